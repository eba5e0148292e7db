//! A PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What is read and written are LoRA adapters on linear layers, with or without DoRA magnitudes, with
//! any initialization (`init_lora_weights`), rank-stabilized or not, with rank and alpha patterns. For a
//! module `P` of `out` rows and `in` columns, `h(P)` being `base_model.model.P`:
//!
//! ```text
//! h(P).lora_A.weight           [r, in]
//! h(P).lora_B.weight           [out, r]
//! h(P).lora_magnitude_vector   [out]      DoRA
//! ```
//!
//! Everything else that PEFT can put into a folder is refused by name. Source: PEFT 0.21.

use std::collections::{BTreeMap, BTreeSet};

pub(crate) mod check;
pub mod config;
pub mod names;
mod read;
mod write;

pub use config::{InitLoraWeights, PeftConfig, TargetModules};
pub use names::Part;

/// The file of the configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of the tensors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// A tensor in the host's memory, row-major, slowest dimension first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostTensor {
    /// Its size.
    pub shape: Vec<usize>,
    /// Its elements; as many as the product of `shape`.
    pub data: Vec<f32>,
}

/// An adapter: its configuration and its tensors under PEFT's keys.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftAdapter {
    /// `adapter_config.json`.
    pub config: PeftConfig,
    /// `adapter_model.safetensors`, as f32.
    pub tensors: BTreeMap<String, HostTensor>,
}

impl PeftAdapter {
    /// The tensor of a module, if the adapter has it.
    pub fn get(&self, module: &str, part: Part) -> Option<&HostTensor> {
        self.tensors.get(&names::tensor_key(module, part))
    }

    /// Sets the tensor of a module.
    pub fn insert(&mut self, module: &str, part: Part, tensor: HostTensor) {
        self.tensors.insert(names::tensor_key(module, part), tensor);
    }

    /// The modules that are adapted, sorted.
    pub fn modules(&self) -> BTreeSet<&str> {
        self.tensors.keys().filter_map(|key| names::parse_key(key)).map(|(module, _)| module).collect()
    }
}
