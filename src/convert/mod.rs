//! From what was trained to what is served: merged models, other kinds of adapters, other formats.

mod card;
pub mod families;
pub mod gguf_to_hf;
pub mod hf;
pub mod hf_to_gguf;
pub mod merge;
mod model_name;
pub mod pissa_to_lora;
pub mod settings;
pub mod source;
pub mod vocab;
