//! LLM.int8: one signed byte per element, one f32 per row.
//!
//! | key | type | shape | content |
//! |---|---|---|---|
//! | `m.weight` | I8 | (N, K) | q = round(127 x / SCB) |
//! | `m.SCB` | F32 | (N) | max of the row's magnitudes |
//! | `m.weight_format` | U8 | () | 0: rows, the only layout that is stored today |
//!
//! `x = (q * SCB) * (1/127)`, in f32. Source: bitsandbytes 0.50 (`int8_vectorwise_dequant`), and
//! Dettmers et al., LLM.int8() (arXiv 2208.07339).

use std::ops::Range;

use super::read::{Find, expect_dtype, expect_shape, finite};
use super::write::float_bytes;
use crate::blocks::half::round_to_f16;
use crate::error::{Error, Kind, Place, Result};
use crate::file::Bytes;
use crate::safetensors::{Dtype, TensorView};

/// A matrix in LLM.int8.
#[derive(Debug, Clone)]
pub struct Int8 {
    cols: usize,
    codes: Bytes,
    /// SCB of every row.
    scales: Vec<f32>,
}

impl Int8 {
    /// Reads the weight `name` (`….weight`); `None` if there is no `….SCB` beside it.
    ///
    /// # Errors
    /// A tensor has another type or shape than the others say, or another layout than rows.
    pub fn read(name: &str, find: Find<'_>) -> Result<Option<Int8>> {
        let module = name.strip_suffix("weight").unwrap_or(name);
        let (Some(codes), Some(scb)) = (find(name), find(&format!("{module}SCB"))) else { return Ok(None) };
        expect_dtype(&codes, Dtype::I8, "I8")?;
        let [rows, cols] = codes.shape[..] else {
            let found = format!("{:?}", codes.shape).into();
            let kind = Kind::WrongShape { expected: "the two sizes of a matrix".into(), found };
            return Err(Error::new(kind).at(Place::Tensor(codes.name)));
        };
        let scales = finite(&scb, rows)?;
        if let Some(format) = find(&format!("{module}weight_format")) {
            expect_dtype(&format, Dtype::U8, "U8")?;
            expect_shape(&format, &[])?;
            if format.bytes[..] != [0] {
                let kind = Kind::WrongQuantState {
                    found: format!("`weight_format`: {}", format.bytes[0]).into(),
                    expected: "0, rows",
                };
                return Err(Error::new(kind).at(Place::Tensor(format.name)));
            }
        }
        Ok(Some(Int8 { cols, codes: codes.bytes, scales }))
    }

    /// Quantizes rows of `cols` elements, which are rounded to f16 first.
    ///
    /// # Panics
    /// `values` is not a whole number of rows.
    pub fn quantize(cols: usize, values: &[f32]) -> Int8 {
        let width = cols.max(1);
        assert!(values.len().is_multiple_of(width), "{} elements in rows of {cols}", values.len());
        let mut codes = Vec::with_capacity(values.len());
        let mut scales = Vec::with_capacity(values.len() / width);
        for row in values.chunks_exact(width) {
            let half: Vec<f32> = row.iter().map(|&x| round_to_f16(x)).collect();
            let largest = half.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let factor = if largest == 0.0 { 0.0 } else { 127.0 / largest };
            codes.extend(half.iter().map(|x| (x * factor).round_ties_even() as i8 as u8));
            scales.push(largest);
        }
        Int8 { cols, codes: codes.into(), scales }
    }

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    /// Input features, K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One signed byte per element, row by row.
    pub fn codes(&self) -> &Bytes {
        &self.codes
    }

    /// The scale of every row, SCB: `x = (q * SCB) * INVERSE`.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// 1/127 as bitsandbytes spells it.
    pub const INVERSE: f32 = 0.007_874_016;

    /// Bytes of codes and scales.
    pub fn size_bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.scales[..])
    }

    /// Some columns of one row as f32.
    ///
    /// # Panics
    /// They lie outside of the weight, or `out` does not hold them.
    #[inline(always)]
    pub fn dequantize(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        assert!(cols.end <= self.cols && cols.len() == out.len(), "columns {cols:?} of {}", self.cols);
        let scale = self.scales[row];
        let codes = &self.codes[row * self.cols..][cols];
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = f32::from(code as i8) * scale * Self::INVERSE;
        }
    }

    /// The tensors that store the weight under `name` (`….weight`).
    pub fn tensors(&self, name: &str) -> Vec<TensorView> {
        let module = name.strip_suffix("weight").unwrap_or(name);
        let tensor = |name: String, dtype, shape: &[usize], bytes| TensorView {
            name,
            dtype,
            shape: shape.to_vec(),
            bytes,
        };
        vec![
            tensor(name.to_owned(), Dtype::I8, &[self.rows(), self.cols], self.codes.clone()),
            tensor(format!("{module}SCB"), Dtype::F32, &[self.rows()], float_bytes(&self.scales)),
            tensor(format!("{module}weight_format"), Dtype::U8, &[], vec![0].into()),
        ]
    }
}
