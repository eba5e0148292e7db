//! From what was trained to what is served: merged models and other kinds of adapters.

pub mod bitsandbytes;
pub mod merge;
pub mod merge_folder;
pub mod pissa_to_lora;
pub mod source;
