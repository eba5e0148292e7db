//! Damage of every kind to small valid files: always an error or a file, never a panic.

use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::GgufFile;
use qpeft_formats::safetensors::SafetensorsFile;
use std::path::Path;

use super::build::{Gguf, safetensors};

/// A GGUF file with every kind of value and a few tensors.
fn gguf() -> Vec<u8> {
    Gguf::new(3, 3, 5)
        .key_u32("general.alignment", 16)
        .string("s")
        .u32(8)
        .string("text")
        .string("l")
        .u32(9)
        .u32(8)
        .u64(2)
        .string("a")
        .string("")
        .string("n")
        .u32(9)
        .u32(1)
        .u64(3)
        .bytes(&[1, 2, 3])
        .string("f")
        .u32(12)
        .bytes(&0.5_f64.to_le_bytes())
        .tensor("a", &[2, 2], 0, 0)
        .tensor("b", &[32], 2, 16)
        .tensor("c", &[1], 0, 48)
        .data(16, 52)
        .0
}

fn header() -> &'static str {
    r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}"#
}

/// Opens and touches everything that an open file offers.
fn read_gguf(bytes: &[u8]) -> bool {
    let Ok(file) = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(bytes.to_vec())) else {
        return false;
    };
    for tensor in file.tensors() {
        assert_eq!(file.bytes(tensor).len() as u64, tensor.size);
        assert!(tensor.row_len().checked_mul(tensor.n_rows()).is_some());
        let _ = (tensor.dtype, file.require(&tensor.name));
    }
    for (key, value) in file.metadata().iter() {
        let _ = (file.metadata().u32(key), file.metadata().i32s(key), value.type_name());
    }
    true
}

fn read_safetensors(bytes: &[u8]) -> bool {
    let ours = SafetensorsFile::from_bytes(Path::new("a"), Bytes::from(bytes.to_vec()));
    let theirs = ::safetensors::SafeTensors::deserialize(bytes);
    let Ok(ours) = ours else { return false };
    let theirs = theirs.expect("what passes our checks passes those of the reference implementation");
    assert_eq!(ours.names().len(), theirs.len());
    for name in ours.names() {
        let view = ours.require(name).unwrap();
        assert_eq!(&view.bytes[..], theirs.tensor(name).unwrap().data());
        let _ = view.to_f32();
    }
    true
}

fn damage(valid: &[u8], read: fn(&[u8]) -> bool) {
    assert!(read(valid));
    for len in 0..valid.len() {
        assert!(!read(&valid[..len]), "cut to {len} bytes");
    }
    let mut accepted = 0;
    for at in 0..valid.len() {
        for flip in (0..8).map(|bit| 1 << bit).chain([0xff]) {
            let mut bytes = valid.to_vec();
            bytes[at] ^= flip;
            accepted += usize::from(read(&bytes));
        }
        for value in [0, 0x7f, 0x80, 0xff] {
            let mut bytes = valid.to_vec();
            bytes[at] = value;
            read(&bytes);
        }
        // Eight bytes at once: lengths, counts and offsets of every magnitude.
        for value in [u64::MAX, 1 << 63, 1 << 60, i64::MAX as u64, 1 << 32] {
            let mut bytes = valid.to_vec();
            let end = bytes.len().min(at + 8);
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            read(&bytes);
        }
        let mut bytes = valid.to_vec();
        bytes.remove(at);
        read(&bytes);
        bytes.insert(at, 0x20);
        bytes.insert(at, 0x31);
        read(&bytes);
    }
    assert!(accepted > 0, "flips inside of data change no structure");
}

#[test]
fn a_damaged_gguf_file_never_panics() {
    damage(&gguf(), read_gguf);
}

#[test]
fn a_damaged_safetensors_file_never_panics_and_never_fools_us_alone() {
    damage(&safetensors(header(), 14), read_safetensors);
}
