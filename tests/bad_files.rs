//! Every malformed file of `testdata/bad` through the binary: exit code 1, what is wrong, where and what
//! to do, and an output that is as it was.
//!
//! `tests/bad_files.txt` has all messages, so that a change to one is seen. To write it again after a
//! change: `BLESS=1 cargo test --release --test bad_files`.

mod common;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use common::{DENSE, QUANTIZED, Scratch, files, refuse, sequences};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files, sorted.
fn bad() -> Vec<PathBuf> {
    let mut all: Vec<_> =
        fs::read_dir(root().join("testdata/bad")).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// What the commands are given for one file.
struct Inputs {
    /// What `inspect` is given; none where the file is right by itself.
    inspect: Option<String>,
    model: String,
    adapter: String,
}

/// A file as the model or adapter that it is a part of; none if it is a part of neither.
fn inputs(path: &Path, dir: &Scratch) -> Option<Inputs> {
    let name = path.file_name().unwrap().to_str().unwrap();
    let (format, _) = name.split_once('-').unwrap();
    let folder = |name: &str, files: &[(&str, &[u8])]| {
        fs::create_dir_all(dir.path(name)).unwrap();
        for (file, bytes) in files {
            dir.write(&format!("{name}/{file}"), bytes);
        }
        dir.path(name)
    };
    let good = text(&root().join("testdata/peft/fp32/lora/init"));
    let bytes = fs::read(path).unwrap();
    let settings = fs::read(Path::new(DENSE).join("config.json")).unwrap();
    let tensors = fs::read(Path::new(&good).join("adapter_model.safetensors")).unwrap();
    Some(match format {
        "gguf" => Inputs { inspect: Some(text(path)), model: text(path), adapter: good },
        "tokenizer" if path.extension().is_some_and(|end| end == "gguf") => {
            Inputs { inspect: None, model: text(path), adapter: good }
        }
        "safetensors" => {
            let model = folder("model", &[("config.json", &settings), ("model.safetensors", &bytes)]);
            Inputs { inspect: Some(text(path)), model, adapter: good }
        }
        "index" => {
            let files: &[(&str, &[u8])] =
                &[("config.json", &settings), ("model.safetensors.index.json", &bytes)];
            let model = folder("model", files);
            fs::copy(Path::new(DENSE).join("model.safetensors"), format!("{model}/one.safetensors")).unwrap();
            Inputs { inspect: Some(model.clone()), model, adapter: good }
        }
        "config" => {
            let shard = fs::read(Path::new(DENSE).join("model.safetensors")).unwrap();
            let mut config: serde_json::Value = serde_json::from_slice(&settings).unwrap();
            let quantized: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            config["quantization_config"] = quantized["quantization_config"].clone();
            let config = config.to_string();
            let files: &[(&str, &[u8])] =
                &[("config.json", config.as_bytes()), ("model.safetensors", &shard)];
            Inputs { inspect: None, model: folder("model", files), adapter: good }
        }
        "peft" => {
            let files: &[(&str, &[u8])] =
                &[("adapter_config.json", &bytes), ("adapter_model.safetensors", &tensors)];
            let adapter = folder("adapter", files);
            Inputs { inspect: Some(adapter.clone()), model: DENSE.to_owned(), adapter }
        }
        "adapter" => {
            let config = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"]}"#;
            let files: &[(&str, &[u8])] =
                &[("adapter_config.json", config), ("adapter_model.safetensors", &bytes)];
            let adapter = folder("adapter", files);
            Inputs { inspect: Some(adapter.clone()), model: QUANTIZED.to_owned(), adapter }
        }
        _ => return None,
    })
}

#[test]
fn every_bad_file_is_refused_by_every_command_and_touches_nothing() {
    let mut messages = String::new();
    let mut refused = 0;
    for path in bad() {
        let dir = Scratch::new();
        let Some(inputs) = inputs(&path, &dir) else { continue };
        let data = dir.write("data.jsonl", sequences(2, 8, 1));
        // The output is there already, with something in it.
        let merged = dir.write("merged.gguf", "before");
        let before = files(&dir.path(""));
        let Inputs { inspect, model, adapter } = &inputs;
        let run = dir.path("run");
        let common = ["--model", model.as_str(), "--adapter", adapter];
        let of = |command: &str, rest: &[&str]| -> Vec<String> {
            std::iter::once(&command).chain(&common).chain(rest).map(|arg| (*arg).to_owned()).collect()
        };
        let train = ["train", "--model", model, "--init-adapter", adapter, "--data", &data, "--output", &run]
            .map(str::to_owned)
            .to_vec();
        let mut all = vec![
            of("eval", &["--data", &data, "--threads", "1"]),
            of("merge", &["--output", &merged, "--overwrite-output"]),
            train,
        ];
        all.extend(inspect.iter().map(|path| vec!["inspect".to_owned(), path.clone()]));
        for (i, args) in all.iter().enumerate() {
            let refusal = refuse(args);
            assert_eq!(refusal.code, 1, "{args:?}: {refusal:?}");
            if i == 0 {
                let shown = |text: &str| {
                    text.replace(&dir.path(""), "").replace(&text_of(root()), "").replace('\\', "/")
                };
                let name = path.file_name().unwrap().to_str().unwrap();
                writeln!(messages, "== {name}\n{}", shown(&refusal.error)).unwrap();
                if !refusal.hint.is_empty() {
                    writeln!(messages, "hint: {}", shown(&refusal.hint)).unwrap();
                }
            }
        }
        assert_eq!(files(&dir.path("")), before, "{}: nothing is written", path.display());
        refused += 1;
    }
    assert!(refused > 100, "{refused} files");

    let stored = root().join("tests/bad_files.txt");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&stored, &messages).unwrap();
    }
    let expected = fs::read_to_string(&stored).unwrap();
    let differs = messages.lines().zip(expected.lines()).find(|(a, b)| a != b);
    assert!(messages == expected, "tests/bad_files.txt is not what is said now: {differs:?}");
}

fn text_of(path: &Path) -> String {
    format!("{}/", path.display())
}

#[test]
fn every_message_names_its_file() {
    let messages = fs::read_to_string(root().join("tests/bad_files.txt")).unwrap();
    for block in messages.split("== ").skip(1) {
        let error = block.lines().nth(1).unwrap();
        assert!(error.starts_with("error: `"), "{block}");
        assert!(!block.contains('\u{1b}') && !block.contains('\u{7}'), "{block}");
    }
}
