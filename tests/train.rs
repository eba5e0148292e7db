//! Training through the binary on the bundled tiny models: it learns, it continues bit for bit, and what
//! it writes is what every later command computes with.

mod common;

use common::{
    DENSE, QUANTIZED, Scratch, adapter, adapter_bytes, assert_relative, eval_loss, eval_losses, json, log,
    refuse, sequences, step_losses, succeed, train, train_and_kill, train_args,
};
use std::path::Path;

use qpeft_formats::gguf::{GgufFile, GgufWriter, TensorDecl};
use qpeft_formats::peft::{InitLoraWeights, Part};
use qpeft_formats::{GgmlType, blocks};

/// Eight short examples, seen three times in twelve steps of two.
const SHORT: &str = "--lora-r 8 --batch-size 2 --learning-rate 5e-3";

const METHODS: [&str; 4] = ["lora", "dora", "pissa", "pissa --use-dora"];

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[test]
fn every_method_learns_on_a_quantized_base() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 1));
    for method in METHODS {
        let run = dir.path(&method.replace(' ', ""));
        let banner = train(QUANTIZED, &data, &run, &format!("{SHORT} --max-steps 40 --method {method}"));
        let losses = step_losses(&run);
        assert_eq!(losses.len(), 40);
        // One pass is four steps.
        let (before, after) = (mean(&losses[..4]), mean(&losses[36..]));
        assert!(after < 0.75 * before, "{method}: {before} -> {after}");

        let adapter = adapter(&run);
        let (pissa, dora) = (method.starts_with("pissa"), method.contains("dora"));
        assert_eq!((adapter.config.r, adapter.config.use_dora), (8, dora));
        assert_eq!(adapter.config.lora_alpha, if pissa { 8.0 } else { 32.0 });
        let is_pissa = adapter.config.init_lora_weights == InitLoraWeights::Named("pissa".into());
        assert_eq!(is_pissa, pissa, "{method}");
        assert_eq!(adapter.modules().len(), 7);
        let key = "model.layers.0.self_attn.k_proj";
        assert_eq!(adapter.get(key, Part::A).unwrap().shape, [8, 256]);
        assert_eq!(adapter.get(key, Part::B).unwrap().shape, [128, 8]);
        assert_eq!(adapter.get(key, Part::Magnitude).map(|m| m.shape.clone()), dora.then(|| vec![128]));
        for part in ["trainable", "memory", "masked", "7 linears", &adapter.config.r.to_string()] {
            assert!(banner.contains(part), "no `{part}` in\n{banner}");
        }
    }
}

#[test]
fn a_killed_run_continues_bit_for_bit() {
    // Steps of about 600 tokens: slow enough that the kill falls between them.
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(22, 90, 2));
    let held_out = dir.write("held-out.jsonl", sequences(3, 20, 3));
    let settings = [
        "--method dora --batch-size 8",
        "--method lora --batch-size 4 --gradient-accumulation-steps 2 --lora-dropout 0.1",
        "--method pissa --use-dora --batch-size 4 --gradient-accumulation-steps 2 --lora-dropout 0.1",
    ];
    for (index, settings) in settings.into_iter().enumerate() {
        let flags = format!(
            "{settings} --eval-data {held_out} --eval-steps 3 --max-steps 12 --save-steps 4 --lora-r 4 --learning-rate 2e-3"
        );
        let (straight, killed) =
            (dir.path(&format!("straight-{index}")), dir.path(&format!("killed-{index}")));
        train(QUANTIZED, &data, &straight, &flags);
        train_and_kill(&train_args(QUANTIZED, &data, &killed, &flags), &killed, 6);
        let resumed = train(QUANTIZED, &data, &killed, &format!("{flags} --resume"));
        assert!(resumed.contains("at step 5") || resumed.contains("at step 9"), "{resumed}");
        assert_eq!(adapter_bytes(&straight), adapter_bytes(&killed), "{settings}");
        assert_eq!(log(&straight), log(&killed), "{settings}");
        assert_eq!(step_losses(&killed).len(), 12);

        // A finished run that is resumed has nothing to do and changes nothing.
        let again = train(QUANTIZED, &data, &killed, &format!("{flags} --resume"));
        assert!(again.contains("at step 13"), "{again}");
        assert_eq!(adapter_bytes(&straight), adapter_bytes(&killed));
        assert_eq!(log(&straight), log(&killed));
    }
}

