//! A linear with its adapter merged in, dense and packed again: the same for every format that a merge writes.
//!
//! On a device one weight at a time is there, packed, dense and packed again; only packed bytes cross the bus. Which types
//! it packs is a matter of the kernels: the others, and what is not finite and has to be named, are left to the CPU.

use std::ops::Range;
use std::sync::mpsc;

use qpeft_kernels::ops::dequantize::dequantize_rows;
use qpeft_kernels::ops::packing_loss::{PackingLoss, packing_loss};
use qpeft_kernels::ops::quantize::{is_packed_on_device, quantize};
use qpeft_kernels::weight::DeviceWeight;
use qpeft_kernels::{Device, Tensor, View, ViewMut};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::model::save::not_finite;
use crate::model::{BaseWeight, Decoder, Linear, Parameters};

/// Rows that one thread adapts or compares at a time.
const ROWS_PER_TASK: usize = 64;

/// Runs `write`, which takes what `make` makes of the `jobs`, in their order and each once; meanwhile the next is made on
/// another thread, because files are slow.
///
/// # Errors
/// That of `write`, which gets those of `make`.
pub fn one_ahead<J: Send, T: Send, R>(
    jobs: Vec<J>,
    mut make: impl FnMut(J) -> Result<T> + Send,
    write: impl FnOnce(&mut dyn FnMut() -> Result<T>) -> Result<R>,
) -> Result<R> {
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::sync_channel(0);
        scope.spawn(move || {
            for job in jobs {
                let made = make(job);
                let is_last = made.is_err();
                // Nobody listens any more after an error of the writer.
                if send.send(made).is_err() || is_last {
                    break;
                }
            }
        });
        write(&mut || receive.recv().expect("nothing is taken that is not a job, nor after an error"))
    })
}

/// Merges linears one after another.
#[derive(Debug)]
pub struct Merger {
    values: Vec<f32>,
    there: Option<There>,
}

/// What stays on a device.
#[derive(Debug)]
struct There {
    device: Device,
    /// The values of all adapters.
    values: Tensor,
    /// A dense weight before and after its merge, and what is stored of it, each as large as the largest.
    dense: [Tensor; 3],
}

impl Merger {
    /// For the linears of `decoder`, whose adapters have the values of `params`, computing on `device`.
    ///
    /// # Errors
    /// The device has too little memory.
    pub fn new(decoder: &Decoder, params: &Parameters, device: &Device) -> Result<Merger> {
        let values = params.values.read()?;
        let there = device.cuda().map(|_| {
            let sizes = decoder.linears().map(|linear| linear.weight.rows() * linear.weight.cols());
            let largest = sizes.max().unwrap_or(0);
            let dense = || Tensor::zeros(device, 1, largest);
            Ok::<_, Error>(There {
                device: device.clone(),
                values: Tensor::from_slice(device, 1, values.len(), &values)?,
                dense: [dense()?, dense()?, dense()?],
            })
        });
        Ok(Merger { there: there.transpose()?, values })
    }

    /// The weight of a linear with its adapter, if it has one, in the type of `like`, in host memory. Adds to `loss`
    /// what packing took from the adapter's change.
    ///
    /// # Errors
    /// A merged value is not finite (`name` is that of the tensor), or an op refuses.
    pub fn pack(
        &mut self,
        name: &str,
        linear: &Linear,
        like: &BaseWeight,
        loss: &mut PackingLoss,
    ) -> Result<BaseWeight> {
        if let Some(there) = self.there.as_mut().filter(|_| is_packed_on_device(like))
            && let Some((packed, found)) = there.pack(linear, like)?
        {
            if linear.adapter.is_some() {
                *loss += found;
            }
            return Ok(packed);
        }
        let cols = linear.weight.cols();
        let merged = self.merged(linear)?;
        let packed = match like.requantize(&merged) {
            Err(qpeft_kernels::Error::NotFinite { row, col, value, .. }) => {
                return Err(not_finite(name, row, col, value));
            }
            packed => packed?,
        };
        if linear.adapter.is_some() {
            add_loss(loss, linear.weight.rows(), cols, |rows, [base, adapted, stored]| {
                linear.weight.dequantize_rows(rows.clone(), base);
                adapted.copy_from_slice(&merged[rows.start * cols..rows.end * cols]);
                packed.dequantize_rows(rows, stored);
                Ok(())
            })?;
        }
        Ok(packed)
    }

