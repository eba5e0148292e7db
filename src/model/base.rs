//! The base model as a file: a GGUF or a Hugging Face folder, asked for by Hugging Face names.
//!
//! Whatever the file does to its rows (llama-architecture GGUFs permute those of q and k per head) is
//! undone here, so that everything above sees one layout: that of the adapters.

use std::path::Path;

use qpeft_formats::bitsandbytes::config::Quantization;
use qpeft_formats::bitsandbytes::{FourBit, Int8};
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{GgufFile, names};
use qpeft_formats::safetensors::{Checkpoint, Dtype, fp8};
use qpeft_formats::{GgmlType, blocks};
use qpeft_kernels::ops::quantize::Packers;
use qpeft_kernels::weight::WeightType;
use qpeft_kernels::{Device, Tensor};

use super::config::Config;
use super::linear::BaseWeight;
use super::save::slot_of;
use super::tokenizer::{Tokenizer, TokenizerError};
use crate::error::{Error, Result};

/// An opened and checked base model.
#[derive(Debug)]
pub enum Base {
    /// One GGUF file.
    Gguf(GgufFile),
    /// A folder with `config.json` and safetensors.
    Folder(Checkpoint),
    /// Another base whose linears are quantized as they are loaded.
    Quantized {
        /// What is on disk.
        base: Box<Base>,
        /// The type of the linears in memory.
        to: WeightType,
    },
}

/// What a base that is quantized as it is loaded is quantized by.
#[derive(Debug)]
pub enum Quantizing {
    /// These.
    By(Packers),
    /// Nobody: on a device that only counts, values do not matter.
    OnlySizes,
}

impl Quantizing {
    /// What belongs to a base and the device that is at hand.
    ///
    /// # Errors
    /// The device refuses.
    pub fn of(base: &Base, device: &Device) -> Result<Quantizing> {
        match base {
            _ if device.is_meta() => Ok(Quantizing::OnlySizes),
            Base::Quantized { to, .. } if Packers::is_shared(*to) => Ok(Quantizing::By(Packers::of(device)?)),
            _ => Ok(Quantizing::By(Packers::default())),
        }
    }
}

impl Base {
    /// Opens a `.gguf` file or a Hugging Face folder.
    ///
    /// # Errors
    /// The path is neither, or what is there is refused.
    pub fn open(path: &Path) -> Result<Base> {
        if path.is_dir() {
            let folder = Checkpoint::open(path)?;
            quantization(&folder)?;
            return Ok(Base::Folder(folder));
        }
        Ok(Base::Gguf(GgufFile::open(path)?))
    }