#[test]
fn recomputing_activations_changes_no_bit() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 4));
    for (index, model) in [QUANTIZED, DENSE].into_iter().enumerate() {
        let flags = format!("{SHORT} --method dora --lora-dropout 0.1 --max-steps 8");
        let (kept, again) = (dir.path(&format!("kept-{index}")), dir.path(&format!("again-{index}")));
        train(model, &data, &kept, &flags);
        train(model, &data, &again, &format!("{flags} --gradient-checkpointing"));
        assert_eq!(adapter_bytes(&kept), adapter_bytes(&again), "{model}");
        assert_eq!(log(&kept), log(&again));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 60, 5));
    for (index, method) in METHODS.into_iter().enumerate() {
        let flags = format!("{SHORT} --method {method} --max-steps 6 --threads");
        let runs = [1, 2, 3].map(|threads| {
            let run = dir.path(&format!("run-{index}-{threads}"));
            train(QUANTIZED, &data, &run, &format!("{flags} {threads}"));
            run
        });
        for run in &runs[1..] {
            assert_eq!(log(&runs[0]), log(run), "{method}");
            assert_eq!(adapter_bytes(&runs[0]), adapter_bytes(run), "{method}");
        }
    }
}

#[test]
fn two_micro_batches_of_one_are_a_batch_of_two() {
    let dir = Scratch::new();
    // Examples of different lengths: the mean is over tokens, not over examples.
    let data = dir.write("data.jsonl", sequences(8, 40, 6));
    let flags = "--lora-r 8 --learning-rate 2e-3 --method dora --max-steps 8";
    let (one, two) = (dir.path("one"), dir.path("two"));
    train(QUANTIZED, &data, &one, &format!("{flags} --batch-size 2"));
    train(QUANTIZED, &data, &two, &format!("{flags} --batch-size 1 --gradient-accumulation-steps 2"));
    let (one, two) = (step_losses(&one), step_losses(&two));
    assert_eq!((one.len(), two.len()), (8, 8));
    for (one, two) in one.iter().zip(&two) {
        assert_relative(*one, *two, 1e-5);
    }
}

#[test]
fn steps_are_counted_in_epochs_unless_their_number_is_given() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(10, 12, 7));
    let flags = "--lora-r 2 --batch-size 2 --gradient-accumulation-steps 2";
    let counts = [
        ("--num-train-epochs 1", 3),
        ("--num-train-epochs 2", 5),
        ("--num-train-epochs 0.5", 2),
        ("--max-steps 7", 7),
        ("--max-steps 2 --num-train-epochs 9", 2),
    ];
    for (index, (counted, steps)) in counts.into_iter().enumerate() {
        let run = dir.path(&format!("run-{index}"));
        train(QUANTIZED, &data, &run, &format!("{flags} {counted}"));
        assert_eq!(step_losses(&run).len(), steps, "{counted}");
    }
}

