//! Hugging Face folders to GGUF and back, against the files that llama.cpp's converter wrote for the same
//! folders: every tensor byte for byte, every key and value; and what must be refused before anything is written.

use std::path::{Path, PathBuf};

use qpeft::convert::gguf_to_hf::{SHARD, write_folder};
use qpeft::convert::hf::HfSource;
use qpeft::convert::hf_to_gguf::{OutType, write_gguf};
use qpeft::convert::source::Source;
use qpeft::model::tokenizer::Tokenizer;
use qpeft_formats::GgmlType;
use qpeft_formats::gguf::{GgufFile, Metadata};
use qpeft_formats::mixture::FileType;
use qpeft_formats::safetensors::{Checkpoint, Dtype};
use serde_json::{Value, json};

/// Every family, with the pre-tokenizer of its made-up vocabulary recognized or not needed.
const MODELS: [&str; 9] = [
    "tiny-mistral",
    "tiny-llama3",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-gemma2",
    "tiny-gemma3",
    "tiny-phi3",
    "tiny-phi4",
    "tiny-gpt2",
];

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/models").join(name)
}

fn golden(name: &str) -> GgufFile {
    GgufFile::open(&model(&format!("{name}.F32.gguf"))).unwrap()
}

fn to_gguf(folder: &Path, path: &Path, outtype: OutType) -> GgufFile {
    write_gguf(&HfSource::open(folder).unwrap(), path, outtype, |_, _| {}).unwrap();
    GgufFile::open(path).unwrap()
}

