//! Malformed parts of folders, in `testdata/bad`: a file that is wrong only beside others that are right.
//!
//! Built here and stored as the files of `bad_files.rs` are; [`open`] puts each into its folder. Also
//! the law that no way to be wrong goes without a file or a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::config::Quantization;
use qpeft_formats::error::{Error, Kind, Result};
use qpeft_formats::peft::PeftAdapter;
use qpeft_formats::safetensors::{Checkpoint, Dtype, TensorRef, write_safetensors};

use super::bad_files::variant;
use super::testdata;

type Case = (&'static str, Vec<u8>);

/// The kinds of parts: the start of a name.
const PARTS: [&str; 3] = ["adapter-", "index-", "config-"];

fn file(tensors: &[TensorRef<'_>]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    write_safetensors(&path, tensors, &BTreeMap::new()).unwrap();
    fs::read(path).unwrap()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// `adapter_model.safetensors` of a LoRA of rank 2.
fn adapter() -> Vec<Case> {
    let zeros = floats(&[0.0; 8]);
    let key = |end: &str| format!("base_model.model.up.{end}");
    let (a, b) = (key("lora_A.weight"), key("lora_B.weight"));
    let with = |third: &str, shape: &[usize]| {
        let len = 4 * shape.iter().product::<usize>();
        file(&[
            (&a, Dtype::F32, &[2, 3], &zeros[..24]),
            (&b, Dtype::F32, &[4, 2], &zeros),
            (third, Dtype::F32, shape, &zeros[..len]),
        ])
    };
    vec![
        ("adapter-no-tensors.safetensors", file(&[])),
        ("adapter-missing-tensor.safetensors", file(&[(&a, Dtype::F32, &[2, 3], &zeros[..24])])),
        ("adapter-unexpected-tensor.magnitude.safetensors", with(&key("lora_magnitude_vector"), &[4])),
        ("adapter-unexpected-tensor.name.safetensors", with("up.lora_A.weight", &[2, 3])),
        (
            "adapter-wrong-shape.rank.safetensors",
            file(&[(&a, Dtype::F32, &[1, 3], &zeros[..12]), (&b, Dtype::F32, &[4, 1], &zeros[..16])]),
        ),
        (
            "adapter-wrong-shape.dims.safetensors",
            file(&[(&a, Dtype::F32, &[2, 3], &zeros[..24]), (&b, Dtype::F32, &[8], &zeros)]),
        ),
        (
            "adapter-unsupported-dtype.safetensors",
            file(&[(&a, Dtype::I32, &[2, 3], &zeros[..24]), (&b, Dtype::F32, &[4, 2], &zeros)]),
        ),
    ]
}

/// `model.safetensors.index.json` beside the shard `one.safetensors` with the tensor `a`.
fn index() -> Vec<Case> {
    let map = |entries: &str| format!(r#"{{"weight_map": {{{entries}}}}}"#).into_bytes();
    vec![
        ("index-json.json", b"{".to_vec()),
        ("index-json.twice.json", map(r#""a": "one.safetensors", "a": "one.safetensors""#)),
        ("index-json.no-map.json", br#"{"metadata": {}}"#.to_vec()),
        ("index-bad-shard-name.parent.json", map(r#""a": "../one.safetensors""#)),
        ("index-bad-shard-name.root.json", map(r#""a": "/one.safetensors""#)),
        ("index-bad-shard-name.empty.json", map(r#""a": """#)),
        ("index-missing-shard.nul.json", map(r#""a": "one\u0000.safetensors""#)),
        ("index-missing-shard.json", map(r#""a": "two.safetensors""#)),
        ("index-not-in-shard.json", map(r#""a": "one.safetensors", "b": "one.safetensors""#)),
    ]
}

/// `config.json` of a quantized checkpoint.
fn config() -> Vec<Case> {
    let settings = |text: &str| format!(r#"{{"quantization_config": {{{text}}}}}"#).into_bytes();
    vec![
        ("config-unsupported-quantization.gptq.json", settings(r#""quant_method": "gptq""#)),
        (
            "config-unsupported-quantization.compressed.json",
            settings(r#""quant_method": "compressed-tensors", "format": "pack-quantized""#),
        ),
        ("config-wrong-setting.method.json", settings(r#""quant_method": 4"#)),
        (
            "config-wrong-setting.type.json",
            settings(r#""quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf5""#),
        ),
        (
            "config-wrong-setting.block.json",
            settings(r#""quant_method": "fp8", "weight_block_size": [0, 128]"#),
        ),
    ]
}

fn cases() -> Vec<Case> {
    [adapter(), index(), config()].concat()
}

/// Opens a part in its folder.
fn open(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap().to_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let bytes = fs::read(path).unwrap();
    match name.split_once('-').unwrap().0 {
        "adapter" => {
            place("adapter_config.json", br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4}"#);
            place("adapter_model.safetensors", &bytes);
            PeftAdapter::read(dir.path()).map(drop)
        }
        "config" => {
            let config = serde_json::from_slice(&bytes).unwrap();
            Quantization::from_config(&config).map(drop).map_err(|e| e.in_file(path))
        }
        _ => {
            place("config.json", b"{}");
            place("one.safetensors", &file(&[("a", Dtype::U8, &[1], &[7])]));
            place("model.safetensors.index.json", &bytes);
            Checkpoint::open(dir.path()).map(drop)
        }
    }
}

#[test]
fn the_stored_parts_are_those_built_here() {
    let dir = testdata("bad");
    if std::env::var_os("BLESS").is_some() {
        for (name, bytes) in cases() {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in cases() {
        assert!(bytes.len() < 8192, "{name}");
        assert!(fs::read(dir.join(name)).unwrap() == bytes, "{name}");
    }
    let built: BTreeSet<String> = cases().iter().map(|(name, _)| (*name).to_owned()).collect();
    let is_part = |name: &String| PARTS.iter().any(|part| name.starts_with(part));
    let stored: BTreeSet<String> = stored().into_iter().filter(is_part).collect();
    assert_eq!(stored, built);
}

fn stored() -> Vec<String> {
    let entries = fs::read_dir(testdata("bad")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_bad_part_is_refused_for_the_reason_in_its_name() {
    let mut wrong = Vec::new();
    for (name, _) in cases() {
        let expected = name.split_once('-').unwrap().1.split_once('.').unwrap().0;
        match open(&testdata("bad").join(name)) {
            Ok(()) => wrong.push(format!("{name}: accepted")),
            Err(error) => {
                assert!(error.path.is_some(), "{name}: {error}: no file");
                if variant(&error.kind) != expected {
                    wrong.push(format!("{name}: {error}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The variants that no file can show, and the test that does: variant, file, test.
const ELSEWHERE: &[(&str, &str, &str)] = &[
    // The file system's, not a file's.
    ("Io", "formats/tests/containers/file.rs", "a_read_only_folder_is_an_error_with_a_hint"),
    ("NotAFile", "formats/tests/containers/file.rs", "folders_and_missing_files_are_not_mapped"),
    (
        "NoWeights",
        "formats/tests/containers/safetensors.rs",
        "a_checkpoint_with_missing_or_ambiguous_parts_is_refused",
    ),
    // What the user asks for.
    ("ReadOnlyType", "formats/tests/containers/bad_parts.rs", "a_type_that_cannot_be_written_is_refused"),
    (
        "ImportanceRequired",
        "formats/tests/containers/bad_parts.rs",
        "a_type_that_cannot_be_written_is_refused",
    ),
    ("ImportanceLength", "formats/src/imatrix/mod.rs", "a_weight_of_another_size_is_refused"),
    ("NotInALayer", "formats/src/mixture/tests.rs", "what_cannot_be_chosen_is_refused_with_the_tensor"),
    // A file may hold such a pattern; it is wrong once a module is asked for.
    ("BadPattern", "formats/tests/containers/peft.rs", "targets_are_matched_as_peft_matches_them"),
    ("NotFinite", "formats/src/blocks/properties.rs", "the_first_element_that_is_not_finite_is_named"),
    // The caller's of a writer.
    (
        "OutOfOrder",
        "formats/tests/containers/gguf.rs",
        "the_writer_takes_exactly_the_declared_bytes_in_the_declared_order",
    ),
    (
        "UndeclaredTensor",
        "formats/tests/containers/gguf.rs",
        "the_writer_takes_exactly_the_declared_bytes_in_the_declared_order",
    ),
];

#[test]
fn a_type_that_cannot_be_written_is_refused() {
    let read_only = GgmlType::F64.require_quantizer(true).unwrap_err();
    assert!(read_only.to_string().starts_with("values cannot be written in type F64; writable: F32, "));
    let required = Error::new(Kind::ImportanceRequired { found: "IQ1_S" });
    assert!(required.to_string().starts_with("type IQ1_S is written only with an importance matrix"));
    assert!(read_only.hint().is_some() && required.hint().unwrap().contains("--imatrix"));
}

#[test]
fn every_way_to_be_wrong_has_a_file_or_a_test() {
    let source = include_str!("../../src/error.rs");
    let (_, body) = source.split_once("pub enum Kind {").unwrap();
    let (body, _) = body.split_once("\n}\n").unwrap();
    let variants: Vec<&str> = body
        .lines()
        .filter_map(|line| line.strip_prefix("    ").filter(|line| line.starts_with(char::is_uppercase)))
        .map(|line| line.split(|c: char| !c.is_alphanumeric()).next().unwrap())
        .collect();
    assert!(variants.len() > 40, "{variants:?}");
    let stored = stored();
    let mut missing = Vec::new();
    for name in &variants {
        let mut kebab = String::new();
        for c in name.chars() {
            kebab.extend(c.is_ascii_uppercase().then_some('-'));
            kebab.push(c.to_ascii_lowercase());
        }
        let has_file =
            stored.iter().any(|file| file.split_once('-').unwrap().1.split('.').next() == kebab.get(1..));
        let elsewhere = ELSEWHERE.iter().find(|(variant, ..)| variant == name);
        match elsewhere {
            Some(_) if has_file => missing.push(format!("`{name}` has a file: take it out of ELSEWHERE")),
            Some((_, file, test)) => {
                let text = fs::read_to_string(testdata("..").join(file)).unwrap();
                let is_there = text.contains(&format!("fn {test}("));
                // The test must name the variant, or show its message.
                if !is_there {
                    missing.push(format!("`{name}`: {file} has no test `{test}`"));
                }
            }
            None if !has_file => missing.push(format!("`{name}` has no file in testdata/bad")),
            None => {}
        }
    }
    for (name, ..) in ELSEWHERE.iter().filter(|(name, ..)| !variants.contains(name)) {
        missing.push(format!("`{name}` is gone: take it out of ELSEWHERE"));
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}
