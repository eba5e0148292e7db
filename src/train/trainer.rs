//! The training loop: the only place where time passes.
//!
//! A step is `gradient_accumulation_steps` micro-batches, one clipped AdamW update, and one refresh of
//! what adapters derive from their parameters. Whoever watches implements [`Observer`].

use std::path::Path;
use std::time::Instant;

use qpeft_formats::peft::PeftConfig;
use qpeft_kernels::Device;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::rng::RngKey;
use qpeft_kernels::weight::WeightType;

use super::checkpoint::{self, Checkpoint, State};
use super::config::{TargetModules, TrainConfig};
use super::data::{self, Dataset, EvalSize, Sampler};
use super::error::{Error, Result};
use super::fit::{ALL_LAYERS, ANY_LAYERS, Fit, fit, limit_of};
use super::log::{EvalRecord, LogWriter, StepRecord};
use super::optimizer::Optimizer;
use super::run_files::{RunFile, RunLock};
use super::schedule::{Schedule, warmup_steps};
use super::start::Start;
use crate::adapters::staged::{FileId, Manifest};
use crate::adapters::{self, AdapterFolder, folder};
use crate::model::chat;
use crate::model::tokenizer::Tokenizer;
use crate::model::{Base, Batch, Buffers, Decoder, Keep, Loss, Parameters};

/// What is about to be trained, said before the first step.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Base file or folder.
    pub base: String,
    /// Type of most of its weights.
    pub base_type: String,
    /// `dora (r 16, alpha 32, ...)`.
    pub method: String,
    /// Adapted linears.
    pub targets: usize,
    /// Names of the targeted modules.
    pub target_names: Vec<String>,
    /// Trained scalars.
    pub trainable: usize,
    /// Scalars of base and adapter.
    pub total: usize,
    /// Bytes of the packed base, of activations and gradients, of the optimizer.
    pub memory: Vec<(&'static str, usize)>,
    /// How it was fitted into a device's memory.
    pub fit: Option<Fit>,
    /// Training and evaluation examples.
    pub examples: (usize, usize),
    /// Examples cut at the maximum length, and examples left out.
    pub cut: (usize, usize),
    /// Share of the first example's tokens that carry no loss.
    pub masked_share: f32,
    /// Tokens of the first example.
    pub first_tokens: usize,
    /// Optimizer steps.
    pub total_steps: u64,
    /// Examples per step.
    pub examples_per_step: usize,
    /// First step of this process, if resumed: one more than the steps done.
    pub resumed_at: Option<u64>,
    /// The device and the libraries it works with.
    pub device: String,
    /// The staged init, if there is one.
    pub staged: Option<Manifest>,
}

/// Somebody who watches a run.
pub trait Observer {
    /// What is done beside steps, and how much of it: what, done, total.
    fn phase(&mut self, what: &str, done: usize, total: usize);
    /// Something to know that does not stop the run.
    fn warn(&mut self, text: &str);
    /// Everything is ready.
    fn plan(&mut self, plan: &Plan);
    /// An optimizer step is done; `logged`: as every `logging_steps`, or as the last.
    fn step(&mut self, record: &StepRecord, logged: bool);
    /// An evaluation is done.
    fn eval(&mut self, record: &EvalRecord);
    /// A checkpoint is written.
    fn saved(&mut self, path: &Path);
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Steps done in total.
    pub steps: u64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// Loss on the evaluation data before the first and after the last step.
    pub eval: Option<(f64, f64)>,
    /// Seconds of this process's steps.
    pub seconds: f64,
}

/// Trains as `config` says and writes the run into `config.output`; a run that is there is continued
/// with `resume` and replaced without.
///
/// # Errors
/// The base, the data, the adapter or the output folder is refused, the loss stops being finite, or the device fails.
pub fn train(
    config: &TrainConfig,
    device: &Device,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    let mut run = Run::prepare(config, device, resume, observer)?;
    run.train(observer).map_err(|e| {
        // What is there to resume from; that there is nothing is no further error.
        let last_checkpoint = checkpoint::latest(&config.output).ok();
        Error::interrupted(e, run.state.step, last_checkpoint)
    })
}

/// The pieces of a run in progress.
struct Run<'a> {
    config: &'a TrainConfig,
    decoder: Decoder,
    params: Parameters,
    peft: PeftConfig,
    optimizer: Optimizer,
    buffers: Buffers,
    /// Sequences that go through the model at once.
    batch_size: usize,
    data: Dataset,
    eval_data: Option<Dataset>,
    sampler: Sampler,
    schedule: Schedule,
    state: State,
    log: LogWriter,
    /// As long as this run goes on, no other writes into its folder.
    _lock: RunLock,
}

