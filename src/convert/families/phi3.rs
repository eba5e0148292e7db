//! Phi-3 and Phi-4 mini: Q, K and V are one tensor, and so are gate and up, in both formats.

use super::rope::RopeRules;
use super::{Absent, Class, Dim, Family, Fixed, Key, Tensor, no_check, no_extra};

/// The row of the registry.
pub const FAMILY: Family = Family {
    arch: "phi3",
    classes: &[Class { architecture: "Phi3ForCausalLM", model_type: "phi3" }],
    prefix: "model.",
    tensors: &[
        Tensor::new("lm_head.weight", "output.weight", &[Dim::Vocab, Dim::Hidden]).optional(),
        Tensor::new("embed_tokens.weight", "token_embd.weight", &[Dim::Vocab, Dim::Hidden]),
        Tensor::new("norm.weight", "output_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", &[Dim::Hidden]),
        Tensor::new(
            "layers.{}.self_attn.qkv_proj.weight",
            "blk.{}.attn_qkv.weight",
            &[Dim::Qkv, Dim::Hidden],
        ),
        Tensor::new("layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", &[Dim::Hidden, Dim::Q]),
        Tensor::new("layers.{}.mlp.gate_up_proj.weight", "blk.{}.ffn_up.weight", &[Dim::GateUp, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Dim::Hidden, Dim::Ffn]),
    ],
    keys: &[
        Key::Size("context_length", &["max_position_embeddings"], Absent::Is(4096.0)),
        Key::Size(
            "rope.scaling.original_context_length",
            &["original_max_position_embeddings"],
            Absent::Is(4096.0),
        ),
        Key::Size("embedding_length", &["hidden_size"], Absent::Refused),
        Key::Size("feed_forward_length", &["intermediate_size"], Absent::Refused),
        Key::Size("block_count", &["num_hidden_layers"], Absent::Refused),
        Key::Size("attention.head_count", &["num_attention_heads"], Absent::Refused),
        Key::Size("attention.head_count_kv", &["num_key_value_heads"], Absent::Like("attention.head_count")),
        Key::Float("attention.layer_norm_rms_epsilon", "rms_norm_eps", Absent::Is(1e-5)),
        Key::RopeDims,
        Key::Rope,
        Key::FileType,
        Key::Size("attention.sliding_window", &["sliding_window"], Absent::Zero),
    ],
    fixed: &[Fixed::Text("hidden_act", &["silu", "swish"])],
    flags: &[("tie_word_embeddings", "output.weight", false)],
    tied: false,
    rope: Some(RopeRules {
        theta: 10_000.0,
        local_theta: None,
        theta_implied: false,
        scalings: &["longrope"],
    }),
    space_prefix: None,
    check: no_check,
    extra: no_extra,
};