#[test]
fn file_order_is_kept_only_when_asked_for() {
    let dir = Scratch::new();
    let text = sequences(6, 20, 8);
    let data = dir.write("data.jsonl", &text);
    // So small a rate leaves the model as it is: each step's loss is that of its example.
    let flags = "--lora-r 2 --batch-size 1 --learning-rate 1e-12";
    let (kept, mixed) = (dir.path("kept"), dir.path("mixed"));
    train(QUANTIZED, &data, &kept, &format!("{flags} --no-shuffle"));
    train(QUANTIZED, &data, &mixed, flags);
    let (kept, mut mixed) = (step_losses(&kept), step_losses(&mixed));
    for (line, loss) in text.lines().zip(&kept) {
        let one = dir.write("one.jsonl", line);
        assert_relative(*loss, eval_loss(QUANTIZED, &one, None), 1e-6);
    }
    assert_ne!(kept, mixed);
    let mut sorted = kept;
    sorted.sort_by(f64::total_cmp);
    mixed.sort_by(f64::total_cmp);
    for (a, b) in sorted.iter().zip(&mixed) {
        assert_relative(*a, *b, 1e-6);
    }
}

#[test]
fn a_saved_adapter_is_trained_further() {
    let dir = Scratch::new();
    let text = sequences(8, 24, 9);
    let data = dir.write("data.jsonl", &text);
    let first: Vec<&str> = text.lines().take(2).collect();
    let first = dir.write("first.jsonl", first.join("\n"));
    for method in METHODS {
        let name = method.replace(' ', "");
        let (run, further) = (dir.path(&name), dir.path(&format!("{name}-further")));
        let flags = format!("{SHORT} --no-shuffle --method {method}");
        train(QUANTIZED, &data, &run, &format!("{flags} --max-steps 8"));
        train(QUANTIZED, &data, &further, &format!("{flags} --max-steps 3 --init-adapter {run}"));
        let expected = eval_loss(QUANTIZED, &first, Some(&run));
        assert_relative(step_losses(&further)[0], expected, 1e-6);
        assert!(expected < 0.95 * eval_loss(QUANTIZED, &first, None), "{method} did not learn");
        // What came out is complete: it runs on the base that was named.
        assert!(eval_loss(QUANTIZED, &first, Some(&further)) < expected, "{method}");
        if method.starts_with("pissa") {
            let init = |run: &str| common::files(&format!("{run}/init")).into_iter().map(|(_, bytes)| bytes);
            assert!(init(&run).eq(init(&further)), "{method}: the split is that of the first run");
        }
    }
}

#[test]
fn the_last_checkpoint_is_an_adapter_as_well() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 10));
    for method in ["dora", "pissa"] {
        let run = dir.path(method);
        train(
            QUANTIZED,
            &data,
            &run,
            &format!("{SHORT} --max-steps 6 --save-steps 2 --save-total-limit 2 --method {method}"),
        );
        let mut kept: Vec<_> = std::fs::read_dir(format!("{run}/checkpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        kept.sort();
        assert_eq!(kept, ["step-4", "step-6"]);
        let checkpoint = format!("{run}/checkpoints/step-6");
        assert_eq!(adapter_bytes(&checkpoint), adapter_bytes(&run));
        assert_eq!(eval_loss(QUANTIZED, &data, Some(&checkpoint)), eval_loss(QUANTIZED, &data, Some(&run)));
    }
}

#[test]
fn a_pissa_run_keeps_its_split_and_uses_it_again() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 11));
    let run = dir.path("run");
    let flags = format!("{SHORT} --method pissa --max-steps 4 --eval-data {data}");
    train(QUANTIZED, &data, &run, &flags);
    let init = || common::files(&format!("{run}/init"));
    let (before, trained) = (init(), adapter_bytes(&run));
    let names: Vec<_> = before.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "residual.gguf"]);

    // The same settings find the split by what it was made of; it is not even written again.
    let written = || std::fs::metadata(format!("{run}/init/residual.gguf")).unwrap().modified().unwrap();
    let at = written();
    let said = train(QUANTIZED, &data, &run, &format!("{flags} --overwrite-output"));
    assert!(!said.contains("split (PiSSA)"), "{said}");
    assert_eq!(written(), at);
    assert_eq!(init(), before);
    assert_eq!(adapter_bytes(&run), trained);

    // Another rank is another split.
    let said = train(QUANTIZED, &data, &run, &format!("{flags} --overwrite-output --seed 7"));
    assert!(said.contains("split (PiSSA)"), "{said}");
    assert_ne!(init(), before);
}

