//! The whole engine against PEFT: initial loss, every gradient and ten optimizer steps of LoRA, DoRA and
//! PiSSA on the tiny llama, from the tensors that PEFT started from; on a dense base, on NF4 with double
//! quantization, and on a Q4_K GGUF. Sources: `testdata/README.md`.

use std::path::{Path, PathBuf};

use qpeft::adapters;
use qpeft::model::{Base, Batch, Buffers, Decoder, Keep, Parameters};
use qpeft::train::optimizer::Optimizer;
use qpeft::train::schedule::{Schedule, SchedulerType};
use qpeft_formats::peft::PeftAdapter;
use qpeft_formats::safetensors::SafetensorsFile;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::svd::SvdOptions;
use qpeft_kernels::{Device, Tensor};
use serde_json::Value;

/// Base and method.
const RUNS: [(&str, &str); 10] = [
    ("fp32", "lora"),
    ("fp32", "rslora"),
    ("fp32", "lora_patterns"),
    ("fp32", "dora"),
    ("fp32", "pissa"),
    ("nf4", "lora"),
    ("nf4", "rslora"),
    ("nf4", "lora_patterns"),
    ("nf4", "dora"),
    ("gguf", "lora"),
];

/// The model of each base.
fn model(base: &str) -> PathBuf {
    testdata(match base {
        "fp32" => "models/tiny-llama",
        "nf4" => "models/tiny-llama-nf4",
        "gguf" => "models/tiny-llama-256.Q4_K.gguf",
        other => panic!("no base `{other}`"),
    })
}

/// A file of a run; PEFT started some runs on NF4 from the adapters of those on the dense base.
fn run_file(base: &str, method: &str, name: &str) -> PathBuf {
    let own = testdata("peft").join(base).join(method).join(name);
    if own.exists() { own } else { testdata("peft/fp32").join(method).join(name) }
}

fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(path)
}

/// A method of the goldens, on the tiny llama.
struct Run {
    golden: Value,
    batch: Batch,
    decoder: Decoder,
    params: Parameters,
    buffers: Buffers,
}

impl Run {
    fn new((base, method): (&str, &str), keep: Keep) -> Run {
        let file = |name: &str| run_file(base, method, name);
        let golden = serde_json::from_str(&std::fs::read_to_string(file("golden.json")).unwrap()).unwrap();
        let mut decoder = Decoder::load(&Base::open(&model(base)).unwrap(), &Device::Cpu).unwrap();
        let init = PeftAdapter::read(&file("init")).unwrap();
        if method == "pissa" {
            let options = SvdOptions::default();
            let (config, given) = (&init.config, Some(&init));
            adapters::split_targets(&mut decoder, config, given, &options, &Device::Cpu, |_, _| {}).unwrap();
        }
        let mut params = adapters::attach(&mut decoder, &init.config).unwrap();
        adapters::load(&mut params, &init).unwrap();
        decoder.refresh(&params).unwrap();
        let batch = batch(&SafetensorsFile::open(&file("golden.safetensors")).unwrap());
        let buffers = Buffers::new(&decoder, batch.len(), keep).unwrap();
        Run { golden, batch, decoder, params, buffers }
    }

    fn loss_and_gradients(&mut self, grads: &mut Tensor) -> f64 {
        let scale = 1.0 / self.batch.supervised().0.len() as f32;
        let pass = self.params.pass(None);
        let buffers = &mut self.buffers;
        let mut dparams = grads.view_mut();
        self.decoder.loss_and_gradients(buffers, &self.batch, &mut dparams, scale, &pass).unwrap().mean()
    }
}

fn batch(file: &SafetensorsFile) -> Batch {
    let integers = |name: &str| -> (Vec<i64>, usize) {
        let tensor = file.require(name).unwrap();
        let values = tensor.bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
        (values, tensor.shape[1])
    };
    let ((ids, width), (labels, _)) = (integers("input_ids"), integers("labels"));
    let mut batch = Batch::new();
    for (ids, labels) in ids.chunks(width).zip(labels.chunks(width)) {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let labels: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
        batch.push(&ids, &labels);
    }
    batch
}

fn relative(found: f64, expected: f64) -> f64 {
    (found - expected).abs() / expected.abs()
}

/// All logits of a base on a batch, (T, V).
fn logits(base: &Base, batch: &Batch) -> Vec<f32> {
    let decoder = Decoder::load(base, &Device::Cpu).unwrap();
    let params = Parameters::none(&Device::Cpu).unwrap();
    let mut buffers = Buffers::new(&decoder, batch.len(), Keep::Nothing).unwrap();
    let pass = params.pass(None);
    let mut found = Vec::new();
    let collect = |_, chunk: qpeft_kernels::View<'_>| {
        found.extend_from_slice(chunk.cpu("test")?);
        Ok(())
    };
    decoder.logits(&mut buffers, batch, &pass, collect).unwrap();
    found
}

