//! What can be typed: one struct per command, with every flag's name, aliases, range and default.
//!
//! This is the only list of settings. The YAML file of `--config` is read through the same flags
//! (see [`super::config`]), so a key cannot exist without its flag nor differ from it. The aliases
//! are the names that other trainers use. Here are the commands, what several of them share, and the flags of
//! those that use a model or show it; those of training, of writing models and of measuring have files of their own.

mod bench;
mod train;
mod write;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use qpeft_kernels::weight::WeightType;

pub use bench::{
    BenchAttentionArgs, BenchDequantizeArgs, BenchLinearArgs, BenchQuantizeArgs, BenchSvdArgs,
    BenchTrainArgs, PlanArgs, Recompute,
};
pub use train::{TrainArgs, refuse_residual_quant};
pub use write::{
    GgufToHfArgs, HfToGgufArgs, MergeArgs, MergeTarget, PissaToLoraArgs, QuantizeArgs, TypeArgs,
};

use super::values::{at_least_one, at_least_zero, probability, weight_type};

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
