//! Refusals through the binary: what is wrong, where, what to do about it, the exit code (1 the input, 2
//! the usage or the environment), and that nothing is lost by being refused.

mod common;

use std::path::Path;

use common::{
    DENSE, QUANTIZED, Scratch, adapter, eval_loss, files, refuse, sequences, succeed, train, train_args,
};
use qpeft_formats::peft::Part;
use qpeft_kernels::cuda::Cuda;

const SHORT: &str = "--lora-r 4 --batch-size 2 --learning-rate 1e-3 --max-steps 4 --save-steps 2";

/// The start of the refusal of a path.
fn at(path: &str) -> String {
    format!("error: `{path}`")
}

fn bad(name: &str) -> String {
    format!("{}/testdata/bad/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn eval(model: &str, data: &str) -> Vec<String> {
    ["eval", "--model", model, "--data", data, "--threads", "1"].map(str::to_owned).to_vec()
}

fn eval_adapter(model: &str, data: &str, adapter: &str) -> Vec<String> {
    [eval(model, data), vec!["--adapter".to_owned(), adapter.to_owned()]].concat()
}

/// Trains on a data file that must be refused.
#[track_caller]
fn refuse_data(dir: &Scratch, content: &str, flags: &str) -> common::Refusal {
    let data = dir.write("data.jsonl", content);
    let refusal = refuse(&train_args(QUANTIZED, &data, &dir.path("run"), flags));
    assert!(refusal.error.starts_with(&at(&data)), "{refusal:?}");
    // The same data is refused in the same words when it is to be measured.
    if flags.is_empty() {
        assert_eq!(refuse(&eval(QUANTIZED, &data)), refusal);
    }
    assert!(files(&dir.path("run")).is_empty(), "a refused run leaves no file");
    refusal
}

#[test]
fn a_damaged_gguf_is_refused_at_its_place() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(2, 12, 1));
    let model = std::fs::read(QUANTIZED).unwrap();
    let cut = dir.write("cut.gguf", &model[..model.len() / 2]);
    let cut_early = dir.write("cut-early.gguf", &model[..3000]);
    let unknown = dir.path("pre.gguf");
    replace_once(QUANTIZED, &unknown, b"gpt-2", b"gpt-9");
    let expected: [(&str, &[&str]); 7] = [
        (&cut, &["tensor `blk.0.attn_output.weight`", "data ends at byte", "the file at byte"]),
        (&cut_early, &["key `tokenizer.ggml.tokens`", "declares 352 array elements"]),
        (
            &bad("gguf-truncated.tensor.gguf"),
            &["tensor `a tensor`: dimension needs 8 bytes, 4 are left (at byte 60)"],
        ),
        (&bad("gguf-not-gguf.gguf"), &["a GGUF file with `GGUF`"]),
        (&bad("gguf-past-end.1-tib.gguf"), &["tensor `a`: data ends at byte 1099511627840"]),
        (&bad("gguf-too-many.tensors.gguf"), &["declares 1152921504606846976 tensors"]),
        (&bad("gguf-too-many.keys.gguf"), &["declares 1152921504606846976 metadata keys"]),
    ];
    for (model, parts) in expected {
        let refusal = refuse(&eval(model, &data));
        refusal.says(1, parts);
        assert!(refusal.error.starts_with(&at(model)), "{refusal:?}");
        // Training and looking refuse in the same words.
        assert_eq!(refuse(&train_args(model, &data, &dir.path("run"), "")), refusal);
        assert_eq!(refuse(&["inspect", model]), refusal);
    }

    let refusal = refuse(&eval(&unknown, &data));
    refusal.says(1, &["`tokenizer.ggml.pre`", "unknown pre-tokenizer `gpt-9`", "`smollm`", "`llama-bpe`"]);
    refusal.hints(&["--tokenizer"]);
    // What the hint says helps.
    let own = format!("{}/testdata/tokenizer/tiny-llama/tokenizer.json", env!("CARGO_MANIFEST_DIR"));
    succeed(&[eval(&unknown, &data), vec!["--tokenizer".to_owned(), own.clone()]].concat());

    // One that has tokens which the model has not.
    let mut larger: serde_json::Value = serde_json::from_slice(&std::fs::read(own).unwrap()).unwrap();
    let token = serde_json::json!({ "id": 512, "content": "<beyond>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true });
    larger["added_tokens"].as_array_mut().unwrap().push(token);
    let larger = dir.write("larger.json", larger.to_string());
    let data = dir.write("beyond.txt", "a b <beyond> c");
    let tokenizer = ["--tokenizer".to_owned(), larger];
    for args in [eval(QUANTIZED, &data), train_args(QUANTIZED, &data, &dir.path("run"), "")] {
        let refusal = refuse(&[args, tokenizer.to_vec()].concat());
        refusal.says(1, &["token 512", "vocabulary of 352"]).hints(&["--tokenizer"]);
    }
}

/// Copies a file with the only occurrence of `from` replaced by as many bytes.
fn replace_once(path: &str, target: &str, from: &[u8], to: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    let places: Vec<usize> =
        bytes.windows(from.len()).enumerate().filter(|(_, w)| *w == from).map(|(i, _)| i).collect();
    assert_eq!((places.len(), from.len()), (1, to.len()));
    bytes[places[0]..places[0] + to.len()].copy_from_slice(to);
    std::fs::write(target, bytes).unwrap();
}

#[test]
fn data_without_examples_is_refused() {
    let dir = Scratch::new();
    for content in ["", "\n", "\n  \n\n"] {
        refuse_data(&dir, content, "").says(1, &["the file holds no examples"]);
    }
}

#[test]
fn a_wrong_line_is_refused_by_its_number() {
    let dir = Scratch::new();
    let good = sequences(2, 8, 1);
    let cases: [(&str, &[&str], &str); 9] = [
        ("not json {", &["not a JSON object"], "one JSON object per line"),
        ("{\"input_ids\": [5, 6], \"labels\": [5, 6]", &["not a JSON object"], "one JSON object per line"),
        ("[1, 2]", &["not a JSON object"], "one JSON object per line"),
        (
            "{\"prompt\": \"a\", \"completion\": \"b\"}",
            &["`input_ids`", "`prompt`, `completion`"],
            "one shape",
        ),
        ("{\"input_ids\": [5, \"6\"]}", &["field `input_ids[1]`: expected integers, found a string"], ""),
        ("{\"input_ids\": 5}", &["field `input_ids`: expected integers, found `5`"], ""),
        (
            "{\"input_ids\": [5, 352]}",
            &["`input_ids[1]` is 352, outside of the vocabulary of 352"],
            "own tokenizer",
        ),
        ("{\"input_ids\": [5, -1]}", &["`input_ids[1]` is -1"], "own tokenizer"),
        ("{\"input_ids\": [5, 6, 7], \"labels\": [5]}", &["`labels` has 1 entries and `input_ids` 3"], ""),
    ];
    for (line, parts, hint) in cases {
        let refusal = refuse_data(&dir, &format!("{good}{line}\n{good}"), "");
        refusal.says(1, &[", line 3: "]).says(1, parts).hints(&[hint]);
    }
    let refusal = refuse_data(&dir, "{\"foo\": 1}\n", "");
    refusal.says(1, &[", line 1: ", "expected {\"messages\"", "found an object with `foo`"]);
    refusal.hints(&["--prompt-field question --completion-field answer"]);
    refuse_data(&dir, "{\"messages\": []}\n", "").says(1, &[", line 1: ", "`messages`", "an empty list"]);
}

#[test]
fn an_example_without_room_for_its_completion_is_left_out_or_refused() {
    let dir = Scratch::new();
    let long = "{\"prompt\": \"a b c d e f g h i j k l\", \"completion\": \"x\"}\n";
    let flags = "--max-seq-length 8 --no-chat-template";
    let refusal = refuse_data(&dir, long, flags);
    refusal.says(1, &["no example has a token to train on (1 read)", "max_seq_length is 8"]);
    refusal.hints(&["raise `--max-seq-length` above "]);

    // Beside others it is left out, and that is said.
    let data = dir.write("mixed.jsonl", format!("{long}{{\"prompt\": \"a\", \"completion\": \"b\"}}\n"));
    let said = train(QUANTIZED, &data, &dir.path("mixed"), flags);
    assert!(said.contains("skipped 1 of 2 examples without a token to train on (line 1)"), "{said}");
    assert!(said.contains("data 1 examples"), "{said}");

    // Labels that all say not to train are no better.
    let masked = refuse_data(&dir, "{\"input_ids\": [5, 6, 7], \"labels\": [-100, -100, -100]}\n", "");
    masked.says(1, &["no example has a token to train on"]).hints(&["label is not -100"]);
}

#[test]
fn a_sequence_beyond_the_models_positions_is_refused() {
    let dir = Scratch::new();
    let long = serde_json::json!({"input_ids": vec![5; 300]}).to_string();
    let data = dir.write("data.jsonl", &long);
    for args in [train_args(QUANTIZED, &data, &dir.path("run"), ""), eval(QUANTIZED, &data)] {
        let refusal = refuse(&args);
        refusal.says(1, &["300 tokens", "256 positions"]).hints(&["--max-seq-length"]);
    }
    assert!(files(&dir.path("run")).is_empty());
    let prompt = "a b".repeat(300);
    let args = ["generate", "--model", QUANTIZED, "--raw", "--prompt", &prompt];
    refuse(&args).says(1, &["the prompt has", "256 positions"]);
}

#[test]
fn an_adapter_of_other_shapes_is_refused_with_all_mismatches() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 2));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, &format!("{SHORT} --method dora --target-modules q_proj,down_proj"));
    // Without `qpeft.json` nothing but the shapes can tell.
    let plain = dir.path("plain");
    adapter(&run).write(Path::new(&plain)).unwrap();
    let refusal = refuse(&eval_adapter(DENSE, &data, &plain));
    let module = |layer: u8, name: &str| format!("`base_model.model.model.layers.{layer}.{name}`");
    let of = |name: &str, found: &str, expected: &str| {
        format!("\n  {} has shape {found}, expected {expected}", module(0, name))
    };
    let missing =
        |name: &str, expected: &str| format!("\n  {} is missing, expected shape {expected}", module(1, name));
    let all = [
        of("self_attn.q_proj.lora_A.weight", "[4, 256]", "[4, 128]"),
        of("self_attn.q_proj.lora_B.weight", "[256, 4]", "[128, 4]"),
        of("self_attn.q_proj.lora_magnitude_vector", "[256]", "[128]"),
        of("mlp.down_proj.lora_B.weight", "[256, 4]", "[128, 4]"),
        of("mlp.down_proj.lora_magnitude_vector", "[256]", "[128]"),
        missing("self_attn.q_proj.lora_A.weight", "[4, 128]"),
        missing("self_attn.q_proj.lora_B.weight", "[128, 4]"),
        missing("self_attn.q_proj.lora_magnitude_vector", "[128]"),
        missing("mlp.down_proj.lora_A.weight", "[4, 256]"),
        missing("mlp.down_proj.lora_B.weight", "[128, 4]"),
        missing("mlp.down_proj.lora_magnitude_vector", "[128]"),
    ];
    let parts: Vec<&str> = all.iter().map(String::as_str).collect();
    refusal.says(1, &["11 mismatches"]).says(1, &parts).hints(&["the model that the adapter was trained on"]);
    assert_eq!(refusal.error.lines().count(), 1 + all.len());

    // Training and merging read an adapter no differently.
    let flags = format!("{SHORT} --method dora --init-adapter {plain}");
    assert_eq!(refuse(&train_args(DENSE, &data, &dir.path("new"), &flags)).error, refusal.error);
}

