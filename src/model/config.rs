//! The hyper-parameters of a llama decoder, from GGUF metadata or from a `config.json`.

use qpeft_formats::gguf::{GgufFile, Metadata};
use qpeft_kernels::ops::rope::RopeScaling;
use serde_json::Value;

use crate::error::{Error, Result};

/// Shapes and constants of the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding table (V).
    pub vocab_size: usize,
    /// Channels of the residual stream (C).
    pub hidden_size: usize,
    /// Channels inside the feed-forward (F).
    pub intermediate_size: usize,
    /// Layers (L).
    pub n_layers: usize,
    /// Query heads (H).
    pub n_heads: usize,
    /// Key/value heads (G); divides H.
    pub n_kv_heads: usize,
    /// Channels of one head (D).
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Positions that the model was made for.
    pub max_positions: usize,
}

/// Positions beyond this are refused: the rotary table is allocated up front.
const MAX_POSITIONS: usize = 1 << 20;

impl Config {
    /// Reads the `llama.*` keys of a GGUF file.
    ///
    /// # Errors
    /// Another architecture, a missing key, or shapes that do not belong together.
    pub fn from_gguf(file: &GgufFile) -> Result<Config> {
        let meta = file.metadata();
        let architecture = meta.require_str("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::refused(format!(
                "`{}`: architecture `{architecture}` is not supported by this version; supported: `llama`",
                file.path().display()
            )));
        }
        let size = |key: &str| -> Result<usize> { Ok(meta.require_u32(&format!("llama.{key}"))? as usize) };
        let optional = |key: &str| -> Result<Option<usize>> {
            Ok(meta.u32(&format!("llama.{key}"))?.map(|n| n as usize))
        };
        if optional("expert_count")?.is_some_and(|n| n > 0) {
            return Err(Error::refused(format!(
                "`{}`: mixtures of experts are not supported",
                file.path().display()
            )));
        }
        let hidden_size = size("embedding_length")?;
        let n_heads = size("attention.head_count")?;
        let head_dim = match optional("attention.key_length")? {
            Some(length) => length,
            None => hidden_size.checked_div(n_heads).unwrap_or(0),
        };
        let table = file.require("token_embd.weight")?;
        let config = Config {
            vocab_size: table.n_rows(),
            hidden_size,
            intermediate_size: size("feed_forward_length")?,
            n_layers: size("block_count")?,
            n_heads,
            n_kv_heads: optional("attention.head_count_kv")?.unwrap_or(n_heads),
            head_dim,
            rms_norm_eps: meta.require_f32("llama.attention.layer_norm_rms_epsilon")?,
            rope_theta: meta.f32("llama.rope.freq_base")?.unwrap_or(10_000.0),
            rope_scaling: gguf_rope_scaling(file, meta)?,
            max_positions: size("context_length")?,
        };
        if let Some(rotated) = optional("rope.dimension_count")?
            && rotated != config.head_dim
        {
            return Err(Error::refused(format!(
                "`{}`: key `llama.rope.dimension_count`: {rotated} of {} channels rotated; only full rotation is supported",
                file.path().display(),
                config.head_dim
            )));
        }
        config.check(&file.path().display().to_string())
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// Another model type, a missing or ill-typed key, or an option that the decoder does not have.
    pub fn from_hf(json: &Value, place: &str) -> Result<Config> {
        let refuse = |text: String| Error::refused(format!("`{place}`: {text}"));
        let kind = json["model_type"].as_str().unwrap_or("");
        if kind != "llama" {
            return Err(refuse(format!(
                "model_type `{kind}` is not supported by this version; supported: `llama`"
            )));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if json[key].as_bool() == Some(true) {
                return Err(refuse(format!(
                    "`{key}` is true; linears with a bias are not supported by this version"
                )));
            }
        }
        if let Some(act) = json["hidden_act"].as_str()
            && act != "silu"
        {
            return Err(refuse(format!("`hidden_act` is `{act}`; supported: `silu`")));
        }
        let optional = |key: &str| json[key].as_u64().map(|n| n as usize);
        let size =
            |key: &str| optional(key).ok_or_else(|| refuse(format!("`{key}` is missing or not a number")));
        let hidden_size = size("hidden_size")?;
        let n_heads = size("num_attention_heads")?;
        // transformers 5 gathers the rotary settings under `rope_parameters`; before, they lay apart.
        let rope = match (&json["rope_parameters"], &json["rope_scaling"]) {
            (Value::Object(_), _) => &json["rope_parameters"],
            (_, scaling) => scaling,
        };
        let theta = rope["rope_theta"].as_f64().or(json["rope_theta"].as_f64()).unwrap_or(10_000.0);
        let config = Config {
            vocab_size: size("vocab_size")?,
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            n_layers: size("num_hidden_layers")?,
            n_heads,
            n_kv_heads: optional("num_key_value_heads").unwrap_or(n_heads),
            head_dim: optional("head_dim").unwrap_or(hidden_size.checked_div(n_heads).unwrap_or(0)),
            rms_norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6) as f32,
            rope_theta: theta as f32,
            rope_scaling: hf_rope_scaling(rope).map_err(refuse)?,
            max_positions: optional("max_position_embeddings").unwrap_or(2048),
        };
        config.check(place)
    }

    /// Refuses shapes that no decoder has, before anything is allocated from them.
    fn check(self, place: &str) -> Result<Config> {
        let refuse = |text: String| Err(Error::refused(format!("`{place}`: {text}")));
        for (what, value) in [
            ("vocabulary size", self.vocab_size),
            ("hidden size", self.hidden_size),
            ("feed-forward size", self.intermediate_size),
            ("number of layers", self.n_layers),
            ("number of heads", self.n_heads),
            ("number of key/value heads", self.n_kv_heads),
            ("head dimension", self.head_dim),
            ("number of positions", self.max_positions),
        ] {
            if value == 0 {
                return refuse(format!("the {what} is 0"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return refuse(format!(
                "{} heads are not a multiple of {} key/value heads",
                self.n_heads, self.n_kv_heads
            ));
        }
        if self.n_heads.checked_mul(self.head_dim).is_none() {
            return refuse(format!("{} heads of {} channels overflow 64 bits", self.n_heads, self.head_dim));
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse(format!(
                "head dimension {} is odd, so it cannot be rotated in pairs",
                self.head_dim
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return refuse(format!("the RMS norm epsilon is {}", self.rms_norm_eps));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return refuse(format!("the rotary base is {}", self.rope_theta));
        }
        if self.max_positions > MAX_POSITIONS {
            return refuse(format!(
                "{} positions; at most {MAX_POSITIONS} are supported",
                self.max_positions
            ));
        }
        Ok(self)
    }

    /// Refuses a sequence of `length` tokens that the model has no positions for.
    ///
    /// # Errors
    /// [`Error::Refused`] with both numbers.
    pub fn check_length(&self, length: usize) -> Result<()> {
        if length <= self.max_positions {
            return Ok(());
        }
        let message = format!(
            "a sequence of {length} tokens is longer than the model's {} positions",
            self.max_positions
        );
        Err(Error::refused(message).with_hint("lower `--max-seq-length`"))
    }

    /// Refuses tokens that the embedding table has no row for.
    ///
    /// # Errors
    /// [`Error::Refused`] with the largest of them and the size of the vocabulary.
    pub fn check_tokens<'a>(&self, tokens: impl IntoIterator<Item = &'a u32>) -> Result<()> {
        match tokens.into_iter().max() {
            Some(&largest) if largest as usize >= self.vocab_size => {
                let message =
                    format!("token {largest} is beyond the model's vocabulary of {} tokens", self.vocab_size);
                Err(Error::refused(message).with_hint(
                    "give the tokenizer that belongs to the model; without `--tokenizer` its own is taken",
                ))
            }
            _ => Ok(()),
        }
    }

    /// Scale of the attention logits.
    pub fn attention_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

fn gguf_rope_scaling(file: &GgufFile, meta: &Metadata) -> Result<RopeScaling> {
    if let Some(info) = file.tensor("rope_freqs.weight") {
        let bytes = file.bytes(info);
        if info.n_rows() != 1 {
            return Err(Error::refused(format!(
                "`{}`: tensor `rope_freqs.weight`: shape {:?}, expected one row",
                file.path().display(),
                info.shape
            )));
        }
        let mut factors = vec![0.0; info.row_len()];
        qpeft_formats::blocks::dequantize_row(info.dtype, &bytes, &mut factors);
        return Ok(RopeScaling::Factors(factors));
    }
    match meta.str("llama.rope.scaling.type")? {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: meta.require_f32("llama.rope.scaling.factor")? }),
        Some(other) => Err(Error::refused(format!(
            "`{}`: key `llama.rope.scaling.type`: `{other}` is not supported; supported: `none`, `linear`, or a `rope_freqs.weight` tensor",
            file.path().display()
        ))),
    }
}

fn hf_rope_scaling(rope: &Value) -> Result<RopeScaling, String> {
    let number = |key: &str| {
        rope[key]
            .as_f64()
            .map(|x| x as f32)
            .ok_or_else(|| format!("rope setting `{key}` is missing or not a number"))
    };
    match rope["rope_type"].as_str().or(rope["type"].as_str()) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: number("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")? as u32,
        }),
        Some(other) => {
            Err(format!("rope_type `{other}` is not supported; supported: `default`, `linear`, `llama3`"))
        }
    }
}