    /// As [`Base::open`], with the linears of the blocks quantized at load if a type is given. Embeddings,
    /// the output head and norms stay, as with bitsandbytes.
    ///
    /// # Errors
    /// As [`Base::open`]; or the base is quantized already.
    pub fn open_as(path: &Path, to: Option<WeightType>) -> Result<Base> {
        let base = Base::open(path)?;
        let Some(to) = to else { return Ok(base) };
        if let Base::Folder(folder) = &base
            && !matches!(quantization(folder)?, Quantization::None | Quantization::Fp8 { .. })
        {
            return Err(Error::refused(format!(
                "`{}` is quantized already ({}); `--base-quant {to}` would quantize it twice",
                path.display(),
                base.main_type()
            ))
            .with_hint("leave out `--base-quant`, or give the full-precision model"));
        }
        Ok(Base::Quantized { base: Box::new(base), to })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Base::Gguf(file) => file.path(),
            Base::Folder(folder) => folder.dir(),
            Base::Quantized { base, .. } => base.path(),
        }
    }

    /// Name of the file or folder, without its parents.
    pub fn name(&self) -> String {
        self.path()
            .file_name()
            .map_or_else(|| self.path().display().to_string(), |n| n.to_string_lossy().into_owned())
    }

    /// `blake3:` and the hash of the weights: what ties an adapter to its base. Of a base that is quantized
    /// at load, the type follows: `blake3:...+nf4`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        Ok(match self {
            Base::Gguf(file) => file.fingerprint()?,
            Base::Folder(folder) => folder.fingerprint()?,
            Base::Quantized { base, to } => format!("{}+{to}", base.fingerprint()?),
        })
    }

    /// The decoder's shapes.
    ///
    /// # Errors
    /// Another architecture, or settings that the decoder does not have.
    pub fn config(&self) -> Result<Config> {
        match self {
            Base::Gguf(file) => Config::from_gguf(file),
            Base::Folder(folder) => {
                Config::from_hf(folder.config(), &folder.config_path().display().to_string())
            }
            Base::Quantized { base, .. } => base.config(),
        }
    }

    /// The tokenizer that belongs to the model.
    ///
    /// # Errors
    /// There is none, or one that is not supported.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(match self {
            // A vocabulary knows its keys, not its file.
            Base::Gguf(file) => Tokenizer::from_gguf(file.metadata()).map_err(|e| {
                if matches!(e, TokenizerError::Metadata(_)) {
                    return Error::from(e);
                }
                let error = Error::refused(format!("`{}`: {e}", file.path().display()));
                e.hint().into_iter().fold(error, Error::with_hint)
            })?,
            Base::Folder(folder) => Tokenizer::from_hf_dir(folder.dir())?,
            Base::Quantized { base, .. } => base.tokenizer()?,
        })
    }

    /// Whether the file has this tensor (Hugging Face name).
    pub fn has(&self, name: &str) -> bool {
        match self {
            Base::Gguf(file) => names::gguf_tensor(name).is_some_and(|name| file.tensor(&name).is_some()),
            Base::Folder(folder) => folder.tensor(name).is_some(),
            Base::Quantized { base, .. } => base.has(name),
        }
    }

    /// A packed matrix (rows, cols) by its Hugging Face name, rows in Hugging Face order.
    ///
    /// `heads`: the matrix is a q or k projection of so many heads. `quantizing`: asked by a base that is quantized as it
    /// is loaded.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or a type that is not supported.
    pub fn matrix(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        heads: Option<usize>,
        quantizing: &Quantizing,
    ) -> Result<BaseWeight> {
        match self {
            Base::Gguf(file) => {
                let info = file.require(&gguf_name(name)?)?;
                let dtype = info.dtype;
                self.expect_shape(&info.name, &[rows, cols], &[info.n_rows(), info.row_len()])?;
                let mut bytes = file.bytes(info);
                if let Some(heads) = heads {
                    let mut reordered = vec![0; bytes.len()];
                    names::rows_to_hf(&mut reordered, &bytes, dtype.row_bytes(cols)?, heads, rows / heads)?;
                    bytes = Bytes::from(reordered);
                }
                let factor = self.companion_scale(file, &info.name)?;
                Ok(BaseWeight::from_ggml(dtype, rows, cols, bytes)?.scaled_by(factor))
            }
            Base::Folder(folder) => {
                let weight = folder_matrix(folder, name)?;
                self.expect_shape(name, &[rows, cols], &[weight.rows(), weight.cols()])?;
                Ok(weight)
            }
            Base::Quantized { base, to } => {
                let weight = base.matrix(name, rows, cols, heads, quantizing)?;
                if slot_of(name).is_none() {
                    return Ok(weight);
                }
                let dtype = weight.element_type();
                let packed = match quantizing {
                    Quantizing::By(packers) => weight.quantized_by(packers, *to, dtype),
                    Quantizing::OnlySizes => BaseWeight::empty_from(*to, rows, cols, dtype),
                };
                packed.map_err(|e| {
                    let hint = e.hint();
                    let error = Error::refused(format!("tensor `{name}` cannot be quantized to {to}: {e}"));
                    let smaller = || "choose a type of smaller blocks: q8_0, q5_0, q4_0, nf4".to_owned();
                    error.with_hint(hint.unwrap_or_else(smaller))
                })
            }
        }
    }

    /// What all elements of a matrix are to be multiplied by: `blk.0.ffn_up.scale` for
    /// `blk.0.ffn_up.weight`, which NVFP4 files have. (`.input_scale` is for engines that quantize
    /// activations too.)
    fn companion_scale(&self, file: &GgufFile, weight: &str) -> Result<f32> {
        let Some(info) =
            weight.strip_suffix(".weight").and_then(|module| file.tensor(&format!("{module}.scale")))
        else {
            return Ok(1.0);
        };
        let refused = |what: String| {
            Error::refused(format!(
                "`{}`: tensor `{}`: {what}, expected one normal F32 number that multiplies `{weight}`",
                self.path().display(),
                info.name
            ))
        };
        let elements = info.n_rows() * info.row_len();
        if elements != 1 || info.dtype != GgmlType::F32 {
            return Err(refused(format!("{elements} elements of {}", info.dtype)));
        }
        let mut factor = [0.0];
        blocks::dequantize_row(info.dtype, &file.bytes(info), &mut factor);
        if !factor[0].is_normal() {
            return Err(refused(format!("`{}`", factor[0])));
        }
        Ok(factor[0])
    }

    /// A vector, as one row on `device`.
    ///
    /// # Errors
    /// The tensor is missing, has another length, or a type that is not supported.
    pub fn vector(&self, device: &Device, name: &str, len: usize) -> Result<Tensor> {
        let values = match self {
            Base::Gguf(file) => {
                let info = file.require(&gguf_name(name)?)?;
                self.expect_shape(&info.name, &[len], &[info.n_rows() * info.row_len()])?;
                let mut values = vec![0.0; len];
                blocks::dequantize_row(info.dtype, &file.bytes(info), &mut values);
                values
            }
            Base::Folder(folder) => {
                let view = folder.require(name)?;
                self.expect_shape(name, &[len], &view.shape)?;
                view.to_f32()?
            }
            Base::Quantized { base, .. } => return base.vector(device, name, len),
        };
        Ok(Tensor::from_slice(device, 1, len, &values)?)
    }

    /// The quantization of the linears, for people: the type of most of them.
    pub fn main_type(&self) -> String {
        let mut counts: Vec<(String, u64)> = Vec::new();
        let mut count = |name: String, size: u64| match counts.iter_mut().find(|(n, _)| *n == name) {
            Some((_, total)) => *total += size,
            None => counts.push((name, size)),
        };
        match self {
            Base::Gguf(file) => {
                for info in file.tensors().iter().filter(|info| info.name.starts_with("blk.")) {
                    count(info.dtype.name().to_owned(), info.size);
                }
            }
            Base::Quantized { to, .. } => return to.name().to_owned(),
            Base::Folder(folder) => {
                match quantization(folder) {
                    Ok(Quantization::FourBit { quant_type, double }) => {
                        return WeightType::FourBit { quant_type, double }.name().to_owned();
                    }
                    Ok(Quantization::Int8) => return WeightType::Int8.name().to_owned(),
                    _ => {}
                }
                for name in folder.names() {
                    if let Some(view) = folder.tensor(name) {
                        count(view.dtype.to_string(), view.bytes.len() as u64);
                    }
                }
            }
        }
        counts.into_iter().max_by_key(|(_, size)| *size).map_or_else(|| "none".to_owned(), |(name, _)| name)
    }

    fn expect_shape(&self, name: &str, expected: &[usize], found: &[usize]) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        Err(Error::refused(format!(
            "`{}`: tensor `{name}`: shape {found:?}, expected {expected:?} from the model's configuration",
            self.path().display()
        )))
    }
}