#[test]
fn a_pissa_adapter_finds_its_residual_base() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 12));
    for (index, model) in [QUANTIZED, DENSE].into_iter().enumerate() {
        let run = dir.path(&format!("run-{index}"));
        train(model, &data, &run, &format!("{SHORT} --method pissa --max-steps 6 --eval-data {data}"));
        let evals = eval_losses(&run);
        assert_eq!(evals.len(), 2);
        assert_eq!(eval_loss(model, &data, Some(&run)), evals[1]);

        // The initial factors on the residual are the model that training began with ...
        let initial = dir.copy(&run, &format!("initial-{index}"));
        std::fs::copy(
            format!("{run}/init/adapter_model.safetensors"),
            format!("{initial}/adapter_model.safetensors"),
        )
        .unwrap();
        assert_eq!(eval_loss(model, &data, Some(&initial)), evals[0]);
        // ... which is the base itself where the residual is not quantized.
        if model == DENSE {
            assert_relative(evals[0], eval_loss(model, &data, None), 1e-5);
        }
    }
}

#[test]
fn eval_measures_what_training_measured() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 13));
    let held_out = dir.write("held-out.jsonl", sequences(5, 24, 14));
    for method in ["lora", "dora"] {
        let run = dir.path(method);
        let flags = format!("{SHORT} --max-steps 6 --method {method} --lora-dropout 0.2 --eval-steps 2");
        train(QUANTIZED, &data, &run, &format!("{flags} --eval-data {held_out}"));
        let evals = eval_losses(&run);
        assert_eq!(evals.len(), 4, "before, after steps 2, 4 and 6");
        assert_eq!(eval_loss(QUANTIZED, &held_out, None), evals[0], "a new adapter changes nothing");
        assert_eq!(eval_loss(QUANTIZED, &held_out, Some(&run)), evals[3]);
    }
}

#[test]
fn a_folder_is_merged_into_a_gguf_of_any_mixture() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 17));
    for method in ["lora", "dora", "pissa"] {
        let run = dir.path(method);
        train(DENSE, &data, &run, &format!("{SHORT} --max-steps 20 --method {method}"));
        let adapted = eval_loss(DENSE, &data, Some(&run));
        for (quant, tolerance) in [("", 1e-5), ("q8_0", 2e-3)] {
            let merged = dir.path(&format!("{method}{quant}.gguf"));
            let mut args = vec!["merge", "--model", DENSE, "--adapter", &run, "--output", &merged];
            if !quant.is_empty() {
                args.extend(["--quant", quant]);
            }
            let report = json(&args);
            assert_eq!(report["merged"], 14, "{report}");
            let arrived = report["change_arrived"].as_f64().unwrap();
            assert!((arrived - 1.0).abs() < 0.02, "{method} {quant}: {arrived}");
            assert_relative(eval_loss(&merged, &data, None), adapted, tolerance);
        }
    }
}

