//! The flags of `qpeft train`, and which of them go together.

use std::path::PathBuf;

use clap::Args;
use qpeft_kernels::weight::WeightType;

use super::{ComputeArgs, DataArgs};
use crate::cli::report::Usage;
use crate::cli::values::{at_least_one, at_least_zero, bytes, fraction, positive, share, weight_type};
use crate::train::TrainConfig;
use crate::train::config::{Method, TargetModules};
use crate::train::schedule::SchedulerType;

/// `qpeft train`
#[derive(Debug, Clone, Args)]
pub struct TrainArgs {
    /// YAML file with any of these settings; flags win over it
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// GGUF file or Hugging Face folder
    #[arg(long, short, value_name = "PATH", aliases = ["model-name-or-path", "model-name", "base-model"])]
    pub model: PathBuf,
    /// Quantize the linears of the base at load: nf4, nf4-dq, fp4, int8 or a ggml type
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub base_quant: Option<WeightType>,
    /// Training examples, JSONL
    #[arg(long, short, value_name = "FILE", aliases = ["dataset", "dataset-name", "train-file"])]
    pub data: PathBuf,
    /// Folder of the run
    #[arg(long, short, value_name = "DIR", aliases = ["output-dir", "output-adapter"])]
    pub output: PathBuf,
    /// tokenizer.json to use in place of the model's own
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub tokenizer: Option<PathBuf>,
    /// Continue from the newest checkpoint in --output
    #[arg(long, aliases = ["resume-from-checkpoint", "auto-resume"])]
    pub resume: bool,
    /// Replace the run that is in --output
    #[arg(long, hide_short_help = true, aliases = ["overwrite", "overwrite-output-dir"])]
    pub overwrite_output: bool,