impl<'a> Run<'a> {
    fn prepare(
        config: &'a TrainConfig,
        device: &Device,
        resume: bool,
        observer: &mut dyn Observer,
    ) -> Result<Run<'a>> {
        // The cheapest refusal first: an output folder that cannot be written.
        std::fs::create_dir_all(&config.output).map_err(|e| Error::io("create", &config.output, e))?;
        let lock = RunLock::take(&config.output)?;
        let checkpoint =
            if resume { Some(checkpoint::load(&checkpoint::latest(&config.output)?)?) } else { None };

        observer.phase("open model", 0, 0);
        let model = Base::open_as(&config.model, config.base_quant)?;
        let base_id = FileId::of(&model)?;
        let tokenizer = match &config.tokenizer {
            Some(path) => Tokenizer::from_file(path).map_err(crate::Error::from)?,
            None => model.tokenizer()?,
        };
        let template_time = checkpoint.as_ref().map_or_else(chat::now, |c| c.state.template_time);
        let (data, eval_data) = load_data(config, &tokenizer, template_time, observer)?;
        let longest = |d: &Dataset| d.examples.iter().map(|e| e.input_ids.len()).max().unwrap_or(0);
        let longest = longest(&data).max(eval_data.as_ref().map_or(0, longest));
        let shape = model.config()?;
        shape.check_length(longest)?;
        let examples = data.examples.iter().chain(eval_data.iter().flat_map(|data| &data.examples));
        shape.check_tokens(examples.flat_map(|example| &example.input_ids))?;

        let init = config.init_adapter.as_deref().map(AdapterFolder::open).transpose()?;
        let start = Start { config, device, model, init: init.as_ref(), resume };
        start.check()?;
        let residual = start.residual_type();
        let fit = match limit_of(device, config.memory_limit.map(|bytes| bytes as usize))? {
            Some(limit) => {
                let (peft, shape) = (start.peft_config(), (config.batch_size, longest));
                let recomputed = if config.gradient_checkpointing { ALL_LAYERS } else { ANY_LAYERS };
                Some(fit(&start.model, &peft, residual, shape, recomputed, limit)?)
            }
            None => None,
        };
        let (decoder, mut params, peft, manifest, base) = start.adapt(fit.as_ref(), observer)?;
        if let Some(warning) = overridden(config, &peft, residual) {
            observer.warn(&warning);
        }

        let hyper = AdamW {
            beta1: config.adam_beta1 as f32,
            beta2: config.adam_beta2 as f32,
            eps: config.adam_epsilon as f32,
            weight_decay: config.weight_decay as f32,
        };
        let mut optimizer = Optimizer::new(device, params.count(), hyper, config.max_grad_norm)?;
        let mut decoder = decoder;
        let (batch_size, keep, on_host) = match &fit {
            Some(Fit { settings, .. }) => {
                decoder.keep_copies(settings.copied)?;
                (settings.batch, settings.keep(decoder.layers.len()), settings.streams_on_host)
            }
            None if config.gradient_checkpointing => (config.batch_size, Keep::LAYER_INPUTS, false),
            None => (config.batch_size, Keep::EVERYTHING, false),
        };
        let buffers = Buffers::placed(&decoder, batch_size * longest, keep, on_host)?;

        let per_step = config.batch_size * config.gradient_accumulation_steps;
        let examples = (config.num_train_epochs * data.examples.len() as f64).round().max(1.0) as u64;
        let total_steps = config.max_steps.unwrap_or(examples.div_ceil(per_step as u64));
        let schedule = Schedule {
            kind: config.lr_scheduler_type,
            peak: config.learning_rate,
            warmup_steps: warmup_steps(config.warmup_steps, config.warmup_ratio, total_steps),
            total_steps,
        };
        if total_steps <= schedule.warmup_steps.min(1) {
            observer.warn("the only step of this run is the first of the warmup, which has the learning rate 0: nothing will be learned; give `--warmup-steps 0` or more steps");
        }
        if config.eval_steps > 0 && eval_data.is_none() {
            observer.warn("`--eval-steps` does nothing without `--eval-data` or `--eval-split`");
        }
        if config.memory_limit.is_some() && device.cuda().is_none() {
            observer.warn("`--memory-limit` does nothing on a CPU: it is about the memory of a GPU");
        }
        let mut sampler = Sampler::new(data.examples.len(), config.seed, !config.no_shuffle);
        let mut state = State {
            seed: config.seed,
            config: config.binding(),
            data_hash: data.hash.clone(),
            examples_hash: data.examples_hash(),
            template_time,
            base_fingerprint: base_id.fingerprint.clone(),
            ..State::default()
        };
        if let Some(checkpoint) = checkpoint {
            checkpoint.state.check(config, &data, &base_id.fingerprint)?;
            sampler = Sampler::from_position(
                data.examples.len(),
                config.seed,
                !config.no_shuffle,
                checkpoint.state.sampler_position,
            );
            restore(&checkpoint, &mut params, &mut optimizer)?;
            state = checkpoint.state;
        }
        decoder.refresh(&params)?;