#[test]
fn an_adapter_with_a_value_that_is_not_finite_is_refused() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 3));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, SHORT);
    for value in [f32::NAN, f32::INFINITY] {
        let mut broken = adapter(&run);
        let module = "model.layers.0.mlp.up_proj";
        let mut tensor = broken.get(module, Part::B).unwrap().clone();
        tensor.data[17] = value;
        broken.insert(module, Part::B, tensor);
        let folder = dir.path("broken");
        broken.write(Path::new(&folder)).unwrap();
        let part = format!("mlp.up_proj.lora_B.weight` holds {value} at element 17");
        refuse(&eval_adapter(QUANTIZED, &data, &folder)).says(1, &["1 mismatch:", &part]);
        let merged = dir.path("merged.gguf");
        let args = ["merge", "--model", QUANTIZED, "--adapter", &folder, "--output", &merged];
        refuse(&args).says(1, &[&part]);
        assert!(!Path::new(&merged).exists());
    }
}

#[test]
fn the_wrong_base_is_refused_by_its_fingerprint() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 4));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, SHORT);
    // One bit of one weight, in a copy of the same name, type and shape.
    let mut bytes = std::fs::read(QUANTIZED).unwrap();
    let end = bytes.len() - 1;
    bytes[end] ^= 1;
    let other = dir.write("other.gguf", &bytes);
    for model in [&other, DENSE] {
        let refusal = refuse(&eval_adapter(model, &data, &run));
        let file = "(`tiny-llama-256.Q4_K.gguf`)";
        refusal.says(
            1,
            &["was trained on another base", model, "fingerprint blake3:", "expected blake3:", file],
        );
        refusal.hints(&["--model", "tiny-llama-256.Q4_K.gguf"]);
        let merged = dir.path("merged.gguf");
        let merge = ["merge", "--model", model, "--adapter", &run, "--output", &merged];
        assert_eq!(refuse(&merge), refusal);
        let generate = ["generate", "--model", model, "--adapter", &run, "--prompt", "a"];
        assert_eq!(refuse(&generate), refusal);
        assert!(!Path::new(&merged).exists());
    }
    for method in ["lora", "pissa"] {
        let first = dir.path(method);
        train(QUANTIZED, &data, &first, &format!("{SHORT} --method {method}"));
        let flags = format!("{SHORT} --method {method} --init-adapter {first}");
        let refusal = refuse(&train_args(&other, &data, &dir.path("further"), &flags));
        refusal.says(1, &["was trained on another base", &other]);
        assert!(files(&dir.path("further")).is_empty());
    }
    let before = files(&run);
    let refusal = refuse(&train_args(&other, &data, &run, &format!("{SHORT} --resume")));
    refusal.says(1, &["another base model", "fingerprint"]).hints(&["--model"]);
    assert_eq!(files(&run), before);
}

