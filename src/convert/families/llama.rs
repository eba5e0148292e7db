//! Llama, Mistral and what shares their architecture (SmolLM2, TinyLlama): rows of Q and K are permuted.
//!
//! A GGUF file has no sliding window in this architecture, as llama.cpp's converter leaves it out too: a
//! Mistral with a window attends to everything there.

use super::rope::RopeRules;
use super::{Absent, Change, Class, Dim, Dims, Family, Fixed, Key, Tensor, no_extra};
use crate::convert::settings::Settings;
use crate::error::Result;

/// The row of the registry.
pub const FAMILY: Family = Family {
    arch: "llama",
    classes: &[
        Class { architecture: "LlamaForCausalLM", model_type: "llama" },
        Class { architecture: "MistralForCausalLM", model_type: "mistral" },
        Class { architecture: "LlamaModel", model_type: "llama" },
    ],
    prefix: "model.",
    tensors: &[
        Tensor::new("lm_head.weight", "output.weight", &[Dim::Vocab, Dim::Hidden]).optional(),
        Tensor::new("embed_tokens.weight", "token_embd.weight", &[Dim::Vocab, Dim::Hidden]),
        Tensor::new("norm.weight", "output_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", &[Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", &[Dim::Q, Dim::Hidden])
            .change(Change::PermuteQ),
        Tensor::new("layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", &[Dim::Kv, Dim::Hidden])
            .change(Change::PermuteK),
        Tensor::new("layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", &[Dim::Kv, Dim::Hidden]),
        Tensor::new("layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", &[Dim::Hidden, Dim::Q]),
        Tensor::new("layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias", &[Dim::Q])
            .change(Change::PermuteQ)
            .optional(),
        Tensor::new("layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias", &[Dim::Kv])
            .change(Change::PermuteK)
            .optional(),
        Tensor::new("layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias", &[Dim::Kv]).optional(),
        Tensor::new("layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias", &[Dim::Hidden]).optional(),
        Tensor::new("layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Dim::Hidden, Dim::Ffn]),
        Tensor::new("layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias", &[Dim::Ffn]).optional(),
        Tensor::new("layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias", &[Dim::Ffn]).optional(),
        Tensor::new("layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias", &[Dim::Hidden]).optional(),
    ],
    keys: &[
        Key::Size("block_count", &["num_hidden_layers"], Absent::Refused),
        Key::Size("context_length", &["max_position_embeddings"], Absent::Is(2048.0)),
        Key::Size("embedding_length", &["hidden_size"], Absent::Refused),
        Key::Size("feed_forward_length", &["intermediate_size"], Absent::Refused),
        Key::Size("attention.head_count", &["num_attention_heads"], Absent::Refused),
        Key::Size("attention.head_count_kv", &["num_key_value_heads"], Absent::Like("attention.head_count")),
        Key::Rope,
        Key::Float("attention.layer_norm_rms_epsilon", "rms_norm_eps", Absent::Is(1e-6)),
        Key::HeadDim(Absent::PerHead),
        Key::FileType,
        Key::VocabSize,
        Key::RopeDims,
    ],
    fixed: &[Fixed::Text("hidden_act", &["silu", "swish"])],
    flags: &[
        ("attention_bias", "blk.0.attn_q.bias", true),
        ("mlp_bias", "blk.0.ffn_gate.bias", true),
        ("tie_word_embeddings", "output.weight", false),
    ],
    tied: false,
    rope: Some(RopeRules {
        theta: 10_000.0,
        local_theta: None,
        theta_implied: false,
        scalings: &["linear", "llama3", "yarn"],
    }),
    space_prefix: None,
    check,
    extra: no_extra,
};

fn check(config: &Settings, dims: &Dims) -> Result<Vec<String>> {
    let window = config.size("sliding_window")?.filter(|&window| u64::from(window) < dims.positions);
    Ok(window
        .map(|window| {
            format!(
                "the sliding window of {window} tokens is left out: GGUF has none in the architecture `llama`, so that every position attends to all earlier ones"
            )
        })
        .into_iter()
        .collect())
}
