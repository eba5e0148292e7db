//! The JSON that lies beside a 4-bit weight as a U8 tensor, with the keys, order and spelling of Python's
//! `json.dumps`, so that what is written here has the bytes that bitsandbytes writes.

use std::fmt::Write as _;

use serde_json::Value;

use super::{BLOCK_SIZES, QuantState, QuantType};
use crate::error::{Error, Kind, Result};
use crate::json::UniqueEntries;
use crate::limits::MAX_QUANT_STATE;
use crate::safetensors::Dtype;

/// The content of the JSON.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Blob {
    pub state: QuantState,
    /// Block size and offset of the scales, if they are quantized too.
    pub nested: Option<(usize, f32)>,
}

/// Every key that bitsandbytes knows here.
const KEYS: [&str; 7] =
    ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"];

/// A value of one key that is not what it must be.
fn wrong(key: &str, value: Option<&Value>, expected: &'static str) -> Error {
    let found = value.map_or_else(|| format!("no `{key}`"), |value| format!("`{key}`: {value}"));
    Error::new(Kind::WrongQuantState { found: found.into(), expected })
}

impl Blob {
    /// Reads the JSON of a weight whose key names `quant_type`.
    pub fn parse(bytes: &[u8], quant_type: QuantType) -> Result<Blob> {
        if bytes.len() as u64 > MAX_QUANT_STATE {
            let found = bytes.len() as u64;
            return Err(Error::new(Kind::TooLong { what: "quant_state", found, limit: MAX_QUANT_STATE }));
        }
        let UniqueEntries(entries) = serde_json::from_slice::<UniqueEntries<Value>>(bytes)?;
        if let Some((key, value)) = entries.iter().find(|(key, _)| !KEYS.contains(&key.as_str())) {
            return Err(wrong(key, Some(value), "a key that bitsandbytes writes"));
        }
        let get = |key: &str| entries.iter().find(|(k, _)| k == key).map(|(_, value)| value);
        let size = |key: &str, expected, is_valid: &dyn Fn(usize) -> bool| {
            get(key)
                .and_then(Value::as_u64)
                .and_then(|n| usize::try_from(n).ok())
                .filter(|&n| is_valid(n))
                .ok_or_else(|| wrong(key, get(key), expected))
        };
        if get("quant_type").and_then(Value::as_str) != Some(quant_type.name()) {
            let expected = match quant_type {
                QuantType::Nf4 => "`nf4`, as in the name of the tensor",
                QuantType::Fp4 => "`fp4`, as in the name of the tensor",
            };
            return Err(wrong("quant_type", get("quant_type"), expected));
        }
        let is_block_size = |n: usize| BLOCK_SIZES.contains(&n);
        let blocksize = size("blocksize", "a power of two from 32 to 4096", &is_block_size)?;
        let dtype = get("dtype")
            .and_then(Value::as_str)
            .and_then(dtype_from_name)
            .ok_or_else(|| wrong("dtype", get("dtype"), "float32, float16 or bfloat16"))?;
        let (rows, cols) = get("shape")
            .and_then(shape)
            .ok_or_else(|| wrong("shape", get("shape"), "the two sizes of a matrix"))?;
        let nested = if KEYS[4..].iter().any(|key| get(key).is_some()) {
            let blocksize = size("nested_blocksize", "a power of two from 32 to 4096", &is_block_size)?;
            if get("nested_dtype").and_then(Value::as_str) != Some("float32") {
                return Err(wrong("nested_dtype", get("nested_dtype"), "`float32`"));
            }
            let offset = get("nested_offset")
                .and_then(Value::as_f64)
                .map(|x| x as f32)
                .filter(|x| x.is_finite())
                .ok_or_else(|| wrong("nested_offset", get("nested_offset"), "a finite number"))?;
            Some((blocksize, offset))
        } else {
            None
        };
        Ok(Blob { state: QuantState { quant_type, blocksize, rows, cols, dtype }, nested })
    }

    /// The bytes of the tensor.
    pub fn to_bytes(self) -> Vec<u8> {
        let QuantState { quant_type, blocksize, rows, cols, dtype } = self.state;
        let mut text = format!(
            r#"{{"quant_type": "{}", "blocksize": {blocksize}, "dtype": "{}", "shape": [{rows}, {cols}]"#,
            quant_type.name(),
            dtype_name(dtype)
        );
        if let Some((blocksize, offset)) = self.nested {
            let offset = python_float(f64::from(offset));
            write!(
                text,
                r#", "nested_blocksize": {blocksize}, "nested_dtype": "float32", "nested_offset": {offset}"#
            )
            .expect("writing to a string cannot fail");
        }
        text.push('}');
        text.into_bytes()
    }
}

/// Two sizes whose product is a number of elements.
fn shape(value: &Value) -> Option<(usize, usize)> {
    let [rows, cols] = value.as_array()?.as_slice() else { return None };
    let (rows, cols) = (usize::try_from(rows.as_u64()?).ok()?, usize::try_from(cols.as_u64()?).ok()?);
    rows.checked_mul(cols)?;
    Some((rows, cols))
}

/// torch's name of a type, without `torch.`.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

fn dtype_from_name(name: &str) -> Option<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::BF16].into_iter().find(|&dtype| dtype_name(dtype) == name)
}

/// A number as Python's JSON has it: the fewest digits that give it back, `e` from 1e16 on and below 1e-4. The mean of
/// scales that overflows is an infinity there, too.
fn python_float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("`e` is what this format writes");
    let exponent: i32 = exponent.parse().expect("the exponent is a number");
    if (-4..16).contains(&exponent) || x == 0.0 {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spelled_as_python_spells_them() {
        for (x, text) in [
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            (f64::NAN, "NaN"),
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.2805918753147125, "0.2805918753147125"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (-2.5e-30, "-2.5e-30"),
            (1e300, "1e+300"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let state =
            QuantState { quant_type: QuantType::Fp4, blocksize: 128, rows: 3, cols: 5, dtype: Dtype::BF16 };
        for nested in [None, Some((256, 1.25e-6))] {
            let blob = Blob { state, nested };
            assert_eq!(Blob::parse(&blob.to_bytes(), QuantType::Fp4).unwrap(), blob);
        }
    }
}
