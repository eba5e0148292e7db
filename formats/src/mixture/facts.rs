//! What the rules want to know of a model: five facts of its metadata.

use crate::error::Result;
use crate::gguf::Metadata;

/// Facts of a model that decide which tensors get more bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    /// `general.architecture`.
    pub arch: String,
    /// Layers, with those that predict further tokens.
    pub layers: usize,
    /// Q heads per KV head in the first layer; 0 without KV heads.
    pub gqa: usize,
    /// Experts of a layer; 0 or 1 for a dense model.
    pub experts: usize,
    /// A model of the 70B class, whose value projections many heads share.
    pub is_70b: bool,
}

impl ModelFacts {
    /// Facts from their numbers; `heads` and `kv_heads` are those of the first layer.
    pub fn new(arch: &str, layers: usize, heads: usize, kv_heads: usize, experts: usize) -> ModelFacts {
        let is_70b = match arch {
            "llama" => layers == 80 && heads != kv_heads,
            "deci" | "olmo" | "qwen2" => layers == 80,
            "jais2" => layers == 68,
            _ => false,
        };
        let gqa = heads.checked_div(kv_heads).unwrap_or(0);
        ModelFacts { arch: arch.to_owned(), layers, gqa, experts, is_70b }
    }

    /// Reads the facts from the metadata of a GGUF file.
    ///
    /// # Errors
    /// `general.architecture` or the number of layers is missing, or a value has another type.
    pub fn read(metadata: &Metadata) -> Result<ModelFacts> {
        let arch = metadata.require_str("general.architecture")?;
        let first = |key: &str| metadata.first_u32(&format!("{arch}.{key}"));
        // A vision tower has no key of this name and no rule that asks for layers.
        let layers = match arch {
            "clip" => 0,
            _ => metadata.require_u32(&format!("{arch}.block_count"))?,
        };
        let heads = first("attention.head_count")?.unwrap_or(0);
        let kv_heads = first("attention.head_count_kv")?.unwrap_or(heads);
        let experts = first("expert_count")?.unwrap_or(0);
        Ok(ModelFacts::new(arch, layers as usize, heads as usize, kv_heads as usize, experts as usize))
    }
}
