//! The binary as a user meets it: help, refusals, exit codes, and what `inspect` prints.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::{Array, GgufWriter, Metadata, TensorDecl, Value};
use qpeft_formats::peft::{HostTensor, Part, PeftAdapter, PeftConfig, TargetModules};
use qpeft_formats::safetensors::write_safetensors_f32;

const COMMANDS: [&[&str]; 16] = [
    &["train"],
    &["convert", "pissa-to-lora"],
    &["convert", "hf-to-gguf"],
    &["convert", "gguf-to-hf"],
    &["merge"],
    &["quantize"],
    &["eval"],
    &["generate"],
    &["inspect"],
    &["bench", "train"],
    &["bench", "quantize"],
    &["bench", "dequantize"],
    &["bench", "attention"],
    &["bench", "linear"],
    &["plan"],
    &["demo"],
];

fn qpeft(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qpeft"));
    command.args(args).env_remove("NO_COLOR").output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("the output is UTF-8")
}

/// Exit code and stderr of a run that must print nothing to stdout.
fn refused(args: &[&str]) -> (i32, String) {
    let out = qpeft(args);
    assert_eq!(text(&out.stdout), "", "{args:?}");
    (out.status.code().expect("the process was not killed"), text(&out.stderr).to_owned())
}

fn inspect(path: &Path) -> (String, serde_json::Value) {
    let path = path.to_str().unwrap();
    let out = qpeft(&["inspect", path]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let json = qpeft(&["inspect", path, "--json"]);
    assert_eq!(text(&json.stdout).lines().count(), 1);
    assert_eq!(text(&json.stderr), "");
    (text(&out.stdout).to_owned(), serde_json::from_slice(&json.stdout).expect("one JSON object"))
}

#[test]
fn every_command_explains_itself_on_stdout_in_a_screen() {
    for command in COMMANDS.into_iter().chain([&[][..], &["convert"], &["bench"]]) {
        for flag in ["-h", "--help"] {
            let out = qpeft(&[command, &[flag]].concat());
            let (help, errors) = (text(&out.stdout), text(&out.stderr));
            assert_eq!((out.status.code(), errors), (Some(0), ""), "{command:?}");
            assert!(help.contains("Usage: qpeft"), "{help}");
            if flag == "-h" {
                let lines = help.lines().count();
                assert!(lines <= 50, "`qpeft {} -h` has {lines} lines", command.join(" "));
            }
        }
    }
    let out = qpeft(&["--version"]);
    assert_eq!(text(&out.stdout), concat!("qpeft ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn an_unknown_flag_is_refused_with_the_nearest() {
    assert_eq!(
        refused(&["train", "--lora-rr", "8"]),
        (2, "error: unknown flag `--lora-rr`\n\nhint: did you mean `--lora-r`?\n".to_owned())
    );
    for command in COMMANDS {
        let (code, errors) = refused(&[command, &["--xyzzy"]].concat());
        let expected =
            format!("error: unknown flag `--xyzzy`\n\nhint: see `qpeft {} --help`\n", command.join(" "));
        assert_eq!((code, errors), (2, expected));
    }
}

#[test]
fn an_unknown_command_is_refused() {
    assert_eq!(
        refused(&["trian"]),
        (2, "error: unknown command `trian`\n\nhint: did you mean `train`?\n".to_owned())
    );
    assert_eq!(refused(&[]), (2, "error: `qpeft` needs a command\n\nhint: see `qpeft --help`\n".to_owned()));
}

#[test]
fn a_missing_flag_is_named() {
    assert_eq!(
        refused(&["train", "--model", "m", "--output", "o"]),
        (
            2,
            "error: `qpeft train` needs `--data`\n\nhint: give the flag, or its key in the file of `--config`\n"
                .to_owned()
        )
    );
}

#[test]
fn a_value_out_of_range_is_refused() {
    assert_eq!(
        refused(&["train", "--model", "m", "--data", "d", "--output", "o", "--lora-dropout", "1"]),
        (2, "error: `--lora-dropout`: expected a number of at least 0 and below 1, found `1`\n".to_owned())
    );
    assert_eq!(
        refused(&["merge", "--model", "m", "--adapter", "a", "--output", "o", "--to", "onnx"]),
        (
            2,
            "error: `--to`: expected `gguf` or `safetensors` or `nf4` or `nf4-dq` or `fp4`, found `onnx`\n"
                .to_owned()
        )
    );
    assert_eq!(
        refused(&["generate", "--model", "m", "--prompt", "p", "--chat", "--raw"]),
        (2, "error: `--chat` and `--raw` exclude each other\n".to_owned())
    );
    let (code, errors) =
        refused(&["merge", "--model", "m", "--adapter", "a", "--output", "o", "--quant", "q9"]);
    assert_eq!(code, 2);
    assert!(errors.starts_with("error: `--quant`: expected one of `F32`, `F16`,"), "{errors}");
}

#[test]
fn an_unknown_key_and_a_wrong_value_of_the_file_are_refused_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.yaml");
    let path = path.to_str().unwrap();
    let with = |yaml: &str| {
        std::fs::write(path, yaml).unwrap();
        refused(&["train", "--config", path])
    };
    assert_eq!(
        with("model: m\nlora_rnak: 8\n"),
        (2, format!("error: `{path}` line 2: unknown key `lora_rnak`\n\nhint: did you mean `lora_r`?\n"))
    );
    assert_eq!(
        with("model: m\ndata: d\noutput: o\nlora_r: many\n"),
        (
            2,
            format!(
                "error: `{path}` line 4: key `lora_r`: expected an integer of at least 1, found `many`\n"
            )
        )
    );
    assert_eq!(
        with("use_dora: 3\n"),
        (
            2,
            format!(
                "error: `{path}` line 1: key `use_dora`: expected `true` or `false`, found the number `3`\n"
            )
        )
    );
    std::fs::remove_file(path).unwrap();
    let (code, errors) = refused(&["train", "--config", path]);
    assert_eq!(code, 2);
    assert!(errors.starts_with(&format!("error: cannot read `--config {path}`: ")), "{errors}");
}

#[test]
fn what_cannot_be_inspected_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (code, errors) = refused(&["inspect", &path("none.gguf")]);
    assert_eq!(code, 2);
    assert!(
        errors.starts_with(&format!("error: cannot open `{}`\n  caused by: ", path("none.gguf"))),
        "{errors}"
    );

    std::fs::write(path("bad.gguf"), b"GGML and more").unwrap();
    let (code, errors) = refused(&["inspect", &path("bad.gguf")]);
    assert_eq!(code, 1, "{errors}");
    assert!(errors.starts_with(&format!("error: `{}`: ", path("bad.gguf"))), "{errors}");

    std::fs::write(path("notes.txt"), b"text").unwrap();
    let (code, errors) = refused(&["inspect", &path("notes.txt")]);
    assert_eq!(code, 2);
    assert!(errors.contains("is neither a GGUF nor a safetensors file\n\nhint: "), "{errors}");

    let (code, errors) = refused(&["inspect", dir.path().to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(errors.contains("is neither a model nor an adapter folder\n\nhint: "), "{errors}");
}

#[test]
fn inspect_shows_a_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", Value::String("llama".into()));
    metadata.insert("llama.rope.freq_base", Value::F32(1e-5));
    metadata.insert("tokenizer.ggml.tokens", Value::Array(Array::String(vec!["<s>".into(); 300])));
    let decl =
        |name: &str, shape: &[u64], dtype| TensorDecl { name: name.into(), shape: shape.into(), dtype };
    let tensors = [decl("a.weight", &[64, 3], GgmlType::Q8_0), decl("b", &[4], GgmlType::F32)];
    let mut writer = GgufWriter::create(&path, &metadata, &tensors).unwrap();
    writer.write("a.weight", &[0; 6 * 34]).unwrap();
    writer.write("b", &[0; 16]).unwrap();
    writer.finish().unwrap();

    let (shown, json) = inspect(&path);
    for part in [
        "gguf version 3",
        "general.architecture   llama\n",
        "tokenizer.ggml.tokens  array of string of length 300: [\"<s>\", \"<s>\", \"<s>\", \"<s>\", ...]\n",
        "  Q8_0  1 tensors  192 parameters  204 B (92.7 %)\n",
        "tensors (2)\n  a.weight  Q8_0  [64, 3]  204 B\n  b         F32   [4]      16 B\n",
    ] {
        assert!(shown.contains(part), "no `{part}` in\n{shown}");
    }
    assert_eq!(json["kind"], "gguf");
    assert_eq!(json["parameters"], 196);
    assert_eq!(json["bits_per_weight"], 220.0 * 8.0 / 196.0);
    assert_eq!(json["size_bytes"], std::fs::metadata(&path).unwrap().len());
    assert_eq!(json["metadata"]["llama.rope.freq_base"], 1e-5);
    assert_eq!(json["metadata"]["tokenizer.ggml.tokens"]["length"], 300);
    assert_eq!(json["types"]["Q8_0"]["bytes"], 204);
    assert_eq!(json["tensors"][0]["shape"], serde_json::json!([64, 3]));
    let hash = qpeft_formats::file::fingerprint(&path).unwrap();
    assert_eq!(json["fingerprint"], hash);
    assert!(shown.contains(&hash));
}

#[test]
fn inspect_shows_a_safetensors_file_and_a_model_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors_f32(&path, [("w", &[2, 3][..], &[0.5; 6][..])], &metadata).unwrap();
    let (shown, json) = inspect(&path);
    assert!(shown.contains("tensors (1)\n  w  F32  [2, 3]  24 B\n"), "{shown}");
    assert_eq!((&json["kind"], &json["metadata"]["format"]), (&"safetensors".into(), &"pt".into()));

    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "llama", "hidden_size": 3}"#).unwrap();
    let (shown, json) = inspect(dir.path());
    assert!(shown.contains("model_type   llama\n"), "{shown}");
    assert_eq!((&json["kind"], &json["parameters"]), (&"model".into(), &6.into()));
    assert_eq!(json["bits_per_weight"], 32.0);
}

