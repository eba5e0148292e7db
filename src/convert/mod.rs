//! From what was trained to what is served: merged models and other kinds of adapters.

pub mod gguf;
pub mod merge;
pub mod pipeline;
pub mod pissa_to_lora;
pub mod quantize;
pub mod source;