    /// The weight in f32 with its adapter, if it has one.
    fn merged(&self, linear: &Linear) -> Result<Vec<f32>> {
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let mut merged = vec![0.0; rows * cols];
        merged.par_chunks_mut(ROWS_PER_TASK * cols).enumerate().try_for_each(|(chunk, out)| {
            let start = chunk * ROWS_PER_TASK;
            merged_rows(linear, &self.values, start..start + out.len() / cols, out)
        })?;
        Ok(merged)
    }
}

/// Rows of a linear in f32 with its adapter, if it has one; `values` are those of all adapters.
///
/// # Errors
/// An op refuses.
pub fn merged_rows(linear: &Linear, values: &[f32], rows: Range<usize>, out: &mut [f32]) -> Result<()> {
    linear.weight.dequantize_rows(rows.clone(), out);
    let Some(adapter) = &linear.adapter else { return Ok(()) };
    let out = ViewMut::from_slice(out, rows.len(), linear.weight.cols());
    adapter.merge(rows, out, View::from_slice(values, 1, values.len()))
}

/// Adds to `loss` what storing took from the change of a weight, of which `fill` gives some rows: of the base, merged, and as
/// stored.
///
/// # Errors
/// That of `fill`, or an op refuses.
pub fn add_loss(
    loss: &mut PackingLoss,
    rows: usize,
    cols: usize,
    fill: impl Fn(Range<usize>, [&mut [f32]; 3]) -> Result<()> + Sync,
) -> Result<()> {
    let parts = (0..rows.div_ceil(ROWS_PER_TASK)).into_par_iter().map(|task| {
        let range = task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK);
        let mut values = [(); 3].map(|()| vec![0.0; range.len() * cols]);
        fill(range.clone(), values.each_mut().map(Vec::as_mut_slice))?;
        let [base, merged, stored] = values.each_ref().map(|rows| View::from_slice(rows, range.len(), cols));
        Ok(packing_loss(base, merged, stored)?)
    });
    for part in parts.collect::<Result<Vec<PackingLoss>>>()? {
        *loss += part;
    }
    Ok(())
}

impl There {
    /// `None` where the sums are not finite.
    fn pack(&mut self, linear: &Linear, like: &BaseWeight) -> Result<Option<(BaseWeight, PackingLoss)>> {
        let cuda = self.device.cuda().expect("a merger keeps this for a CUDA device only");
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let uploaded;
        let weight = if let Some(weight) = linear.weight.device() {
            weight
        } else {
            uploaded = DeviceWeight::upload(cuda, &linear.weight)?;
            &uploaded
        };
        let [mut before, mut after, mut stored] =
            self.dense.each_mut().map(|dense| dense.view_mut().into_slice(0, rows, cols));
        dequantize_rows(before.reborrow(), weight, 0..rows, None, None)?;
        dequantize_rows(after.reborrow(), weight, 0..rows, None, None)?;
        if let Some(adapter) = &linear.adapter {
            adapter.merge(0..rows, after.reborrow(), self.values.view())?;
        }
        let Some(packed) = quantize(after.as_view(), Some(stored.reborrow()), like)? else { return Ok(None) };
        let loss = packing_loss(before.as_view(), after.as_view(), stored.as_view())?;
        Ok(loss.adapted.is_finite().then_some((packed, loss)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_ahead_comes_in_order_and_errors_end_it() {
        let run = |bad: usize, stop: usize| {
            let mut taken = Vec::new();
            let make = |job: usize| if job == bad { Err(Error::refused("bad")) } else { Ok(10 * job) };
            let result = one_ahead((0..5).collect(), make, |next| {
                for i in 0..5 {
                    if i == stop {
                        return Err(Error::refused("full"));
                    }
                    taken.push(next()?);
                }
                Ok(())
            });
            (taken, result.map_err(|e| e.to_string()))
        };
        assert_eq!(run(9, 9), (vec![0, 10, 20, 30, 40], Ok(())));
        assert_eq!(run(2, 9), (vec![0, 10], Err("bad".to_owned())));
        assert_eq!(run(9, 3), (vec![0, 10, 20], Err("full".to_owned())));
        assert_eq!(run(9, 0), (vec![], Err("full".to_owned())));
    }
}