fn to_folder(file: &GgufFile, dir: &Path, dtype: Dtype) -> Checkpoint {
    write_folder(file, dir, dtype, SHARD, |_, _| {}).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// Keys and values, without the name, which the goldens have from elsewhere; sorted, because one key of
/// `longrope` stands at another place.
fn keys(metadata: &Metadata) -> Vec<(String, String)> {
    let entries = metadata.iter().filter(|(key, _)| *key != "general.name");
    let mut keys: Vec<_> = entries.map(|(key, value)| (key.to_owned(), format!("{value:?}"))).collect();
    keys.sort();
    keys
}

#[track_caller]
fn same_tensors(name: &str, ours: &GgufFile, theirs: &GgufFile) {
    assert_eq!(ours.tensors(), theirs.tensors(), "{name}");
    for (a, b) in ours.tensors().iter().zip(theirs.tensors()) {
        assert!(*ours.bytes(a) == *theirs.bytes(b), "{name}: {}", a.name);
    }
}

#[test]
fn a_folder_becomes_the_file_that_the_converter_of_llama_cpp_writes() {
    let dir = tempfile::tempdir().unwrap();
    for name in MODELS {
        let ours = to_gguf(&model(name), &dir.path().join("a.gguf"), OutType::Type(GgmlType::F32));
        let theirs = golden(name);
        same_tensors(name, &ours, &theirs);
        assert_eq!(keys(ours.metadata()), keys(theirs.metadata()), "{name}");
        let order = |file: &GgufFile| -> Vec<String> {
            file.metadata()
                .iter()
                .map(|(key, _)| key.to_owned())
                .filter(|key| !key.contains("attn_factor"))
                .collect()
        };
        assert_eq!(order(&ours), order(&theirs), "{name}");
    }
}

#[test]
fn a_file_becomes_the_folder_that_it_was_made_from() {
    let dir = tempfile::tempdir().unwrap();
    // Gone without a place in a GGUF, or of no meaning for the model.
    let lost = [
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "pretraining_tp",
        "max_window_layers",
        "use_sliding_window",
        "_sliding_window_pattern",
        "pad_token_id",
        "rope_parameters",
        "rope_scaling",
        "layer_types",
        "use_bidirectional_attention",
    ];
    for name in MODELS {
        let ours = to_folder(&golden(name), &dir.path().join(name), Dtype::F32);
        let theirs = Checkpoint::open(&model(name)).unwrap();
        assert!(ours.names().eq(theirs.names()), "{name}");
        for tensor in theirs.names() {
            let (a, b) = (ours.require(tensor).unwrap(), theirs.require(tensor).unwrap());
            assert_eq!((a.dtype, &a.shape), (Dtype::F32, &b.shape), "{name}: {tensor}");
            assert!(a.to_f32().unwrap() == b.to_f32().unwrap(), "{name}: {tensor}");
        }
        for (key, value) in theirs.config().as_object().unwrap() {
            let is_lost = lost.contains(&key.as_str()) || key.starts_with("summary_") || value.is_null();
            // The architecture `llama` has no window, and no name of its own for Mistral.
            let is_mistral = name == "tiny-mistral"
                && ["architectures", "model_type", "sliding_window"].contains(&key.as_str());
            if !is_lost && !is_mistral {
                assert_eq!(&ours.config()[key], value, "{name}: {key}");
            }
        }
    }
    // Scalings come back as they were, though a GGUF has only what they result in.
    let config =
        |name: &str| Checkpoint::open(&dir.path().join(name)).unwrap().config()["rope_parameters"].clone();
    assert_eq!(
        config("tiny-llama3"),
        json!({"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_type": "llama3"})
    );
    assert_eq!(
        config("tiny-gemma3"),
        json!({"full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"}, "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}})
    );
    assert_eq!(config("tiny-phi4")["long_factor"][9], 3.7);
    assert_eq!(config("tiny-phi4")["partial_rotary_factor"], 0.75);
}

#[test]
fn a_file_survives_the_way_over_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    for name in MODELS {
        let theirs = golden(name);
        to_folder(&theirs, &dir.path().join(name), Dtype::F32);
        let ours = to_gguf(&dir.path().join(name), &dir.path().join("b.gguf"), OutType::Type(GgmlType::F32));
        // Types and data; tied heads and file order may lie elsewhere.
        same_tensors(name, &ours, &theirs);
        for key in ["tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            let kinds_of_phi =
                name.contains("phi") && (key.ends_with("scores") || key.ends_with("token_type"));
            // Phi's converter counts every token that is cut out as added.
            if !kinds_of_phi {
                assert_eq!(ours.metadata().get(&key), theirs.metadata().get(&key), "{name}: {key}");
            }
        }
    }
}

#[test]
fn texts_get_the_same_tokens_on_every_side() {
    let dir = tempfile::tempdir().unwrap();
    let strings = std::fs::read(model("../tokenizer/strings.json")).unwrap();
    let strings: Value = serde_json::from_slice(&strings).unwrap();
    let mut texts = Vec::new();
    collect(&strings, &mut texts);
    assert!(texts.len() >= 50, "{}", texts.len());
    for name in MODELS {
        let file = golden(name);
        let before = Tokenizer::from_gguf(file.metadata()).unwrap();
        let folder = dir.path().join(name);
        to_folder(&file, &folder, Dtype::BF16);
        let json = Tokenizer::from_hf_dir(&folder).unwrap();
        // Without `tokenizer.model`, scores come from the order of the merges.
        let _ = std::fs::remove_file(folder.join("tokenizer.model"));
        let after = to_gguf(&folder, &dir.path().join("c.gguf"), OutType::Auto);
        let after = Tokenizer::from_gguf(after.metadata()).unwrap();
        for text in &texts {
            let expected = before.encode(text, true).unwrap();
            assert_eq!(json.encode(text, true).unwrap(), expected, "{name}: tokenizer.json: {text:?}");
            assert_eq!(after.encode(text, true).unwrap(), expected, "{name}: GGUF again: {text:?}");
        }
        assert_eq!(json.chat_template(), before.chat_template(), "{name}");
        assert_eq!((json.bos(), json.eos()), (before.bos(), before.eos()), "{name}");
    }
}

/// All strings that `strings.json` names as texts.
fn collect(json: &Value, out: &mut Vec<String>) {
    match json {
        Value::Array(list) => list.iter().for_each(|entry| collect(entry, out)),
        Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(text) if key == "text" || key == "string" => out.push(text.to_owned()),
                    Some(_) => {}
                    None => collect(value, out),
                }
            }
        }
        _ => {}
    }
}