#[test]
fn a_raw_pissa_adapter_is_refused_on_the_original_base() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 5));
    let run = dir.path("run");
    let flags = format!("{SHORT} --method pissa");
    train(QUANTIZED, &data, &run, &flags);
    let raw = dir.path("raw");
    adapter(&run).write(Path::new(&raw)).unwrap();
    let without_init = dir.copy(&run, "without-init");
    std::fs::remove_dir_all(format!("{without_init}/init")).unwrap();
    for folder in [&raw, &without_init] {
        let refusal = refuse(&eval_adapter(QUANTIZED, &data, folder));
        refusal
            .says(1, &[folder, "raw PiSSA adapter", "no `init` folder"])
            .hints(&["pissa-to-lora", "run folder"]);
        let merged = dir.path("merged.gguf");
        let args = ["merge", "--model", QUANTIZED, "--adapter", folder, "--output", &merged];
        assert_eq!(refuse(&args), refusal);
        let converted = dir.path("converted");
        let args = ["convert", "pissa-to-lora", "--adapter", folder, "--output", &converted];
        refuse(&args).says(1, &["init/manifest.json"]);
        assert!(!Path::new(&merged).exists() && !Path::new(&converted).exists());
    }

    // The residual is never made again: a second split would be another one.
    let before = files(&without_init);
    let refusal = refuse(&train_args(QUANTIZED, &data, &without_init, &format!("{flags} --resume")));
    refusal.says(1, &["init/manifest.json"]).hints(&["cannot be recomputed"]);
    assert_eq!(files(&without_init), before);

    // Nor does it become an adapter of another kind.
    let refusal =
        refuse(&train_args(QUANTIZED, &data, &dir.path("new"), &format!("{SHORT} --init-adapter {run}")));
    refusal.says(1, &["PiSSA adapter"]).hints(&["--method pissa"]);

    let args = ["convert", "pissa-to-lora", "--adapter", &run, "--output", &dir.path("c"), "--model", DENSE];
    refuse(&args).says(1, &["is not the base that the run split", "fingerprint"]);
}

