//! The learning rate of every step: linear warmup, then constant, linear or cosine decay.
//!
//! The numbers are those of transformers' `get_{constant,linear,cosine}_schedule_with_warmup`
//! (`optimization.py`), so a run here and a run there see the same rates. The schedule is a pure
//! function of the step: a resumed run needs nothing but its step number.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulerType {
    /// Half a cosine from the peak to zero.
    #[default]
    Cosine,
    /// A straight line from the peak to zero.
    Linear,
    /// The peak until the end.
    Constant,
}

impl SchedulerType {
    /// Every scheduler, in the order in which messages list them.
    pub const ALL: [SchedulerType; 3] =
        [SchedulerType::Cosine, SchedulerType::Linear, SchedulerType::Constant];

    /// The name as flags and files spell it.
    pub const fn name(self) -> &'static str {
        match self {
            SchedulerType::Cosine => "cosine",
            SchedulerType::Linear => "linear",
            SchedulerType::Constant => "constant",
        }
    }
}

impl fmt::Display for SchedulerType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SchedulerType {
    type Err = String;

    /// Also takes transformers' `constant_with_warmup`: a warmup of zero steps makes it `constant`.
    fn from_str(name: &str) -> Result<SchedulerType, String> {
        let short = name.strip_suffix("_with_warmup").unwrap_or(name);
        SchedulerType::ALL
            .into_iter()
            .find(|t| t.name() == short)
            .ok_or_else(|| "expected `cosine`, `linear` or `constant`".to_owned())
    }
}

/// A learning rate per optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape after the warmup.
    pub kind: SchedulerType,
    /// The learning rate at the end of the warmup.
    pub peak: f64,
    /// Steps of linear warmup; the first of them has rate 0.
    pub warmup_steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// `lr(step)` for `step` counted from 0; f64.
    ///
    /// With `w` warmup steps, `n` total and `p = (step - w) / max(1, n - w)`: `peak * step / w` below
    /// `w`, then `peak`, `peak * (1 - p)` or `peak * (1 + cos(pi p)) / 2`, never below zero.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step as f64 / self.warmup_steps as f64);
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let factor = match self.kind {
            SchedulerType::Constant => 1.0,
            SchedulerType::Linear => self.total_steps.saturating_sub(step) as f64 / span,
            SchedulerType::Cosine => {
                let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
                0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        };
        self.peak * factor.max(0.0)
    }
}

/// Warmup steps of a run: `warmup_steps` if given, otherwise `ceil(warmup_ratio * total_steps)`.
pub fn warmup_steps(warmup_steps: Option<u64>, warmup_ratio: f64, total_steps: u64) -> u64 {
    warmup_steps.unwrap_or_else(|| (warmup_ratio * total_steps as f64).ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, steps: u64) -> Vec<f64> {
        (0..steps).map(|step| schedule.learning_rate(step)).collect()
    }

    /// One unit in the last place of the peak: the two libraries' `cos` may differ by that.
    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (step, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= 1e-18, "step {step}: {a:e}, expected {b:e}");
        }
    }

    #[test]
    fn cosine_after_warmup_gives_the_rates_of_the_scheduled_golden_run() {
        // `run_clip1_warmup3_cosine.lr` of the golden PEFT runs: transformers, lr 0.005, 3 of 10 steps warmup.
        let golden = [
            0.0,
            0.0016666666666666666,
            0.003333333333333333,
            0.005,
            0.004752422169756048,
            0.004058724504646834,
            0.003056302334890786,
            0.001943697665109214,
            0.0009412754953531664,
            0.00024757783024395244,
        ];
        let schedule =
            Schedule { kind: SchedulerType::Cosine, peak: 0.005, warmup_steps: 3, total_steps: 10 };
        assert_close(&rates(schedule, 10), &golden);
    }

    #[test]
    fn linear_and_constant_after_warmup_give_the_rates_of_transformers() {
        let (peak, warmup_steps, total_steps) = (2e-4, 2, 8);
        let linear = [
            0.0,
            0.0001,
            0.0002,
            0.0001666666666666667,
            0.00013333333333333334,
            0.0001,
            6.666666666666667e-05,
            3.3333333333333335e-05,
            0.0,
        ];
        let of = |kind| rates(Schedule { kind, peak, warmup_steps, total_steps }, 9);
        assert_close(&of(SchedulerType::Linear), &linear);
        let constant = [0.0, 0.0001, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002];
        assert_close(&of(SchedulerType::Constant), &constant);
    }

    #[test]
    fn cosine_without_warmup_starts_at_the_peak_and_ends_at_zero() {
        let transformers = [
            0.0002,
            0.0001923879532511287,
            0.00017071067811865476,
            0.000138268343236509,
            0.0001,
            6.173165676349103e-05,
            2.9289321881345254e-05,
            7.612046748871327e-06,
            0.0,
        ];
        let schedule = Schedule { kind: SchedulerType::Cosine, peak: 2e-4, warmup_steps: 0, total_steps: 8 };
        assert_close(&rates(schedule, 9), &transformers);
    }

    #[test]
    fn every_rate_is_finite_when_the_whole_run_is_warmup_or_has_no_steps() {
        for kind in SchedulerType::ALL {
            for (warmup_steps, total_steps) in [(8, 8), (20, 8), (0, 0), (0, 1)] {
                for rate in rates(Schedule { kind, peak: 1.0, warmup_steps, total_steps }, 30) {
                    assert!((0.0..=1.0).contains(&rate), "{kind} {warmup_steps}/{total_steps}: {rate}");
                }
            }
        }
    }

    #[test]
    fn warmup_steps_win_over_the_ratio_which_is_rounded_up() {
        assert_eq!(warmup_steps(Some(5), 0.5, 100), 5);
        assert_eq!(warmup_steps(Some(0), 0.5, 100), 0);
        assert_eq!(warmup_steps(None, 0.03, 100), 3);
        assert_eq!(warmup_steps(None, 0.03, 60), 2);
        assert_eq!(warmup_steps(None, 0.0, 60), 0);
        assert_eq!(warmup_steps(None, 1.0, 60), 60);
    }

    #[test]
    fn an_unknown_scheduler_is_refused_with_the_known_names() {
        assert_eq!("constant_with_warmup".parse(), Ok(SchedulerType::Constant));
        assert_eq!(
            "cosin".parse::<SchedulerType>(),
            Err("expected `cosine`, `linear` or `constant`".to_owned())
        );
    }
}
