//! Targets of what quantization reads and writes: bitsandbytes weights, importance matrices, split
//! models, and the choice of types.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use qpeft_formats::bitsandbytes::config::Quantization;
use qpeft_formats::bitsandbytes::{FourBit, Int8};
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{GgufFile, TensorDecl};
use qpeft_formats::imatrix::Imatrix;
use qpeft_formats::mixture::{FileType, Mixture, ModelFacts};
use qpeft_formats::safetensors::{SafetensorsFile, TensorView};

use super::target::{scratch, unpack};
use super::targets::message;

/// `config.json`, and a safetensors file whose tensors are read as 4-bit and 8-bit weights. What reads
/// gives numbers in any piece, and tensors that read as the same weight.
pub fn bitsandbytes(data: &[u8]) {
    let [config, tensors] = unpack::<2>(data);
    if let Ok(config) = serde_json::from_slice(config) {
        let _ = Quantization::from_config(&config).map_err(|e| (e.to_string(), e.hint()));
    }
    let file = SafetensorsFile::from_bytes(Path::new("a"), Bytes::from(tensors.to_vec()));
    let Ok(file) = file else { return };
    // Also names whose own tensor is missing while parts of it are there.
    let names: BTreeSet<&str> =
        file.names().flat_map(|name| [name, name.split(".quant_state").next().unwrap_or(name)]).collect();
    for name in names {
        match FourBit::read(name, &|key| file.tensor(key)) {
            Ok(Some(weight)) => four_bit(name, &weight),
            Ok(None) => {}
            Err(error) => drop((error.to_string(), error.hint())),
        }
        match Int8::read(name, &|key| file.tensor(key)) {
            Ok(Some(weight)) => int8(name, &weight),
            Ok(None) => {}
            Err(error) => drop((error.to_string(), error.hint())),
        }
    }
}

fn four_bit(name: &str, weight: &FourBit) {
    let values = |weight: &FourBit| {
        let mut values = vec![0.0; weight.state().elements()];
        weight.dequantize(0, &mut values);
        values.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
    };
    let whole = values(weight);
    for start in [0, 1, whole.len() / 2, whole.len().saturating_sub(3)] {
        let mut piece = vec![0.0; (whole.len() - start.min(whole.len())).min(7)];
        weight.dequantize(start.min(whole.len()), &mut piece);
        assert!(piece.iter().zip(&whole[start.min(whole.len())..]).all(|(a, b)| a.to_bits() == *b));
    }
    let tensors = weight.tensors(name);
    let again =
        FourBit::read(name, &|key| find(&tensors, key)).expect("what reads is written").expect("there");
    assert_eq!((weight.state(), weight.is_double()), (again.state(), again.is_double()));
    // The code book of the file may differ from ours in the last digits; what is written has ours.
    assert_eq!(values(&again), whole);
}

fn int8(name: &str, weight: &Int8) {
    let tensors = weight.tensors(name);
    let again = Int8::read(name, &|key| find(&tensors, key)).expect("what reads is written").expect("there");
    let mut rows = [vec![0.0; weight.cols()], vec![0.0; weight.cols()]];
    for row in 0..weight.rows() {
        weight.dequantize(row, 0..weight.cols(), &mut rows[0]);
        again.dequantize(row, 0..weight.cols(), &mut rows[1]);
        assert!(rows[0].iter().zip(&rows[1]).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

fn find(tensors: &[TensorView], key: &str) -> Option<TensorView> {
    tensors.iter().find(|tensor| tensor.name == key).cloned()
}

/// An importance matrix of either kind; what is there is finite and not negative.
pub fn imatrix(data: &[u8]) {
    let matrix = match Imatrix::from_bytes(Path::new("a.dat"), Bytes::from(data.to_vec())) {
        Ok(matrix) => matrix,
        Err(error) => return message(&error),
    };
    assert!(!matrix.is_empty());
    for name in matrix.names() {
        let error = matrix.of(name, usize::MAX, 2).expect_err("no file has so many");
        message(&error);
        let len = (1..1 << 24).find(|&len| matrix.of(name, len, 1).is_ok()).expect("it has a length");
        let values = matrix.of(name, len, 1).expect("as found").expect("it is in the list");
        assert!(values.iter().all(|x| x.is_finite() && *x >= 0.0), "{name}");
    }
    let _ = (matrix.datasets(), matrix.chunk_count());
}

/// A split model of two files; the second starts at the second `GGUF` of the input.
pub fn split(data: &[u8]) {
    let cut = (4..data.len()).find(|&at| data[at..].starts_with(b"GGUF")).unwrap_or(data.len());
    let dir = scratch();
    let first = dir.path().join("a-00001-of-00002.gguf");
    fs::write(&first, &data[..cut]).expect("writable");
    fs::write(dir.path().join("a-00002-of-00002.gguf"), &data[cut..]).expect("writable");
    match GgufFile::open(&first) {
        Ok(file) => {
            let mut names = BTreeSet::new();
            for tensor in file.tensors() {
                assert!(names.insert(&tensor.name), "tensor `{}` appears twice", tensor.name);
                assert_eq!(file.tensor(&tensor.name), Some(tensor));
                assert_eq!(file.bytes(tensor).len() as u64, tensor.size);
            }
            file.fingerprint().expect("its files can be read");
        }
        Err(error) => message(&error),
    }
}

/// The types that every mixture gives to the tensors of a GGUF file.
pub fn mixture(data: &[u8]) {
    let Ok(file) = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(data.to_vec())) else { return };
    let facts = match ModelFacts::read(file.metadata()) {
        Ok(facts) => facts,
        Err(error) => return message(&error),
    };
    let decls: Vec<_> = file
        .tensors()
        .iter()
        .map(|t| TensorDecl { name: t.name.clone(), shape: t.shape.clone(), dtype: t.dtype })
        .collect();
    for file_type in FileType::ALL {
        for has_importance in [false, true] {
            match Mixture::new(file_type).choose(&facts, &decls, has_importance) {
                Ok(choices) => {
                    assert_eq!(choices.len(), decls.len());
                    for (choice, decl) in choices.iter().zip(&decls) {
                        let row_len = decl.shape.first().map_or(1, |&n| n as usize);
                        assert!(choice.dtype.row_bytes(row_len).is_ok(), "{decl:?} became {choice:?}");
                    }
                }
                Err(error) => drop((error.to_string(), error.hint())),
            }
        }
    }
}
