//! What can be typed: one struct per command, with every flag's name, aliases, range and default.
//!
//! This is the only list of settings. The YAML file of `--config` is read through the same flags
//! (see [`super::config`]), so a key cannot exist without its flag nor differ from it. The aliases
//! are the names that other trainers use.

mod bench;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use qpeft_formats::GgmlType;
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::mixture::{FileType, Mixture, TypeOverride};
use qpeft_kernels::weight::WeightType;

pub use bench::{
    BenchAttentionArgs, BenchDequantizeArgs, BenchLinearArgs, BenchQuantizeArgs, BenchSvdArgs,
    BenchTrainArgs, PlanArgs, Recompute,
};

use super::report::Usage;
use super::values::{
    Quant, at_least_one, at_least_zero, bytes, dense_type, file_type, fraction, ggml_type, out_type,
    positive, probability, quant, share, type_override, weight_type,
};
use crate::convert::hf_to_gguf::OutType;
use crate::train::TrainConfig;
use crate::train::config::{Method, TargetModules};
use crate::train::schedule::SchedulerType;

/// Train parameter-efficient adapters directly on quantized language models
#[derive(Debug, Parser)]
#[command(name = "qpeft", version, max_term_width = 110, propagate_version = false)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
    /// Print errors and results only
    #[arg(long, short, global = true, help_heading = "Output")]
    pub quiet: bool,
    /// Print plain lines in place of a progress bar
    #[arg(long, global = true, help_heading = "Output")]
    pub no_progress: bool,
}

/// The commands, in the order of the help.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a LoRA, DoRA or PiSSA adapter on a quantized or dense base
    Train(Box<TrainArgs>),
    /// Turn an adapter or a model into another format
    #[command(subcommand)]
    Convert(ConvertCommand),
    /// Merge an adapter into its base and write one model, weight by weight on a GPU if there is one
    Merge(MergeArgs),
    /// Write a model in other types
    Quantize(QuantizeArgs),
    /// Measure loss and perplexity of a model, with or without an adapter
    Eval(EvalArgs),
    /// Generate text, with or without an adapter
    Generate(GenerateArgs),
    /// Show what is in a GGUF, a safetensors file, a model folder or an adapter folder
    Inspect(InspectArgs),
    /// Measure speed and memory
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Say what a training run would take of a device's memory, and how it would be made to fit
    Plan(PlanArgs),
    /// Run the whole pipeline on a small real model
    Demo(DemoArgs),
}

/// `qpeft convert ...`
#[derive(Debug, Subcommand)]
pub enum ConvertCommand {
    /// Write a trained PiSSA adapter as a plain LoRA of the original base
    PissaToLora(PissaToLoraArgs),
    /// Write a Hugging Face folder as a GGUF file
    HfToGguf(HfToGgufArgs),
    /// Write a GGUF file as a Hugging Face folder
    GgufToHf(GgufToHfArgs),
}

/// `qpeft bench ...`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure training speed and peak memory on synthetic tokens
    Train(BenchTrainArgs),
    /// Measure how fast each type is quantized, beside llama.cpp's own quantizer or by a GPU
    Quantize(BenchQuantizeArgs),
    /// Measure how fast one core or a GPU dequantizes each type
    Dequantize(BenchDequantizeArgs),
    /// Measure causal attention, forward and backward
    Attention(BenchAttentionArgs),
    /// Measure a linear layer on a packed weight, forward and backward, with and without a branch
    Linear(BenchLinearArgs),
    /// Measure how fast PiSSA splits the weights of a model
    Svd(BenchSvdArgs),
}

/// Where and on how many threads a command computes.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", help_heading = "Compute")]
    pub device: String,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>, help_heading = "Compute")]
    pub threads: Option<usize>,
}

/// A model, and the adapter on it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// GGUF file or Hugging Face folder
    #[arg(long, short, value_name = "PATH", aliases = ["model-name-or-path", "model-name", "base-model"])]
    pub model: PathBuf,
    /// Quantize the linears of the base at load: nf4, nf4-dq, fp4, int8 or a ggml type
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub base_quant: Option<WeightType>,
    /// Adapter folder; a PiSSA run finds its own residual base
    #[arg(long, value_name = "DIR", aliases = ["adapter-path", "adapter-name-or-path"])]
    pub adapter: Option<PathBuf>,
    /// tokenizer.json to use in place of the model's own
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

/// How lines of a JSONL file become tokens and a mask.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Key of the prompt in pair data
    #[arg(long, hide_short_help = true, value_name = "KEY", help_heading = "Data")]
    pub prompt_field: Option<String>,
    /// Key of the completion in pair data
    #[arg(long, hide_short_help = true, value_name = "KEY", help_heading = "Data")]
    pub completion_field: Option<String>,
    /// Also count the loss on prompt tokens
    #[arg(long, hide_short_help = true, help_heading = "Data", aliases = ["train-on-inputs", "train-on-input"])]
    pub train_on_prompt: bool,
    /// Join prompt and completion without the chat template
    #[arg(long, hide_short_help = true, help_heading = "Data")]
    pub no_chat_template: bool,
    /// Longest example in tokens; the rest is cut
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = at_least_one::<usize>, help_heading = "Data",
        aliases = ["max-length", "sequence-len", "cutoff-len", "max-seq-len", "ctx-size"])]
    pub max_seq_length: usize,
}

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