#[test]
fn other_types_keep_vectors_and_norms_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let f32s = to_gguf(&model("tiny-gpt2"), &path, OutType::Type(GgmlType::F32));
    // BF16 in the folder: `auto` takes that. Rows of 32 are one block of Q8_0.
    for (outtype, expected) in [
        (OutType::Auto, GgmlType::BF16),
        (OutType::Type(GgmlType::F16), GgmlType::F16),
        (OutType::Type(GgmlType::Q8_0), GgmlType::Q8_0),
    ] {
        let file = to_gguf(&model("tiny-gpt2"), &dir.path().join("b.gguf"), outtype);
        assert_eq!(
            file.metadata().u32("general.file_type").unwrap(),
            FileType::from_name(expected.name()).map(FileType::id)
        );
        for (info, f32s) in file.tensors().iter().zip(f32s.tensors()) {
            let is_matrix = info.shape.len() == 2 && info.name != "position_embd.weight";
            assert_eq!(info.dtype, if is_matrix { expected } else { GgmlType::F32 }, "{}", info.name);
            assert_eq!(info.name, f32s.name);
        }
    }
    // The matrices of a BF16 folder come back from F32 exactly.
    let folder = to_folder(&f32s, &dir.path().join("folder"), Dtype::BF16);
    let theirs = Checkpoint::open(&model("tiny-gpt2")).unwrap();
    for name in theirs.names() {
        assert!(*folder.require(name).unwrap().bytes == *theirs.require(name).unwrap().bytes, "{name}");
    }
}

#[test]
fn rows_are_the_same_in_any_portions() {
    for name in ["tiny-mistral", "tiny-gpt2", "tiny-gemma2"] {
        let source = HfSource::open(&model(name)).unwrap();
        for (index, tensor) in source.tensors().iter().enumerate() {
            let (rows, cols) = (tensor.n_rows(), tensor.row_len());
            let mut whole = vec![0.0; rows * cols];
            source.rows(index, 0..rows, &mut whole).unwrap();
            for start in (0..rows).step_by(7) {
                let count = 7.min(rows - start);
                let mut part = vec![0.0; count * cols];
                source.rows(index, start..start + count, &mut part).unwrap();
                assert!(part == whole[start * cols..(start + count) * cols], "{name}: {}", tensor.name);
            }
        }
    }
}

#[test]
fn large_models_are_split_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = golden("tiny-qwen3");
    let written = write_folder(&file, &dir.path().join("f"), Dtype::F32, 20_000, |_, _| {}).unwrap();
    assert!(written.shards > 3, "{}", written.shards);
    let last = format!("f/model-{0:05}-of-{0:05}.safetensors", written.shards);
    assert!(dir.path().join(last).is_file());
    let again = to_gguf(&dir.path().join("f"), &dir.path().join("a.gguf"), OutType::Type(GgmlType::F32));
    let mut names: Vec<_> = again.tensors().iter().map(|t| &t.name).collect();
    let mut expected: Vec<_> = file.tensors().iter().map(|t| &t.name).collect();
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
}

/// A copy of a model folder in which one file's JSON is edited.
fn edited(name: &str, file: &str, edit: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model(name)).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join(file);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    dir
}

#[track_caller]
fn refuses(name: &str, file: &str, edit: impl FnOnce(&mut Value), parts: &[&str]) {
    let dir = edited(name, file, edit);
    let error = HfSource::open(dir.path()).unwrap_err().to_string();
    for part in parts.iter().chain([&dir.path().to_str().unwrap()]) {
        assert!(error.contains(part), "{error}: lacks {part}");
    }
}

