//! The `llama3` scaling of frequencies: four settings in `config.json`, one factor per frequency in a GGUF.
//!
//! Frequency f with wavelength 2π/f is divided by: 1 if the wavelength is below original/high; the factor
//! if it is above original/low; and between them by a blend of the two. The tensor keeps only the result,
//! so that reading it back means to find settings that give the same factors.

/// The settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3 {
    /// `factor`.
    pub factor: f64,
    /// `low_freq_factor`.
    pub low_freq_factor: f64,
    /// `high_freq_factor`.
    pub high_freq_factor: f64,
    /// `original_max_position_embeddings`.
    pub original: u32,
}

impl Llama3 {
    /// One divisor per pair of channels, computed in f32 in the order of llama.cpp's converter.
    pub fn factors(&self, theta: f64, head_dim: u64) -> Vec<f32> {
        let (factor, low, high) =
            (self.factor as f32, self.low_freq_factor as f32, self.high_freq_factor as f32);
        let original = self.original as f32;
        let high_wavelength = (f64::from(self.original) / self.high_freq_factor) as f32;
        let low_wavelength = (f64::from(self.original) / self.low_freq_factor) as f32;
        let blend = (self.high_freq_factor - self.low_freq_factor) as f32;
        wavelengths(theta, head_dim)
            .map(|wavelength| {
                if wavelength < high_wavelength {
                    1.0
                } else if wavelength > low_wavelength {
                    factor
                } else {
                    let smooth = (1.0 / wavelength * original - low) / blend;
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            })
            .inspect(|_| debug_assert!(high > low))
            .collect()
    }

    /// The settings that give `factors`: those of the published models if they do, else found from two
    /// blended frequencies with `low_freq_factor` 1 (only ratios to it matter).
    pub fn fit(factors: &[f32], theta: f64, head_dim: u64) -> Option<Llama3> {
        if factors.len() as u64 != head_dim / 2 || !factors.iter().all(|x| x.is_finite() && *x >= 1.0) {
            return None;
        }
        let factor = factors.iter().copied().fold(1.0_f32, f32::max);
        let factor: f64 = factor.to_string().parse().ok()?;
        let gives = |llama3: &Llama3| {
            let close = |(a, b): (&f32, f32)| (a - b).abs() <= 1e-5 * b;
            factors.iter().zip(llama3.factors(theta, head_dim)).all(close)
        };
        let published = Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
        if gives(&published) {
            return Some(published);
        }
        // smooth = (original / wavelength - low) / (high - low), a line in 1 / wavelength.
        let smooth = |x: f32| (1.0 / f64::from(x) - 1.0 / factor) / (1.0 - 1.0 / factor);
        let blended: Vec<(f64, f64)> = wavelengths(theta, head_dim)
            .zip(factors)
            .filter(|(_, x)| **x > 1.0 && f64::from(**x) < factor)
            .map(|(wavelength, x)| (1.0 / f64::from(wavelength), smooth(*x)))
            .collect();
        let (first, last) = (blended.first()?, blended.last()?);
        if first.0 == last.0 {
            return None;
        }
        let slope = (last.1 - first.1) / (last.0 - first.0);
        let offset = slope * first.0 - first.1;
        let high = (1.0 + 1.0 / offset) * 1000.0;
        let high = high.round() / 1000.0;
        let original = (slope * (high - 1.0)).round();
        if !(high > 1.0 && high.is_finite() && original >= 1.0 && original <= f64::from(u32::MAX)) {
            return None;
        }
        let found =
            Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: high, original: original as u32 };
        gives(&found).then_some(found)
    }
}

/// 2π / θ^(-2i/d) for each pair of channels.
fn wavelengths(theta: f64, head_dim: u64) -> impl Iterator<Item = f32> {
    (0..head_dim / 2).map(move |i| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        let frequency = 1.0 / (theta as f32).powf(exponent);
        1.0 / frequency * std::f32::consts::TAU
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found_again_from_their_factors() {
        let cases = [
            (
                Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 },
                500_000.0,
                128,
            ),
            (
                Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 },
                500_000.0,
                64,
            ),
            (
                Llama3 { factor: 16.0, low_freq_factor: 1.0, high_freq_factor: 8.0, original: 2048 },
                10_000.0,
                128,
            ),
        ];
        for (settings, theta, head_dim) in cases {
            let factors = settings.factors(theta, head_dim);
            assert_eq!(Llama3::fit(&factors, theta, head_dim), Some(settings));
        }
        assert_eq!(Llama3::fit(&[1.0, 3.0, 2.0, 8.0], 10_000.0, 8), None);
    }
}
