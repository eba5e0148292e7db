//! Tensors of a checkpoint to a checked 4-bit weight. Nothing is believed: every type, shape and length is compared
//! with what the JSON says, and the JSON with itself, before a byte is used.

use super::blob::Blob;
use super::nested::Nested;
use super::{FourBit, QuantType, Scales};
use crate::error::{Error, Kind, Place, Result};
use crate::safetensors::{Dtype, TensorView};

/// How a checkpoint finds a tensor by its name.
pub type Find<'a> = &'a dyn Fn(&str) -> Option<TensorView>;

/// How far an entry of a stored code book may lie from ours: versions of bitsandbytes computed the tables
/// in other ways, and all of them dequantize with their own.
const TABLE_TOLERANCE: f32 = 1e-5;

/// Where the JSON of a weight lies.
pub(super) fn state_key(name: &str, quant_type: QuantType) -> String {
    format!("{name}.quant_state.bitsandbytes__{}", quant_type.name())
}

impl FourBit {
    /// The 4-bit type of the weight `name`; `None` if it is not stored in 4 bits.
    pub fn quant_type(name: &str, find: Find<'_>) -> Option<QuantType> {
        QuantType::ALL.into_iter().find(|&t| find(&state_key(name, t)).is_some())
    }

    /// Reads the weight `name` (`model.layers.0.mlp.up_proj.weight`); `None` if it is not stored in 4 bits.
    ///
    /// # Errors
    /// A tensor that belongs to it is missing, or has another type, shape or length than the others say.
    pub fn read(name: &str, find: Find<'_>) -> Result<Option<FourBit>> {
        let Some(quant_type) = FourBit::quant_type(name, find) else { return Ok(None) };
        let get = |key: &str| {
            find(key).ok_or_else(|| Error::new(Kind::MissingTensor).at(Place::Tensor(key.to_owned())))
        };
        let json = get(&state_key(name, quant_type))?;
        expect_dtype(&json, Dtype::U8, "U8")?;
        let blob =
            Blob::parse(&json.bytes, quant_type).map_err(|e| e.at(Place::Tensor(json.name.clone())))?;
        let state = blob.state;

        let codes = get(name)?;
        // bitsandbytes can pack the bytes into elements of any type: only their number counts.
        expect_bytes(&codes, state.code_bytes())?;
        let table = floats(&get(&format!("{name}.quant_map"))?, 16)?;
        if let Some(entry) = table
            .iter()
            .zip(quant_type.table())
            .position(|(found, expected)| (found - expected).abs().total_cmp(&TABLE_TOLERANCE).is_gt())
        {
            let kind = Kind::WrongTable {
                table: quant_type.name(),
                entry,
                expected: quant_type.table()[entry],
                found: table[entry],
            };
            return Err(Error::new(kind).at(Place::Tensor(format!("{name}.quant_map"))));
        }
        let absmax = get(&format!("{name}.absmax"))?;
        let scales = match blob.nested {
            None => {
                expect_dtype(&absmax, Dtype::F32, "F32")?;
                expect_shape(&absmax, &[state.blocks()])?;
                Scales::Plain(absmax.bytes)
            }
            Some((blocksize, offset)) => {
                expect_dtype(&absmax, Dtype::U8, "U8")?;
                expect_shape(&absmax, &[state.blocks()])?;
                let count = state.blocks().div_ceil(blocksize);
                let scales = finite(&get(&format!("{name}.nested_absmax"))?, count)?;
                let map = finite(&get(&format!("{name}.nested_quant_map"))?, 256)?;
                Scales::Nested(Nested {
                    codes: absmax.bytes,
                    absmax: scales,
                    blocksize,
                    map: map.into_boxed_slice().try_into().expect("256 values were read"),
                    offset,
                })
            }
        };
        Ok(Some(FourBit { state, codes: codes.bytes, scales }))
    }
}

/// Refuses elements of another type.
pub(super) fn expect_dtype(tensor: &TensorView, expected: Dtype, name: &'static str) -> Result<()> {
    if tensor.dtype == expected {
        return Ok(());
    }
    let kind = Kind::WrongDtype { expected: name, found: tensor.dtype.to_string().into() };
    Err(Error::new(kind).at(Place::Tensor(tensor.name.clone())))
}

/// Refuses another shape.
pub(super) fn expect_shape(tensor: &TensorView, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    let kind = Kind::WrongShape {
        expected: format!("{expected:?}").into(),
        found: format!("{:?}", tensor.shape).into(),
    };
    Err(Error::new(kind).at(Place::Tensor(tensor.name.clone())))
}

fn expect_bytes(tensor: &TensorView, expected: usize) -> Result<()> {
    if tensor.bytes.len() == expected {
        return Ok(());
    }
    let kind = Kind::WrongLength { expected: expected as u64, found: tensor.bytes.len() as u64 };
    Err(Error::new(kind).at(Place::Tensor(tensor.name.clone())))
}

/// The elements of an F32 vector of known length.
fn floats(tensor: &TensorView, len: usize) -> Result<Vec<f32>> {
    expect_dtype(tensor, Dtype::F32, "F32")?;
    expect_shape(tensor, &[len])?;
    Ok(tensor.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
}

/// As [`floats`], refusing NaN and infinities.
pub(super) fn finite(tensor: &TensorView, len: usize) -> Result<Vec<f32>> {
    let values = floats(tensor, len)?;
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(values),
        Some(index) => {
            let kind = Kind::BadScale { index: index as u64, value: values[index] };
            Err(Error::new(kind).at(Place::Tensor(tensor.name.clone())))
        }
    }
}