    /// Method: lora, dora or pissa
    #[arg(long, value_name = "NAME", default_value_t, value_parser = str::parse::<Method>, help_heading = "Adapter",
        aliases = ["fine-tune-type"])]
    pub method: Method,
    /// Rank r
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one::<usize>, help_heading = "Adapter",
        aliases = ["lora-rank", "rank", "r"])]
    pub lora_r: usize,
    /// Scale the branch by alpha / r [default: 32; pissa: r]
    #[arg(long, value_name = "X", value_parser = positive, help_heading = "Adapter", aliases = ["alpha"])]
    pub lora_alpha: Option<f64>,
    /// Dropout on the input of the branch
    #[arg(long, hide_short_help = true, value_name = "P", default_value_t = 0.0, value_parser = fraction, help_heading = "Adapter")]
    pub lora_dropout: f64,
    /// all-linear, or layer names: q_proj,v_proj
    #[arg(long, value_name = "NAMES", default_value = "all-linear", value_delimiter = ',', help_heading = "Adapter",
        aliases = ["lora-target-modules", "lora-modules", "lora-target"])]
    pub target_modules: Vec<String>,
    /// Train a magnitude per row as well (with --method pissa)
    #[arg(long, hide_short_help = true, help_heading = "Adapter", alias = "peft-use-dora")]
    pub use_dora: bool,
    /// Scale the branch by alpha / sqrt(r)
    #[arg(long, help_heading = "Adapter", hide_short_help = true, alias = "peft-use-rslora")]
    pub use_rslora: bool,
    /// Power iterations of PiSSA's randomized SVD
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_zero::<usize>, help_heading = "Adapter",
        hide_short_help = true, alias = "pissa-iter")]
    pub pissa_niter: usize,
    /// Rounds in which PiSSA's factors and residuals are fitted to each other, so that less is lost by rounding
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = at_least_zero::<usize>, help_heading = "Adapter",
        hide_short_help = true)]
    pub pissa_refinements: usize,
    /// Store PiSSA's residuals in this type: q8_0, bf16, nf4, ... [default: the base's own types]
    #[arg(long, value_name = "TYPE", value_parser = weight_type, help_heading = "Adapter", hide_short_help = true)]
    pub residual_quant: Option<WeightType>,
    /// Start from a saved adapter
    #[arg(long, value_name = "DIR", help_heading = "Adapter", hide_short_help = true)]
    pub init_adapter: Option<PathBuf>,

    /// How examples become tokens.
    #[command(flatten)]
    pub data_args: DataArgs,
    /// Keep the order of the data file
    #[arg(long, help_heading = "Data")]
    pub no_shuffle: bool,

    /// Examples per forward pass
    #[arg(long, short, value_name = "N", default_value_t = 4, value_parser = at_least_one::<usize>, help_heading = "Optimization",
        aliases = ["micro-batch-size", "per-device-train-batch-size"])]
    pub batch_size: usize,
    /// Forward passes per optimizer step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one::<usize>, help_heading = "Optimization",
        aliases = ["grad-accumulation-steps", "gradient-accumulation"])]
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate
    #[arg(long, value_name = "X", default_value_t = 2e-4, value_parser = positive, help_heading = "Optimization", aliases = ["lr"])]
    pub learning_rate: f64,
    /// cosine, linear or constant
    #[arg(long, value_name = "NAME", default_value_t, value_parser = str::parse::<SchedulerType>, help_heading = "Optimization",
        aliases = ["lr-scheduler"])]
    pub lr_scheduler_type: SchedulerType,
    /// Share of the steps that are linear warmup
    #[arg(long, value_name = "P", default_value_t = 0.03, value_parser = share, help_heading = "Optimization")]
    pub warmup_ratio: f64,
    /// Steps of linear warmup; wins over --warmup-ratio
    #[arg(long, value_name = "N", value_parser = at_least_zero::<u64>, help_heading = "Optimization", hide_short_help = true,
        aliases = ["num-warmup-steps"])]
    pub warmup_steps: Option<u64>,
    /// Optimizer steps; wins over --num-train-epochs
    #[arg(long, value_name = "N", value_parser = at_least_one::<u64>, help_heading = "Optimization", aliases = ["iters"])]
    pub max_steps: Option<u64>,
    /// Passes over the data
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = positive, help_heading = "Optimization",
        aliases = ["num-epochs", "epochs"])]
    pub num_train_epochs: f64,
    /// AdamW's weight decay
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = at_least_zero::<f64>, help_heading = "Optimization",
        hide_short_help = true)]
    pub weight_decay: f64,
    /// Clip the total gradient norm; 0 does not clip
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = at_least_zero::<f64>, help_heading = "Optimization",
        hide_short_help = true, aliases = ["clip-grad-norm"])]
    pub max_grad_norm: f64,
    /// AdamW's decay of the first moment
    #[arg(long, value_name = "P", default_value_t = 0.9, value_parser = fraction, help_heading = "Optimization",
        hide_short_help = true)]
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment
    #[arg(long, value_name = "P", default_value_t = 0.999, value_parser = fraction, help_heading = "Optimization",
        hide_short_help = true)]
    pub adam_beta2: f64,
    /// AdamW's epsilon
    #[arg(long, value_name = "X", default_value_t = 1e-8, value_parser = positive, help_heading = "Optimization",
        hide_short_help = true)]
    pub adam_epsilon: f64,
    /// Seed of initialization, shuffling and dropout
    #[arg(long, value_name = "N", default_value_t = 42, value_parser = at_least_zero::<u64>, help_heading = "Optimization")]
    pub seed: u64,
    /// Compute activations again: less memory, slower
    #[arg(long, help_heading = "Compute", aliases = ["grad-checkpoint", "use-gradient-checkpointing"])]
    pub gradient_checkpointing: bool,
    /// Device memory to stay within, as 8GiB [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Compute", hide_short_help = true)]
    pub memory_limit: Option<u64>,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,

    /// Held-out examples, JSONL
    #[arg(long, value_name = "FILE", help_heading = "Evaluation and files", aliases = ["eval-dataset", "eval-file"])]
    pub eval_data: Option<PathBuf>,
    /// Hold out this share of --data
    #[arg(long, hide_short_help = true, value_name = "P", default_value_t = 0.0, value_parser = fraction, help_heading = "Evaluation and files",
        aliases = ["val-set-size", "val-size"])]
    pub eval_split: f64,
    /// Steps between evaluations; 0: first and last step only
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = at_least_zero::<u64>, help_heading = "Evaluation and files",
        aliases = ["steps-per-eval"])]
    pub eval_steps: u64,
    /// Steps between checkpoints; 0: last step only
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_zero::<u64>, help_heading = "Evaluation and files",
        aliases = ["save-every", "checkpoint-save-steps"])]
    pub save_steps: u64,
    /// Newest checkpoints to keep [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>, help_heading = "Evaluation and files", hide_short_help = true)]
    pub save_total_limit: Option<usize>,
    /// Steps between lines of log.jsonl
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one::<u64>, help_heading = "Evaluation and files",
        hide_short_help = true, aliases = ["log-every-n-steps", "steps-per-report"])]
    pub logging_steps: u64,
    /// Print one JSON object about the finished run
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