/// `qpeft convert hf-to-gguf`
#[derive(Debug, Clone, Args)]
pub struct HfToGgufArgs {
    /// Hugging Face folder
    #[arg(long, short, value_name = "DIR", aliases = ["model-name-or-path", "model-name", "base-model"])]
    pub model: PathBuf,
    /// GGUF file to write
    #[arg(long, short, value_name = "FILE", aliases = ["outfile", "output-file"])]
    pub output: PathBuf,
    /// Type of the matrices: f32, f16, bf16, q8_0, or auto (bf16 or f16, as the folder has them)
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = out_type)]
    pub outtype: OutType,
    /// Pre-tokenizer of a byte-level BPE vocabulary, as llama.cpp names it [default: recognized]
    #[arg(long, value_name = "NAME")]
    pub pre: Option<String>,
    /// Replace what is in --output
    #[arg(long, alias = "overwrite")]
    pub overwrite_output: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft convert gguf-to-hf`
#[derive(Debug, Clone, Args)]
pub struct GgufToHfArgs {
    /// GGUF file
    #[arg(long, short, value_name = "FILE", aliases = ["model-name-or-path", "model-name", "base-model"])]
    pub model: PathBuf,
    /// Folder to write
    #[arg(long, short, value_name = "DIR", aliases = ["output-dir"])]
    pub output: PathBuf,
    /// Type of the tensors: f32, f16 or bf16 [default: that of the matrices, bf16 if they are quantized]
    #[arg(long, value_name = "TYPE", value_parser = dense_type)]
    pub dtype: Option<GgmlType>,
    /// Replace what is in --output
    #[arg(long, alias = "overwrite")]
    pub overwrite_output: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft convert pissa-to-lora`
#[derive(Debug, Clone, Args)]
pub struct PissaToLoraArgs {
    /// Folder of the PiSSA run
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Folder for the LoRA
    #[arg(long, short, value_name = "DIR")]
    pub output: PathBuf,
    /// Original base, to measure the error of the conversion
    #[arg(long, short, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Folder of the initial factors [default: `init` in --adapter]
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
    /// Replace what is in --output
    #[arg(long, alias = "overwrite")]
    pub overwrite_output: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The container of a merged model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MergeTarget {
    /// One GGUF file
    Gguf,
    /// Hugging Face folder, all tensors dense
    Safetensors,
    /// Hugging Face folder in NF4, the scales as in the base
    Nf4,
    /// Hugging Face folder in NF4 with double quantization
    Nf4Dq,
    /// Hugging Face folder in FP4, the scales as in the base
    Fp4,
}

/// `qpeft merge`
#[derive(Debug, Clone, Args)]
pub struct MergeArgs {
    /// GGUF file or Hugging Face folder
    #[arg(long, short, value_name = "PATH")]
    pub model: PathBuf,
    /// Quantize the linears of the base at load: nf4, nf4-dq, fp4, int8 or a ggml type
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub base_quant: Option<WeightType>,
    /// Adapter folder
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Format of the merged model
    #[arg(long, value_enum, default_value = "gguf")]
    pub to: MergeTarget,
    /// Type or mixture of the merged weights, with --to gguf: q8_0, q4_k_m, ... [default: the base's own types, of a
    /// PiSSA run its residual's]
    #[arg(long, value_name = "TYPE", value_parser = file_type)]
    pub quant: Option<FileType>,
    /// What is particular about some tensors, and about the files.
    #[command(flatten)]
    pub types: TypeArgs,
    /// Type of all tensors, with --to safetensors: f32, f16 or bf16 [default: the base's]
    #[arg(long, value_name = "TYPE", value_parser = dense_type)]
    pub dtype: Option<GgmlType>,
    /// Most gigabytes of one file of a folder
    #[arg(long, value_name = "GB", default_value_t = 5.0, value_parser = positive)]
    pub max_shard_size: f64,
    /// File or folder to write
    #[arg(long, short, value_name = "PATH")]
    pub output: PathBuf,
    /// Replace --output
    #[arg(long, alias = "overwrite")]
    pub overwrite_output: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// Exceptions from a mixture, and the size of the files.
#[derive(Debug, Clone, Args)]
pub struct TypeArgs {
    /// Give every quantized tensor the same type
    #[arg(long, help_heading = "Types")]
    pub pure: bool,
    /// Type of the tensors whose names match; may be repeated, the first match decides
    #[arg(long, value_name = "REGEX=TYPE", value_parser = type_override, action = clap::ArgAction::Append, help_heading = "Types")]
    pub tensor_type: Vec<TypeOverride>,
    /// Type of output.weight, or of a token embedding that is also the head
    #[arg(long, value_name = "TYPE", value_parser = ggml_type, help_heading = "Types")]
    pub output_tensor_type: Option<GgmlType>,
    /// Type of the token embedding
    #[arg(long, value_name = "TYPE", value_parser = ggml_type, help_heading = "Types")]
    pub token_embedding_type: Option<GgmlType>,
    /// Leave output.weight as it is
    #[arg(long, help_heading = "Types")]
    pub leave_output_tensor: bool,
    /// Write several files of at most this size: 2G, 500M
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with = "split_max_tensors", help_heading = "Files")]
    pub split_max_size: Option<u64>,
    /// Write several files of at most so many tensors
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>, help_heading = "Files")]
    pub split_max_tensors: Option<usize>,
}

