//! `qpeft bench ...`: speed and memory on this machine, one file per command.

pub mod attention;
pub mod dequantize;
mod floor;
pub mod linear;
pub mod quantize;
mod quantize_cuda;
pub mod svd;
pub mod train;

use std::time::{Duration, Instant};

use qpeft_kernels::rng::RngKey;
use qpeft_kernels::{Device, Tensor};
use rayon::prelude::*;

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

/// Time of one measurement on a device, and of the calls that are awaited together.
const MEASURE: Duration = Duration::from_millis(400);
const ROUND: Duration = Duration::from_millis(10);

/// Median seconds of a call. Several are awaited together, so that a GPU is never out of work; each gets its
/// number, to take operands that no cache holds.
fn median_seconds(device: &Device, mut call: impl FnMut(usize) -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut number = 0;
    let mut timed = |calls: usize| -> anyhow::Result<f64> {
        let began = Instant::now();
        for _ in 0..calls {
            call(number)?;
            number += 1;
        }
        if let Some(cuda) = device.cuda() {
            cuda.synchronize()?;
        }
        Ok(began.elapsed().as_secs_f64() / calls as f64)
    };
    // The first compiles kernels and sizes scratch.
    timed(1)?;
    let calls = (ROUND.as_secs_f64() / timed(1)?).clamp(1.0, 1000.0) as usize;
    let mut seconds = rounds(3, 1000, MEASURE).map(|_| timed(calls)).collect::<anyhow::Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Normally distributed numbers, all of them different: a GPU multiplies equal rows with less power, and faster.
fn normal(rows: usize, cols: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; rows * cols];
    values.par_chunks_mut(cols.max(1)).enumerate().for_each(|(row, values)| {
        RngKey { seed, stream: row as u64 }.fill_normal(values, std);
    });
    values
}

/// Such numbers as activations of a device.
fn activations(device: &Device, rows: usize, cols: usize, seed: u64) -> anyhow::Result<Tensor> {
    let mut tensor = Tensor::activations(device, rows, cols)?;
    tensor.write(&normal(rows, cols, 1.0, seed))?;
    Ok(tensor)
}
