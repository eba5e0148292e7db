//! Gemma 2: norms stored with 1 added, four of them per layer, capped logits, a window in every second layer.

use serde_json::{Map, Value};

use super::rope::RopeRules;
use super::{Absent, Change, Class, Dim, Dims, Family, Fixed, Key, Tensor};
use crate::convert::settings::Settings;
use crate::error::Result;

/// The row of the registry.
pub const FAMILY: Family = Family {
    arch: "gemma2",
    classes: &[Class { architecture: "Gemma2ForCausalLM", model_type: "gemma2" }],
    prefix: "model.",
    tensors: &[
        Tensor::new("lm_head.weight", "output.weight", &[Dim::Vocab, Dim::Hidden])
            .change(Change::Drop)
            .optional(),
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
        Tensor::new("layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", &[Dim::Ffn, Dim::Hidden]),
        Tensor::new("layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", &[Dim::Hidden, Dim::Ffn]),
    ],
    keys: &[
        Key::Size("context_length", &["max_position_embeddings"], Absent::Is(8192.0)),
        Key::Size("embedding_length", &["hidden_size"], Absent::Refused),
        Key::Size("block_count", &["num_hidden_layers"], Absent::Refused),
        Key::Size("feed_forward_length", &["intermediate_size"], Absent::Refused),
        Key::Size("attention.head_count", &["num_attention_heads"], Absent::Refused),
        Key::Size("attention.head_count_kv", &["num_key_value_heads"], Absent::Is(4.0)),
        Key::Float("attention.layer_norm_rms_epsilon", "rms_norm_eps", Absent::Is(1e-6)),
        Key::HeadDim(Absent::Is(256.0)),
        Key::FileType,
        Key::Float("attn_logit_softcapping", "attn_logit_softcapping", Absent::Is(50.0)),
        Key::Float("final_logit_softcapping", "final_logit_softcapping", Absent::Is(30.0)),
        Key::Size("attention.sliding_window", &["sliding_window"], Absent::Is(4096.0)),
        Key::Rope,
    ],
    fixed: &[
        Fixed::Text("hidden_activation", &["gelu_pytorch_tanh"]),
        Fixed::Text("hidden_act", &["gelu_pytorch_tanh"]),
        Fixed::Flag("attention_bias", false),
        Fixed::Flag("tie_word_embeddings", true),
    ],
    flags: &[],
    tied: true,
    rope: Some(RopeRules { theta: 10_000.0, local_theta: None, theta_implied: true, scalings: &[] }),
    space_prefix: Some(false),
    check: |config, dims| {
        attention_scale(config, scale(dims))?;
        layer_types(config, dims, PATTERN)
    },
    extra: |dims, out| write(dims, scale(dims), PATTERN, out),
};

/// Every second layer attends to everything.
const PATTERN: u32 = 2;

/// Queries are scaled by 1/sqrt of this. llama.cpp takes the head dimension, except in the model of 27
/// billion parameters, which it knows by its number of layers.
fn scale(dims: &Dims) -> u64 {
    if dims.layers == 46 { dims.hidden / dims.heads } else { dims.head_dim }
}

/// Refuses another scale than the one that llama.cpp uses: a GGUF has no key for it.
pub(super) fn attention_scale(config: &Settings, scale: u64) -> Result<()> {
    let key = "query_pre_attn_scalar";
    let found = config.number(key)?.unwrap_or(256.0);
    if found == scale as f64 {
        return Ok(());
    }
    let what =
        format!("is {found}, but a model of this size has {scale} in a GGUF, which cannot say otherwise");
    Err(config.refuse(key, &what))
}

/// Refuses another sequence of layers with and without window than the one that llama.cpp uses.
pub(super) fn layer_types(config: &Settings, dims: &Dims, pattern: u32) -> Result<Vec<String>> {
    for key in ["sliding_window_pattern", "_sliding_window_pattern"] {
        if let Some(found) = config.size(key)?
            && found != pattern
        {
            return Err(config.refuse(key, &format!("is {found}; supported: {pattern}")));
        }
    }
    if let Some(found) = config.get("layer_types") {
        let list = found.as_array().ok_or_else(|| config.wrong("layer_types", "list of strings", found))?;
        let layers = u64::from(dims.layers);
        if list.len() as u64 != layers {
            let what = format!("has {} entries, expected one for each of {layers} layers", list.len());
            return Err(config.refuse("layer_types", &what));
        }
        for (layer, found) in list.iter().enumerate() {
            let expected = layer_type(layer as u32, pattern);
            if found != expected {
                let what = format!(
                    "layer {layer} has `{found}`, in a GGUF of this architecture it has `{expected}`"
                );
                return Err(config.refuse("layer_types", &what));
            }
        }
    }
    Ok(Vec::new())
}

fn layer_type(layer: u32, pattern: u32) -> &'static str {
    if (layer + 1).is_multiple_of(pattern) { "full_attention" } else { "sliding_attention" }
}

/// The settings that the architecture implies. The number of layers was compared with the tensors.
pub(super) fn write(dims: &Dims, scale: u64, pattern: u32, out: &mut Map<String, Value>) {
    out.remove("hidden_act");
    out.insert("query_pre_attn_scalar".to_owned(), Value::from(scale));
    let types: Vec<&str> = (0..dims.layers).map(|layer| layer_type(layer, pattern)).collect();
    out.insert("layer_types".to_owned(), Value::from(types));
}