#[test]
fn a_damaged_residual_base_is_refused() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 6));
    let run = dir.path("run");
    let flags = format!("{SHORT} --method pissa");
    train(QUANTIZED, &data, &run, &flags);
    let residual = format!("{run}/init/residual.gguf");
    let mut bytes = std::fs::read(&residual).unwrap();
    let end = bytes.len() - 1;
    bytes[end] ^= 1;
    std::fs::write(&residual, &bytes).unwrap();
    let before = files(&run);
    let resume = train_args(QUANTIZED, &data, &run, &format!("{flags} --resume"));
    for args in [eval_adapter(QUANTIZED, &data, &run), resume] {
        let refusal = refuse(&args);
        refusal.says(1, &[&at(&residual), "fingerprint blake3:", "expected blake3:"]);
        refusal.hints(&["cannot be recomputed"]);
    }
    std::fs::write(format!("{run}/init/manifest.json"), "{}").unwrap();
    refuse(&eval_adapter(QUANTIZED, &data, &run)).says(1, &["init/manifest.json", "missing field"]);
    std::fs::write(format!("{run}/init/manifest.json"), &before[0].1).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_refused_and_the_one_before_it_serves() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 7));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, SHORT);
    let trained = common::adapter_bytes(&run);
    let resume = train_args(QUANTIZED, &data, &run, &format!("{SHORT} --resume"));
    let checkpoint = format!("{run}/checkpoints/step-4");
    let tensors = format!("{checkpoint}/tensors.safetensors");
    let good = std::fs::read(&tensors).unwrap();

    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0x10;
    for damaged in [&flipped[..], &good[..good.len() - 1], &[]] {
        std::fs::write(&tensors, damaged).unwrap();
        let before = files(&run);
        let refusal = refuse(&resume);
        refusal.says(1, &[&at(&tensors), "blake3"]).hints(&[
            "delete",
            &checkpoint,
            "the checkpoint before it",
        ]);
        assert_eq!(files(&run), before);
    }
    std::fs::remove_file(&tensors).unwrap();
    refuse(&resume).says(1, &[&at(&tensors), "is missing"]).hints(&["delete"]);
    std::fs::write(&tensors, &good).unwrap();
    let state = format!("{checkpoint}/state.json");
    std::fs::write(&state, "{\"layout\": 1").unwrap();
    refuse(&resume).says(1, &[&at(&state)]);

    // What the hint says helps.
    std::fs::remove_dir_all(&checkpoint).unwrap();
    succeed(&resume);
    assert_eq!(common::adapter_bytes(&run), trained);
}