#[test]
fn a_model_becomes_a_bitsandbytes_folder_and_that_a_gguf_of_the_same_values() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(4, 24, 19));
    let (folder, file) = (dir.path("nf4"), dir.path("nf4.gguf"));
    let report = json(&["quantize", "--model", DENSE, "--quant", "nf4-dq", "--output", &folder]);
    assert_eq!(report["quantized"], 14, "{report}");
    let parameters = |path: &str| json(&["inspect", path])["parameters"].as_u64().unwrap();
    assert_eq!(parameters(&folder), parameters(DENSE));
    json(&["convert", "hf-to-gguf", "--model", &folder, "--output", &file, "--outtype", "f32"]);
    assert_relative(eval_loss(&file, &data, None), eval_loss(&folder, &data, None), 1e-5);
    // The same codes whether the model came as a folder or as a GGUF.
    let (dense, again) = (dir.path("dense.gguf"), dir.path("again"));
    json(&["convert", "hf-to-gguf", "--model", DENSE, "--output", &dense, "--outtype", "f32"]);
    json(&["quantize", "--model", &dense, "--quant", "nf4-dq", "--output", &again, "--threads", "3"]);
    assert_relative(eval_loss(&again, &data, None), eval_loss(&folder, &data, None), 1e-9);
    let none = dir.path("none");
    refuse(&["quantize", "--model", &dense, "--quant", "nf4", "--output", &none, "--device", "gpu"])
        .says(2, &["cannot use the device `gpu`"]);
    assert!(!Path::new(&none).exists());
    refuse(&["quantize", "--model", DENSE, "--quant", "nf4", "--pure", "--output", &again])
        .says(2, &["`--pure` does nothing with a bitsandbytes type"]);
}

#[test]
fn a_merged_model_behaves_as_the_adapter_does() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 15));
    for method in METHODS {
        let name = method.replace(' ', "");
        let run = dir.path(&name);
        train(QUANTIZED, &data, &run, &format!("{SHORT} --max-steps 60 --method {method}"));
        let (base, adapted) = (eval_loss(QUANTIZED, &data, None), eval_loss(QUANTIZED, &data, Some(&run)));
        for quant in ["", "f32", "f16", "q8_0", "q4_0"] {
            let merged = dir.path(&format!("{name}-{quant}.gguf"));
            let mut args = vec!["merge", "--model", QUANTIZED, "--adapter", &run, "--output", &merged];
            if !quant.is_empty() {
                args.extend(["--quant", quant]);
            }
            let report = json(&args);
            assert_eq!(report["merged"], 7);
            let types = |path: &str| json(&["inspect", path])["types"].clone();
            if quant.is_empty() {
                assert_eq!(types(&merged), types(QUANTIZED), "the base's own types");
            } else {
                // Norms stay in F32, and llama-quantize gives the head six bits.
                let expected = match quant {
                    "f32" => 1,
                    "q4_0" => 3,
                    _ => 2,
                };
                let types = types(&merged);
                assert_eq!(types.as_object().unwrap().len(), expected, "{types}");
                assert!(types.get(quant.to_uppercase()).is_some(), "{types}");
            }
            let loss = eval_loss(&merged, &data, None);
            if quant == "f32" {
                // Only the order of the sums differs: (W + s B A) x in place of W x + s B (A x).
                assert_relative(loss, adapted, 1e-5);
                continue;
            }
            // Packing loses a share of the change, in a direction that has nothing to do with the loss;
            // losing that share along the change itself would cost as large a share of the improvement.
            let lost = report["noise_to_change"].as_f64().unwrap();
            let bound = 0.1 * lost * (base - adapted);
            assert!((loss - adapted).abs() < bound, "{method} {quant}: {adapted} -> {loss}, bound {bound}");
        }
    }
}

