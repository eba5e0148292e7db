//! The targets of this crate: containers, adapter folders, block codecs, and round trips.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::blocks::{check_finite, dequantize_row, quantize_row};
use qpeft_formats::dtype::Quantizer;
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{GgufFile, GgufWriter, TensorDecl};
use qpeft_formats::peft::{PeftAdapter, PeftConfig};
use qpeft_formats::safetensors::{Checkpoint, SafetensorsFile, write_safetensors};

use super::quantized::{bitsandbytes, imatrix, mixture, split};
use super::target::{Target, scratch, unpack};

/// JSON values cost some 70 bytes in memory for `0,` in the file, twice that while a list grows.
const JSON: usize = 192;

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target { name: "gguf", run: gguf, bytes_per_byte: 48, bytes_at_least: 64 << 10 },
    Target { name: "gguf_rewrite", run: gguf_rewrite, bytes_per_byte: 128, bytes_at_least: 8 << 20 },
    Target { name: "safetensors", run: safetensors, bytes_per_byte: JSON, bytes_at_least: 64 << 10 },
    Target {
        name: "safetensors_rewrite",
        run: safetensors_rewrite,
        bytes_per_byte: JSON,
        bytes_at_least: 256 << 10,
    },
    Target { name: "checkpoint", run: checkpoint, bytes_per_byte: JSON, bytes_at_least: 2 << 20 },
    // A pattern of a few bytes may compile to a machine of 2 x 1 MiB, see `peft::config`.
    Target { name: "peft", run: peft, bytes_per_byte: JSON, bytes_at_least: 64 << 20 },
    Target { name: "peft_config", run: peft_config, bytes_per_byte: JSON, bytes_at_least: 64 << 20 },
    // A fingerprint reads through a buffer of 1 MiB.
    Target { name: "split", run: split, bytes_per_byte: 48, bytes_at_least: 2 << 20 },
    Target { name: "imatrix", run: imatrix, bytes_per_byte: 48, bytes_at_least: 64 << 10 },
    Target { name: "bitsandbytes", run: bitsandbytes, bytes_per_byte: JSON, bytes_at_least: 256 << 10 },
    Target { name: "mixture", run: mixture, bytes_per_byte: 64, bytes_at_least: 256 << 10 },
    Target { name: "blocks", run: blocks, bytes_per_byte: 160, bytes_at_least: 256 << 10 },
    // The code books of the IQ types are searched through tables of some MiB, made once.
    Target { name: "quantize", run: quantize, bytes_per_byte: 16, bytes_at_least: 8 << 20 },
];

fn bytes(data: &[u8]) -> Bytes {
    Bytes::from(data.to_vec())
}

/// The message of an error: it must be printable, and a hint must not panic either.
pub fn message(error: &qpeft_formats::Error) {
    let _ = (error.to_string(), error.hint());
    assert!(error.path.is_some(), "{error}: names no file");
}

/// A GGUF file: all that an open file offers can be asked for.
fn gguf(data: &[u8]) {
    match GgufFile::from_bytes(Path::new("a.gguf"), bytes(data)) {
        Ok(file) => touch(&file),
        Err(error) => message(&error),
    }
}

fn touch(file: &GgufFile) {
    for tensor in file.tensors() {
        assert_eq!(file.bytes(tensor).len() as u64, tensor.size);
        assert_eq!(file.tensor(&tensor.name), Some(tensor));
        // Loops run over these two, so their product must be what the size was made of.
        let elements = tensor.row_len().checked_mul(tensor.n_rows()).expect("checked when read");
        let blocks = elements / tensor.dtype.block_len();
        assert_eq!(blocks * tensor.dtype.block_bytes(), tensor.size as usize);
    }
    let metadata = file.metadata();
    for (key, value) in metadata.iter() {
        let _ = value.type_name();
        // Each getter gives the value or an error; one of any type may be asked for any key.
        let _ = (metadata.u32(key), metadata.u64(key), metadata.f32(key), metadata.bool(key));
        let _ = (metadata.str(key), metadata.strings(key).map(drop), metadata.f32s(key).map(drop));
        let _ = (metadata.i32s(key).map(drop), metadata.u32s(key).map(drop));
    }
}

