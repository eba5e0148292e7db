//! The flags of what measures or predicts: `qpeft bench ...` and `qpeft plan`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qpeft_kernels::weight::WeightType;

use super::ComputeArgs;
use crate::cli::values::{at_least_one, at_least_zero, bytes, packed_type, up_to_2_pow_32, weight_type};
use crate::model::synthetic::{BaseType, Shape};
use crate::train::config::Method;

/// `qpeft bench train`
#[derive(Debug, Clone, Args)]
pub struct BenchTrainArgs {
    /// GGUF file or Hugging Face folder
    #[arg(long, short, value_name = "PATH", required_unless_present = "shape")]
    pub model: Option<PathBuf>,
    /// Random weights in the shape of a known model, in place of a file: llama-3.1-8b, llama-3.2-1b, ...
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "base_quant"], value_parser = str::parse::<Shape>)]
    pub shape: Option<Shape>,
    /// Type of the random weights: nf4, nf4-dq, bf16, q4_k, q8_0, ... or q4_k_m
    #[arg(long, value_name = "TYPE", default_value = "nf4-dq", value_parser = str::parse::<BaseType>)]
    pub base: BaseType,
    /// Random tokens and, with --shape, random weights; what this benchmark always uses
    #[arg(long)]
    pub synthetic: bool,
    /// Quantize the linears of the base at load: nf4, nf4-dq, fp4, int8 or a ggml type
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub base_quant: Option<WeightType>,
    /// Method: lora, dora or pissa
    #[arg(long, value_name = "NAME", default_value_t, value_parser = str::parse::<Method>)]
    pub method: Method,
    /// Rank r
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one::<usize>, aliases = ["lora-rank", "rank", "r"])]
    pub lora_r: usize,
    /// Second method that takes turns with the first, step by step
    #[arg(long, value_name = "NAME", value_parser = str::parse::<Method>)]
    pub compare: Option<Method>,
    /// Sequences per forward pass
    #[arg(long, short, value_name = "N", default_value_t = 4, value_parser = at_least_one::<usize>)]
    pub batch_size: usize,
    /// Tokens per sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one::<usize>)]
    pub max_seq_length: usize,
    /// Measured steps
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one::<u64>)]
    pub steps: u64,
    /// Steps before the measurement
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_zero::<u64>)]
    pub warmup: u64,
    /// Layers whose activations are computed again in the backward pass: all, none, or auto for what memory allows
    #[arg(long, value_enum, value_name = "LAYERS", default_value_t)]
    pub recompute: Recompute,
    /// Device memory that the run may take, as 8GiB [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub memory_limit: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// Layers whose activations are computed again in the backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Recompute {
    /// As many as do not fit into memory.
    #[default]
    Auto,
    /// Every layer: least memory.
    All,
    /// No layer: fastest.
    None,
}

/// `qpeft bench quantize`
#[derive(Debug, Clone, Args)]
pub struct BenchQuantizeArgs {
    /// Types, as q4_k,q8_0 [default: all that can be written; on a GPU, all that it packs]
    #[arg(long = "type", value_name = "TYPES", value_delimiter = ',', value_parser = packed_type)]
    pub types: Vec<WeightType>,
    /// CPU threads, of both sides [default: 1; beside a GPU, all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    pub threads: Option<usize>,
    /// Device: cpu, or cuda or cuda:N to measure a GPU beside the CPU
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// llama.cpp's libggml-base.so, to compare speed and bytes with; its code is run
    #[arg(long, value_name = "FILE")]
    pub ggml_library: Option<PathBuf>,
    /// Elements to quantize, in rows of 4096 [default: 2^20; on a GPU, 14336 rows]
    #[arg(long, value_name = "N", value_parser = up_to_2_pow_32)]
    pub elements: Option<usize>,
    /// Quantize with importance: the types that take it
    #[arg(long)]
    pub importance: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft bench dequantize`
#[derive(Debug, Clone, Args)]
pub struct BenchDequantizeArgs {
    /// Types, as q4_k,q8_0 [default: all that can be written]
    #[arg(long = "type", value_name = "TYPES", value_delimiter = ',', value_parser = packed_type)]
    pub types: Vec<WeightType>,
    /// Rows of the matrix [default: 16, a tile, on the CPU; 14336 on a GPU]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    pub rows: Option<usize>,
    /// Columns of the matrix [default: 1024 on the CPU, 4096 on a GPU]
    #[arg(long, value_name = "N", value_parser = at_least_one::<usize>)]
    pub cols: Option<usize>,
    /// Device: auto (a GPU if one can be used), cpu (one core), cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft bench attention`
#[derive(Debug, Clone, Args)]
pub struct BenchAttentionArgs {
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one::<usize>)]
    pub heads: usize,
    /// Key and value heads
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one::<usize>)]
    pub kv_heads: usize,
    /// Elements of a head
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one::<usize>)]
    pub head_dim: usize,
    /// Sequences
    #[arg(long, short, value_name = "N", default_value_t = 4, value_parser = at_least_one::<usize>)]
    pub batch_size: usize,
    /// Tokens per sequence
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = at_least_one::<usize>)]
    pub max_seq_length: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `qpeft bench linear`
