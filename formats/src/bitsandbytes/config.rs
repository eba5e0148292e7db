//! `quantization_config` of a `config.json`: what a checkpoint says about its own weights.

use serde_json::{Value, json};

use super::QuantType;
use crate::error::{Error, Kind, Place, Result};

/// The quantization of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quantization {
    /// Every weight as it is.
    None,
    /// bitsandbytes, 4 bits.
    FourBit {
        /// The code book.
        quant_type: QuantType,
        /// Whether the scales are quantized too.
        double: bool,
    },
    /// bitsandbytes, LLM.int8.
    Int8,
    /// Elements of 8 bits with scales in `weight_scale` or `weight_scale_inv`.
    Fp8 {
        /// Rows and columns that share a scale, where the scales are those of blocks.
        block: Option<[usize; 2]>,
    },
}

/// What is understood, for messages.
const SUPPORTED: &str = "bitsandbytes (4bit, 8bit), fp8, compressed-tensors with format float-quantized";

impl Quantization {
    /// Reads the `quantization_config` of a `config.json`.
    ///
    /// # Errors
    /// Another method, which is named, or settings that make no sense.
    pub fn from_config(config: &Value) -> Result<Quantization> {
        let settings = &config["quantization_config"];
        let wrong = |key: &str, expected: &'static str| {
            let found = format!("`{}`", settings[key]).into();
            Error::new(Kind::WrongSetting { expected, found })
                .at(Place::Key(format!("quantization_config.{key}")))
        };
        let unsupported = |found: String| {
            Error::new(Kind::UnsupportedQuantization { found: found.into(), supported: SUPPORTED })
                .at(Place::Key("quantization_config".to_owned()))
        };
        if settings.is_null() {
            return Ok(Quantization::None);
        }
        let flag = |key: &str| settings[key].as_bool().unwrap_or(false);
        let is_four_bit = flag("load_in_4bit") || flag("_load_in_4bit");
        let is_int8 = flag("load_in_8bit") || flag("_load_in_8bit");
        // Early bitsandbytes configurations have no `quant_method`.
        let method = match &settings["quant_method"] {
            Value::String(method) => method.as_str(),
            Value::Null if is_four_bit || is_int8 => "bitsandbytes",
            _ => return Err(wrong("quant_method", "name")),
        };
        match method {
            "bitsandbytes" if is_four_bit => {
                let quant_type = match &settings["bnb_4bit_quant_type"] {
                    Value::Null => Some(QuantType::Fp4),
                    name => name.as_str().and_then(QuantType::from_name),
                };
                let quant_type =
                    quant_type.ok_or_else(|| wrong("bnb_4bit_quant_type", "4-bit type, nf4 or fp4"))?;
                Ok(Quantization::FourBit { quant_type, double: flag("bnb_4bit_use_double_quant") })
            }
            "bitsandbytes" if is_int8 => Ok(Quantization::Int8),
            "fp8" => {
                let block = match &settings["weight_block_size"] {
                    Value::Null => None,
                    size => {
                        let sizes = size.as_array().map(|list| {
                            list.iter().filter_map(Value::as_u64).map(|n| n as usize).collect::<Vec<_>>()
                        });
                        match sizes.as_deref() {
                            Some(&[rows, cols]) if rows > 0 && cols > 0 => Some([rows, cols]),
                            _ => return Err(wrong("weight_block_size", "pair of sizes")),
                        }
                    }
                };
                Ok(Quantization::Fp8 { block })
            }
            "compressed-tensors" if settings["format"] == "float-quantized" => {
                Ok(Quantization::Fp8 { block: None })
            }
            "compressed-tensors" => {
                Err(unsupported(format!("compressed-tensors with format {}", settings["format"])))
            }
            other => Err(unsupported(other.to_owned())),
        }
    }
}

/// The `quantization_config` that transformers writes for a bitsandbytes checkpoint; `None` for the others.
///
/// `compute`: torch's name of the type in which products are computed. `skipped`: modules that stay as
/// they are, where these are not the defaults (the output head).
pub fn bitsandbytes(quantization: &Quantization, compute: &str, skipped: Option<&[String]>) -> Option<Value> {
    let (is_four_bit, quant_type, double) = match *quantization {
        Quantization::FourBit { quant_type, double } => (true, quant_type, double),
        // What transformers writes in these keys for 8 bits are their defaults.
        Quantization::Int8 => (false, QuantType::Fp4, false),
        Quantization::None | Quantization::Fp8 { .. } => return None,
    };
    Some(json!({
        "_load_in_4bit": is_four_bit,
        "_load_in_8bit": !is_four_bit,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type.name(),
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": is_four_bit,
        "load_in_8bit": !is_four_bit,
        "quant_method": "bitsandbytes",
    }))
}