#[test]
fn a_setting_that_is_missing_mistyped_or_huge_is_refused_by_its_key() {
    let config = |name, key: &'static str, value: Value, parts: &[&str]| {
        refuses(name, "config.json", |json| json[key] = value, parts);
    };
    config("tiny-qwen2", "hidden_size", Value::Null, &["config.json", "key `hidden_size`", "missing"]);
    config("tiny-qwen2", "hidden_size", json!("32"), &["key `hidden_size`", "is `\"32\"`", "number from 0"]);
    config("tiny-qwen2", "hidden_size", json!(-1), &["key `hidden_size`", "is `-1`"]);
    config("tiny-qwen2", "hidden_size", json!(1_u64 << 40), &["key `hidden_size`", "1099511627776"]);
    config("tiny-qwen2", "num_attention_heads", json!(0), &["the number of heads is 0"]);
    config("tiny-qwen2", "num_key_value_heads", json!(3), &["2 heads are not a multiple of 3"]);
    config("tiny-qwen2", "rms_norm_eps", json!("x"), &["key `rms_norm_eps`", "finite number"]);
    config("tiny-qwen2", "rope_theta", json!(0), &["key `rope_theta`", "positive"]);
    config(
        "tiny-qwen2",
        "rope_scaling",
        json!({"rope_type": "dynamic", "factor": 2}),
        &["key `rope_scaling.rope_type`", "`dynamic`", "`yarn`"],
    );
    config("tiny-qwen2", "rope_scaling", json!([2]), &["key `rope_scaling`", "expected a object"]);
    config("tiny-qwen2", "hidden_act", json!("relu"), &["key `hidden_act`", "`relu`", "`silu`"]);
    config("tiny-qwen2", "architectures", json!("x"), &["key `architectures`"]);
    config(
        "tiny-qwen2",
        "architectures",
        json!(["MixtralForCausalLM"]),
        &["`MixtralForCausalLM` cannot be converted", "`LlamaForCausalLM`", "`GPT2LMHeadModel`"],
    );
    config(
        "tiny-qwen2",
        "quantization_config",
        json!({"quant_method": "gptq"}),
        &["quantization_config", "gptq"],
    );
    config(
        "tiny-gemma2",
        "query_pre_attn_scalar",
        json!(24),
        &["key `query_pre_attn_scalar`", "is 24", "16"],
    );
    config("tiny-gemma2", "attn_logit_softcapping", Value::Null, &["key `attn_logit_softcapping`", "null"]);
    config(
        "tiny-gemma2",
        "layer_types",
        json!(["full_attention", "full_attention"]),
        &["key `layer_types`", "layer 0"],
    );
    config(
        "tiny-gpt2",
        "scale_attn_by_inverse_layer_idx",
        json!(true),
        &["key `scale_attn_by_inverse_layer_idx`"],
    );
    let phi = |edit: fn(&mut Value), parts: &[&str]| refuses("tiny-phi4", "config.json", edit, parts);
    phi(
        |json| json["rope_parameters"]["long_factor"] = json!([1.0]),
        &["key `long_factor`", "has 1 factors, expected 12"],
    );
    phi(
        |json| json["rope_parameters"]["short_factor"] = json!(["a"]),
        &["key `rope_parameters.short_factor`"],
    );
}

#[test]
fn tensors_that_contradict_the_settings_are_refused_by_their_name() {
    let config = |key: &'static str, value: Value, parts: &[&str]| {
        refuses("tiny-qwen2", "config.json", |json| json[key] = value, parts);
    };
    config("intermediate_size", json!(65), &["mlp.", "has shape", "65"]);
    config("vocab_size", json!(353), &["tensor `lm_head.weight`", "[352, 32]", "[353, 32]"]);
    config("num_hidden_layers", json!(3), &["tensor `model.layers.2.input_layernorm.weight`", "missing"]);
    config("num_hidden_layers", json!(4_000_000_000_u32), &["tensor `model.layers.2.", "missing"]);
    config("num_hidden_layers", json!(1), &["tensor `model.layers.1.", "has no place", "1 layers"]);
    refuses(
        "tiny-qwen3",
        "config.json",
        |json| json["tie_word_embeddings"] = json!(false),
        &["tensor `lm_head.weight`", "missing"],
    );
}

#[test]
fn tokenizer_files_that_are_wrong_are_refused() {
    let tokenizer =
        |edit: fn(&mut Value), parts: &[&str]| refuses("tiny-qwen2", "tokenizer.json", edit, parts);
    tokenizer(|json| json["model"]["vocab"]["!"] = json!(400), &["token 400", "vocabulary of 352"]);
    tokenizer(|json| json["model"]["vocab"]["!"] = json!("x"), &["the id of `!`"]);
    tokenizer(|json| json["model"]["vocab"]["!"] = json!(4), &["have the same id 4"]);
    tokenizer(|json| json["model"]["merges"][0] = json!(["zz", "q"]), &["merge 0 names `zz`"]);
    tokenizer(|json| json["model"]["type"] = json!("Unigram"), &["`Unigram`", "only `BPE`"]);
    tokenizer(|json| json["added_tokens"][0] = json!({"id": 0}), &["`added_tokens`"]);
    tokenizer(|json| json["normalizer"] = json!({"type": "Lowercase"}), &["normalizer `Lowercase`"]);
    tokenizer(
        |json| json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("x"),
        &["has no name in a GGUF", "`qwen2`"],
    );
    refuses("tiny-qwen2", "tokenizer_config.json", |json| json["bos_token"] = json!(5), &["key `bos_token`"]);
    refuses(
        "tiny-qwen2",
        "tokenizer_config.json",
        |json| json["chat_template"] = json!(5),
        &["key `chat_template`"],
    );

    // What the hint says helps.
    let dir =
        edited("tiny-qwen2", "tokenizer.json", |json| json["normalizer"] = json!({"type": "Lowercase"}));
    let error = HfSource::open(dir.path()).unwrap_err();
    assert!(error.hint().unwrap().contains("--pre"), "{error}");
    let source = HfSource::open_with_pre(dir.path(), Some("gpt-2")).unwrap();
    assert_eq!(source.metadata().str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));

    let dir = edited("tiny-gemma2", "config.json", |_| {});
    let path = dir.path().join("tokenizer.model");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let error = HfSource::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.model") && error.contains("at byte"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = HfSource::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("has no `tokenizer.json`"), "{error}");
}