/// What the folder's `config.json` says of its quantization.
///
/// # Errors
/// A method that is not supported.
pub fn quantization(folder: &Checkpoint) -> Result<Quantization> {
    Ok(Quantization::from_config(folder.config()).map_err(|e| e.in_file(&folder.config_path()))?)
}

/// A matrix of a folder, packed as it is stored there.
///
/// # Errors
/// The tensor or one that belongs to it is missing or damaged, or has a type that is not supported.
pub fn folder_matrix(folder: &Checkpoint, name: &str) -> Result<BaseWeight> {
    let find = |name: &str| folder.tensor(name);
    let in_folder = |e: qpeft_formats::Error| e.in_file(folder.dir());
    if let Some(weight) = FourBit::read(name, &find).map_err(in_folder)? {
        return Ok(BaseWeight::from_four_bit(weight));
    }
    if let Some(weight) = Int8::read(name, &find).map_err(in_folder)? {
        return Ok(BaseWeight::from_int8(weight));
    }
    let view = folder.require(name)?;
    let [rows, cols] = view.shape[..] else {
        return Err(Error::refused(format!(
            "`{}`: tensor `{name}`: shape {:?}, expected the two sizes of a matrix",
            folder.dir().display(),
            view.shape
        )));
    };
    if let Some(dtype) = dense_type(view.dtype) {
        return Ok(BaseWeight::from_ggml(dtype, rows, cols, view.bytes)?);
    }
    let values = match fp8::scale_name(name, &find).filter(|_| view.is_fp8()) {
        Some(scale) => {
            let block = match quantization(folder)? {
                Quantization::Fp8 { block } => block,
                _ => None,
            };
            view.to_f32_scaled(&folder.require(&scale)?, block).map_err(in_folder)?
        }
        None => view.to_f32().map_err(in_folder)?,
    };
    Ok(BaseWeight::from_f32(rows, cols, &values)?)
}

/// The ggml type with the same bytes, for the dense types that both know.
pub fn dense_type(dtype: Dtype) -> Option<GgmlType> {
    match dtype {
        Dtype::F32 => Some(GgmlType::F32),
        Dtype::F16 => Some(GgmlType::F16),
        Dtype::BF16 => Some(GgmlType::BF16),
        _ => None,
    }
}

fn gguf_name(name: &str) -> Result<String> {
    names::gguf_tensor(name)
        .ok_or_else(|| Error::refused(format!("tensor `{name}` has no place in a GGUF file")))
}
