//! PiSSA's residuals in a type of their own (`--residual-quant`): what it gains, where it is stored, and that every later
//! command goes on with it.

mod common;

use common::{
    DENSE, QUANTIZED, Scratch, adapter_bytes, assert_relative, eval_loss, eval_losses, files, json, refuse,
    sequences, succeed, train, train_args,
};
use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::GgufFile;
use serde_json::Value;

const PISSA: &str =
    "--method pissa --lora-r 8 --batch-size 2 --learning-rate 5e-3 --max-steps 4 --save-steps 2";

fn read(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn manifest(run: &str) -> Value {
    read(&format!("{run}/init/manifest.json"))
}

#[test]
fn a_finer_residual_leaves_the_model_nearly_as_it_was() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 1));
    let runs = ["", "--residual-quant q8_0"].map(|flag| {
        let run = dir.path(&flag.replace(' ', ""));
        train(QUANTIZED, &data, &run, &format!("{PISSA} --eval-data {data} {flag}"));
        run
    });
    let [own, finer] = [&runs[0], &runs[1]].map(|run| manifest(run));
    let error = |manifest: &Value| manifest["quantization_error"].as_f64().unwrap();
    // Q4_K has 15 steps and Q8_0 has 254 for a range that is hardly wider.
    assert!(error(&finer) < 0.1 * error(&own), "{} for {}", error(&finer), error(&own));
    assert_eq!(own["captured"], finer["captured"]);
    let base = eval_loss(QUANTIZED, &data, None);
    let moved = [&runs[0], &runs[1]].map(|run| (eval_losses(run)[0] - base).abs());
    assert!(moved[1] < 0.2 * moved[0] && moved[1] < 1e-3 * base, "{moved:?} of {base}");

    // The type is recorded, and only the targets have it.
    assert_eq!(finer["settings"]["residual_type"], "Q8_0");
    assert!(own["settings"].get("residual_type").is_none());
    assert!(finer["tensors"].as_array().unwrap().iter().all(|tensor| tensor["residual_type"] == "Q8_0"));
    assert_eq!(read(&format!("{}/qpeft.json", runs[1]))["config"]["residual_quant"], "Q8_0");
    let open = |path: &str| GgufFile::open(Path::new(path)).unwrap();
    let (before, after) = (open(QUANTIZED), open(&format!("{}/init/residual.gguf", runs[1])));
    for (a, b) in before.tensors().iter().zip(after.tensors()) {
        let is_target = a.name.starts_with("blk.") && a.shape.len() == 2;
        assert_eq!(b.dtype, if is_target { GgmlType::Q8_0 } else { a.dtype }, "{}", a.name);
    }
}

#[test]
fn refined_splits_lose_less_and_are_found_again() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 4));
    let [plain, refined] = ["plain", "refined"].map(|name| dir.path(name));
    let flags = format!("{PISSA} --pissa-refinements 2");
    train(QUANTIZED, &data, &plain, PISSA);
    train(QUANTIZED, &data, &refined, &flags);
    let error = |run: &str| manifest(run)["quantization_error"].as_f64().unwrap();
    assert!(error(&refined) < 0.98 * error(&plain), "{} for {}", error(&refined), error(&plain));
    assert_eq!(manifest(&refined)["settings"]["refinements"], 2);
    assert!(manifest(&plain)["settings"].get("refinements").is_none());
    let said = train(QUANTIZED, &data, &refined, &format!("{flags} --overwrite-output"));
    assert!(!said.contains("split (PiSSA)"), "{said}");
    let said = train(QUANTIZED, &data, &refined, &format!("{PISSA} --overwrite-output"));
    assert!(said.contains("split (PiSSA)"), "{said}");

    let factors = format!("{flags} --init-adapter {plain}");
    refuse(&train_args(QUANTIZED, &data, &dir.path("given"), &factors))
        .says(2, &["--pissa-refinements", "--init-adapter", "factors"]);
    let (rank, run) = ("--method pissa --max-steps 1 --lora-r 300", dir.path("rank"));
    refuse(&train_args(QUANTIZED, &data, &run, rank)).says(1, &["--lora-r 300", "q_proj", "256"]);
    let other = "--method lora --max-steps 1 --pissa-refinements 1";
    refuse(&train_args(QUANTIZED, &data, &dir.path("lora"), other))
        .says(2, &["--pissa-refinements", "--method lora", "splits no weight"]);
}