#[test]
fn a_value_beyond_the_type_is_refused_and_leaves_no_file() {
    let dir = edited("tiny-qwen2", "config.json", |_| {});
    // The first element of the last tensor by name becomes 2^127, in BF16.
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    bytes[8 + header..8 + header + 2].copy_from_slice(&[0x00, 0x7f]);
    std::fs::write(&path, bytes).unwrap();
    let source = HfSource::open(dir.path()).unwrap();
    let target = dir.path().join("a.gguf");
    let error = write_gguf(&source, &target, OutType::Type(GgmlType::F16), |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("row 0, column 0 is 170141"), "{error}");
    assert!(error.hint().unwrap().contains("bf16"));
    assert!(!target.exists());
    write_gguf(&source, &target, OutType::Auto, |_, _| {}).unwrap();
}

#[test]
fn a_file_of_an_unknown_architecture_is_refused_and_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(model("tiny-qwen3.F32.gguf")).unwrap();
    let replaced = |from: &str, to: &str| {
        let text = |s: &str| s.as_bytes().to_vec();
        let at = bytes.windows(from.len()).position(|w| w == text(from)).unwrap();
        let mut bytes = bytes.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        GgufFile::from_bytes(Path::new("x.gguf"), bytes.into()).unwrap()
    };
    let target = dir.path().join("folder");
    let refused =
        |file: &GgufFile| write_folder(file, &target, Dtype::F32, SHARD, |_, _| {}).unwrap_err().to_string();
    let error = refused(&replaced("qwen3", "qwenX"));
    assert!(error.contains("`qwenX` cannot be converted; supported: `llama`, `qwen2`, `qwen3`"), "{error}");
    let error = refused(&replaced("blk.1.attn_q.weight", "blk.7.attn_q.weight"));
    assert!(error.contains("tensor `blk.7.attn_q.weight`: has no place"), "{error}");
    let error = refused(&replaced("qwen3.block_count", "qwen3.block_cOunt"));
    assert!(error.contains("key `qwen3.block_count`"), "{error}");
    assert!(!target.exists());
}

#[test]
fn the_commands_convert_and_refuse_with_exit_code_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let run = |args: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_qpeft"))
            .arg("convert")
            .args(args)
            .output()
            .unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let folder = model("tiny-mistral");
    let folder = folder.to_str().unwrap();
    let (file, back) = (path("a.gguf"), path("back"));
    let (code, stdout, stderr) =
        run(&["hf-to-gguf", "--model", folder, "--output", &file, "--outtype", "f16", "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("the sliding window of 6 tokens is left out"), "{stderr}");
    let json: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&json["architecture"], &json["type"], &json["tensors"]),
        (&json!("llama"), &json!("F16"), &json!(21))
    );
    let (code, stdout, stderr) = run(&["gguf-to-hf", "--model", &file, "--output", &back, "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let json: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&json["architecture"], &json["type"]), (&json!("LlamaForCausalLM"), &json!("F16")));

    // An output that exists is not replaced unasked, and stays when the input is refused.
    let before = std::fs::read(&file).unwrap();
    assert_eq!(run(&["hf-to-gguf", "--model", folder, "--output", &file]).0, Some(2));
    let broken = edited("tiny-mistral", "config.json", |json| json["architectures"] = json!(["BertModel"]));
    let broken_path = broken.path().to_str().unwrap();
    let (code, _, stderr) =
        run(&["hf-to-gguf", "--model", broken_path, "--output", &file, "--overwrite-output"]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("config.json") && stderr.contains("`BertModel`"), "{stderr}");
    assert!(std::fs::read(&file).unwrap() == before);
}