        let log = if resume {
            LogWriter::resume(&config.output, state.step)?
        } else {
            // Only now that nothing can be refused any more does a former run go.
            checkpoint::clear_run(&config.output)?;
            LogWriter::create(&config.output)?
        };
        let run_file =
            RunFile::new(base_id, used_data(&data, eval_data.as_ref()), in_effect(config, &peft, residual));
        run_file.write(&config.output)?;
        observer.plan(&Plan {
            base: base.name(),
            base_type: base.main_type(),
            method: describe(config, &peft),
            targets: decoder.linears().filter(|l| l.adapter.is_some()).count(),
            target_names: target_names(&decoder),
            trainable: params.count(),
            total: decoder.parameter_count() + params.count(),
            memory: match &fit {
                Some(fit) => fit.need.parts().into_iter().filter(|(_, bytes)| *bytes > 0).collect(),
                None => vec![
                    ("packed base", decoder.weight_bytes()),
                    ("activations and gradients", buffers.bytes()),
                    ("adapter and optimizer", optimizer.bytes() + params.count() * size_of::<f32>()),
                ],
            },
            fit,
            examples: (data.examples.len(), eval_data.as_ref().map_or(0, |d| d.examples.len())),
            cut: (data.truncated, data.skipped.len()),
            masked_share: data::masked_share(&data.examples[0]),
            first_tokens: data.examples[0].input_ids.len(),
            total_steps,
            examples_per_step: per_step,
            resumed_at: resume.then_some(state.step + 1),
            device: device.describe(),
            staged: manifest,
        });
        Ok(Run {
            config,
            decoder,
            params,
            peft,
            optimizer,
            buffers,
            batch_size,
            data,
            eval_data,
            sampler,
            schedule,
            state,
            log,
            _lock: lock,
        })
    }

    fn train(&mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let start = Instant::now();
        let mut first_eval = None;
        if self.eval_data.is_some() && self.state.step == 0 {
            first_eval = Some(self.evaluate(&start, observer)?);
        }
        let mut last_eval = first_eval;
        let total_steps = self.schedule.total_steps;
        while self.state.step < total_steps {
            let record = self.step(&start)?;
            // The finite loss has proved the newest checkpoint, so older ones may go.
            self.prune()?;
            let logged =
                self.state.step.is_multiple_of(self.config.logging_steps) || self.state.step == total_steps;
            observer.step(&record, logged);
            self.log.step(&record)?;
            let done = self.state.step;
            let due = |every: u64| every > 0 && done.is_multiple_of(every);
            if self.eval_data.is_some() && (due(self.config.eval_steps) || self.state.step == total_steps) {
                last_eval = Some(self.evaluate(&start, observer)?);
            }
            if due(self.config.save_steps) || self.state.step == total_steps {
                let path = self.save()?;
                observer.saved(&path);
                // From here on the run is the one that resumes from the checkpoint, bit for bit.
                self.decoder.refresh_anew(&self.params)?;
            }
        }
        self.prune()?;
        adapters::save(&self.params, &self.peft)?.write(&self.config.output)?;
        Ok(Outcome {
            steps: self.state.step,
            last_loss: self.state.last_loss.unwrap_or(f64::NAN),
            eval: first_eval.zip(last_eval),
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// One optimizer step.
    fn step(&mut self, start: &Instant) -> Result<StepRecord> {
        let began = Instant::now();
        let batches = self.draw();
        let tokens: usize = batches.iter().map(Batch::len).sum();
        let supervised: usize = batches.iter().map(|b| b.supervised().0.len()).sum();
        // A step whose examples carry no loss would divide by zero; its gradient is zero.
        let scale = 1.0 / supervised.max(1) as f32;
        for (index, batch) in batches.iter().enumerate() {
            // A step has at most as many micro-batches as examples.
            let per_step = self.config.batch_size * self.config.gradient_accumulation_steps;
            let micro = self.state.step * per_step as u64 + index as u64;
            let key = RngKey { seed: self.config.seed, stream: micro + 1 };
            let pass = self.params.pass((self.peft.lora_dropout > 0.0).then_some(key));
            let mut grads = self.optimizer.grads();
            self.decoder.accumulate(&mut self.buffers, batch, &mut grads, scale, &pass)?;
        }
        let step = self.state.step + 1;
        let learning_rate = self.schedule.learning_rate(self.state.step);
        self.optimizer.step(&mut self.params, learning_rate)?;
        self.decoder.refresh(&self.params)?;
        // The only wait for the device in a step, after everything is enqueued.
        let (loss, grad_norm) = (self.buffers.take_loss()?, self.optimizer.grad_norm()?);
        if !loss.sum.is_finite() || !grad_norm.is_finite() {
            return Err(Error::NotFinite {
                step,
                loss: loss.mean(),
                grad_norm,
                last_checkpoint: checkpoint::before(&self.config.output, self.state.step)?,
            });
        }

        self.state.step = step;
        self.state.optimizer_step = self.optimizer.updates;
        self.state.sampler_position = self.sampler.position();
        self.state.epoch = self.sampler.epoch() as u64;
        self.state.tokens += tokens as u64;
        self.state.last_loss = Some(loss.mean());
        Ok(StepRecord {
            step,
            loss: loss.mean(),
            learning_rate,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64(),
            elapsed_seconds: start.elapsed().as_secs_f64(),
            epoch: self.sampler.epoch(),
        })
    }

    /// The micro-batches of the next step. Without `max_steps` the last step ends with the last epoch.
    fn draw(&mut self) -> Vec<Batch> {
        let left = if self.config.max_steps.is_some() {
            u64::MAX
        } else {
            let all =
                (self.config.num_train_epochs * self.data.examples.len() as f64).round().max(1.0) as u64;
            all - self.sampler.position().min(all)
        };
        let wanted = self.config.batch_size * self.config.gradient_accumulation_steps;
        let count = left.min(wanted as u64) as usize;
        let picked: Vec<usize> = (0..count).map(|_| self.sampler.next_index()).collect();
        picked.chunks(self.batch_size).map(|indices| self.data.batch(indices)).collect()
    }

    fn evaluate(&mut self, start: &Instant, observer: &mut dyn Observer) -> Result<f64> {
        let data = self.eval_data.as_ref().expect("called only with evaluation data");
        let (buffers, batch_size) = (&mut self.buffers, self.batch_size);
        let mut progress = |done| observer.phase("evaluate", done, data.examples.len());
        let loss = dataset_loss(&self.decoder, buffers, &self.params, data, batch_size, &mut progress)?;
        let record = EvalRecord {
            step: self.state.step,
            loss: loss.mean(),
            perplexity: loss.mean().exp(),
            tokens: loss.tokens as u64,
            elapsed_seconds: start.elapsed().as_secs_f64(),
            epoch: self.sampler.epoch(),
        };
        self.log.eval(&record)?;
        observer.eval(&record);
        let best = self.state.best_loss.map_or(record.loss, |best| best.min(record.loss));
        self.state.best_loss = Some(best);
        Ok(record.loss)
    }

    fn save(&self) -> Result<std::path::PathBuf> {
        let values = self.params.values.read()?;
        let (m, v) = self.optimizer.moments()?;
        let shape = [values.len()];
        let path = checkpoint::save(
            &self.config.output,
            &self.state,
            [("parameters", &shape[..], &values[..]), ("adamw.m", &shape, &m), ("adamw.v", &shape, &v)],
            |dir| Ok(adapters::save(&self.params, &self.peft)?.write(dir)?),
        )?;
        Ok(path)
    }

    fn prune(&self) -> Result<()> {
        self.config.save_total_limit.map_or(Ok(()), |keep| checkpoint::prune(&self.config.output, keep))
    }
}

/// Mean loss of a data set, in micro-batches of `batch_size` examples.
///
/// # Errors
/// An example does not fit the buffers or the vocabulary.
pub fn dataset_loss(
    decoder: &Decoder,
    buffers: &mut Buffers,
    params: &Parameters,
    data: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Loss> {
    let pass = params.pass(None);
    let mut loss = Loss::default();
    let indices: Vec<usize> = (0..data.examples.len()).collect();
    for indices in indices.chunks(batch_size) {
        loss += decoder.loss(buffers, &data.batch(indices), &pass)?;
        progress(indices.last().map_or(0, |i| i + 1));
    }
    Ok(loss)
}

fn load_data(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    template_time: i64,
    observer: &mut dyn Observer,
) -> Result<(Dataset, Option<Dataset>)> {
    let options = config.data_options();
    let template = tokenizer.template().map_err(crate::Error::from)?.map(|t| t.at(template_time));
    let mut load = |path: &Path| -> Result<Dataset> {
        let mut progress = |done: u64, total: u64| observer.phase("tokenize", done as usize, total as usize);
        let data = data::load(path, tokenizer, template.as_ref(), &options, &mut progress)?;
        if let Some(warning) = data.warning() {
            observer.warn(&warning);
        }
        Ok(data)
    };
    let data = load(&config.data)?;
    match &config.eval_data {
        Some(path) => Ok((data, Some(load(path)?))),
        None if config.eval_split > 0.0 => {
            let (data, eval) = data.split_eval(EvalSize::Fraction(config.eval_split), config.seed)?;
            Ok((data, Some(eval)))
        }
        None => Ok((data, None)),
    }
}

/// The settings as they are in effect: a saved adapter brings its own shape along.
fn in_effect(config: &TrainConfig, peft: &PeftConfig, residual: Option<WeightType>) -> TrainConfig {
    TrainConfig {
        lora_r: peft.r,
        lora_alpha: peft.lora_alpha,
        use_rslora: peft.use_rslora,
        use_dora: peft.use_dora,
        residual_quant: residual,
        ..config.clone()
    }
}

/// What the saved adapter decides although the settings say otherwise.
fn overridden(config: &TrainConfig, peft: &PeftConfig, residual: Option<WeightType>) -> Option<String> {
    let differing: Vec<String> = [
        (config.lora_r != peft.r).then(|| format!("lora_r {}", peft.r)),
        (config.lora_alpha != peft.lora_alpha).then(|| format!("lora_alpha {}", peft.lora_alpha)),
        (config.use_rslora != peft.use_rslora).then(|| format!("use_rslora {}", peft.use_rslora)),
        (config.target_modules != TargetModules::AllLinear
            && Some((&config.target_modules).into()) != peft.target_modules)
            .then(|| "target_modules".to_owned()),
        // What was not asked for is not refused either.
        (config.residual_quant.is_some() && config.residual_quant != residual).then(|| {
            format!("residual_quant ({})", residual.map_or("the base's own types", WeightType::name))
        }),
    ]
    .into_iter()
    .flatten()
    .collect();
    (!differing.is_empty()).then(|| {
        format!(
            "the adapter of `--init-adapter` keeps its own {}; the settings do not change it",
            differing.join(", ")
        )
    })
}

fn used_data(data: &Dataset, eval: Option<&Dataset>) -> Vec<FileId> {
    let name = |d: &Dataset| {
        d.source
            .file_name()
            .map_or_else(|| d.source.display().to_string(), |n| n.to_string_lossy().into_owned())
    };
    let id = |d: &Dataset| FileId { name: name(d), fingerprint: format!("blake3:{}", d.hash) };
    std::iter::once(data).chain(eval).map(id).collect()
}

fn restore(checkpoint: &Checkpoint, params: &mut Parameters, optimizer: &mut Optimizer) -> Result<()> {
    let tensor = |name: &str| {
        let missing = || crate::Error::refused(format!("the checkpoint has no tensor `{name}`"));
        checkpoint.tensors.get(name).map(|t| t.data.as_slice()).ok_or_else(missing)
    };
    params.write(tensor("parameters")?)?;
    Ok(optimizer.restore(tensor("adamw.m")?, tensor("adamw.v")?, checkpoint.state.optimizer_step)?)
}

fn describe(config: &TrainConfig, peft: &PeftConfig) -> String {
    let mut name = config.method.name().to_owned();
    if folder::is_pissa(peft) && peft.use_dora {
        name.push_str(" + dora");
    }
    let mut text = format!("{name}, r {}, alpha {}", peft.r, peft.lora_alpha);
    if peft.use_rslora {
        text.push_str(", rsLoRA");
    }
    if peft.lora_dropout > 0.0 {
        text.push_str(", dropout ");
        text.push_str(&peft.lora_dropout.to_string());
    }
    text
}

fn target_names(decoder: &Decoder) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for linear in decoder.linears().filter(|l| l.adapter.is_some()) {
        let name = linear.module.rsplit('.').next().unwrap_or(&linear.module);
        if !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    names
}
