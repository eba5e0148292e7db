//! Containers against files of other programs, against independent readers, and against damage.

mod bad_files;
mod bad_parts;
mod bitsandbytes;
mod build;
mod damage;
mod file;
mod gguf;
mod peft;
mod safetensors;

use std::path::PathBuf;

/// A file of the repository's `testdata`.
fn testdata(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../testdata").join(name)
}
