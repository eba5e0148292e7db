//! What a command may write over, and what it must leave alone.

mod common;

use std::path::Path;
use std::process::Stdio;

use common::{DENSE, QUANTIZED, Scratch, command, refuse, sequences, succeed, train, train_args};

const LORA: &str = "--method lora --lora-r 4 --batch-size 2 --max-steps 2 --warmup-steps 0";

/// A run and the data that it saw.
fn trained(dir: &Scratch, model: &str) -> (String, String) {
    let (data, run) = (dir.write("data.jsonl", sequences(8, 24, 1)), dir.path("run"));
    train(model, &data, &run, LORA);
    (data, run)
}

#[test]
fn a_folder_is_replaced_as_a_whole_only_where_it_holds_a_model_alone() {
    let dir = Scratch::new();
    let (_, run) = trained(&dir, DENSE);
    let merge = |model: &str, output: &str| {
        [
            "merge",
            "--model",
            model,
            "--adapter",
            &run,
            "--to",
            "safetensors",
            "--output",
            output,
            "--overwrite-output",
        ]
        .map(str::to_owned)
    };
    let other = dir.path("other");
    std::fs::create_dir(&other).unwrap();
    let kept = dir.write("other/thesis.txt", "years of work");
    refuse(&merge(DENSE, &other)).says(2, &["--output", "other", "`config.json`"]).hints(&["another path"]);
    let convert = ["convert", "gguf-to-hf", "--model", QUANTIZED, "--output", &other, "--overwrite-output"];
    refuse(&convert).says(2, &["no model folder"]);
    let quantize = ["quantize", "--model", DENSE, "--quant", "nf4", "--output", &other, "--overwrite-output"];
    refuse(&quantize).says(2, &["no model folder"]);
    assert_eq!(std::fs::read(&kept).unwrap(), b"years of work");

    let merged = dir.path("merged");
    succeed(&merge(DENSE, &merged));
    succeed(&merge(DENSE, &merged));
    std::fs::create_dir(dir.path("merged/notes")).unwrap();
    refuse(&merge(DENSE, &merged)).says(2, &["holds the folder `notes`"]);

    let sized =
        ["merge", "--model", DENSE, "--adapter", &run, "--max-shard-size", "1", "--output", &dir.path("a")];
    refuse(&sized).says(2, &["`--max-shard-size`"]).hints(&["--split-max-size"]);

    // The base and the run are read.
    let base = dir.copy(DENSE, "base");
    refuse(&merge(&base, &base)).says(2, &["would replace", "base", "which the command reads"]);
    refuse(&merge(DENSE, &run)).says(2, &["would replace", "run"]);
    assert!(Path::new(&run).join("adapter_model.safetensors").exists());
    let gguf = dir.path("base.gguf");
    std::fs::copy(QUANTIZED, &gguf).unwrap();
    let onto_itself =
        ["quantize", "--model", &gguf, "--quant", "q8_0", "--output", &gguf, "--overwrite-output"];
    refuse(&onto_itself).says(2, &["would replace"]);
    assert_eq!(std::fs::read(&gguf).unwrap(), std::fs::read(QUANTIZED).unwrap());
}

#[test]
fn logits_replace_an_earlier_dump_only() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(1, 8, 1));
    let eval = |dump: &str| {
        ["eval", "--model", QUANTIZED, "--data", &data, "--dump-logits", dump].map(str::to_owned)
    };
    let dump = dir.path("logits.safetensors");
    succeed(&eval(&dump));
    succeed(&eval(&dump));
    let before = std::fs::read(&data).unwrap();
    refuse(&eval(&data)).says(2, &["--dump-logits", "no dump of logits"]);
    assert_eq!(std::fs::read(&data).unwrap(), before);
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let dir = Scratch::new();
    let (data, run) = (dir.write("data.jsonl", sequences(8, 24, 1)), dir.path("run"));
    let long = train_args(QUANTIZED, &data, &run, "--method lora --max-steps 100000 --save-steps 1");
    let mut first = command(&long).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let step = Path::new(&run).join("checkpoints/step-1");
    while !step.exists() {
        assert!(first.try_wait().unwrap().is_none(), "the first run ended");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for flag in ["--overwrite-output", "--resume"] {
        let second = train_args(QUANTIZED, &data, &run, &format!("{LORA} {flag}"));
        refuse(&second).says(1, &["another run is writing to", "run"]).hints(&["another `--output`"]);
    }
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock went with the process.
    train(QUANTIZED, &data, &run, &format!("{LORA} --overwrite-output"));
}

#[cfg(unix)]
#[test]
fn paths_that_are_no_text_are_refused() {
    use std::os::unix::ffi::OsStringExt;
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(1, 8, 1));
    let name = std::ffi::OsString::from_vec(b"out\xff".to_vec());
    let args = train_args(QUANTIZED, &data, "x", LORA);
    let output = command(&args[..args.len()]).arg("--output").arg(&name).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not UTF-8"), "{output:?}");
}

#[test]
fn adapters_whose_base_was_changed_at_their_start_are_refused() {
    let dir = Scratch::new();
    let (data, run) = trained(&dir, QUANTIZED);
    let path = Path::new(&run).join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    for (init, fits) in
        [("olora", false), ("corda", false), ("loftq", false), ("lora_ga", false), ("gaussian", true)]
    {
        std::fs::write(
            &path,
            text.replace("\"init_lora_weights\": true", &format!("\"init_lora_weights\": \"{init}\"")),
        )
        .unwrap();
        let eval = ["eval", "--model", QUANTIZED, "--adapter", &run, "--data", &data];
        if fits {
            succeed(&eval);
        } else {
            refuse(&eval).says(1, &["init_lora_weights", init, "not supported"]).hints(&["plain LoRA"]);
        }
    }
}

#[test]
fn settings_that_do_nothing_or_teach_nothing_are_said() {
    let dir = Scratch::new();
    let (data, run) = trained(&dir, QUANTIZED);
    let flags = format!("{LORA} --init-adapter {run} --target-modules q_proj");
    let said = train(QUANTIZED, &data, &dir.path("further"), &flags);
    assert!(said.contains("keeps its own target_modules"), "{said}");
    let said = train(QUANTIZED, &data, &dir.path("one"), "--method lora --max-steps 1");
    assert!(said.contains("nothing will be learned"), "{said}");
    let said = train(QUANTIZED, &data, &dir.path("two"), "--method lora --max-steps 1 --warmup-steps 0");
    assert!(!said.contains("nothing will be learned"), "{said}");

    let said = train(
        QUANTIZED,
        &data,
        &dir.path("idle"),
        &format!("{LORA} --eval-steps 1 --memory-limit 1GiB --device cpu"),
    );
    assert!(
        said.contains("`--eval-steps` does nothing") && said.contains("`--memory-limit` does nothing"),
        "{said}"
    );

    let long = ["generate", "--model", QUANTIZED, "--raw", "--prompt", "a b", "--max-new-tokens", "300"];
    let (_, said) = succeed(&long);
    assert!(said.contains("fit behind the prompt: the model has 256 positions"), "{said}");

    let config = dir.write("run.yaml", "no_progress: true\nquiet: false\nlearning_rate: 1e-3\n");
    train(QUANTIZED, &data, &dir.path("yaml"), &format!("{LORA} --config {config}"));
    let negative = train_args(QUANTIZED, &data, &dir.path("negative"), "--method lora --learning-rate -1");
    refuse(&negative).says(2, &["--learning-rate", "-1"]);
}