/// What reads is written again, reads equal, and is then written with the same bytes.
fn gguf_rewrite(data: &[u8]) {
    let Ok(first) = GgufFile::from_bytes(Path::new("a.gguf"), bytes(data)) else { return };
    let dir = scratch();
    let again = rewritten(&first, &dir.path().join("again.gguf"));
    let second =
        GgufFile::from_bytes(Path::new("again.gguf"), bytes(&again)).expect("what was written reads");
    assert_eq!(first.tensors(), second.tensors());
    assert_eq!(first.alignment(), second.alignment());
    for tensor in first.tensors() {
        assert!(*first.bytes(tensor) == *second.bytes(tensor), "tensor `{}`", tensor.name);
    }
    // Not `==`: a NaN is a value like any other here.
    let text = |file: &GgufFile| format!("{:?}", file.metadata().iter().collect::<Vec<_>>());
    assert_eq!(text(&first), text(&second));
    assert!(rewritten(&second, &dir.path().join("third.gguf")) == again, "the same content, the same bytes");
}

fn rewritten(file: &GgufFile, path: &Path) -> Vec<u8> {
    let decls: Vec<_> = file
        .tensors()
        .iter()
        .map(|t| TensorDecl { name: t.name.clone(), shape: t.shape.clone(), dtype: t.dtype })
        .collect();
    let mut writer = GgufWriter::create(path, file.metadata(), &decls).expect("what reads can be written");
    for tensor in file.tensors() {
        writer.write(&tensor.name, &file.bytes(tensor)).expect("in order and complete");
    }
    writer.finish().expect("complete");
    fs::read(path).expect("finished files exist")
}

/// A safetensors file; what passes here passes the reference implementation, with the same content.
fn safetensors(data: &[u8]) {
    let file = match SafetensorsFile::from_bytes(Path::new("a.safetensors"), bytes(data)) {
        Ok(file) => file,
        Err(error) => return message(&error),
    };
    let reference = ::safetensors::SafeTensors::deserialize(data).expect("we are stricter than they are");
    assert_eq!(file.names().len(), reference.len());
    for name in file.names() {
        let view = file.require(name).expect("it is in the list");
        let theirs = reference.tensor(name).expect("they found as many");
        assert_eq!((view.dtype, &view.shape[..]), (theirs.dtype(), theirs.shape()));
        assert!(*view.bytes == *theirs.data(), "tensor `{name}`");
        let elements: usize = view.shape.iter().product();
        if let Ok(values) = view.to_f32() {
            assert_eq!(values.len(), elements);
        }
        // Every tensor may claim to be the scale of an 8-bit one.
        for other in file.names().take(if view.is_fp8() { 4 } else { 0 }) {
            let scale = file.require(other).expect("it is in the list");
            for block in [None, Some([1, 2]), Some([3, 128]), Some([usize::MAX, 1])] {
                match view.to_f32_scaled(&scale, block) {
                    Ok(values) => assert_eq!(values.len(), elements),
                    Err(error) => drop((error.to_string(), error.hint())),
                }
            }
        }
    }
}

/// What reads is written again and reads equal.
fn safetensors_rewrite(data: &[u8]) {
    let Ok(first) = SafetensorsFile::from_bytes(Path::new("a.safetensors"), bytes(data)) else { return };
    let dir = scratch();
    let path = dir.path().join("again.safetensors");
    write_again(&first, &path);
    let second = SafetensorsFile::open(&path).expect("what was written reads");
    assert!(first.names().eq(second.names()));
    assert_eq!(first.metadata(), second.metadata());
    for name in first.names() {
        let (a, b) = (first.require(name).expect("listed"), second.require(name).expect("listed"));
        assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape));
        assert!(*a.bytes == *b.bytes, "tensor `{name}`");
    }
    let third = dir.path().join("third.safetensors");
    write_again(&second, &third);
    assert!(fs::read(&path).unwrap() == fs::read(&third).unwrap(), "the same content, the same bytes");
}

fn write_again(file: &SafetensorsFile, path: &Path) {
    let views: Vec<_> = file.names().map(|name| file.require(name).expect("listed")).collect();
    let refs: Vec<_> = views.iter().map(|v| (&*v.name, v.dtype, &v.shape[..], &*v.bytes)).collect();
    let metadata: BTreeMap<_, _> = file.metadata().clone();
    write_safetensors(path, &refs, &metadata).expect("what reads can be written");
}

/// A folder: `config.json`, the index, and the bytes of the first shard; the second is a valid one.
fn checkpoint(data: &[u8]) {
    let [config, index, shard] = unpack::<3>(data);
    let dir = scratch();
    place_checkpoint(dir.path(), config, index, shard);
    match Checkpoint::open(dir.path()) {
        Ok(folder) => {
            for name in folder.names() {
                assert_eq!(folder.require(name).expect("it is in the list").name, name);
            }
            folder.fingerprint().expect("its files can be read");
        }
        Err(error) => message(&error),
    }
}

/// Writes the files of such a folder.
pub fn place_checkpoint(dir: &Path, config: &[u8], index: &[u8], shard: &[u8]) {
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).expect("writable");
    write("config.json", config);
    write("model.safetensors.index.json", index);
    write("model-00001-of-00002.safetensors", shard);
    write("model-00002-of-00002.safetensors", SECOND_SHARD);
}