#[test]
fn a_run_is_resumed_only_as_what_it_was() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 8));
    let other = dir.write("other.jsonl", sequences(4, 12, 9));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, SHORT);
    let before = files(&run);
    let resume = format!("{SHORT} --resume");
    refuse(&train_args(QUANTIZED, &other, &run, &resume))
        .says(1, &["other data", "blake3"])
        .hints(&["--data"]);
    refuse(&train_args(QUANTIZED, &data, &run, &format!("{resume} --seed 7 --weight-decay 0.5")))
        .says(1, &["`seed` is `7`, expected `42`; `weight_decay` is `0.5`, expected `0.0`"])
        .hints(&["the same settings"]);
    assert_eq!(files(&run), before);
    let none = dir.path("none");
    refuse(&train_args(QUANTIZED, &data, &none, &resume))
        .says(1, &["has no checkpoint"])
        .hints(&["--resume"]);
}

#[test]
fn a_run_is_not_mixed_with_another() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 10));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, SHORT);
    let before = files(&run);
    let refusal = refuse(&train_args(QUANTIZED, &data, &run, SHORT));
    refusal.says(2, &["--output", &run, "holds a run"]).hints(&["--resume", "--overwrite-output"]);
    refuse(&train_args(QUANTIZED, &data, &run, &format!("{SHORT} --resume --overwrite-output")))
        .says(2, &["exclude each other"]);
    // A run that is to be replaced stays until the new one is accepted.
    let replace = format!("{SHORT} --overwrite-output");
    refuse(&train_args(&dir.path("none.gguf"), &data, &run, &replace)).says(2, &["none.gguf"]);
    refuse(&train_args(QUANTIZED, &dir.path("none.jsonl"), &run, &replace)).says(2, &["none.jsonl"]);
    refuse(&train_args(QUANTIZED, &data, &run, &format!("{replace} --target-modules x_proj")))
        .says(1, &["x_proj"]);
    assert_eq!(files(&run), before);
}

