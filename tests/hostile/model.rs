//! The target of a whole model: configuration, tokenizer and weights of any GGUF file.

use std::path::Path;

use qpeft::model::{Base, Decoder};
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::GgufFile;
use qpeft_kernels::Device;

use super::target::Target;

/// The rotary table is sized by a count that has a cap of its own, see `model::config`.
pub const MODEL: Target = Target { name: "model", run: model, bytes_per_byte: 400, bytes_at_least: 1 << 30 };

/// A GGUF file as a model: its configuration, its tokenizer and all of its weights.
fn model(data: &[u8]) {
    let file = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(data.to_vec()));
    let Ok(file) = file else { return };
    let base = Base::Gguf(file);
    let _ = (base.main_type(), base.tokenizer().map(drop));
    match Decoder::load(&base, &Device::Cpu) {
        Ok(decoder) => assert!(decoder.config.n_layers == decoder.layers.len()),
        Err(error) => drop((error.to_string(), error.hint())),
    }
}
