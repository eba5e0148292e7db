//! From what was trained to what is served: merged models, other kinds of adapters, other formats.

pub mod adapted;
pub mod bitsandbytes;
mod card;
pub mod families;
pub mod gguf;
pub mod gguf_to_hf;
pub mod hf;
pub mod hf_to_gguf;
pub mod merge;
pub mod merge_folder;
pub mod merge_source;
mod model_name;
pub mod pipeline;
pub mod pissa_to_lora;
pub mod quantize;
pub mod settings;
pub mod source;
pub mod vocab;