#[test]
fn every_later_command_goes_on_with_the_residual() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 2));
    let run = dir.path("run");
    let flags = format!("{PISSA} --eval-data {data} --residual-quant q8_0");
    train(QUANTIZED, &data, &run, &flags);
    let trained = *eval_losses(&run).last().unwrap();
    assert_eq!(eval_loss(QUANTIZED, &data, Some(&run)), trained);

    let (lora, merged) = (dir.path("lora"), dir.path("merged.gguf"));
    let args = ["convert", "pissa-to-lora", "--adapter", &run, "--output", &lora, "--model", QUANTIZED];
    assert_eq!(json(&args)["residual_quantization_error"], manifest(&run)["quantization_error"]);
    assert_relative(eval_loss(QUANTIZED, &data, Some(&lora)), trained, 1e-3);
    succeed(&["merge", "--model", QUANTIZED, "--adapter", &run, "--output", &merged, "--device", "cpu"]);
    assert_relative(eval_loss(&merged, &data, None), trained, 1e-3);

    let resumed = dir.copy(&run, "resumed");
    std::fs::remove_dir_all(format!("{resumed}/checkpoints/step-4")).unwrap();
    std::fs::remove_file(format!("{resumed}/adapter_model.safetensors")).unwrap();
    // Another type is another run.
    let other = format!("{PISSA} --eval-data {data} --residual-quant bf16 --resume");
    refuse(&train_args(QUANTIZED, &data, &resumed, &other)).says(1, &["residual_quant", "Q8_0", "BF16"]);
    train(QUANTIZED, &data, &resumed, &format!("{flags} --resume"));
    assert_eq!(adapter_bytes(&resumed), adapter_bytes(&run));

    // The split of these settings is found again, that of others is made.
    let said = train(QUANTIZED, &data, &resumed, &format!("{flags} --overwrite-output"));
    assert!(!said.contains("split (PiSSA)"), "{said}");
    // An adapter that is trained further keeps its own split, and the run says so.
    let further = dir.path("further");
    let said = train(
        QUANTIZED,
        &data,
        &further,
        &format!("{PISSA} --lora-alpha 8 --residual-quant bf16 --init-adapter {run}"),
    );
    assert!(said.contains("keeps its own residual_quant (Q8_0)"), "{said}");
    assert_eq!(read(&format!("{further}/qpeft.json"))["config"]["residual_quant"], "Q8_0");
    let said = train(QUANTIZED, &data, &resumed, &format!("{PISSA} --overwrite-output"));
    assert!(said.contains("split (PiSSA)"), "{said}");
    assert!(manifest(&resumed)["settings"].get("residual_type").is_none());
}

