//! Checked values: every number that a flag or a YAML key can take, with its range in words.
//!
//! A refusal says only what was expected; [`super::report`] puts the flag and the value before it.

use std::fmt::Display;
use std::str::FromStr;

use qpeft_formats::GgmlType;
use qpeft_formats::dtype::Quantizer;

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

/// A ggml type by name.
pub fn ggml_type(text: &str) -> Result<GgmlType, String> {
    GgmlType::from_name(text).filter(|t| t.require_quantizer(false).is_ok()).ok_or_else(|| {
        let names: Vec<_> = GgmlType::writable().map(|t| format!("`{t}`")).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// A ggml type by name, also one that is written with importance only.
pub fn quantized_type(text: &str) -> Result<GgmlType, String> {
    GgmlType::from_name(text).filter(|t| t.quantizer() != Quantizer::Never).ok_or_else(|| {
        let written = GgmlType::ALL.into_iter().filter(|t| t.quantizer() != Quantizer::Never);
        let names: Vec<_> = written.map(|t| format!("`{t}`")).collect();
        format!("expected one of {}", names.join(", "))
    })
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
        assert!(quantized_type("q8_1").unwrap_err().starts_with("expected one of `F32`, `F16`, "));
    }
}