#[test]
fn an_existing_file_is_not_overwritten() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 11));
    let (run, pissa) = (dir.path("run"), dir.path("pissa"));
    train(QUANTIZED, &data, &run, SHORT);
    train(QUANTIZED, &data, &pissa, &format!("{SHORT} --method pissa"));
    let precious = dir.write("precious.gguf", "not to be lost");
    let args = ["merge", "--model", QUANTIZED, "--adapter", &run, "--output", &precious];
    refuse(&args).says(2, &["--output", &precious, "exists"]).hints(&["--overwrite-output"]);
    let folder = dir.copy(&run, "folder");
    let before = files(&folder);
    let args = ["convert", "pissa-to-lora", "--adapter", &pissa, "--output", &folder];
    refuse(&args).says(2, &["--output", &folder, "exists"]).hints(&["--overwrite-output"]);
    assert_eq!(files(&folder), before);
    // A refusal later on loses nothing either.
    let none = dir.path("none");
    let args =
        ["merge", "--model", QUANTIZED, "--adapter", &none, "--output", &precious, "--overwrite-output"];
    refuse(&args).says(2, &[&none]);
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "not to be lost");
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_any_work() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 12));
    let file = dir.write("file", "not to be lost");
    for output in [file.clone(), format!("{file}/run")] {
        let refusal = refuse(&train_args(QUANTIZED, &data, &output, SHORT));
        refusal.says(2, &[&format!("cannot create `{output}`")]);
        // The model is not even opened.
        assert_eq!(refuse(&train_args("none.gguf", &data, &output, SHORT)), refusal);
    }
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, SHORT);
    let output = format!("{file}/merged.gguf");
    let args = ["merge", "--model", QUANTIZED, "--adapter", &run, "--output", &output];
    refuse(&args).says(2, &[&output]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "not to be lost");
}

#[cfg(unix)]
#[test]
fn a_read_only_output_folder_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 13));
    let locked = dir.path("locked");
    std::fs::create_dir(&locked).unwrap();
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o555)).unwrap();
    if std::fs::write(format!("{locked}/probe"), "").is_ok() {
        // Permissions do not bind the superuser; the test above covers what does.
        return;
    }
    for output in [locked.clone(), format!("{locked}/run")] {
        refuse(&train_args(QUANTIZED, &data, &output, SHORT)).says(2, &[&locked, "ermission denied"]);
    }
    assert!(files(&locked).is_empty());
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 16, 14));
    let run = dir.path("run");
    // The first step of the warmup has rate 0, the second ruins the parameters, the third shows it.
    let flags =
        "--lora-r 4 --batch-size 2 --max-steps 9 --save-steps 1 --warmup-steps 1 --learning-rate 1e30";
    let refusal = refuse(&train_args(QUANTIZED, &data, &run, flags));
    let kept = format!("{run}/checkpoints/step-1");
    refusal.says(1, &["step 3: the loss is NaN", &format!("`{kept}` is kept")]);
    refusal.hints(&["lower `--learning-rate`", &format!("--init-adapter {kept}")]);
    assert!(!Path::new(&format!("{run}/adapter_model.safetensors")).exists());
    assert_eq!(common::step_losses(&run).len(), 2);

    // It is good, and what the hint says helps.
    assert!(eval_loss(QUANTIZED, &data, Some(&kept)).is_finite());
    let flags = format!("--lora-r 4 --batch-size 2 --max-steps 4 --learning-rate 1e-3 --init-adapter {kept}");
    train(QUANTIZED, &data, &dir.path("lower"), &flags);

    // Pruning does not take the good one for the sake of the bad one.
    let pruned = dir.path("pruned");
    let flags = "--lora-r 4 --batch-size 2 --max-steps 9 --save-steps 1 --warmup-steps 1 --learning-rate 1e30 --save-total-limit 1";
    refuse(&train_args(QUANTIZED, &data, &pruned, flags)).says(1, &["checkpoints/step-1` is kept"]);
    assert!(eval_loss(QUANTIZED, &data, Some(&format!("{pruned}/checkpoints/step-1"))).is_finite());
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 15));
    let (none, run) = (dir.path("none"), dir.path("run"));
    for args in [train_args(&none, &data, &run, ""), eval(&none, &data)] {
        refuse(&args).says(2, &[&at(&none)]).hints(&["check the path"]);
    }
    for args in [train_args(QUANTIZED, &none, &run, ""), eval(QUANTIZED, &none)] {
        refuse(&args).says(2, &[&at(&none)]);
    }
    refuse(&eval_adapter(QUANTIZED, &data, &none)).says(2, &[&none, "adapter_config.json"]);
    refuse(&train_args(QUANTIZED, &data, &run, &format!("--init-adapter {none}"))).says(2, &[&none]);
    let refusal = refuse(&train_args(QUANTIZED, &data, &run, "--target-modules q_proj,x_proj"));
    refusal.says(1, &["target module `x_proj`"]).hints(&["q_proj, k_proj", "all-linear"]);
    let refusal = refuse(&train_args(QUANTIZED, &data, &run, "--method dura"));
    refusal.says(2, &["--method", "`lora`, `dora`, `pissa`", "found `dura`"]);
    assert!(files(&run).is_empty());
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 16));
    let mut devices = vec!["cuda:99", "cuda:x", "tpu"];
    if Cuda::count().is_err() {
        devices.push("cuda");
    }
    // What is missing depends on the machine; the code and the way out do not.
    for device in devices {
        let refusal = refuse(&train_args(QUANTIZED, &data, &dir.path("run"), &format!("--device {device}")));
        refusal.says(2, &[device]).hints(&["--device cpu"]);
    }
    assert!(!Path::new(&dir.path("run")).exists());
}

