//! The whole engine against PEFT: initial loss, every gradient and ten optimizer steps of LoRA, DoRA and
//! PiSSA on the tiny llama, from the tensors that PEFT started from. Sources: `testdata/README.md`.

use std::path::{Path, PathBuf};

use qpeft::adapters;
use qpeft::model::{Base, Batch, Buffers, Decoder, Keep, Parameters, Pass};
use qpeft::train::optimizer::Optimizer;
use qpeft::train::schedule::{Schedule, SchedulerType};
use qpeft_formats::peft::PeftAdapter;
use qpeft_formats::safetensors::SafetensorsFile;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::svd::SvdOptions;
use qpeft_kernels::{Device, Tensor};
use serde_json::Value;

const METHODS: [&str; 5] = ["lora", "rslora", "lora_patterns", "dora", "pissa"];

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
    fn new(method: &str, keep: Keep) -> Run {
        let folder = testdata("peft/fp32").join(method);
        let golden =
            serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let base = Base::open(&testdata("models/tiny-llama")).unwrap();
        let mut decoder = Decoder::load(&base, &Device::Cpu).unwrap();
        let init = PeftAdapter::read(&folder.join("init")).unwrap();
        if method == "pissa" {
            let options = SvdOptions::default();
            adapters::split_targets(&mut decoder, &init.config, Some(&init), &options, |_, _| {}).unwrap();
        }
        let mut params = adapters::attach(&mut decoder, &init.config).unwrap();
        adapters::load(&mut params, &init).unwrap();
        decoder.refresh(params.values.view()).unwrap();
        let batch = batch(&SafetensorsFile::open(&folder.join("golden.safetensors")).unwrap());
        let buffers = Buffers::new(&decoder, batch.len(), keep).unwrap();
        Run { golden, batch, decoder, params, buffers }
    }

    fn loss_and_gradients(&mut self, grads: &mut Tensor) -> f64 {
        let scale = 1.0 / self.batch.supervised().0.len() as f32;
        let pass = Pass { params: self.params.values.view(), dropout: None };
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

#[test]
fn the_base_gives_the_logits_of_transformers() {
    let golden = SafetensorsFile::open(&testdata("models/tiny-llama/golden.safetensors")).unwrap();
    let base = Base::open(&testdata("models/tiny-llama")).unwrap();
    let decoder = Decoder::load(&base, &Device::Cpu).unwrap();
    let params = Parameters::none(&Device::Cpu).unwrap();
    let batch = batch(&golden);
    let mut buffers = Buffers::new(&decoder, batch.len(), Keep::Nothing).unwrap();
    let pass = Pass { params: params.values.view(), dropout: None };
    let mut found = Vec::new();
    let collect = |_, chunk: qpeft_kernels::View<'_>| {
        found.extend_from_slice(chunk.cpu("test")?);
        Ok(())
    };
    decoder.logits(&mut buffers, &batch, &pass, collect).unwrap();
    let expected = golden.require("logits").unwrap().to_f32().unwrap();
    assert_eq!(found.len(), expected.len());
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // llama.cpp and transformers differ by 5.7e-6 on the same weights (goldens' README).
    assert!(worst < 2e-5, "largest difference {worst:e}");
}

#[test]
fn the_initial_loss_and_every_gradient_are_those_of_peft() {
    for method in METHODS {
        for keep in [Keep::Everything, Keep::LayerInputs] {
            let mut run = Run::new(method, keep);
            let mut grads = Tensor::zeros(&Device::Cpu, 1, run.params.count()).unwrap();
            let loss = run.loss_and_gradients(&mut grads);
            let expected = run.golden["init_loss"].as_f64().unwrap();
            assert!(relative(loss, expected) < 1e-6, "{method}: loss {loss}, PEFT's {expected}");

            let golden =
                SafetensorsFile::open(&testdata("peft/fp32").join(method).join("grads.safetensors")).unwrap();
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
                    "{method}, {keep:?}: `{}` is off by {error:e} of {size:e}",
                    entry.key
                );
                compared += found.len();
            }
            assert_eq!(compared, run.params.count());
        }
    }
}

/// Ten steps; the learning rate of each and the largest gradient norm as given.
fn ten_steps(method: &str, which: &str, max_grad_norm: f64, schedule: &Schedule) {
    let mut run = Run::new(method, Keep::Everything);
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
        let pass = Pass { params: run.params.values.view(), dropout: None };
        let mut grads = optimizer.grads();
        let loss = run
            .decoder
            .loss_and_gradients(&mut run.buffers, &run.batch, &mut grads, scale, &pass)
            .unwrap()
            .mean();
        let norm = optimizer.grad_norm().unwrap();
        for (what, found) in [("loss", loss), ("grad_norm", norm)] {
            let expected = golden[what][step as usize].as_f64().unwrap();
            assert!(
                relative(found, expected) < 1e-4,
                "{method}, step {step}: {what} {found}, PEFT's {expected}"
            );
        }
        optimizer.step(&mut run.params, schedule.learning_rate(step), norm).unwrap();
        run.decoder.refresh(run.params.values.view()).unwrap();
    }
    let pass = Pass { params: run.params.values.view(), dropout: None };
    let loss = run.decoder.loss(&mut run.buffers, &run.batch, &pass).unwrap().mean();
    let expected = golden["final_loss"].as_f64().unwrap();
    assert!(relative(loss, expected) < 1e-4, "{method}: final loss {loss}, PEFT's {expected}");
}

fn learning_rate(method: &str) -> f64 {
    Run::new(method, Keep::Everything).golden["adamw"]["lr"].as_f64().unwrap()
}

#[test]
fn ten_steps_at_a_fixed_rate_give_the_losses_of_peft() {
    for method in METHODS {
        let peak = learning_rate(method);
        let schedule = Schedule { kind: SchedulerType::Constant, peak, warmup_steps: 0, total_steps: 10 };
        ten_steps(method, "run_fixed_lr", 0.0, &schedule);
    }
}

#[test]
fn ten_clipped_steps_on_a_schedule_give_the_losses_of_peft() {
    for method in METHODS {
        let peak = learning_rate(method);
        let schedule = Schedule { kind: SchedulerType::Cosine, peak, warmup_steps: 3, total_steps: 10 };
        ten_steps(method, "run_clip1_warmup3_cosine", 1.0, &schedule);
    }
}
