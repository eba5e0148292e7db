//! `qpeft quantize`, split models, and what `inspect` finds wrong: against files of llama.cpp by their hash,
//! and against the codecs row by row.

mod common;

use std::fmt::Write as _;
use std::path::Path;

use qpeft_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorDecl, Value};
use qpeft_formats::{GgmlType, blocks};
use sha2::{Digest, Sha256};

use common::{QUANTIZED, Scratch, files, json, refuse, sequences, succeed, train};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn sha256(path: &str) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(std::fs::read(path).unwrap()) {
        write!(text, "{byte:02x}").unwrap();
    }
    text
}

/// A model of one layer with an embedding of several pieces, a norm, experts, and rows of 96.
fn model(dir: &Scratch, poison: Option<(usize, f32)>) -> String {
    let path = dir.path("model.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("llama".into()));
    metadata.insert("general.file_type", Value::U32(0));
    metadata.insert("llama.block_count", Value::U32(1));
    metadata.insert("llama.expert_count", Value::U32(3));
    metadata.insert("llama.attention.head_count", Value::U32(4));
    let decls: Vec<_> = [
        ("token_embd.weight", &[512, 5000][..]),
        ("output.weight", &[512, 40]),
        ("blk.0.ffn_up_exps.weight", &[256, 7, 3]),
        ("blk.0.ffn_down_exps.weight", &[96, 7, 3]),
        ("blk.0.attn_norm.weight", &[512]),
    ]
    .into_iter()
    .map(|(name, shape)| TensorDecl { name: name.into(), shape: shape.into(), dtype: GgmlType::F32 })
    .collect();
    let mut writer = GgufWriter::create(Path::new(&path), &metadata, &decls).unwrap();
    for decl in &decls {
        let n = decl.shape.iter().product::<u64>() as usize;
        let mut values: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
        if let Some((at, value)) = poison.filter(|_| decl.name == "output.weight") {
            values[at] = value;
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&decl.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn quantize<'a>(model: &'a str, quant: &'a str, output: &'a str) -> Vec<&'a str> {
    vec!["quantize", "--model", model, "--quant", quant, "--output", output]
}

#[test]
fn whole_files_are_those_that_llama_cpp_writes() {
    let dir = Scratch::new();
    let list = std::fs::read_to_string(format!("{ROOT}/testdata/quantize/llama-cpp.txt")).unwrap();
    let mut wrong = Vec::new();
    for (i, line) in list.lines().enumerate() {
        let [source, file_type, hash] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let (model, output) = (format!("{ROOT}/testdata/models/{source}"), dir.path(&format!("{i}.gguf")));
        // Threads change nothing.
        let threads = (i % 3 + 1).to_string();
        succeed(&[&quantize(&model, file_type, &output)[..], &["--threads", &threads]].concat());
        if sha256(&output) != hash {
            wrong.push(format!("{source} {file_type}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(list.lines().count() >= 26);
}

#[test]
fn every_row_is_that_of_the_codec_and_keys_and_tensors_are_in_order() {
    let dir = Scratch::new();
    let (source, output) = (model(&dir, None), dir.path("q.gguf"));
    succeed(&[&quantize(&source, "q4_k_s", &output)[..], &["--tensor-type", "exps=q8_0"]].concat());
    let (source, written) =
        (GgufFile::open(Path::new(&source)).unwrap(), GgufFile::open(Path::new(&output)).unwrap());
    let keys: Vec<_> = written.metadata().iter().map(|(key, _)| key).collect();
    assert_eq!(keys[4..], ["general.quantization_version", "general.file_type"]);
    assert_eq!(written.metadata().u32("general.file_type").unwrap(), Some(14));
    let found: Vec<_> = written.tensors().iter().map(|t| (t.name.as_str(), t.dtype.name())).collect();
    assert_eq!(
        found,
        [
            ("output.weight", "Q6_K"),
            ("token_embd.weight", "Q4_K"),
            ("blk.0.attn_norm.weight", "F32"),
            ("blk.0.ffn_down_exps.weight", "Q8_0"),
            ("blk.0.ffn_up_exps.weight", "Q8_0"),
        ]
    );
    for tensor in written.tensors() {
        let original = source.bytes(source.require(&tensor.name).unwrap());
        let values: Vec<f32> = original.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        let mut expected = vec![0; tensor.size as usize];
        let (len, bytes) = (tensor.row_len(), tensor.dtype.row_bytes(tensor.row_len()).unwrap());
        for (row, bytes) in values.chunks(len).zip(expected.chunks_mut(bytes)) {
            blocks::quantize_row(tensor.dtype, row, None, bytes);
        }
        assert!(written.bytes(tensor)[..] == expected[..], "{}", tensor.name);
    }
}

#[test]
fn a_model_goes_into_files_and_comes_back() {
    let dir = Scratch::new();
    let (source, parts, back) = (model(&dir, None), dir.path("parts.gguf"), dir.path("back.gguf"));
    let whole = dir.path("whole.gguf");
    succeed(&quantize(&source, "copy", &whole));
    for limit in [&["--split-max-tensors", "2"][..], &["--split-max-size", "100K"]] {
        succeed(&[&quantize(&source, "copy", &parts)[..], limit].concat());
        let first = dir.path("parts-00001-of-00003.gguf");
        let json = json(&["inspect", &first]);
        assert_eq!(json["files"].as_array().unwrap().len(), 3);
        assert_eq!(json["tensors"].as_array().unwrap().len(), 5);
        succeed(&[&quantize(&first, "copy", &back)[..], &["--overwrite-output"]].concat());
        assert_eq!(sha256(&back), sha256(&whole), "{limit:?}");
        let again = refuse(&[&quantize(&source, "copy", &parts)[..], limit].concat());
        again.says(2, &["parts-00001-of-00003.gguf` exists"]);
        for file in [&first, &dir.path("parts-00003-of-00003.gguf")] {
            let onto = refuse(&[&quantize(&first, "q8_0", file)[..], &["--overwrite-output"]].concat());
            onto.says(2, &["would replace", "which the command reads"]);
        }
        for no in 1..=3 {
            std::fs::remove_file(dir.path(&format!("parts-0000{no}-of-00003.gguf"))).unwrap();
        }
    }
}

#[test]
fn what_is_not_finite_or_too_large_is_refused_with_its_place_and_nothing_is_written() {
    let dir = Scratch::new();
    for (value, quant, expected) in [
        (
            f32::NAN,
            "q8_0",
            "tensor `output.weight`: row 3, column 5 is NaN; only finite weights can be stored",
        ),
        (
            f32::NAN,
            "copy",
            "tensor `output.weight`: row 3, column 5 is NaN; only finite weights can be stored",
        ),
        (f32::NEG_INFINITY, "f16", "tensor `output.weight`: row 3, column 5 is -inf"),
        (1e9, "q8_0", "tensor `output.weight`: row 3 is too large for Q8_0: a block becomes inf"),
    ] {
        let (source, output) = (model(&dir, Some((3 * 512 + 5, value))), dir.write("q.gguf", "precious"));
        let error = refuse(&[&quantize(&source, quant, &output)[..], &["--overwrite-output"]].concat());
        error.says(1, &[expected]);
        assert_eq!(std::fs::read(&output).unwrap(), b"precious");
        assert_eq!(files(&dir.path("")).len(), 2, "nothing else is left");
    }
}

#[test]
fn few_bits_need_importance_and_a_dry_run_says_so_without_writing() {
    let dir = Scratch::new();
    let (source, output) = (model(&dir, None), dir.path("q.gguf"));
    let others = ["token_embd=q8_0", "output=q8_0", "ffn_down=q8_0"].map(|o| ["--tensor-type", o]).concat();
    let error = refuse(&[&quantize(&source, "q2_k_s", &output)[..], &others].concat());
    error.says(1, &["tensor `blk.0.ffn_up_exps.weight`: as Q2_K it would be garbage without importance"]);
    error.hints(&["`--imatrix FILE`"]);
    let plan = json(&["quantize", "--model", &source, "--quant", "q8_0", "--dry-run"]);
    assert_eq!(plan["tensors"][1]["to"], "Q8_0");
    assert_eq!(plan["tensors"][1]["bytes"], 5000 * 512 / 32 * 34);
    let (text, _) = succeed(&["quantize", "--model", &source, "--quant", "q8_0", "--dry-run"]);
    assert!(text.contains("F32 -> Q8_0"), "{text}");
    assert!(!Path::new(&output).exists());
    refuse(&["quantize", "--model", &source, "--quant", "q8_0"]).says(2, &["needs `--output`"]);
    let error = refuse(&[&quantize(&source, "copy", &output)[..], &["--pure"]].concat());
    error.says(2, &["`--pure` does nothing with `--quant copy`"]);
}

#[test]
fn an_importance_matrix_of_another_model_is_refused_and_that_of_this_one_is_named_in_the_file() {
    let dir = Scratch::new();
    let (source, output) = (model(&dir, None), dir.path("q.gguf"));
    let imatrix = |name: &str, values: usize| {
        let mut bytes = Vec::new();
        bytes.extend(1_i32.to_le_bytes());
        bytes.extend((name.len() as i32).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend([2_i32.to_le_bytes(), (values as i32).to_le_bytes()].concat());
        bytes.extend((0..values).flat_map(|i| (i as f32).to_le_bytes()));
        bytes.extend([9_i32.to_le_bytes(), 1_i32.to_le_bytes()].concat());
        bytes.extend(b"t");
        dir.write("imatrix.dat", bytes)
    };
    let path = imatrix("blk.0.ffn_up_exps.weight", 256);
    let args = [&quantize(&source, "q8_0", &output)[..], &["--imatrix", &path]].concat();
    let error = refuse(&args);
    error.says(1, &["has 256 values of importance, the weight has 768 columns"]);
    imatrix("blk.0.ffn_up_exps.weight", 768);
    succeed(&args);
    let written = GgufFile::open(Path::new(&output)).unwrap();
    let keys: Vec<_> = written.metadata().iter().map(|(key, _)| key).skip(6).collect();
    assert_eq!(
        keys,
        [
            "quantize.imatrix.file",
            "quantize.imatrix.dataset",
            "quantize.imatrix.entries_count",
            "quantize.imatrix.chunks_count"
        ]
    );
    assert_eq!(written.metadata().u32("quantize.imatrix.chunks_count").unwrap(), Some(9));
    let matrix = std::fs::read(&path).unwrap();
    let onto = [&quantize(&source, "q8_0", &path)[..], &["--imatrix", &path, "--overwrite-output"]].concat();
    refuse(&onto).says(2, &["would replace", "imatrix.dat"]);
    assert_eq!(std::fs::read(&path).unwrap(), matrix);
}

#[test]
fn an_adapter_of_a_split_base_is_trained_and_merged_into_one_file_or_several() {
    let dir = Scratch::new();
    let parts = dir.path("base.gguf");
    succeed(&[&quantize(QUANTIZED, "copy", &parts)[..], &["--split-max-tensors", "5"]].concat());
    let count = files(&dir.path("")).len();
    assert!(count > 1);
    let base = dir.path(&format!("base-00001-of-{count:05}.gguf"));
    let (data, run) = (dir.write("data.jsonl", sequences(8, 24, 1)), dir.path("run"));
    train(&base, &data, &run, "--lora-r 4 --max-steps 2 --batch-size 2");

    let merge = |output: &str, flags: &[&str]| {
        let merge = ["merge", "--model", &base, "--adapter", &run, "--output", output];
        succeed(&[&merge[..], flags].concat());
    };
    let (one, several) = (dir.path("merged.gguf"), dir.path("several.gguf"));
    merge(&one, &["--quant", "q5_k_m"]);
    merge(&several, &["--quant", "q5_k_m", "--split-max-tensors", "6"]);
    let first = files(&dir.path("")).into_iter().map(|(path, _)| path).find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("several-00001-of-"))
    });
    let (one, several) = (GgufFile::open(Path::new(&one)).unwrap(), GgufFile::open(&first.unwrap()).unwrap());
    assert!(several.paths().len() > 1);
    assert_eq!(one.metadata(), several.metadata());
    assert_eq!(one.metadata().u32("general.file_type").unwrap(), Some(17));
    for (a, b) in one.tensors().iter().zip(several.tensors()) {
        assert_eq!((&a.name, a.dtype), (&b.name, b.dtype));
        assert!(one.bytes(a)[..] == several.bytes(b)[..], "{}", a.name);
    }
    // The mixture gave some tensors more bits than others.
    let types: std::collections::BTreeSet<_> = one.tensors().iter().map(|t| t.dtype.name()).collect();
    assert!(types.contains("Q5_K") && types.contains("Q6_K"), "{types:?}");
}

#[test]
fn quantizing_again_warns() {
    let dir = Scratch::new();
    let output = dir.path("q.gguf");
    let (_, said) = succeed(&quantize(QUANTIZED, "q4_0", &output));
    assert!(said.contains("are quantized already"), "{said}");
    let quiet = [&quantize(QUANTIZED, "q4_0", &output)[..], &["--allow-requantize", "--overwrite-output"]];
    let (_, said) = succeed(&quiet.concat());
    assert!(!said.contains("are quantized already"), "{said}");
}

#[test]
fn a_device_that_has_no_part_is_said_and_one_that_is_none_refused() {
    let dir = Scratch::new();
    let output = dir.path("q.gguf");
    let (_, said) = succeed(&[&quantize(QUANTIZED, "q8_0", &output)[..], &["--device", "cuda:3"]].concat());
    assert!(said.contains("`--device cuda:3` does nothing: a GPU takes part in packing Q4_K, "), "{said}");
    for device in ["gpu", "cuda:x"] {
        let args = [&quantize(QUANTIZED, "q8_0", &output)[..], &["--dry-run", "--device", device]].concat();
        refuse(&args).says(2, &[&format!("cannot use the device `{device}`")]);
    }
}

#[test]
fn inspect_names_the_problems_of_a_model() {
    let dir = Scratch::new();
    let json = json(&["inspect", QUANTIZED]);
    assert_eq!(json["problems"], serde_json::json!([]));
    assert_eq!((&json["head"], &json["tokens"]), (&"tied".into(), &352.into()));

    let source = model(&dir, Some((7, f32::INFINITY)));
    let (shown, _) = succeed(&["inspect", &source]);
    for problem in [
        "qpeft cannot train on it: ",
        "key `tokenizer.ggml.model`: the key is missing",
        "tensor `output.weight`: element 7 is inf",
    ] {
        assert!(shown.contains(problem), "no `{problem}` in\n{shown}");
    }
}
