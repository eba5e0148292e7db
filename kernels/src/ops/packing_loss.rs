//! What packing takes from a change of a weight. No backward: it is measured, not trained.

use std::ops::AddAssign;

use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::{Result, check};
use crate::tensor::View;

const OP: &str = "packing_loss";

/// Sums over the elements of a weight W, its changed version W', and what is stored of that.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PackingLoss {
    /// ||W'||².
    pub adapted: f64,
    /// ||W' - W||²: the change.
    pub change: f64,
    /// <stored - W, W' - W>: the part of the change that is in what was stored.
    pub arrived: f64,
    /// ||stored - W'||²: the noise of packing.
    pub noise: f64,
}

impl AddAssign for PackingLoss {
    fn add_assign(&mut self, other: PackingLoss) {
        self.adapted += other.adapted;
        self.change += other.change;
        self.arrived += other.arrived;
        self.noise += other.noise;
    }
}

/// The sums of [`PackingLoss`].
///
/// Shapes: `before`, `after`, `stored` (N, K) of f32.
/// Precision: differences in f32, as the weights are; their products and sums in f64, in an order that is always the
/// same: in host memory that of the elements, on the calling thread; on a device that of its threads. Waits for a device.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the definition.
pub fn packing_loss(before: View, after: View, stored: View) -> Result<PackingLoss> {
    for (rows, cols, x) in
        [("rows of after", "columns of after", after), ("rows of stored", "columns of stored", stored)]
    {
        check(OP, rows, before.rows, x.rows)?;
        check(OP, cols, before.cols, x.cols)?;
    }
    if let Some(cuda) = before.cuda() {
        return packing_loss_cuda(cuda, before, after, stored);
    }
    let (cols, strides) = (before.cols, [before, after, stored].map(|x| x.stride.max(1)));
    let mut sums = PackingLoss::default();
    let rows = before.cpu(OP)?.chunks(strides[0]).zip(after.cpu(OP)?.chunks(strides[1]));
    for ((before, after), stored) in rows.zip(stored.cpu(OP)?.chunks(strides[2])) {
        for ((before, after), stored) in before[..cols].iter().zip(&after[..cols]).zip(&stored[..cols]) {
            let (adapted, change) = (f64::from(*after), f64::from(after - before));
            sums.adapted += adapted * adapted;
            sums.change += change * change;
            sums.arrived += f64::from(stored - before) * change;
            sums.noise += (f64::from(*stored) - adapted).powi(2);
        }
    }
    Ok(sums)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("packing_loss.cu", include_str!("packing_loss.cu"));

/// Threads of a block, as `packing_loss.cu` has it.
const THREADS: usize = 256;

/// Blocks, each with partial sums; fixed, so that sums have the same bits on every device.
const BLOCKS: usize = 1024;

fn packing_loss_cuda(cuda: &Cuda, before: View, after: View, stored: View) -> Result<PackingLoss> {
    let mut bytes = vec![0; BLOCKS * size_of::<[f64; 4]>()];
    let partial = cuda.borrow(bytes.len())?;
    let args = [
        Arg::Ptr(partial.ptr()),
        Arg::Ptr(before.f32(OP)?),
        Arg::I64(before.stride as i64),
        Arg::Ptr(after.f32(OP)?),
        Arg::I64(after.stride as i64),
        Arg::Ptr(stored.f32(OP)?),
        Arg::I64(stored.stride as i64),
        Arg::size(before.rows),
        Arg::size(before.cols),
    ];
    cuda.launch(&SOURCE, "packing_loss", Grid::of(BLOCKS, THREADS), &args)?;
    cuda.read(partial.ptr(), &mut bytes)?;
    let mut sums = PackingLoss::default();
    let (numbers, _) = bytes.as_chunks::<8>();
    for &[adapted, change, arrived, noise] in numbers.as_chunks::<4>().0 {
        let [adapted, change, arrived, noise] = [adapted, change, arrived, noise].map(f64::from_le_bytes);
        sums += PackingLoss { adapted, change, arrived, noise };
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;
    use crate::testing::{Mat, cuda};

    fn matrices(rows: usize, cols: usize) -> [Mat; 3] {
        let [before, mut after, mut stored] =
            [1, 2, 3].map(|seed| Mat::random(seed, rows, cols, 0.01).values());
        for ((before, after), stored) in before.iter().zip(&mut after).zip(&mut stored) {
            *after += 100.0 * before;
            *stored += *after;
        }
        [before, after, stored].map(|values| Mat::new(rows, cols, values))
    }

    fn assert_close(found: PackingLoss, expected: PackingLoss) {
        let parts = |sums: PackingLoss| [sums.adapted, sums.change, sums.arrived, sums.noise];
        for (found, expected) in parts(found).into_iter().zip(parts(expected)) {
            assert!((found - expected).abs() <= 1e-9 * expected.abs(), "{found} for {expected}");
        }
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        let [before, after, stored] = matrices(5, 37);
        let [w, changed, rest] = [&before, &after, &stored].map(Mat::f64);
        let sum = |term: &dyn Fn(usize) -> f64| (0..w.len()).map(term).sum::<f64>();
        // The differences are rounded to f32.
        let difference = |a: f64, b: f64| f64::from((a - b) as f32);
        let expected = PackingLoss {
            adapted: sum(&|i| changed[i].powi(2)),
            change: sum(&|i| difference(changed[i], w[i]).powi(2)),
            arrived: sum(&|i| difference(rest[i], w[i]) * difference(changed[i], w[i])),
            noise: sum(&|i| (rest[i] - changed[i]).powi(2)),
        };
        for gap in [0, 3] {
            let [before, after, stored] = [&before, &after, &stored].map(|x| x.padded(gap));
            assert_close(packing_loss(before.view(), after.view(), stored.view()).unwrap(), expected);
        }
        let error = packing_loss(before.view(), after.view(), stored.view().row_range(0, 4)).unwrap_err();
        assert_eq!(error.to_string(), "packing_loss: rows of stored is 4, expected 5");
    }

    #[test]
    fn cuda_sums_are_those_of_the_host() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in [(1, 1), (5, 37), (3000, 576), (0, 8)] {
            let host = matrices(rows, cols);
            let [w, changed, rest] = host.each_ref().map(Mat::view);
            let expected = packing_loss(w, changed, rest).unwrap();
            let there =
                host.each_ref().map(|x| Tensor::from_slice(&device, rows, cols, &x.values()).unwrap());
            let [w, changed, rest] = there.each_ref().map(Tensor::view);
            let found = packing_loss(w, changed, rest).unwrap();
            assert_close(found, expected);
            assert_eq!(packing_loss(w, changed, rest).unwrap(), found, "other bits the next time");
        }
    }
}