/// The bundled base with two matrices as NVFP4 blocks and their factor in a tensor beside each, and the
/// same numbers as plain F32.
fn with_companion_scales(dir: &Scratch, factor: &[f32]) -> (String, String) {
    let file = GgufFile::open(Path::new(QUANTIZED)).unwrap();
    let (packed, plain) = (dir.path("nvfp4.gguf"), dir.path("plain.gguf"));
    let (mut packed_tensors, mut plain_tensors) = (Vec::new(), Vec::new());
    for info in file.tensors() {
        let tensor = |name: &str, shape: &[u64], dtype, bytes: Vec<u8>| {
            (TensorDecl { name: name.to_owned(), shape: shape.to_vec(), dtype }, bytes)
        };
        let bytes = file.bytes(info);
        let module = info.name.trim_end_matches(".weight");
        if !module.ends_with(".attn_q") && !module.ends_with(".ffn_down") {
            for tensors in [&mut packed_tensors, &mut plain_tensors] {
                tensors.push(tensor(&info.name, &info.shape, info.dtype, bytes.to_vec()));
            }
            continue;
        }
        let mut values = vec![0.0; info.n_rows() * info.row_len()];
        blocks::dequantize_row(info.dtype, &bytes, &mut values);
        for x in &mut values {
            *x /= factor[0];
        }
        let mut blocks = vec![0; GgmlType::NVFP4.row_bytes(values.len()).unwrap()];
        blocks::quantize_row(GgmlType::NVFP4, &values, None, &mut blocks);
        blocks::dequantize_row(GgmlType::NVFP4, &blocks, &mut values);
        let little_endian = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        packed_tensors.push(tensor(&info.name, &info.shape, GgmlType::NVFP4, blocks));
        let name = format!("{module}.scale");
        let shape = [factor.len() as u64];
        packed_tensors.push(tensor(&name, &shape, GgmlType::F32, little_endian(factor)));
        for x in &mut values {
            *x *= factor[0];
        }
        plain_tensors.push(tensor(&info.name, &info.shape, GgmlType::F32, little_endian(&values)));
    }
    for (path, tensors) in [(&packed, packed_tensors), (&plain, plain_tensors)] {
        let declared: Vec<TensorDecl> = tensors.iter().map(|(declared, _)| declared.clone()).collect();
        let mut writer = GgufWriter::create(Path::new(path), file.metadata(), &declared).unwrap();
        for (declared, bytes) in &tensors {
            writer.write(&declared.name, bytes).unwrap();
        }
        writer.finish().unwrap();
    }
    (packed, plain)
}

#[test]
fn a_factor_beside_a_tensor_is_part_of_its_values() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 17));
    let (packed, plain) = with_companion_scales(&dir, &[0.003]);
    let base = eval_loss(&packed, &data, None);
    assert_relative(base, eval_loss(&plain, &data, None), 1e-6);

    let runs = [("packed", &packed), ("plain", &plain)].map(|(name, model)| {
        let run = dir.path(name);
        train(model, &data, &run, &format!("{SHORT} --max-steps 40 --method dora"));
        run
    });
    for (a, b) in step_losses(&runs[0]).into_iter().zip(step_losses(&runs[1])) {
        assert_relative(a, b, 1e-4);
    }
    let adapted = eval_loss(&packed, &data, Some(&runs[0]));
    assert!(adapted < 0.8 * base, "{base} -> {adapted}");
    for quant in ["", "f32", "q8_0"] {
        let merged = dir.path(&format!("merged-{quant}.gguf"));
        let mut args = vec!["merge", "--model", &packed, "--adapter", &runs[0], "--output", &merged];
        if !quant.is_empty() {
            args.extend(["--quant", quant]);
        }
        let lost = json(&args)["noise_to_change"].as_f64().unwrap();
        let (file, from) = (GgufFile::open(Path::new(&merged)).unwrap(), Path::new(&packed));
        let scale = |file: &GgufFile| file.bytes(file.require("blk.0.attn_q.scale").unwrap()).to_vec();
        assert_eq!(scale(&file), scale(&GgufFile::open(from).unwrap()));
        let loss = eval_loss(&merged, &data, None);
        let bound = if quant == "f32" { 1e-5 * adapted } else { 0.1 * lost * (base - adapted) };
        assert!((loss - adapted).abs() < bound, "{quant}: {adapted} -> {loss}, bound {bound}");
    }

    // The residual of a staged split is packed with the same factor.
    let run = dir.path("pissa");
    train(&packed, &data, &run, &format!("{SHORT} --max-steps 2 --method pissa --eval-data {data}"));
    let evals = eval_losses(&run);
    assert_relative(evals[0], base, 0.05);
    assert_relative(eval_loss(&packed, &data, Some(&run)), *evals.last().unwrap(), 1e-6);
}

