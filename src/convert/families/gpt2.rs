//! GPT-2: learned positions, biases everywhere, weights stored as (in, out) in its checkpoints.

use super::{Absent, Change, Class, Dim, Family, Fixed, Key, Tensor, no_check};

/// The row of the registry.
pub const FAMILY: Family = Family {
    arch: "gpt2",
    classes: &[Class { architecture: "GPT2LMHeadModel", model_type: "gpt2" }],
    prefix: "transformer.",
    tensors: &[
        Tensor::new("lm_head.weight", "output.weight", &[Dim::Vocab, Dim::Hidden]).optional(),
        Tensor::new("wte.weight", "token_embd.weight", &[Dim::Vocab, Dim::Hidden]),
        Tensor::new("wpe.weight", "position_embd.weight", &[Dim::Positions, Dim::Hidden]),
        Tensor::new("ln_f.weight", "output_norm.weight", &[Dim::Hidden]),
        Tensor::new("ln_f.bias", "output_norm.bias", &[Dim::Hidden]),
        Tensor::new("h.{}.ln_1.weight", "blk.{}.attn_norm.weight", &[Dim::Hidden]),
        Tensor::new("h.{}.ln_1.bias", "blk.{}.attn_norm.bias", &[Dim::Hidden]),
        Tensor::new("h.{}.ln_2.weight", "blk.{}.ffn_norm.weight", &[Dim::Hidden]),
        Tensor::new("h.{}.ln_2.bias", "blk.{}.ffn_norm.bias", &[Dim::Hidden]),
        Tensor::new("h.{}.attn.c_attn.weight", "blk.{}.attn_qkv.weight", &[Dim::Hidden, Dim::Qkv])
            .change(Change::Transpose),
        Tensor::new("h.{}.attn.c_attn.bias", "blk.{}.attn_qkv.bias", &[Dim::Qkv]),
        Tensor::new("h.{}.attn.c_proj.weight", "blk.{}.attn_output.weight", &[Dim::Hidden, Dim::Hidden])
            .change(Change::Transpose),
        Tensor::new("h.{}.attn.c_proj.bias", "blk.{}.attn_output.bias", &[Dim::Hidden]),
        Tensor::new("h.{}.mlp.c_fc.weight", "blk.{}.ffn_up.weight", &[Dim::Hidden, Dim::Ffn])
            .change(Change::Transpose),
        Tensor::new("h.{}.mlp.c_fc.bias", "blk.{}.ffn_up.bias", &[Dim::Ffn]),
        Tensor::new("h.{}.mlp.c_proj.weight", "blk.{}.ffn_down.weight", &[Dim::Ffn, Dim::Hidden])
            .change(Change::Transpose),
        Tensor::new("h.{}.mlp.c_proj.bias", "blk.{}.ffn_down.bias", &[Dim::Hidden]),
    ],
    keys: &[
        Key::Size("block_count", &["n_layer"], Absent::Refused),
        Key::Size("context_length", &["n_positions", "n_ctx"], Absent::Refused),
        Key::Size("embedding_length", &["n_embd"], Absent::Refused),
        Key::Size("feed_forward_length", &["n_inner"], Absent::FourHidden),
        Key::Size("attention.head_count", &["n_head"], Absent::Refused),
        Key::Float("attention.layer_norm_epsilon", "layer_norm_epsilon", Absent::Is(1e-5)),
        Key::FileType,
    ],
    fixed: &[
        Fixed::Text("activation_function", &["gelu_new", "gelu_pytorch_tanh", "gelu_fast"]),
        Fixed::Flag("scale_attn_weights", true),
        Fixed::Flag("scale_attn_by_inverse_layer_idx", false),
        Fixed::Flag("add_cross_attention", false),
    ],
    flags: &[("tie_word_embeddings", "output.weight", false)],
    tied: true,
    rope: None,
    space_prefix: None,
    check: no_check,
    extra: |_, out| {
        out.insert("reorder_and_upcast_attn".to_owned(), false.into());
    },
};
