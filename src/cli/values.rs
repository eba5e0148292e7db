//! Checked values: every number that a flag or a YAML key can take, with its range in words.
//!
//! A refusal says only what was expected; [`super::report`] puts the flag and the value before it.

use std::fmt::Display;
use std::str::FromStr;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::mixture::{FileType, TypeOverride};
use qpeft_kernels::weight::WeightType;

use crate::convert::hf_to_gguf::OutType;

/// A number with the word that messages use for its kind.
pub trait Number: FromStr + PartialOrd + Copy + Display {
    /// `an integer` or `a number`.
    const KIND: &'static str;
    /// The lower ends that flags have.
    const ZERO: Self;
    /// See [`Number::ZERO`].
    const ONE: Self;

    /// Whether it is a value at all: no NaN, no infinity.
    fn is_usable(self) -> bool;
}

macro_rules! number {
    ($($type:ty, $kind:literal, $usable:expr;)*) => {$(
        impl Number for $type {
            const KIND: &'static str = $kind;
            const ZERO: $type = 0 as $type;
            const ONE: $type = 1 as $type;
            fn is_usable(self) -> bool {
                ($usable)(self)
            }
        }
    )*};
}

number! {
    usize, "an integer", |_| true;
    u64, "an integer", |_| true;
    f64, "a number", f64::is_finite;
}

fn number<T: Number>(text: &str, what: &str, accept: impl Fn(T) -> bool) -> Result<T, String> {
    match text.parse::<T>() {
        Ok(value) if value.is_usable() && accept(value) => Ok(value),
        _ => Err(format!("expected {} {what}", T::KIND)),
    }
}

/// `[1, ...)`
pub fn at_least_one<T: Number>(text: &str) -> Result<T, String> {
    number(text, "of at least 1", |x: T| x >= T::ONE)
}

/// `[0, ...)`
pub fn at_least_zero<T: Number>(text: &str) -> Result<T, String> {
    number(text, "of at least 0", |x: T| x >= T::ZERO)
}

/// `(0, ...)`
pub fn positive(text: &str) -> Result<f64, String> {
    number(text, "above 0", |x: f64| x > 0.0)
}

/// `[0, 1)`
pub fn fraction(text: &str) -> Result<f64, String> {
    number(text, "of at least 0 and below 1", |x: f64| (0.0..1.0).contains(&x))
}

/// `[0, 1]`
pub fn share(text: &str) -> Result<f64, String> {
    number(text, "from 0 to 1", |x: f64| (0.0..=1.0).contains(&x))
}

/// `(0, 1]`
pub fn probability(text: &str) -> Result<f64, String> {
    number(text, "above 0 and at most 1", |x: f64| x > 0.0 && x <= 1.0)
}

/// `[1, 2^32]`: what memory may be asked for.
pub fn up_to_2_pow_32(text: &str) -> Result<usize, String> {
    number(text, "from 1 to 4294967296", |x: usize| (1..=1 << 32).contains(&x))
}

/// A type that a base can be quantized to at load.
pub fn weight_type(text: &str) -> Result<WeightType, String> {
    text.parse()
}

/// A type in which a weight can be stored, by name.
pub fn packed_type(text: &str) -> Result<WeightType, String> {
    weight_type(text).or_else(|_| ggml_type(text).map(WeightType::Ggml))
}

/// A dense type.
pub fn dense_type(text: &str) -> Result<GgmlType, String> {
    match GgmlType::from_name(text) {
        Some(dtype @ (GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)) => Ok(dtype),
        _ => Err("expected f32, f16 or bf16".to_owned()),
    }
}