fn worst(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_base_gives_the_logits_of_transformers() {
    let golden = SafetensorsFile::open(&testdata("models/tiny-llama/golden.safetensors")).unwrap();
    let found = logits(&Base::open(&model("fp32")).unwrap(), &batch(&golden));
    let worst = worst(&found, &golden.require("logits").unwrap().to_f32().unwrap());
    // llama.cpp and transformers differ by 5.7e-6 on the same weights (goldens' README).
    assert!(worst < 2e-5, "largest difference {worst:e}");
}

#[test]
fn a_base_of_bitsandbytes_gives_the_logits_of_transformers_also_when_we_quantize_it_ourselves() {
    let golden = SafetensorsFile::open(&testdata("models/tiny-llama-nf4/golden.safetensors")).unwrap();
    let batch = batch(&golden);
    let expected = |name: &str| golden.require(name).unwrap().to_f32().unwrap();
    let ours = Base::open_as(&model("fp32"), Some("nf4-dq".parse().unwrap())).unwrap();
    for base in [Base::open(&model("nf4")).unwrap(), ours] {
        let found = logits(&base, &batch);
        let row = expected("logits_row0");
        let worst = worst(&found[..row.len()], &row)
            .max(worst(&found[found.len() - 512..], &expected("logits_row1_last")));
        assert!(worst < 2e-5, "largest difference {worst:e}");
    }
}

#[test]
fn the_initial_loss_and_every_gradient_are_those_of_peft() {
    for run_of @ (base, method) in RUNS {
        for keep in [Keep::EVERYTHING, Keep::LAYER_INPUTS] {
            let mut run = Run::new(run_of, keep);
            let mut grads = Tensor::zeros(&Device::Cpu, 1, run.params.count()).unwrap();
            let loss = run.loss_and_gradients(&mut grads);
            let expected = run.golden["init_loss"].as_f64().unwrap();
            assert!(relative(loss, expected) < 1e-6, "{base} {method}: loss {loss}, PEFT's {expected}");

            let golden = SafetensorsFile::open(&run_file(base, method, "grads.safetensors")).unwrap();
            let found = grads.read().unwrap();
            let mut compared = 0;
            for entry in &run.params.entries {
                let expected = golden.require(&format!("init.{}", entry.key)).unwrap().to_f32().unwrap();
                let found = &found[entry.range()];
                let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
                let size = norm(&mut expected.iter().map(|&x| f64::from(x)));
                let error = norm(&mut found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
                // Where PEFT's gradient is zero (A at B = 0), so is ours, exactly.
                assert!(
                    error <= 1e-4 * size,
                    "{base} {method}, {keep:?}: `{}` is off by {error:e} of {size:e}",
                    entry.key
                );
                compared += found.len();
            }
            assert_eq!(compared, run.params.count());
        }
    }
}

/// Ten steps; the learning rate of each and the largest gradient norm as given.
fn ten_steps(run_of: (&str, &str), which: &str, max_grad_norm: f64, schedule: &Schedule) {
    let mut run = Run::new(run_of, Keep::EVERYTHING);
    let hyper = &run.golden["adamw"];
    let number = |value: &Value| value.as_f64().unwrap() as f32;
    let hyper = AdamW {
        beta1: number(&hyper["betas"][0]),
        beta2: number(&hyper["betas"][1]),
        eps: number(&hyper["eps"]),
        weight_decay: number(&hyper["weight_decay"]),
    };
    let mut optimizer = Optimizer::new(&Device::Cpu, run.params.count(), hyper, max_grad_norm).unwrap();
    let golden = run.golden[which].clone();
    let scale = 1.0 / run.batch.supervised().0.len() as f32;
    for step in 0..10 {
        let pass = run.params.pass(None);
        let mut grads = optimizer.grads();
        let loss = run
            .decoder
            .loss_and_gradients(&mut run.buffers, &run.batch, &mut grads, scale, &pass)
            .unwrap()
            .mean();
        optimizer.step(&mut run.params, schedule.learning_rate(step)).unwrap();
        let norm = optimizer.grad_norm().unwrap();
        for (what, found) in [("loss", loss), ("grad_norm", norm)] {
            let expected = golden[what][step as usize].as_f64().unwrap();
            assert!(
                relative(found, expected) < 1e-4,
                "{run_of:?}, step {step}: {what} {found}, PEFT's {expected}"
            );
        }
        run.decoder.refresh(&run.params).unwrap();
    }
    let pass = run.params.pass(None);
    let loss = run.decoder.loss(&mut run.buffers, &run.batch, &pass).unwrap().mean();
    let expected = golden["final_loss"].as_f64().unwrap();
    assert!(relative(loss, expected) < 1e-4, "{run_of:?}: final loss {loss}, PEFT's {expected}");
}

fn learning_rate(run: (&str, &str)) -> f64 {
    Run::new(run, Keep::EVERYTHING).golden["adamw"]["lr"].as_f64().unwrap()
}

#[test]
fn ten_steps_at_a_fixed_rate_give_the_losses_of_peft() {
    for run in RUNS {
        let peak = learning_rate(run);
        let schedule = Schedule { kind: SchedulerType::Constant, peak, warmup_steps: 0, total_steps: 10 };
        ten_steps(run, "run_fixed_lr", 0.0, &schedule);
    }
}

#[test]
fn ten_clipped_steps_on_a_schedule_give_the_losses_of_peft() {
    for run in RUNS {
        let peak = learning_rate(run);
        let schedule = Schedule { kind: SchedulerType::Cosine, peak, warmup_steps: 3, total_steps: 10 };
        ten_steps(run, "run_clip1_warmup3_cosine", 1.0, &schedule);
    }
}
