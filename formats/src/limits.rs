//! Every cap on what a file may declare, each with its reason.
//!
//! A count is compared with its cap and with the bytes that are left before anything is allocated
//! for it. The caps lie far above every published checkpoint; they stop a damaged or hostile file.

/// Tensors in one file: the largest published mixture-of-experts checkpoints have some ten thousand.
pub const MAX_TENSORS: u64 = 1 << 20;

/// Metadata keys in one GGUF file: real ones have a few dozen.
pub const MAX_METADATA_KEYS: u64 = 1 << 16;

/// Bytes of one metadata string or array: the largest real ones are vocabularies of some 10 MiB;
/// llama.cpp allows a string of 1 GiB.
pub const MAX_METADATA_BYTES: u64 = 1 << 30;

/// Bytes of all metadata of one GGUF file together; in memory they take a few times as many.
pub const MAX_METADATA_SECTION: u64 = 2 << 30;

/// Bytes of a tensor name: ggml stores it in 64 bytes with a closing zero.
pub const MAX_TENSOR_NAME: u64 = 63;

/// Dimensions of a GGUF tensor: ggml's tensors have four.
pub const MAX_DIMS: u64 = 4;

/// `general.alignment`: a huge page; more would only waste the space between tensors.
pub const MAX_ALIGNMENT: u64 = 2 << 20;

/// Elements reserved in advance for a list of strings: its memory is a multiple of its bytes in the
/// file, so it grows as strings are really found.
pub const MAX_RESERVED_STRINGS: usize = 1 << 16;

/// Bytes of a safetensors header: the same cap as the reference implementation.
pub const MAX_SAFETENSORS_HEADER: u64 = 100_000_000;

/// Bytes of a JSON file (`config.json`, `adapter_config.json`, a shard index): the largest real ones,
/// indices of mixture-of-experts checkpoints, have some 10 MiB.
pub const MAX_JSON_BYTES: u64 = 256 << 20;

/// Bytes of the JSON beside a bitsandbytes weight: real ones have some 170.
pub const MAX_QUANT_STATE: u64 = 4096;