#[test]
fn the_residual_of_a_folder_is_dense_or_in_a_type_of_bitsandbytes() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 3));
    let packed = dir.path("packed");
    succeed(&["quantize", "--model", DENSE, "--quant", "nf4-dq", "--output", &packed]);
    let cases = [
        (DENSE, "", "nf4", Some("nf4")),
        (DENSE, "--target-modules q_proj,down_proj", "nf4-dq", None),
        (&packed, "", "bf16", None),
        (&packed, "--target-modules v_proj", "int8", Some("nf4")),
    ];
    for (index, (model, flags, to, quantization)) in cases.into_iter().enumerate() {
        let run = dir.path(&format!("run-{index}"));
        train(model, &data, &run, &format!("{PISSA} {flags} --eval-data {data} --residual-quant {to}"));
        let manifest = manifest(&run);
        let tensors = manifest["tensors"].as_array().unwrap();
        let is_to = |t: &Value| t["residual_type"].as_str().unwrap().eq_ignore_ascii_case(to);
        assert!(tensors.iter().all(is_to), "{manifest}");
        let evals = eval_losses(&run);
        assert_relative(evals[0], eval_loss(model, &data, None), 0.02);
        assert_eq!(eval_loss(model, &data, Some(&run)), evals[1], "{to}");
        // What is said of all linears is true of all, or of those that were left alone.
        let config = read(&format!("{run}/init/residual/config.json"));
        assert_eq!(config["quantization_config"]["bnb_4bit_quant_type"].as_str(), quantization, "{to}");
        let merged = dir.path(&format!("merged-{index}"));
        let args = ["merge", "--model", model, "--adapter", &run, "--to", "safetensors", "--output", &merged];
        succeed(&[&args[..], &["--dtype", "f32", "--device", "cpu"]].concat());
        assert_relative(eval_loss(&merged, &data, None), evals[1], 1e-5);
    }
}

#[test]
fn what_cannot_be_stored_is_refused_before_anything_is_split() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 12, 4));
    let narrow = dir.path("narrow.gguf");
    succeed(&["convert", "hf-to-gguf", "--model", DENSE, "--output", &narrow]);
    for (model, to, says, hint) in [
        (
            QUANTIZED,
            "nf4",
            "a GGUF file, which cannot hold `--residual-quant nf4`; it holds ggml's types",
            "q8_0",
        ),
        (
            DENSE,
            "q8_0",
            "a Hugging Face folder, which cannot hold `--residual-quant Q8_0`; it holds nf4",
            "bf16",
        ),
        (
            &narrow,
            "q6_k",
            "the residual of `model.layers.0.self_attn.q_proj` cannot be stored in Q6_K: row length 128 is not a multiple of the Q6_K block length 256",
            "`--residual-quant`: q8_0",
        ),
    ] {
        let run = dir.path("refused");
        let refusal = refuse(&train_args(model, &data, &run, &format!("{PISSA} --residual-quant {to}")));
        refusal.says(1, &[model, says]).hints(&[hint]);
        assert!(files(&run).is_empty());
    }
    // Rows of the targets alone count: those of `down_proj` are 256 long.
    let flags = format!("{PISSA} --residual-quant q6_k --target-modules down_proj");
    train(&narrow, &data, &dir.path("run"), &flags);

    let config = dir.write("run.yaml", "residual_quant: q8_0\n");
    for flags in
        ["--method lora --residual-quant q8_0".to_owned(), format!("--method dora --config {config}")]
    {
        let refusal = refuse(&train_args(QUANTIZED, &data, &dir.path("refused"), &flags));
        refusal.says(2, &["`--residual-quant` does nothing with `--method"]).hints(&["--method pissa"]);
    }
}

#[test]
fn a_plan_counts_the_residuals_in_their_type() {
    let weights = |flags: &[&str]| {
        let plan = ["plan", "--shape", "llama-3.2-1b", "--method", "pissa", "--memory-limit", "64GiB"];
        json(&[&plan[..], flags].concat())["parts"]["packed base"].as_u64().unwrap() as f64
    };
    let (own, finer) =
        (weights(&["--base", "q4_0"]), weights(&["--base", "q4_0", "--residual-quant", "q8_0"]));
    // 16 layers of 60.8 million weights; four more bits each.
    let linears = 16.0 * (2048.0 * (2.0 * 2048.0 + 2.0 * 512.0) + 3.0 * 2048.0 * 8192.0);
    assert_relative(finer - own, 0.5 * linears, 1e-3);
    refuse(&["plan", "--shape", "llama-3.2-1b", "--residual-quant", "q8_0", "--memory-limit", "64GiB"])
        .says(2, &["`--method lora`"]);
}
