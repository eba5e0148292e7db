//! The whole engine against PEFT: initial loss, every gradient and ten optimizer steps of LoRA, DoRA and
//! PiSSA on the tiny llama, from the tensors that PEFT started from; on a dense base, on NF4 with double
//! quantization, and on a Q4_K GGUF. Sources: `testdata/README.md`.

mod cuda;

use std::path::{Path, PathBuf};

use qpeft::adapters::{self, pissa::SplitOptions};
use qpeft::model::{Base, Batch, Buffers, Decoder, Keep, Parameters};
use qpeft::train::optimizer::Optimizer;
use qpeft::train::schedule::{Schedule, SchedulerType};
use qpeft_formats::peft::{PeftAdapter, PeftConfig, TargetModules};
use qpeft_formats::safetensors::SafetensorsFile;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::rng::RngKey;
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
    fn new(run: (&str, &str), keep: Keep) -> Run {
        Run::on(&Device::Cpu, run, keep, false)
    }

    /// On a device; with `copies`, every linear has its own bf16 copy there.
    fn on(device: &Device, (base, method): (&str, &str), keep: Keep, copies: bool) -> Run {
        let file = |name: &str| run_file(base, method, name);
        let golden = serde_json::from_str(&std::fs::read_to_string(file("golden.json")).unwrap()).unwrap();
        let mut decoder = Decoder::load(&Base::open(&model(base)).unwrap(), device).unwrap();
        let init = PeftAdapter::read(&file("init")).unwrap();
        if method == "pissa" {
            let options = SplitOptions::default();
            let (config, given) = (&init.config, Some(&init));
            adapters::split_targets(&mut decoder, config, given, None, &options, &Device::Cpu, |_, _| {})
                .unwrap();
        }
        let mut params = adapters::attach(&mut decoder, &init.config).unwrap();
        adapters::load(&mut params, &init).unwrap();
        decoder.keep_copies(if copies { usize::MAX } else { 0 }).unwrap();
        decoder.refresh(&params).unwrap();
        let batch = batch(&SafetensorsFile::open(&file("golden.safetensors")).unwrap());
        let buffers = Buffers::new(&decoder, batch.len(), keep).unwrap();
        Run { golden, batch, decoder, params, buffers }
    }

    fn optimizer(&self, max_grad_norm: f64) -> Optimizer {
        let hyper = &self.golden["adamw"];
        let number = |value: &Value| value.as_f64().unwrap() as f32;
        let hyper = AdamW {
            beta1: number(&hyper["betas"][0]),
            beta2: number(&hyper["betas"][1]),
            eps: number(&hyper["eps"]),
            weight_decay: number(&hyper["weight_decay"]),
        };
        Optimizer::new(&self.decoder.device, self.params.count(), hyper, max_grad_norm).unwrap()
    }

    /// One optimizer step: the loss before it, and the gradient's norm.
    fn step(&mut self, optimizer: &mut Optimizer, learning_rate: f64) -> (f64, f64) {
        let scale = 1.0 / self.batch.supervised().0.len() as f32;
        let pass = self.params.pass(None);
        let mut grads = optimizer.grads();
        let buffers = &mut self.buffers;
        let loss = self.decoder.loss_and_gradients(buffers, &self.batch, &mut grads, scale, &pass).unwrap();
        optimizer.step(&mut self.params, learning_rate).unwrap();
        self.decoder.refresh(&self.params).unwrap();
        (loss.mean(), optimizer.grad_norm().unwrap())
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

/// The error of each gradient and the gradient, by their Euclidean norms, with the tensor's key.
fn gradient_errors(run_of: (&str, &str), run: &Run, found: &[f32]) -> Vec<(String, f64, f64)> {
    let golden = SafetensorsFile::open(&run_file(run_of.0, run_of.1, "grads.safetensors")).unwrap();
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let entries = run.params.entries.iter().map(|entry| {
        let expected = golden.require(&format!("init.{}", entry.key)).unwrap().to_f32().unwrap();
        let found = &found[entry.range()];
        assert_eq!(found.len(), expected.len(), "`{}`", entry.key);
        let error = norm(&mut found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
        (entry.key.clone(), error, norm(&mut expected.iter().map(|&x| f64::from(x))))
    });
    let errors: Vec<_> = entries.collect();
    assert_eq!(run.params.entries.iter().map(qpeft::model::Entry::len).sum::<usize>(), run.params.count());
    errors
}

#[test]
fn the_initial_loss_and_every_gradient_are_those_of_peft() {
    for run_of @ (base, method) in RUNS {
        for keep in [Keep::EVERYTHING, Keep::LAYER_INPUTS, Keep::LayersWithoutAct(1)] {
            let mut run = Run::new(run_of, keep);
            let mut grads = Tensor::zeros(&Device::Cpu, 1, run.params.count()).unwrap();
            let loss = run.loss_and_gradients(&mut grads);
            let expected = run.golden["init_loss"].as_f64().unwrap();
            assert!(relative(loss, expected) < 1e-6, "{base} {method}: loss {loss}, PEFT's {expected}");
            for (key, error, size) in gradient_errors(run_of, &run, &grads.read().unwrap()) {
                // Where PEFT's gradient is zero (A at B = 0), so is ours, exactly.
                assert!(
                    error <= 1e-4 * size,
                    "{base} {method}, {keep:?}: `{key}` is off by {error:e} of {size:e}"
                );
            }
        }
    }
}

/// Adapters that have learned something: B = 0 would hide what reaches A.
fn started(decoder: &mut Decoder, config: &PeftConfig) -> Parameters {
    let mut params = adapters::attach(decoder, config).unwrap();
    adapters::initialize(decoder, &mut params, 0).unwrap();
    let mut values = params.values.read().unwrap();
    let zeros = values.iter_mut().filter(|x| **x == 0.0).enumerate();
    zeros.for_each(|(i, x)| *x = (i % 13) as f32 * 1e-3);
    params.write(&values).unwrap();
    decoder.refresh(&params).unwrap();
    params
}

/// Loss and gradients of branches that drop inputs, which have no goldens: the draws are ours.
fn with_dropout(device: &Device, use_dora: bool, keep: Keep) -> (f64, Vec<f32>) {
    let mut config = PeftConfig::new(4, 8.0);
    config.target_modules = Some(TargetModules::AllLinear);
    config.use_dora = use_dora;
    config.lora_dropout = 0.25;
    let mut decoder = Decoder::load(&Base::open(&model("nf4")).unwrap(), device).unwrap();
    let params = started(&mut decoder, &config);
    let golden = run_file("nf4", "lora", "golden.safetensors");
    let batch = batch(&SafetensorsFile::open(&golden).unwrap());
    let mut buffers = Buffers::new(&decoder, batch.len(), keep).unwrap();
    let mut grads = Tensor::zeros(device, 1, params.count()).unwrap();
    let (pass, mut to) = (params.pass(Some(RngKey { seed: 1, stream: 2 })), grads.view_mut());
    let loss = decoder.loss_and_gradients(&mut buffers, &batch, &mut to, 1e-2, &pass).unwrap();
    (loss.mean(), grads.read().unwrap())
}

/// Every way to keep activations, after the one that keeps all.
const KEEPS: [Keep; 4] =
    [Keep::LAYER_INPUTS, Keep::Layers(1), Keep::LayersWithoutAct(usize::MAX), Keep::LayersWithoutAct(1)];

#[test]
fn bits_do_not_depend_on_what_is_computed_again() {
    for run_of in RUNS {
        let gradients = |keep| {
            let mut run = Run::new(run_of, keep);
            let mut grads = Tensor::zeros(&Device::Cpu, 1, run.params.count()).unwrap();
            (run.loss_and_gradients(&mut grads), grads.read().unwrap())
        };
        let expected = gradients(Keep::EVERYTHING);
        for keep in KEEPS {
            assert!(gradients(keep) == expected, "{run_of:?}, {keep:?}: other bits");
        }
    }
}

#[test]
fn bits_with_dropout_do_not_depend_on_what_is_computed_again() {
    for use_dora in [false, true] {
        let expected = with_dropout(&Device::Cpu, use_dora, Keep::EVERYTHING);
        assert!(expected.0.is_finite() && expected.1.iter().any(|&g| g != 0.0));
        for keep in KEEPS {
            let found = with_dropout(&Device::Cpu, use_dora, keep);
            assert!(found == expected, "dora {use_dora}, {keep:?}: other bits");
        }
    }
}

/// Ten steps of a run as PEFT took them: at a fixed rate, or clipped and on a schedule.
fn ten_steps(mut run: Run, clipped: bool, what: &str, [loss_tolerance, norm_tolerance]: [f64; 2]) {
    let peak = run.golden["adamw"]["lr"].as_f64().unwrap();
    let (which, kind, warmup_steps, max_grad_norm) = if clipped {
        ("run_clip1_warmup3_cosine", SchedulerType::Cosine, 3, 1.0)
    } else {
        ("run_fixed_lr", SchedulerType::Constant, 0, 0.0)
    };
    let schedule = Schedule { kind, peak, warmup_steps, total_steps: 10 };
    let mut optimizer = run.optimizer(max_grad_norm);
    let golden = run.golden[which].clone();
    for step in 0..10 {
        let (loss, norm) = run.step(&mut optimizer, schedule.learning_rate(step));
        for (name, found, tolerance) in [("loss", loss, loss_tolerance), ("grad_norm", norm, norm_tolerance)]
        {
            let expected = golden[name][step as usize].as_f64().unwrap();
            assert!(
                relative(found, expected) < tolerance,
                "{what}, step {step}: {name} {found}, PEFT's {expected}"
            );
        }
    }
    let pass = run.params.pass(None);
    let loss = run.decoder.loss(&mut run.buffers, &run.batch, &pass).unwrap().mean();
    let expected = golden["final_loss"].as_f64().unwrap();
    assert!(relative(loss, expected) < loss_tolerance, "{what}: final loss {loss}, PEFT's {expected}");
}

#[test]
fn ten_steps_at_a_fixed_rate_give_the_losses_of_peft() {
    for run in RUNS {
        ten_steps(Run::new(run, Keep::EVERYTHING), false, &format!("{run:?}"), [1e-4; 2]);
    }
}

#[test]
fn ten_clipped_steps_on_a_schedule_give_the_losses_of_peft() {
    for run in RUNS {
        ten_steps(Run::new(run, Keep::EVERYTHING), true, &format!("{run:?}"), [1e-4; 2]);
    }
}