/// A safetensors file with the tensor `second`, one byte.
const SECOND_SHARD: &[u8] =
    b"\x40\0\0\0\0\0\0\0{\"second\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}      \x07";

/// An adapter folder: `adapter_config.json` and the bytes of `adapter_model.safetensors`. What reads is
/// written again and reads equal.
fn peft(data: &[u8]) {
    let [config, tensors] = unpack::<2>(data);
    let dir = scratch();
    fs::write(dir.path().join("adapter_config.json"), config).expect("writable");
    fs::write(dir.path().join("adapter_model.safetensors"), tensors).expect("writable");
    let adapter = match PeftAdapter::read(dir.path()) {
        Ok(adapter) => adapter,
        Err(error) => return message(&error),
    };
    for module in adapter.modules() {
        let _ = (adapter.config.scaling(module), adapter.config.targets(module));
    }
    let again = dir.path().join("again");
    adapter.write(&again).expect("what reads can be written");
    let second = PeftAdapter::read(&again).expect("what was written reads");
    assert_eq!(adapter.config, second.config);
    assert!(adapter.tensors.keys().eq(second.tensors.keys()));
    for (name, tensor) in &adapter.tensors {
        let other = &second.tensors[name];
        assert_eq!(tensor.shape, other.shape);
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(tensor.data.iter().zip(&other.data).all(same), "tensor `{name}`");
    }
}

/// `adapter_config.json` alone; its patterns meet the names of modules.
fn peft_config(data: &[u8]) {
    let dir = scratch();
    let path = dir.path().join("adapter_config.json");
    fs::write(&path, data).expect("writable");
    let config = match PeftConfig::read(&path) {
        Ok(config) => config,
        Err(error) => return message(&error),
    };
    for module in ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", ""] {
        let _ = (config.targets(module), config.rank_of(module), config.alpha_of(module));
        let _ = config.scaling(module);
    }
    config.write(&path).expect("what reads can be written");
    assert_eq!(PeftConfig::read(&path).expect("what was written reads"), config);
}

/// The type that the first byte chooses, and the other bytes.
fn typed(data: &[u8]) -> Option<(GgmlType, &[u8])> {
    let (&first, rest) = data.split_first()?;
    Some((GgmlType::ALL[first as usize % GgmlType::ALL.len()], rest))
}

/// Any bytes as blocks of any type give numbers, the same ones in one piece and block by block.
fn blocks(data: &[u8]) {
    let Some((dtype, rest)) = typed(data) else { return };
    if dtype.quantizer() == Quantizer::Never && dtype.name().starts_with("IQ") {
        return;
    }
    let whole = rest.len() / dtype.block_bytes();
    let packed = &rest[..whole * dtype.block_bytes()];
    let mut values = vec![0.0; whole * dtype.block_len()];
    dequantize_row(dtype, packed, &mut values);
    for (block, values) in packed.chunks(dtype.block_bytes()).zip(values.chunks(dtype.block_len())) {
        let mut alone = vec![0.0; dtype.block_len()];
        dequantize_row(dtype, block, &mut alone);
        assert!(alone.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype}");
    }
}

/// Any floats as a row of any type give blocks, which do not depend on what was there before, and
/// finite floats of moderate size give finite numbers back.
fn quantize(data: &[u8]) {
    let Some((dtype, rest)) = typed(data) else { return };
    let (values, _) = rest.as_chunks::<4>();
    let values: Vec<f32> = values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let row = &values[..values.len() / dtype.block_len() * dtype.block_len()];
    // An importance matrix holds mean squares.
    let importance: Vec<f32> = row.iter().rev().map(|x| (x * x).min(1e30)).collect();
    for importance in [None, Some(&importance[..])] {
        if dtype.require_quantizer(importance.is_some()).is_err() || row.is_empty() {
            continue;
        }
        let size = dtype.row_bytes(row.len()).expect("whole blocks");
        let (mut over_zeros, mut over_ones) = (vec![0; size], vec![0xff; size]);
        quantize_row(dtype, row, importance, &mut over_zeros);
        quantize_row(dtype, row, importance, &mut over_ones);
        assert!(over_zeros == over_ones, "{dtype}: bytes of the output were left as they were");
        let mut back = vec![0.0; row.len()];
        dequantize_row(dtype, &over_zeros, &mut back);
        let moderate = row.iter().all(|x| x.abs() < 6e4) && check_finite(row).is_ok();
        assert!(!moderate || check_finite(&back).is_ok(), "{dtype}: {row:?} became {back:?}");
    }
}