#[test]
fn a_factor_that_is_no_number_is_refused() {
    for (factor, found) in
        [(&[0.5, 0.5][..], "2 elements of F32"), (&[0.0], "`0`"), (&[f32::INFINITY], "`inf`")]
    {
        let dir = Scratch::new();
        let data = dir.write("data.jsonl", sequences(4, 12, 18));
        let (packed, _) = with_companion_scales(&dir, factor);
        let refusal = refuse(&["eval", "--model", &packed, "--data", &data]);
        refusal.says(1, &[&packed, "blk.0.attn_q.scale", found, "expected one normal F32 number"]);
    }
}

#[test]
fn greedy_text_is_the_same_every_time() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 16));
    let run = dir.path("run");
    train(QUANTIZED, &data, &run, &format!("{SHORT} --max-steps 8 --method dora"));
    let say = |flags: &str| {
        let mut args = vec!["generate", "--model", QUANTIZED, "--adapter", &run, "--prompt", "this is"];
        args.extend(["--max-new-tokens", "24"]);
        args.extend(flags.split_whitespace());
        succeed(&args).0
    };
    let greedy = say("--threads 1");
    assert!(greedy.trim().len() > 2, "{greedy}");
    assert_eq!(greedy, say("--threads 2 --seed 9"));
    let sampled = say("--temperature 2 --seed 1");
    assert_eq!(sampled, say("--temperature 2 --seed 1"));
    assert_ne!(sampled, say("--temperature 2 --seed 2"));
    assert_ne!(greedy, sampled);
}

#[test]
fn a_pissa_adapter_becomes_a_lora_of_the_original_base() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 17));
    for method in ["pissa", "pissa --use-dora"] {
        let name = method.replace(' ', "");
        let (run, lora) = (dir.path(&name), dir.path(&format!("{name}-lora")));
        train(DENSE, &data, &run, &format!("{SHORT} --max-steps 10 --method {method}"));
        let args = ["convert", "pissa-to-lora", "--adapter", &run, "--output", &lora, "--model", DENSE];
        let (_, said) = succeed(&args);
        assert!(said.contains("the result is exact"), "{said}");
        let converted = adapter(&lora);
        assert_eq!((converted.config.r, converted.config.lora_alpha), (16, 16.0));
        let trained = eval_loss(DENSE, &data, Some(&run));
        assert_relative(eval_loss(DENSE, &data, Some(&lora)), trained, 1e-5);
        assert!(trained < 0.95 * eval_loss(DENSE, &data, None));
    }
}

#[test]
fn on_a_quantized_base_the_conversion_tells_its_error() {
    let dir = Scratch::new();
    let data = dir.write("data.jsonl", sequences(8, 24, 18));
    let (run, lora) = (dir.path("run"), dir.path("lora"));
    train(QUANTIZED, &data, &run, &format!("{SHORT} --max-steps 4 --method pissa"));
    let args = ["convert", "pissa-to-lora", "--adapter", &run, "--output", &lora, "--model", QUANTIZED];
    let (_, said) = succeed(&args);
    assert!(said.contains("residual quantization error") && !said.contains("exact\n"), "{said}");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(format!("{run}/init/manifest.json")).unwrap()).unwrap();
    let report = json(&[&args[..], &["--overwrite-output"]].concat());
    let error = report["residual_quantization_error"].as_f64().unwrap();
    assert_eq!(manifest["quantization_error"], error);
    // 4-bit blocks of a near-Gaussian weight lose between 1 and 10 % of its norm.
    assert!((0.01..0.1).contains(&error), "{error}");
    // Close to the trained model, and said to be no more than that.
    let (trained, converted) =
        (eval_loss(QUANTIZED, &data, Some(&run)), eval_loss(QUANTIZED, &data, Some(&lora)));
    assert!(trained != converted && (trained - converted).abs() < 0.1 * trained, "{trained} {converted}");
}
