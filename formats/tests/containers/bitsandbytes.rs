//! Damaged bitsandbytes weights: one file per way to be wrong, in `testdata/bad`, built here byte by byte.
//!
//! To store them again after a change: `BLESS=1 cargo test -p qpeft-formats bitsandbytes`.

use qpeft_formats::bitsandbytes::config::Quantization;
use qpeft_formats::bitsandbytes::{FourBit, Int8};
use qpeft_formats::error::Result;
use qpeft_formats::safetensors::SafetensorsFile;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::testdata;

/// Name, type, shape, data of a tensor.
type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

const TABLE: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A weight of 4 x 32 elements in blocks of 64, its scales quantized or not.
fn weight(json: &str, nested: bool) -> Vec<Tensor> {
    let mut tensors: Vec<Tensor> = vec![
        ("w".into(), "U8", vec![64, 1], vec![0x3c; 64]),
        ("w.quant_map".into(), "F32", vec![16], floats(&TABLE)),
        ("w.quant_state.bitsandbytes__nf4".into(), "U8", vec![json.len()], json.as_bytes().to_vec()),
    ];
    if nested {
        tensors.extend([
            ("w.absmax".into(), "U8", vec![2], vec![3, 200]),
            ("w.nested_absmax".into(), "F32", vec![1], floats(&[0.25])),
            ("w.nested_quant_map".into(), "F32", vec![256], floats(&[0.5; 256])),
        ]);
    } else {
        tensors.push(("w.absmax".into(), "F32", vec![2], floats(&[0.5, 0.25])));
    }
    tensors
}

const PLAIN: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 32]}"#;
const NESTED: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 32], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#;

fn file(tensors: &[Tensor]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let begin = data.len();
        data.extend(bytes);
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{}]}}"#,
            data.len()
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A good weight with one tensor changed; an emptied type takes the tensor out.
fn with(nested: bool, name: &str, change: impl Fn(&mut Tensor)) -> Vec<u8> {
    let mut tensors = weight(if nested { NESTED } else { PLAIN }, nested);
    tensors.iter_mut().filter(|(n, ..)| n == name).for_each(change);
    tensors.retain(|(_, dtype, ..)| !dtype.is_empty());
    file(&tensors)
}

fn json(text: &str) -> Vec<u8> {
    file(&weight(text, text.contains("nested")))
}

fn int8(change: impl Fn(&mut Vec<Tensor>)) -> Vec<u8> {
    let mut tensors: Vec<Tensor> = vec![
        ("m.weight".into(), "I8", vec![2, 3], vec![1, 2, 3, 4, 5, 6]),
        ("m.SCB".into(), "F32", vec![2], floats(&[0.5, 0.25])),
        ("m.weight_format".into(), "U8", vec![], vec![0]),
    ];
    change(&mut tensors);
    file(&tensors)
}

