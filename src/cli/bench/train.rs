//! `qpeft bench train`: tokens per second and peak memory of real training steps on synthetic tokens.
//!
//! Every token is supervised, so the head runs over all rows: the most expensive case. With `--compare` the
//! two methods take turns step by step, so that a noisy machine is noisy to both.

use std::fmt::Write as _;
use std::time::Instant;

use qpeft_formats::peft::{InitLoraWeights, PeftConfig, TargetModules};
use qpeft_kernels::Device;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::rng::RngKey;
use serde_json::{Value, json};

use crate::adapters::{self, Method};
use crate::cli::args::BenchTrainArgs;
use crate::cli::printer::Printer;
use crate::cli::progress::Progress;
use crate::cli::session::open_device;
use crate::model::{Base, Batch, Buffers, Decoder, Keep, Parameters, Pass};
use crate::train::optimizer::Optimizer;

/// Runs the command.
///
/// # Errors
/// The model is refused or memory runs out.
pub fn run(args: &BenchTrainArgs, printer: &Printer) -> anyhow::Result<()> {
    let device = open_device(&args.compute, printer)?;
    let base = Base::open_as(&args.model, args.base_quant)?;
    let mut subjects = vec![Subject::new(args, args.method, &base, &device)?];
    if let Some(other) = args.compare {
        subjects.push(Subject::new(args, other, &base, &device)?);
    }
    let mut bar = Progress::start(printer, "step", 0, args.warmup + args.steps);
    for step in 0..args.warmup + args.steps {
        for subject in &mut subjects {
            let seconds = subject.step(step)?;
            if step >= args.warmup {
                subject.seconds.push(seconds);
            }
        }
        bar.update(step + 1, "");
    }
    bar.finish();

    let peak = peak_rss();
    let results: Vec<Value> = subjects.iter().map(|s| s.result(args)).collect();
    let mut report = json!({
        "model": base.name(),
        "base_type": base.main_type(),
        "device": device.to_string(),
        "threads": rayon::current_num_threads(),
        "batch_size": args.batch_size,
        "sequence_length": args.max_seq_length,
        "gradient_checkpointing": args.gradient_checkpointing,
        "methods": results,
        "peak_rss_mib": peak.map(|bytes| bytes as f64 / f64::from(1 << 20)),
    });
    if let [a, b] = &subjects[..] {
        report["speed_ratio"] = json!(b.median() / a.median());
    }
    if args.json {
        return Ok(printer.json(&report)?);
    }
    let mut text = String::new();
    for subject in &subjects {
        let tokens = (args.batch_size * args.max_seq_length) as f64;
        writeln!(
            text,
            "{:<6} {:8.1} tok/s  {:8.3} s per step (median of {}, fastest {:.3})",
            subject.method.name(),
            tokens / subject.median(),
            subject.median(),
            subject.seconds.len(),
            subject.seconds.iter().copied().fold(f64::INFINITY, f64::min)
        )?;
    }
    if let [a, b] = &subjects[..] {
        let (name, other) = (a.method.name(), b.method.name());
        writeln!(text, "{name} runs at {:.3} x the speed of {other}", b.median() / a.median())?;
    }
    match peak {
        Some(bytes) => writeln!(text, "peak memory {:.0} MiB", bytes as f64 / f64::from(1 << 20))?,
        None => text.push_str("peak memory unknown on this system\n"),
    }
    Ok(printer.data(&text)?)
}

/// One method on its own copy of everything but the mapped weights.
struct Subject {
    method: Method,
    decoder: Decoder,
    params: Parameters,
    optimizer: Optimizer,
    buffers: Buffers,
    batch: Batch,
    seconds: Vec<f64>,
}

impl Subject {
    fn new(args: &BenchTrainArgs, method: Method, base: &Base, device: &Device) -> anyhow::Result<Subject> {
        let mut decoder = Decoder::load(base, device)?;
        let mut config = PeftConfig::new(args.lora_r, 2.0 * args.lora_r as f64);
        config.target_modules = Some(TargetModules::AllLinear);
        config.use_dora = method.info().magnitude;
        if method.info().staged {
            // The split happens once, before training; a step costs what it costs with any factors.
            config.init_lora_weights = InitLoraWeights::Named(method.name().to_owned());
        }
        let mut params = adapters::attach(&mut decoder, &config)?;
        adapters::initialize(&mut decoder, &mut params, 0)?;
        decoder.refresh(params.values.view())?;
        let hyper = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let optimizer = Optimizer::new(device, params.count(), hyper, 1.0)?;
        let keep = if args.gradient_checkpointing { Keep::LayerInputs } else { Keep::Everything };
        let buffers = Buffers::new(&decoder, args.batch_size * args.max_seq_length, keep)?;
        let batch = synthetic(args, decoder.config.vocab_size);
        Ok(Subject { method, decoder, params, optimizer, buffers, batch, seconds: Vec::new() })
    }

    /// Seconds of one optimizer step.
    fn step(&mut self, step: u64) -> anyhow::Result<f64> {
        let began = Instant::now();
        let pass =
            Pass { params: self.params.values.view(), dropout: Some(RngKey { seed: 0, stream: step }) };
        let scale = 1.0 / self.batch.supervised().0.len() as f32;
        let mut grads = self.optimizer.grads();
        self.decoder.loss_and_gradients(&mut self.buffers, &self.batch, &mut grads, scale, &pass)?;
        let norm = self.optimizer.grad_norm()?;
        self.optimizer.step(&mut self.params, 1e-4, norm)?;
        self.decoder.refresh(self.params.values.view())?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    fn result(&self, args: &BenchTrainArgs) -> Value {
        json!({
            "method": self.method.name(),
            "lora_r": args.lora_r,
            "trainable": self.params.count(),
            "tokens_per_second": self.batch.len() as f64 / self.median(),
            "step_seconds": self.median(),
            "steps": self.seconds.len(),
        })
    }
}

/// Sequences of uniformly drawn tokens, all supervised.
fn synthetic(args: &BenchTrainArgs, vocab_size: usize) -> Batch {
    let key = RngKey { seed: 0, stream: 1 };
    let mut batch = Batch::new();
    for sequence in 0..args.batch_size {
        let at = |i: usize| key.below((sequence * args.max_seq_length + i) as u64, vocab_size) as u32;
        let tokens: Vec<u32> = (0..args.max_seq_length).map(at).collect();
        let labels: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        batch.push(&tokens, &labels);
    }
    batch
}

/// The largest resident set of this process so far, in bytes; known on Linux only.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