/// A ggml type in which values can be written, by name.
pub fn ggml_type(text: &str) -> Result<GgmlType, String> {
    let writable = |t: &GgmlType| t.require_quantizer(true).is_ok();
    GgmlType::from_name(text).filter(writable).ok_or_else(|| {
        let names: Vec<_> = GgmlType::ALL.into_iter().filter(writable).map(|t| format!("`{t}`")).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// `f32`, `f16`, `bf16`, `q8_0`, `auto`
pub fn out_type(text: &str) -> Result<OutType, String> {
    const TYPES: [GgmlType; 4] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0];
    if text.eq_ignore_ascii_case("auto") {
        return Ok(OutType::Auto);
    }
    match GgmlType::from_name(text).filter(|dtype| TYPES.contains(dtype)) {
        Some(dtype) => Ok(OutType::Type(dtype)),
        None => Err("expected one of f32, f16, bf16, q8_0, auto".to_owned()),
    }
}

/// A file type by name or alias.
pub fn file_type(text: &str) -> Result<FileType, String> {
    FileType::from_name(text).ok_or_else(|| {
        let names: Vec<_> = FileType::ALL.into_iter().map(|t| format!("`{t}`")).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// A file type, a bitsandbytes type, or `copy`.
pub fn quant(text: &str) -> Result<Quant, String> {
    match text.to_ascii_lowercase().replace('_', "-").as_str() {
        "copy" => Ok(Quant::Copy),
        "nf4" => Ok(Quant::FourBit(QuantType::Nf4, false)),
        "nf4-dq" => Ok(Quant::FourBit(QuantType::Nf4, true)),
        "fp4" => Ok(Quant::FourBit(QuantType::Fp4, false)),
        "fp4-dq" => Ok(Quant::FourBit(QuantType::Fp4, true)),
        _ => file_type(text).map(Quant::To).map_err(|expected| {
            format!("{expected}, `COPY`; or for a bitsandbytes folder `NF4`, `NF4-DQ`, `FP4`, `FP4-DQ`")
        }),
    }
}

/// What `qpeft quantize` makes of the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quant {
    /// Tensors stay as they are.
    Copy,
    /// The types of a mixture.
    To(FileType),
    /// A bitsandbytes folder: the code book, and whether the scales are quantized too.
    FourBit(QuantType, bool),
}

/// `REGEX=TYPE`
pub fn type_override(text: &str) -> Result<TypeOverride, String> {
    let (pattern, dtype) =
        text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty()).ok_or("expected `REGEX=TYPE`")?;
    TypeOverride::new(pattern, ggml_type(dtype)?).map_err(|e| format!("expected `REGEX=TYPE`; {e}"))
}

/// Bytes: a number with `K`, `M` or `G` for thousands, millions or thousands of millions, or `Ki`, `Mi`, `Gi` for
/// powers of 1024.
pub fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 6] = [
        ("KI", 1 << 10),
        ("MI", 1 << 20),
        ("GI", 1 << 30),
        ("K", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
    ];
    let upper = text.trim().to_ascii_uppercase();
    let plain = upper.trim_end_matches('B');
    let unit = UNITS.iter().find_map(|(unit, factor)| Some((plain.strip_suffix(unit)?, *factor)));
    let (digits, factor) = unit.unwrap_or((plain, 1));
    let digits = digits.trim_end();
    let whole = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
    let number = whole.or_else(|| {
        let fraction = digits.parse::<f64>().ok().filter(|x| digits.contains('.') && x.is_finite())?;
        let bytes = fraction * factor as f64;
        (bytes < 2f64.powi(63)).then_some(bytes as u64)
    });
    number.filter(|&n| n > 0).ok_or_else(|| "expected bytes, as in `2G`, `500M` or `8GiB`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_takes_its_ends_and_refuses_what_lies_beyond() {
        assert_eq!(at_least_one::<usize>("1"), Ok(1));
        assert_eq!(at_least_one::<usize>("0"), Err("expected an integer of at least 1".to_owned()));
        assert_eq!(at_least_one::<usize>("-1"), Err("expected an integer of at least 1".to_owned()));
        assert_eq!(at_least_one::<u64>("1.5"), Err("expected an integer of at least 1".to_owned()));
        assert_eq!(at_least_zero::<u64>("0"), Ok(0));
        assert_eq!(at_least_zero::<f64>("0"), Ok(0.0));
        assert_eq!(at_least_zero::<f64>("inf"), Err("expected a number of at least 0".to_owned()));
        assert_eq!(positive("1e-5"), Ok(1e-5));
        assert_eq!(positive("0"), Err("expected a number above 0".to_owned()));
        assert_eq!(positive("nan"), Err("expected a number above 0".to_owned()));
        assert_eq!(fraction("0"), Ok(0.0));
        assert_eq!(fraction("1"), Err("expected a number of at least 0 and below 1".to_owned()));
        assert_eq!(share("1"), Ok(1.0));
        assert_eq!(share("1.01"), Err("expected a number from 0 to 1".to_owned()));
        assert_eq!(probability("1"), Ok(1.0));
        assert_eq!(up_to_2_pow_32("4294967296"), Ok(1 << 32));
        assert_eq!(up_to_2_pow_32("4294967297"), Err("expected an integer from 1 to 4294967296".to_owned()));
        assert_eq!(probability("0"), Err("expected a number above 0 and at most 1".to_owned()));
    }

    #[test]
    fn ggml_types_are_found_in_any_case_and_listed_when_unknown() {
        assert_eq!(ggml_type("q4_k"), Ok(GgmlType::Q4_K));
        assert!(ggml_type("q4_k_m").unwrap_err().contains("`Q4_K`, `Q5_K`, `Q6_K`"));
        assert!(ggml_type("q8_1").unwrap_err().starts_with("expected one of `F32`, `F16`, "));
    }

    #[test]
    fn file_types_overrides_and_sizes_are_read() {
        assert_eq!(file_type("q4_k"), Ok(FileType::Q4_K_M));
        assert_eq!(quant("COPY"), Ok(Quant::Copy));
        assert_eq!(quant("q8-0"), Ok(Quant::To(FileType::Q8_0)));
        assert_eq!(quant("nf4_dq"), Ok(Quant::FourBit(QuantType::Nf4, true)));
        let expected = "`COPY`; or for a bitsandbytes folder `NF4`, `NF4-DQ`, `FP4`, `FP4-DQ`";
        assert!(quant("nf5").unwrap_err().ends_with(expected));
        assert!(type_override(r"blk\.[0-9]=q8_0").is_ok());
        assert_eq!(type_override("q8_0").unwrap_err(), "expected `REGEX=TYPE`");
        assert_eq!(type_override("=q8_0").unwrap_err(), "expected `REGEX=TYPE`");
        assert!(type_override("a=q9").unwrap_err().starts_with("expected one of `F32`"));
        assert!(type_override("(=q8_0").unwrap_err().starts_with("expected `REGEX=TYPE`; pattern `(`"));
        assert_eq!([bytes("9.5GiB"), bytes("0.5k")], [Ok(10_200_547_328), Ok(500)]);
        assert_eq!([bytes("2G"), bytes("500mb"), bytes("7")], [Ok(2_000_000_000), Ok(500_000_000), Ok(7)]);
        for wrong in ["0", "2T", "G", "-1", "-1.5G", "0.0", "1e3", "nan", "99999999999999G", "9e99.5G"] {
            assert_eq!(bytes(wrong), Err("expected bytes, as in `2G`, `500M` or `8GiB`".to_owned()));
        }
    }
}
