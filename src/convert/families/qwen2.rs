//! Qwen2 and Qwen2.5: biases on Q, K and V.

use super::rope::RopeRules;
use super::{Absent, Class, Dim, Dims, Family, Fixed, Key, Tensor, no_extra};
use crate::convert::settings::Settings;
use crate::error::Result;

/// The row of the registry.
pub const FAMILY: Family = Family {
    arch: "qwen2",
    classes: &[
        Class { architecture: "Qwen2ForCausalLM", model_type: "qwen2" },
        Class { architecture: "Qwen2Model", model_type: "qwen2" },
    ],
    prefix: "model.",
    tensors: &[
        Tensor::new("lm_head.weight", "output.weight", &[Dim::Vocab, Dim::Hidden]).optional(),
        Tensor::new("embed_tokens.weight", "token_embd.weight", &[Dim::Vocab, Dim::Hidden]),
        Tensor::new("norm.weight", "output_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", &[Dim::Q, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", &[Dim::Kv, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", &[Dim::Kv, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", &[Dim::Hidden, Dim::Q]),
        Tensor::new("layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias", &[Dim::Q]),
        Tensor::new("layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias", &[Dim::Kv]),
        Tensor::new("layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias", &[Dim::Kv]),
        Tensor::new("layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Dim::Hidden, Dim::Ffn]),
    ],
    keys: &[
        Key::Size("block_count", &["num_hidden_layers"], Absent::Refused),
        Key::Size("context_length", &["max_position_embeddings"], Absent::Is(32_768.0)),
        Key::Size("embedding_length", &["hidden_size"], Absent::Refused),
        Key::Size("feed_forward_length", &["intermediate_size"], Absent::Refused),
        Key::Size("attention.head_count", &["num_attention_heads"], Absent::Refused),
        Key::Size("attention.head_count_kv", &["num_key_value_heads"], Absent::Is(32.0)),
        Key::Rope,
        Key::Float("attention.layer_norm_rms_epsilon", "rms_norm_eps", Absent::Is(1e-6)),
        Key::FileType,
    ],
    fixed: &[Fixed::Text("hidden_act", &["silu", "swish"])],
    flags: &[("tie_word_embeddings", "output.weight", false)],
    tied: false,
    rope: Some(RopeRules {
        theta: 10_000.0,
        local_theta: None,
        theta_implied: false,
        scalings: &["linear", "yarn"],
    }),
    space_prefix: None,
    check: no_window,
    extra: no_extra,
};

/// Qwen's window is an option that published models have switched off.
pub(super) fn no_window(config: &Settings, dims: &Dims) -> Result<Vec<String>> {
    // Qwen2 has no `head_dim`; a value that disagrees with the heads would be lost.
    if let Some(found) = config.size("head_dim")?
        && u64::from(found) != dims.head_dim
    {
        let what = format!("is {found}, but the hidden size and the number of heads give {}", dims.head_dim);
        return Err(config.refuse("head_dim", &what));
    }
    if config.flag("use_sliding_window")? != Some(true) {
        return Ok(Vec::new());
    }
    Ok(vec![
        "the sliding window is left out: GGUF has none in this architecture, so that every position attends to all earlier ones"
            .to_owned(),
    ])
}
