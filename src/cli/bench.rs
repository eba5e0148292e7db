//! `qpeft bench ...`: speed and memory on this machine, one file per command.

pub mod dequantize;
mod floor;
pub mod quantize;
pub mod svd;
pub mod train;

use std::time::{Duration, Instant};

/// Seconds of the fastest of the measured calls so far.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
struct Fastest(f64);

impl Fastest {
    fn none() -> Fastest {
        Fastest(f64::INFINITY)
    }

    fn time(&mut self, call: impl FnOnce()) {
        let began = Instant::now();
        call();
        self.0 = self.0.min(began.elapsed().as_secs_f64());
    }

    /// Million elements per second.
    fn melem_per_second(self, elements: usize) -> f64 {
        elements as f64 / self.0 / 1e6
    }
}

/// Rounds of a measurement: at least `least`, then until the time is up, but not more than `most`.
fn rounds(least: usize, most: usize, time: Duration) -> impl Iterator<Item = usize> {
    let began = Instant::now();
    (0..most).take_while(move |&round| round < least || began.elapsed() < time)
}