#[test]
fn inspect_shows_an_adapter_folder() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = PeftConfig::new(2, 4.0);
    config.target_modules = Some(TargetModules::List(vec!["q_proj".into()]));
    let mut adapter = PeftAdapter { config, tensors: BTreeMap::new() };
    let tensor =
        |shape: [usize; 2]| HostTensor { shape: shape.to_vec(), data: vec![0.0; shape[0] * shape[1]] };
    let module = "model.layers.0.self_attn.q_proj";
    adapter.insert(module, Part::A, tensor([2, 8]));
    adapter.insert(module, Part::B, tensor([6, 2]));
    adapter.write(dir.path()).unwrap();
    let (shown, json) = inspect(dir.path());
    assert!(shown.contains("modules          1\n"), "{shown}");
    assert_eq!((&json["kind"], &json["parameters"]), (&"adapter".into(), &28.into()));
    assert_eq!((&json["metadata"]["r"], &json["qpeft"]), (&2.into(), &serde_json::Value::Null));
}

#[cfg(unix)]
#[test]
fn a_reader_that_closes_the_pipe_is_no_failure() {
    use std::process::Stdio;
    let mut child = Command::new(env!("CARGO_BIN_EXE_qpeft"))
        .args(["train", "--help"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), ""));
}

#[test]
fn bench_quantize_measures_the_types_that_were_named() {
    let args = ["bench", "quantize", "--type", "q4_0,tq2_0", "--elements", "8000", "--threads", "2"];
    let out = qpeft(&[&args[..], &["--json"]].concat());
    assert!(out.status.success(), "{}", text(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("one JSON object");
    assert_eq!((&report["elements"], &report["threads"]), (&8192.into(), &2.into()));
    let types = report["types"].as_array().unwrap();
    assert_eq!(types.len(), 2);
    for (row, name) in types.iter().zip(["Q4_0", "TQ2_0"]) {
        assert_eq!(row["type"], name);
        assert!(row["melem_per_second"].as_f64().unwrap() > 0.0);
        assert!(row["ratio"].is_null() && row["bytes_equal"].is_null(), "there is no library");
    }
    let out = qpeft(&[&args[..], &["--importance"]].concat());
    let table = text(&out.stdout);
    assert!(table.starts_with("type ") && table.contains("\nQ4_0 ") && table.contains("\nTQ2_0 "), "{table}");
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[test]
fn bench_quantize_refuses_what_cannot_be_measured() {
    let (code, errors) = refused(&["bench", "quantize", "--ggml-library", "nowhere/libggml-base.so"]);
    assert_eq!(code, 2);
    assert!(errors.contains("cannot use `nowhere/libggml-base.so` as llama.cpp's library"), "{errors}");
    assert!(errors.contains("hint: give the path of llama.cpp's `libggml-base.so`"), "{errors}");
    let (code, errors) = refused(&["bench", "quantize", "--type", "q8_1"]);
    assert_eq!(code, 2);
    assert!(errors.starts_with("error: `--type`: expected one of `F32`, `F16`, "), "{errors}");
    assert_eq!(
        refused(&["bench", "quantize", "--elements", "0"]),
        (2, "error: `--elements`: expected an integer from 1 to 4294967296, found `0`\n".to_owned())
    );
}

/// A benchmark on one core of the CPU: its report.
fn bench(args: &[&str]) -> serde_json::Value {
    let out = qpeft(&[&["bench"], args, &["--device", "cpu", "--json"]].concat());
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

#[test]
fn bench_dequantize_measures_one_core() {
    let report = bench(&["dequantize", "--type", "q8_0,mxfp4"]);
    assert_eq!(
        (&report["device"], &report["rows"], &report["cols"]),
        (&"cpu".into(), &16.into(), &1024.into())
    );
    for (row, (name, bits)) in
        report["types"].as_array().unwrap().iter().zip([("Q8_0", 8.5), ("MXFP4", 4.25)])
    {
        assert_eq!((&row["type"], &row["bits_per_weight"]), (&name.into(), &bits.into()));
        assert!(row["gelem_per_second"].as_f64().unwrap() > 0.0);
    }
    let report = bench(&["dequantize", "--type", "q4_k,nf4-dq", "--rows", "3", "--cols", "512"]);
    assert_eq!((&report["rows"], &report["cols"]), (&3.into(), &512.into()));
    let args = ["bench", "dequantize", "--type", "q8_0", "--device", "cpu"];
    assert_eq!(text(&qpeft(&args).stdout).lines().count(), 2);
    let (code, errors) = refused(&[&args[..], &["--cols", "33"]].concat());
    assert_eq!(code, 1, "{errors}");
    assert!(errors.contains("33"), "{errors}");
}

#[test]
fn bench_attention_measures_both_passes() {
    let heads = ["attention", "--heads", "4", "--kv-heads", "2", "--head-dim", "24", "--threads", "1"];
    let report = bench(&[&heads[..], &["--batch-size", "2", "--max-seq-length", "70"]].concat());
    assert_eq!((&report["sequence_length"], &report["head_dim"]), (&70.into(), &24.into()));
    for pass in ["forward", "backward"] {
        assert!(report[pass]["ms"].as_f64().unwrap() > 0.0 && report[pass]["tflops"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(
        refused(&["bench", "attention", "--heads", "4", "--kv-heads", "3"]),
        (2, "error: `--heads 4` is no multiple of `--kv-heads 3`\n".to_owned())
    );
}

#[test]
fn bench_linear_measures_with_and_without_a_branch() {
    let sizes = ["--rows", "96", "--cols", "256", "--tokens", "40", "--lora-r", "4", "--threads", "1"];
    let report = bench(&[&["linear", "--base", "q4_k"][..], &sizes].concat());
    assert_eq!((&report["type"], &report["tokens"]), (&"Q4_K".into(), &40.into()));
    let ways = report["ways"].as_array().unwrap();
    assert_eq!(ways.len(), 2, "the CPU always dequantizes");
    for (way, branch) in ways.iter().zip([false, true]) {
        assert_eq!((&way["branch"], &way["dequantized"]), (&branch.into(), &true.into()));
        assert!(
            way["forward"]["ms"].as_f64().unwrap() > 0.0 && way["backward"]["ms"].as_f64().unwrap() > 0.0
        );
    }
    let out = qpeft(&[&["bench", "linear", "--base", "nf4", "--device", "cpu"][..], &sizes].concat());
    let table = text(&out.stdout);
    assert!(table.contains("\nNF4 ") && table.contains("\nNF4, branch "), "{table}");
}