#[derive(Debug, Clone, Args)]
pub struct BenchLinearArgs {
    /// Output features
    #[arg(long, value_name = "N", default_value_t = 14336, value_parser = at_least_one::<usize>)]
    pub rows: usize,
    /// Input features
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = at_least_one::<usize>)]
    pub cols: usize,
    /// Tokens of a forward pass
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = at_least_one::<usize>)]
    pub tokens: usize,
    /// Rank r of the branch
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one::<usize>, aliases = ["lora-rank", "rank", "r"])]
    pub lora_r: usize,
    /// Type of the weight: nf4, nf4-dq, bf16, q4_k, q8_0, ...
    #[arg(long, value_name = "TYPE", default_value = "nf4-dq", value_parser = packed_type)]
    pub base: WeightType,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}

/// `qpeft plan`
#[derive(Debug, Clone, Args)]
pub struct PlanArgs {
    /// GGUF file or Hugging Face folder
    #[arg(long, short, value_name = "PATH", required_unless_present = "shape")]
    pub model: Option<PathBuf>,
    /// A known model's shape in place of a file: llama-3.1-8b, llama-3.2-1b, ...
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "base_quant"], value_parser = str::parse::<Shape>)]
    pub shape: Option<Shape>,
    /// Type of the weights of --shape: nf4, nf4-dq, bf16, q4_k, q8_0, ... or q4_k_m
    #[arg(long, value_name = "TYPE", default_value = "nf4-dq", value_parser = str::parse::<BaseType>)]
    pub base: BaseType,
    /// Quantize the linears of the base at load: nf4, nf4-dq, fp4, int8 or a ggml type
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub base_quant: Option<WeightType>,
    /// Method: lora, dora or pissa
    #[arg(long, value_name = "NAME", default_value_t, value_parser = str::parse::<Method>)]
    pub method: Method,
    /// Rank r
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one::<usize>, aliases = ["lora-rank", "rank", "r"])]
    pub lora_r: usize,
    /// Type of PiSSA's residuals: q8_0, bf16, nf4, ... [default: the base's own types]
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub residual_quant: Option<WeightType>,
    /// Sequences per forward pass
    #[arg(long, short, value_name = "N", default_value_t = 4, value_parser = at_least_one::<usize>)]
    pub batch_size: usize,
    /// Tokens per sequence
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = at_least_one::<usize>)]
    pub max_seq_length: usize,
    /// Compute the activations of every layer again
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Device memory that the run may take, as 8GiB [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub memory_limit: Option<u64>,
    /// Device whose free memory counts: auto, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `qpeft bench svd`
#[derive(Debug, Clone, Args)]
pub struct BenchSvdArgs {
    /// Random weights in the shape of a known model: llama-3.1-8b, llama-3.2-1b, ...
    #[arg(long, value_name = "NAME", required_unless_present = "rows", value_parser = str::parse::<Shape>)]
    pub shape: Option<Shape>,
    /// Rows of a single matrix in place of a model's
    #[arg(long, value_name = "N", requires = "cols", conflicts_with = "shape", value_parser = at_least_one::<usize>)]
    pub rows: Option<usize>,
    /// Columns of a single matrix
    #[arg(long, value_name = "N", requires = "rows", value_parser = at_least_one::<usize>)]
    pub cols: Option<usize>,
    /// Type of the weights: nf4, nf4-dq, bf16, q4_k, q8_0, ...
    #[arg(long, value_name = "TYPE", default_value = "nf4", value_parser = weight_type)]
    pub base: WeightType,
    /// Type of the residuals: q8_0, bf16, nf4, ... [default: that of the weights]
    #[arg(long, value_name = "TYPE", value_parser = weight_type)]
    pub residual_quant: Option<WeightType>,
    /// Rank r
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one::<usize>, aliases = ["lora-rank", "rank", "r"])]
    pub lora_r: usize,
    /// Iterations of the SVD
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub pissa_niter: usize,
    /// Rounds in which factors and residuals are fitted to each other
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub pissa_refinements: usize,
    /// Also split the smallest matrix on the CPU, and compare what is left
    #[arg(long)]
    pub check: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Where to compute.
    #[command(flatten)]
    pub compute: ComputeArgs,
}
