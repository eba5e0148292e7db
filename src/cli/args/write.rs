//! The flags of what writes a model or an adapter in another form: `qpeft convert ...`, `qpeft merge` and
//! `qpeft quantize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use qpeft_formats::GgmlType;
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::mixture::{FileType, Mixture, TypeOverride};
use qpeft_kernels::weight::WeightType;

use super::ComputeArgs;
use crate::cli::report::Usage;
use crate::cli::values::{
    Quant, at_least_one, bytes, dense_type, file_type, ggml_type, out_type, positive, quant, type_override,
    weight_type,
};
use crate::convert::hf_to_gguf::OutType;

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
    /// Most gigabytes of one file of a folder [default: 5]
    #[arg(long, value_name = "GB", value_parser = positive)]
    pub max_shard_size: Option<f64>,
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
