//! `qpeft bench train`: tokens per second and peak memory of real training steps on synthetic tokens.
//!
//! Every token is supervised, so the head runs over all rows: the most expensive case. With `--compare` the
//! two methods take turns step by step, so that a noisy machine is noisy to both. On a GPU one more step with
//! events around every launch tells where the time goes, and the floor what no program could beat.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use qpeft_formats::peft::{InitLoraWeights, PeftConfig, TargetModules};
use qpeft_kernels::Device;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::rng::RngKey;
use serde_json::{Value, json};

use super::floor::{Ceilings, Floor};
use crate::adapters::{self, Method};
use crate::cli::args::{BenchTrainArgs, Recompute};
use crate::cli::printer::Printer;
use crate::cli::progress::Progress;
use crate::cli::session::open_device;
use crate::model::memory::meta;
use crate::model::{Base, Batch, Buffers, Decoder, Keep, Parameters};
use crate::train::fit::{ALL_LAYERS, ANY_LAYERS, Fit, fit_decoder, limit_of};
use crate::train::optimizer::Optimizer;

const GIB: f64 = (1u64 << 30) as f64;

/// Runs the command.
///
/// # Errors
/// The model is refused or memory runs out.
pub fn run(args: &BenchTrainArgs, printer: &Printer) -> anyhow::Result<()> {
    let device = open_device(&args.compute, printer)?;
    let base = args.model.as_deref().map(|path| Base::open_as(path, args.base_quant)).transpose()?;
    let mut subjects = vec![Subject::new(args, args.method, base.as_ref(), &device)?];
    if let Some(other) = args.compare {
        subjects.push(Subject::new(args, other, base.as_ref(), &device)?);
    }
    let mut bar = Progress::start(printer, "step", 0, args.warmup + args.steps);
    for step in 0..args.warmup + args.steps {
        for subject in &mut subjects {
            let seconds = subject.step()?;
            if step >= args.warmup {
                subject.seconds.push(seconds);
            }
        }
        bar.update(step + 1, "");
    }
    bar.finish();

    let peak = match &device {
        Device::Cpu | Device::Meta(_) => peak_rss(),
        Device::Cuda(cuda) => Some(cuda.held_bytes().1 as u64),
    };
    let mut report = json!({
        "model": base.as_ref().map_or_else(|| args.shape.as_ref().map(|s| s.name.to_owned()), |b| Some(b.name())),
        "base_type": base.as_ref().map_or_else(|| args.base.to_string(), Base::main_type),
        "device": device.to_string(),
        "threads": rayon::current_num_threads(),
        "batch_size": args.batch_size,
        "sequence_length": args.max_seq_length,
        "peak_gib": peak.map(|bytes| bytes as f64 / GIB),
    });
    let mut splits = Vec::new();
    if let Device::Cuda(cuda) = &device {
        report["gpu"] = json!(cuda.model()?);
        let ceilings = Ceilings::measure(cuda)?;
        let floor = Floor::of(&subjects[0].decoder, args, ceilings);
        report["floor"] = json!(floor);
        for subject in &mut subjects {
            splits.push(subject.split(cuda)?);
        }
    }
    let mut results: Vec<Value> = subjects.iter().map(|s| s.result(args)).collect();
    for (result, split) in results.iter_mut().zip(&splits) {
        result["split_ms"] = json!(split);
    }
    report["methods"] = json!(results);
    if let [a, b] = &subjects[..] {
        report["speed_ratio"] = json!(b.median() / a.median());
    }
    if args.json {
        return Ok(printer.json(&report)?);
    }
    let mut text = String::new();
    for (i, subject) in subjects.iter().enumerate() {
        writeln!(
            text,
            "{:<6} {:8.1} tok/s  {:8.2} ms per step (median of {}, fastest {:.2})",
            subject.method.name(),
            subject.tokens() as f64 / subject.median(),
            1e3 * subject.median(),
            subject.seconds.len(),
            1e3 * subject.seconds.iter().copied().fold(f64::INFINITY, f64::min)
        )?;
        if let Some(fit) = &subject.fit {
            writeln!(text, "       {}; predicted {:.3} GiB", fit.settings, fit.need.total() as f64 / GIB)?;
        }
        if let Some(split) = splits.get(i) {
            let parts: Vec<String> = split.iter().map(|(what, ms)| format!("{what} {ms:.2}")).collect();
            writeln!(text, "       ms: {}", parts.join(", "))?;
        }
    }
    if let [a, b] = &subjects[..] {
        let (name, other) = (a.method.name(), b.method.name());
        writeln!(text, "{name} runs at {:.3} x the speed of {other}", b.median() / a.median())?;
    }
    if let Some(seconds) = report["floor"]["seconds"].as_f64() {
        writeln!(text, "floor  {:8.2} ms per step from FLOPs and bytes", 1e3 * seconds)?;
    }
    match peak {
        Some(bytes) => writeln!(text, "peak memory {:.3} GiB", bytes as f64 / GIB)?,
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
    /// The micro-batches of a step.
    batches: Vec<Batch>,
    fit: Option<Fit>,
    seconds: Vec<f64>,
}

impl Subject {
    fn new(
        args: &BenchTrainArgs,
        method: Method,
        base: Option<&Base>,
        device: &Device,
    ) -> anyhow::Result<Subject> {
        let mut config = PeftConfig::new(args.lora_r, 2.0 * args.lora_r as f64);
        config.target_modules = Some(TargetModules::AllLinear);
        config.use_dora = method.info().magnitude;
        if method.info().staged {
            // The split happens once, before training; a step costs what it costs with any factors.
            config.init_lora_weights = InitLoraWeights::Named(method.name().to_owned());
        }
        let build = |device: &Device, embedding_on_host: bool| match (base, &args.shape) {
            (Some(base), _) => Decoder::load_placed(base, device, embedding_on_host),
            (None, Some(shape)) => Decoder::synthetic(shape, args.base, device, embedding_on_host),
            (None, None) => unreachable!("one of both is required"),
        };
        let recomputed = match args.recompute {
            Recompute::Auto => ANY_LAYERS,
            Recompute::All => ALL_LAYERS,
            Recompute::None => 0..=0,
        };
        let fit = match limit_of(device, args.memory_limit.map(|bytes| bytes as usize))? {
            Some(limit) => {
                let (meta, meter) = meta();
                let size = (args.batch_size, args.max_seq_length);
                Some(fit_decoder(build(&meta, false)?, &config, size, recomputed.clone(), limit, &meter)?)
            }
            None => None,
        };
        if let (Some(fit), Some(cuda)) = (&fit, device.cuda()) {
            fit.need.reserve(cuda)?;
        }
        let mut decoder = build(device, fit.is_some_and(|fit| fit.settings.embedding_on_host))?;
        let mut params = adapters::attach(&mut decoder, &config)?;
        adapters::initialize(&mut decoder, &mut params, 0)?;
        decoder.refresh(&params)?;
        let hyper = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let optimizer = Optimizer::new(device, params.count(), hyper, 1.0)?;
        let layers = decoder.layers.len();
        let (batch_size, keep, on_host) = match &fit {
            Some(Fit { settings, .. }) => {
                decoder.keep_copies(settings.copied)?;
                (settings.batch, settings.keep(layers), settings.streams_on_host)
            }
            None => (args.batch_size, Keep::Layers(layers - (*recomputed.start()).min(layers)), false),
        };
        let buffers = Buffers::placed(&decoder, batch_size * args.max_seq_length, keep, on_host)?;
        let batches = synthetic(args, batch_size, decoder.config.vocab_size);
        Ok(Subject { method, decoder, params, optimizer, buffers, batches, fit, seconds: Vec::new() })
    }

    /// Seconds of one optimizer step.
    fn step(&mut self) -> anyhow::Result<f64> {
        let began = Instant::now();
        let pass = self.params.pass(None);
        let scale = 1.0 / self.batches.iter().map(|batch| batch.supervised().0.len()).sum::<usize>() as f32;
        for batch in &self.batches {
            let mut grads = self.optimizer.grads();
            self.decoder.accumulate(&mut self.buffers, batch, &mut grads, scale, &pass)?;
        }
        self.optimizer.step(&mut self.params, 1e-4)?;
        self.decoder.refresh(&self.params)?;
        let loss = self.buffers.take_loss()?;
        anyhow::ensure!(loss.sum.is_finite(), "the loss is not finite");
        Ok(began.elapsed().as_secs_f64())
    }

    /// Milliseconds of one more step by kernel file.
    fn split(&mut self, cuda: &qpeft_kernels::cuda::Cuda) -> anyhow::Result<BTreeMap<&'static str, f64>> {
        cuda.start_profile();
        self.step()?;
        Ok(cuda.stop_profile()?)
    }

    fn tokens(&self) -> usize {
        self.batches.iter().map(Batch::len).sum()
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
            "tokens_per_second": self.tokens() as f64 / self.median(),
            "settings": self.fit.map(|fit| fit.settings.to_string()),
            "predicted_gib": self.fit.map(|fit| fit.need.total() as f64 / GIB),
            "step_seconds": self.median(),
            "steps": self.seconds.len(),
        })
    }
}

/// Sequences of uniformly drawn tokens, all supervised, `batch_size` at a time.
fn synthetic(args: &BenchTrainArgs, batch_size: usize, vocab_size: usize) -> Vec<Batch> {
    let key = RngKey { seed: 0, stream: 1 };
    let mut batches = Vec::new();
    for sequence in 0..args.batch_size {
        if sequence % batch_size == 0 {
            batches.push(Batch::new());
        }
        let at = |i: usize| key.below((sequence * args.max_seq_length + i) as u64, vocab_size) as u32;
        let tokens: Vec<u32> = (0..args.max_seq_length).map(at).collect();
        let labels: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        batches.last_mut().expect("begun above").push(&tokens, &labels);
    }
    batches
}

/// The largest resident set of this process so far, in bytes; known on Linux only.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