impl TrainArgs {
    /// The settings of the run: defaults that depend on other settings are filled in, and combinations
    /// that mean nothing are refused.
    ///
    /// # Errors
    /// See [`Usage`].
    pub fn resolve(&self) -> Result<TrainConfig, Usage> {
        if self.resume && self.overwrite_output {
            return Err(Usage::new("`--resume` and `--overwrite-output` exclude each other")
                .hint("`--resume` continues the run in `--output`, `--overwrite-output` deletes it"));
        }
        if self.eval_data.is_some() && self.eval_split > 0.0 {
            return Err(Usage::new("`--eval-data` and `--eval-split` exclude each other"));
        }
        if self.data_args.prompt_field.is_some() != self.data_args.completion_field.is_some() {
            return Err(Usage::new("`--prompt-field` and `--completion-field` need each other"));
        }
        if let Some(empty) = self.target_modules.iter().find(|name| name.trim().is_empty()) {
            return Err(Usage::new(format!("`--target-modules`: `{empty}` is not the name of a layer"))
                .hint("give `all-linear` or names such as `q_proj,v_proj`"));
        }
        let targets = self.target_modules.iter().map(|name| name.trim().to_owned()).collect::<Vec<_>>();
        if targets.len() > 1 && targets.iter().any(|name| name == "all-linear") {
            return Err(Usage::new("`--target-modules`: `all-linear` stands alone"));
        }
        refuse_residual_quant(self.method, self.residual_quant)?;
        self.refuse_refinements()?;
        let alpha = match self.method {
            Method::Lora | Method::Dora => 32.0,
            Method::Pissa => self.lora_r as f64,
        };
        Ok(TrainConfig {
            model: self.model.clone(),
            base_quant: self.base_quant,
            data: self.data.clone(),
            output: self.output.clone(),
            tokenizer: self.tokenizer.clone(),
            method: self.method,
            use_dora: self.use_dora || self.method == Method::Dora,
            use_rslora: self.use_rslora,
            lora_r: self.lora_r,
            lora_alpha: self.lora_alpha.unwrap_or(alpha),
            lora_dropout: self.lora_dropout,
            target_modules: TargetModules::from_names(targets),
            pissa_niter: self.pissa_niter,
            pissa_refinements: self.pissa_refinements,
            residual_quant: self.residual_quant,
            init_adapter: self.init_adapter.clone(),
            prompt_field: self.data_args.prompt_field.clone(),
            completion_field: self.data_args.completion_field.clone(),
            train_on_prompt: self.data_args.train_on_prompt,
            no_chat_template: self.data_args.no_chat_template,
            no_shuffle: self.no_shuffle,
            max_seq_length: self.data_args.max_seq_length,
            batch_size: self.batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            learning_rate: self.learning_rate,
            lr_scheduler_type: self.lr_scheduler_type,
            warmup_ratio: self.warmup_ratio,
            warmup_steps: self.warmup_steps,
            max_steps: self.max_steps,
            num_train_epochs: self.num_train_epochs,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            seed: self.seed,
            gradient_checkpointing: self.gradient_checkpointing,
            memory_limit: self.memory_limit,
            eval_data: self.eval_data.clone(),
            eval_split: self.eval_split,
            eval_steps: self.eval_steps,
            save_steps: self.save_steps,
            save_total_limit: self.save_total_limit,
            logging_steps: self.logging_steps,
        })
    }

    /// Refuses rounds of refinement where nothing is split, or where the factors are given.
    fn refuse_refinements(&self) -> Result<(), Usage> {
        let (with, why, hint) = if self.pissa_refinements == 0 {
            return Ok(());
        } else if !self.method.info().staged {
            (format!("--method {}", self.method), "which splits no weight", "give `--method pissa`")
        } else if self.init_adapter.is_some() {
            ("--init-adapter".to_owned(), "which brings its factors along", "leave one of the two out")
        } else {
            return Ok(());
        };
        Err(Usage::new(format!("`--pissa-refinements` does nothing with `{with}`, {why}")).hint(hint))
    }
}

/// Refuses a type of residuals where nothing is split.
///
/// # Errors
/// [`Usage`] naming the flag.
pub fn refuse_residual_quant(method: Method, residual_quant: Option<WeightType>) -> Result<(), Usage> {
    if residual_quant.is_none() || method.info().staged {
        return Ok(());
    }
    Err(Usage::new(format!(
        "`--residual-quant` does nothing with `--method {method}`, which splits no weight"
    ))
    .hint("leave it out, or give `--method pissa`; `--base-quant` is the type of the base itself"))
}