impl TypeArgs {
    /// The mixture of a file type with these exceptions.
    pub fn mixture(&self, file_type: FileType) -> Mixture {
        Mixture {
            file_type,
            pure: self.pure,
            leave_output: self.leave_output_tensor,
            output_type: self.output_tensor_type,
            embedding_type: self.token_embedding_type,
            overrides: self.tensor_type.clone(),
        }
    }

    /// Refuses exceptions where there is no mixture.
    ///
    /// # Errors
    /// [`Usage`] naming the flag.
    pub fn require_mixture(&self, why: &str) -> Result<(), Usage> {
        let given = [
            ("--pure", self.pure),
            ("--tensor-type", !self.tensor_type.is_empty()),
            ("--output-tensor-type", self.output_tensor_type.is_some()),
            ("--token-embedding-type", self.token_embedding_type.is_some()),
            ("--leave-output-tensor", self.leave_output_tensor),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Usage::new(format!("`{flag}` does nothing {why}"))),
            None => Ok(()),
        }
    }

    /// How the output is cut into files, if it is.
    pub fn split(&self) -> Option<SplitLimit> {
        self.split_max_size.map(SplitLimit::Bytes).or(self.split_max_tensors.map(SplitLimit::Tensors))
    }
}

/// `qpeft quantize`
#[derive(Debug, Clone, Args)]
pub struct QuantizeArgs {
    /// GGUF file, the first of a split one, or Hugging Face folder
    #[arg(long, short, value_name = "PATH")]
    pub model: PathBuf,
    /// Type or mixture of a GGUF: q8_0, q4_k_m, iq4_xs, ...; copy changes no tensor; nf4, nf4-dq, fp4 or fp4-dq
    /// for a bitsandbytes folder
    #[arg(long, value_name = "TYPE", value_parser = quant)]
    pub quant: Quant,
    /// File to write, or folder with a bitsandbytes type
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Importance matrix of the model: GGUF or legacy .dat
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,
    /// Say what would be written, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do not warn that the model is quantized already
    #[arg(long)]
    pub allow_requantize: bool,
    /// Replace --output
    #[arg(long, alias = "overwrite")]
    pub overwrite_output: bool,
    /// What is particular about some tensors, and about the files.
    #[command(flatten)]
    pub types: TypeArgs,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>, help_heading = "Compute")]
    pub threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft eval`
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// The model and its adapter.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Examples, JSONL
    #[arg(long, short, value_name = "FILE", aliases = ["eval-data", "dataset"])]
    pub data: PathBuf,
    /// How examples become tokens.
    #[command(flatten)]
    pub data_args: DataArgs,
    /// Examples per forward pass
    #[arg(long, short, value_name = "N", default_value_t = 4, value_parser = at_least_one::<usize>)]
    pub batch_size: usize,
    /// Write the logits as a safetensors file
    #[arg(long, value_name = "FILE")]
    pub dump_logits: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `qpeft generate`
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// The model and its adapter.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt
    #[arg(long, short, value_name = "TEXT")]
    pub prompt: String,
    /// Wrap the prompt in the chat template as a user's message (the default if there is one)
    #[arg(long, conflicts_with = "raw")]
    pub chat: bool,
    /// Continue the prompt as it is
    #[arg(long)]
    pub raw: bool,
    /// Tokens to generate at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128, value_parser = at_least_one::<usize>, aliases = ["max-tokens", "n-predict"])]
    pub max_new_tokens: usize,
    /// Temperature of the sampling; 0 is greedy
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = at_least_zero::<f64>)]
    pub temperature: f64,
    /// Sample from the most likely tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub top_p: f64,
    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 42, value_parser = at_least_zero::<u64>)]
    pub seed: u64,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `qpeft inspect`
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// GGUF or safetensors file, model folder, or adapter folder
    pub path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft demo`
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// GGUF file [default: a small model, cached or fetched]
    #[arg(long, short, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Folder for what the demo writes
    #[arg(long, short, value_name = "DIR", default_value = "qpeft-demo")]
    pub output: PathBuf,
    /// Training steps
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = at_least_one::<u64>)]
    pub steps: u64,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}