#[test]
fn an_adapter_is_trained_further_only_as_what_it_is() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 18));
    for (is, given) in [("lora", "dora"), ("dora", "lora")] {
        let run = dir.path(is);
        train(QUANTIZED, &data, &run, &format!("{SHORT} --method {is}"));
        let flags = format!("{SHORT} --method {given} --init-adapter {run}");
        let refusal = refuse(&train_args(QUANTIZED, &data, &dir.path("new"), &flags));
        refusal.says(1, &["--init-adapter"]).hints(&[&format!("`--method {is}`")]);
    }
}

#[test]
fn a_run_that_does_not_fit_into_the_memory_limit_is_refused_before_any_weight_is_loaded() {
    let shape = ["plan", "--shape", "llama-3.1-8b", "--memory-limit"];
    let refusal = refuse(&[&shape[..], &["1GiB"]].concat());
    refusal.says(1, &["does not fit into 1.00 GiB", "one sequence of 2048 tokens", "weights 4.34"]);
    refusal.hints(&["fewer bits"]);
    // Where the weights fit, the length is at fault.
    let refusal = refuse(&[&shape[..], &["9GiB", "--max-seq-length", "60000"]].concat());
    refusal.says(1, &["does not fit into 9.00 GiB", "one sequence of 60000 tokens"]);
    refusal.hints(&["--max-seq-length", "--memory-limit"]);
    let fits = common::json(&[&shape[..], &["9GiB"]].concat());
    let peak = fits["peak_bytes"].as_u64().unwrap();
    assert!(peak <= 9 << 30 && fits["parts"].as_object().unwrap().len() == 5, "{fits}");
    assert_eq!(fits["parts"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum::<u64>(), peak);
}

#[test]
fn heads_that_no_kernel_serves_are_refused_with_those_that_are_served() {
    let dir = Scratch::new();
    let model = dir.copy(DENSE, "model");
    let path = format!("{model}/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // The same matrices, cut into heads of eight.
    for (key, value) in [("head_dim", 8), ("num_attention_heads", 16), ("num_key_value_heads", 8)] {
        config[key] = value.into();
    }
    std::fs::write(&path, config.to_string()).unwrap();
    let refusal = refuse(&["plan", "--model", &model, "--memory-limit", "1GiB"]);
    refusal.says(2, &["8 elements a head (it has one for 16, 32, 64, 80, 96, 128, 256)"]);
    refusal.hints(&["--device cpu"]);
    // The CPU serves any.
    let data = dir.write("data.jsonl", sequences(2, 12, 1));
    succeed(&train_args(&model, &data, &dir.path("run"), "--lora-r 2 --batch-size 1 --max-steps 1"));
}
