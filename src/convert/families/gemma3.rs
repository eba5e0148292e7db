//! Gemma 3 (text): norms on the heads of Q and K too, five layers with a window and a rotary base of their
//! own to one without.
//!
//! Of the multimodal models the text part is converted.

use super::gemma2::{attention_scale, layer_types, write};
use super::rope::RopeRules;
use super::{Absent, Change, Class, Dim, Dims, Family, Fixed, Key, Tensor};

/// The row of the registry.
pub const FAMILY: Family = Family {
    arch: "gemma3",
    classes: &[
        Class { architecture: "Gemma3ForCausalLM", model_type: "gemma3_text" },
        Class { architecture: "Gemma3ForConditionalGeneration", model_type: "gemma3" },
    ],
    prefix: "model.",
    tensors: &[
        Tensor::new("lm_head.weight", "output.weight", &[Dim::Vocab, Dim::Hidden]).optional(),
        Tensor::new("embed_tokens.weight", "token_embd.weight", &[Dim::Vocab, Dim::Hidden]),
        Tensor::new("norm.weight", "output_norm.weight", &[Dim::Hidden]).change(Change::PlusOne),
        Tensor::new("layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", &[Dim::Hidden])
            .change(Change::PlusOne),
        Tensor::new(
            "layers.{}.post_attention_layernorm.weight",
            "blk.{}.post_attention_norm.weight",
            &[Dim::Hidden],
        )
        .change(Change::PlusOne),
        Tensor::new("layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight", &[Dim::Hidden])
            .change(Change::PlusOne),
        Tensor::new(
            "layers.{}.post_feedforward_layernorm.weight",
            "blk.{}.post_ffw_norm.weight",
            &[Dim::Hidden],
        )
        .change(Change::PlusOne),
        Tensor::new("layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", &[Dim::Q, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", &[Dim::Kv, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", &[Dim::Kv, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", &[Dim::Hidden, Dim::Q]),
        Tensor::new("layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight", &[Dim::Head])
            .change(Change::PlusOne),
        Tensor::new("layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight", &[Dim::Head])
            .change(Change::PlusOne),
        Tensor::new("layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Dim::Hidden, Dim::Ffn]),
    ],
    keys: &[
        Key::Size("block_count", &["num_hidden_layers"], Absent::Is(26.0)),
        Key::Size("context_length", &["max_position_embeddings"], Absent::Is(131_072.0)),
        Key::Size("embedding_length", &["hidden_size"], Absent::Is(2304.0)),
        Key::Size("feed_forward_length", &["intermediate_size"], Absent::Is(9216.0)),
        Key::Size("attention.head_count", &["num_attention_heads"], Absent::Is(8.0)),
        Key::Size("attention.head_count_kv", &["num_key_value_heads"], Absent::Is(4.0)),
        Key::Rope,
        Key::Float("attention.layer_norm_rms_epsilon", "rms_norm_eps", Absent::Is(1e-6)),
        Key::HeadDim(Absent::Is(256.0)),
        Key::FileType,
        Key::Float("final_logit_softcapping", "final_logit_softcapping", Absent::Left),
        Key::Size("attention.sliding_window", &["sliding_window"], Absent::Is(4096.0)),
    ],
    fixed: &[
        Fixed::Text("hidden_activation", &["gelu_pytorch_tanh"]),
        Fixed::Text("hidden_act", &["gelu_pytorch_tanh"]),
        Fixed::Flag("attention_bias", false),
        Fixed::Flag("use_bidirectional_attention", false),
    ],
    flags: &[("tie_word_embeddings", "output.weight", false)],
    tied: true,
    rope: Some(RopeRules {
        theta: 1_000_000.0,
        local_theta: Some(10_000.0),
        theta_implied: false,
        scalings: &["linear"],
    }),
    space_prefix: Some(false),
    check: |config, dims| {
        if let Some(cap) = config.number("attn_logit_softcapping")? {
            let what = format!("is {cap}; Gemma 3 has none");
            return Err(config.refuse("attn_logit_softcapping", &what));
        }
        attention_scale(config, scale(dims))?;
        layer_types(config, dims, PATTERN)
    },
    extra: |dims, out| write(dims, scale(dims), PATTERN, out),
};

/// Every sixth layer attends to everything.
const PATTERN: u32 = 6;

/// As in Gemma 2; the model of 27 billion parameters has 62 layers.
fn scale(dims: &Dims) -> u64 {
    if dims.layers == 62 { dims.hidden / dims.heads } else { dims.head_dim }
}