/// File name and bytes; the name is `bnb-<variant>.<detail>.safetensors`.
fn cases() -> Vec<(&'static str, Vec<u8>)> {
    let set = |key: &str, value: &str| {
        let (start, rest) = NESTED.split_once(&format!("\"{key}\": ")).unwrap();
        let end =
            if rest.starts_with('[') { rest.find(']').unwrap() + 1 } else { rest.find([',', '}']).unwrap() };
        json(&format!("{start}\"{key}\": {value}{}", &rest[end..]))
    };
    let gone = |t: &mut Tensor| t.1 = "";
    vec![
        ("bnb-json.truncated.safetensors", json(&PLAIN[..30])),
        ("bnb-json.duplicate.safetensors", json(&PLAIN.replace('{', r#"{"shape": [4, 32], "#))),
        ("bnb-json.depth.safetensors", json(&"[".repeat(2000))),
        ("bnb-json.number.safetensors", set("nested_offset", "1e999")),
        (
            "bnb-too-long.json.safetensors",
            with(false, "w.quant_state.bitsandbytes__nf4", |t| {
                (t.2, t.3) = (vec![4097], vec![b' '; 4097]);
            }),
        ),
        ("bnb-wrong-quant-state.key.safetensors", json(&PLAIN.replace('}', r#", "extra": 1}"#))),
        ("bnb-wrong-quant-state.missing.safetensors", json(r#"{"quant_type": "nf4", "blocksize": 64}"#)),
        ("bnb-wrong-quant-state.type.safetensors", set("quant_type", "\"fp4\"")),
        ("bnb-wrong-quant-state.blocksize-0.safetensors", set("blocksize", "0")),
        ("bnb-wrong-quant-state.blocksize-48.safetensors", set("blocksize", "48")),
        ("bnb-wrong-quant-state.blocksize-huge.safetensors", set("blocksize", "18446744073709551616")),
        ("bnb-wrong-quant-state.dtype.safetensors", set("dtype", "\"float64\"")),
        ("bnb-wrong-quant-state.shape-1d.safetensors", set("shape", "[128]")),
        ("bnb-wrong-quant-state.shape-overflow.safetensors", set("shape", "[4294967296, 4294967296]")),
        ("bnb-wrong-quant-state.shape-negative.safetensors", set("shape", "[-4, 32]")),
        ("bnb-wrong-quant-state.nested-blocksize.safetensors", set("nested_blocksize", "1")),
        ("bnb-wrong-quant-state.nested-dtype.safetensors", set("nested_dtype", "\"float16\"")),
        ("bnb-wrong-quant-state.offset.safetensors", set("nested_offset", "\"nan\"")),
        ("bnb-wrong-quant-state.offset-f32.safetensors", set("nested_offset", "1e39")),
        ("bnb-wrong-quant-state.weight-format.safetensors", int8(|t| t[2].3[0] = 1)),
        ("bnb-wrong-length.codes.safetensors", set("shape", "[4, 33]")),
        ("bnb-wrong-length.huge.safetensors", set("shape", "[2147483648, 2147483648]")),
        ("bnb-missing-tensor.codes.safetensors", with(false, "w", gone)),
        ("bnb-missing-tensor.absmax.safetensors", with(false, "w.absmax", gone)),
        ("bnb-missing-tensor.quant-map.safetensors", with(false, "w.quant_map", gone)),
        ("bnb-missing-tensor.nested-absmax.safetensors", with(true, "w.nested_absmax", gone)),
        ("bnb-missing-tensor.nested-map.safetensors", with(true, "w.nested_quant_map", gone)),
        ("bnb-wrong-dtype.absmax.safetensors", file(&weight(NESTED, false))),
        ("bnb-wrong-dtype.absmax-nested.safetensors", file(&weight(PLAIN, true))),
        ("bnb-wrong-dtype.json.safetensors", with(false, "w.quant_state.bitsandbytes__nf4", |t| t.1 = "I8")),
        (
            "bnb-wrong-dtype.quant-map.safetensors",
            with(false, "w.quant_map", |t| (t.1, t.2) = ("I32", vec![16])),
        ),
        ("bnb-wrong-dtype.int8.safetensors", int8(|t| t[0].1 = "U8")),
        (
            "bnb-wrong-shape.absmax.safetensors",
            with(false, "w.absmax", |t| {
                (t.2, t.3) = (vec![3], floats(&[1.0; 3]));
            }),
        ),
        (
            "bnb-wrong-shape.nested-absmax.safetensors",
            with(true, "w.nested_absmax", |t| {
                (t.2, t.3) = (vec![2], floats(&[1.0; 2]));
            }),
        ),
        (
            "bnb-wrong-shape.quant-map.safetensors",
            with(false, "w.quant_map", |t| {
                (t.2, t.3) = (vec![15], floats(&TABLE[..15]));
            }),
        ),
        ("bnb-wrong-shape.int8.safetensors", int8(|t| t[0].2 = vec![6])),
        ("bnb-wrong-shape.scb.safetensors", int8(|t| (t[1].2, t[1].3) = (vec![3], floats(&[1.0; 3])))),
        (
            "bnb-wrong-table.entry.safetensors",
            with(false, "w.quant_map", |t| {
                t.3[60..].copy_from_slice(&2.0f32.to_le_bytes());
            }),
        ),
        (
            "bnb-wrong-table.nan.safetensors",
            with(false, "w.quant_map", |t| {
                t.3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }),
        ),
        (
            "bnb-bad-scale.nested.safetensors",
            with(true, "w.nested_absmax", |t| t.3 = floats(&[f32::INFINITY])),
        ),
        (
            "bnb-bad-scale.map.safetensors",
            with(true, "w.nested_quant_map", |t| t.3 = floats(&[f32::NAN; 256])),
        ),
        ("bnb-bad-scale.scb.safetensors", int8(|t| t[1].3 = floats(&[0.5, f32::NAN]))),
    ]
}

fn open(path: &Path) -> Result<()> {
    let file = SafetensorsFile::open(path)?;
    let find = |name: &str| file.tensor(name);
    let in_file = |e: qpeft_formats::Error| e.in_file(path);
    let four_bit = FourBit::read("w", &find).map_err(in_file)?;
    let int8 = Int8::read("m.weight", &find).map_err(in_file)?;
    assert!(four_bit.is_some() || int8.is_some(), "there is no weight in {}", path.display());
    Ok(())
}

/// `WrongTable { .. }` is `wrong-table`.
fn variant(kind: &qpeft_formats::error::Kind) -> String {
    let debug = format!("{kind:?}");
    let mut out = String::new();
    for c in debug.chars().take_while(char::is_ascii_alphanumeric) {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[test]
fn the_stored_bitsandbytes_files_are_those_built_here() {
    let dir = testdata("bad");
    let cases = cases();
    if std::env::var_os("BLESS").is_some() {
        for (name, bytes) in &cases {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in &cases {
        assert!(fs::read(dir.join(name)).unwrap() == *bytes, "{name}");
    }
    let built: BTreeSet<String> = cases.iter().map(|(name, _)| (*name).to_owned()).collect();
    let stored: BTreeSet<String> = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("bnb-"))
        .collect();
    assert_eq!(stored, built);
}

#[test]
fn every_bad_bitsandbytes_weight_is_refused_for_the_reason_in_its_name() {
    let mut wrong = Vec::new();
    for (name, _) in cases() {
        let path = testdata("bad").join(name);
        let expected = name.strip_prefix("bnb-").unwrap().split_once('.').unwrap().0;
        match open(&path) {
            Ok(()) => wrong.push(format!("{name}: accepted")),
            Err(error) => {
                assert_eq!(error.path.as_deref(), Some(path.as_path()), "{name}");
                let text = error.to_string();
                assert!(!text.ends_with('.') && text.contains("tensor `"), "{text}");
                if variant(&error.kind) != expected {
                    wrong.push(format!("{name}: {text}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_good_weight_is_accepted_and_messages_name_the_tensor_and_both_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    for bytes in [json(PLAIN), json(NESTED), int8(|_| {})] {
        fs::write(&path, bytes).unwrap();
        open(&path).unwrap();
    }
    let message = |name: &str| open(&testdata("bad").join(name)).unwrap_err().to_string();
    for (name, expected) in [
        (
            "bnb-wrong-quant-state.blocksize-48.safetensors",
            "tensor `w.quant_state.bitsandbytes__nf4`: has `blocksize`: 48, expected a power of two from 32 to 4096",
        ),
        ("bnb-wrong-length.codes.safetensors", "tensor `w`: needs 66 bytes, 64 were given"),
        ("bnb-wrong-table.entry.safetensors", "tensor `w.quant_map`: entry 15 is `2`, the nf4 table has `1`"),
        ("bnb-wrong-dtype.absmax.safetensors", "tensor `w.absmax`: has elements of type F32, expected U8"),
        (
            "bnb-bad-scale.scb.safetensors",
            "tensor `m.SCB`: element 1 is `NaN`, and a scale is a finite number",
        ),
    ] {
        let message = message(name);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn damage_of_any_byte_is_refused_or_harmless() {
    // Every byte of a small file takes several values; whatever is accepted is dequantized.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    for good in [json(PLAIN), json(NESTED), int8(|_| {})] {
        for at in (0..good.len()).step_by(3) {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                let Ok(file) = SafetensorsFile::from_bytes(&path, bytes.into()) else { continue };
                let find = |name: &str| file.tensor(name);
                if let Ok(Some(weight)) = FourBit::read("w", &find) {
                    weight.dequantize(0, &mut vec![0.0; weight.state().elements()]);
                }
                if let Ok(Some(weight)) = Int8::read("m.weight", &find) {
                    let cols = weight.cols();
                    (0..weight.rows()).for_each(|row| weight.dequantize(row, 0..cols, &mut vec![0.0; cols]));
                }
            }
        }
    }
}

#[test]
fn quantizations_that_are_not_supported_are_refused_by_name() {
    let read = |text: &str| {
        let config = format!(r#"{{"quantization_config": {text}}}"#);
        Quantization::from_config(&serde_json::from_str(&config).unwrap())
    };
    for method in ["gptq", "awq", "hqq", "torchao", "mxfp4", "compressed-tensors"] {
        let error =
            read(&format!(r#"{{"quant_method": "{method}", "format": "pack-quantized"}}"#)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&format!("quantization `{method}")) && text.contains("bitsandbytes"), "{text}");
        assert!(error.hint().unwrap().contains("--base-quant"));
    }
    for wrong in [
        r#"{"quant_method": 3}"#,
        "{}",
        "[]",
        r#"{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf5"}"#,
        r#"{"quant_method": "fp8", "weight_block_size": [0, 128]}"#,
        r#"{"quant_method": "fp8", "weight_block_size": 128}"#,
        r#"{"quant_method": "bitsandbytes"}"#,
    ] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
    assert_eq!(read("null").unwrap(), Quantization::None);
    let block = Some([128, 128]);
    let fp8 = r#"{"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}"#;
    assert_eq!(read(fp8).unwrap(), Quantization::Fp8 { block });
}
