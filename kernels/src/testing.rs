//! The harness of the op tests: one declaration of a case, and everything that must hold follows.
//!
//! [`check_fast`] runs a fast op with contiguous and with padded rows, on one thread and on four, into
//! destinations that start as NaN where the op overwrites, and compares with the naive version in f64.
//! [`check_gradient`] compares a naive backward with finite differences of the naive forward, also in f64.
//! [`golden`] reads what PyTorch computed for the same op. [`cuda`] holds the CUDA twins against the naive versions.

pub(crate) mod cuda;

use std::sync::OnceLock;

use crate::error::Result;
use crate::rng::RngKey;
use crate::tensor::{View, ViewMut};

/// What fills the gaps between padded rows: a NaN that no op may read or overwrite.
const GAP: u32 = 0x7fc0_9ab5;

/// A matrix of test data. Its rows can be padded.
#[derive(Debug, Clone)]
pub(crate) struct Mat {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    stride: usize,
    data: Vec<f32>,
}

impl Mat {
    /// Normal numbers of standard deviation `std`; the same ones for the same seed.
    pub(crate) fn random(seed: u64, rows: usize, cols: usize, std: f32) -> Mat {
        let mut data = vec![0.0; rows * cols];
        RngKey { seed, stream: 0x7e57 }.fill_normal(&mut data, std);
        Mat::new(rows, cols, data)
    }

    pub(crate) fn new(rows: usize, cols: usize, data: Vec<f32>) -> Mat {
        assert_eq!(data.len(), rows * cols);
        Mat { rows, cols, stride: cols, data }
    }

    /// The nearest bf16 numbers: what a device keeps of activations.
    pub(crate) fn rounded(&self) -> Mat {
        let round = |&x: &f32| half::bf16::from_f32(x).to_f32();
        Mat { data: self.data.iter().map(round).collect(), ..*self }
    }

    /// All NaN: whatever an op leaves there or reads from there shows.
    pub(crate) fn poisoned(rows: usize, cols: usize) -> Mat {
        Mat::new(rows, cols, vec![f32::NAN; rows * cols])
    }

    /// The same elements with `gap` poisoned elements between the rows.
    pub(crate) fn padded(&self, gap: usize) -> Mat {
        let stride = self.cols + gap;
        let mut data = vec![f32::from_bits(GAP); self.rows * stride];
        for (i, row) in self.rows().enumerate() {
            data[i * stride..i * stride + self.cols].copy_from_slice(row);
        }
        Mat { stride, data, ..*self }
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        (0..self.rows).map(|i| &self.data[i * self.stride..i * self.stride + self.cols])
    }

    pub(crate) fn view(&self) -> View<'_> {
        if self.stride == self.cols {
            return View::from_slice(&self.data, self.rows, self.cols);
        }
        let mut view = View::from_slice(&self.data, self.rows, self.stride);
        view.cols = self.cols;
        view.row_range(0, self.rows)
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        let (rows, cols, stride) = (self.rows, self.cols, self.stride);
        if stride == cols {
            return ViewMut::from_slice(&mut self.data, rows, cols);
        }
        let mut view = ViewMut::from_slice(&mut self.data, rows, stride);
        view.cols = cols;
        view.into_row_range(0, rows)
    }

    /// The elements row by row, without gaps.
    pub(crate) fn values(&self) -> Vec<f32> {
        self.rows().flatten().copied().collect()
    }

    /// The elements row by row in f64, for the naive versions.
    pub(crate) fn f64(&self) -> Vec<f64> {
        self.rows().flatten().map(|&x| x as f64).collect()
    }

    fn gaps_are_untouched(&self) -> bool {
        self.data.iter().enumerate().all(|(i, x)| i % self.stride < self.cols || x.to_bits() == GAP)
    }
}

/// What a destination holds before the op.
#[derive(Clone, Copy)]
pub(crate) enum Out<'a> {
    /// The op overwrites it (rows, cols): it starts as NaN.
    Set(usize, usize),
    /// The op adds to it or works in place: it starts as this.
    Add(&'a Mat),
}

/// |found - expected| may be `abs + rel * |expected|`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) rel: f64,
    pub(crate) abs: f64,
}

/// `tolerance(rel, abs)`.
pub(crate) fn tolerance(rel: f64, abs: f64) -> Tolerance {
    Tolerance { rel, abs }
}

/// Runs `fast` in all variants; each must equal `expected` within the tolerance, all must give the same bits.
pub(crate) fn check_fast<const O: usize, const I: usize>(
    what: &str,
    outputs: [(Out<'_>, &[f64]); O],
    inputs: [&Mat; I],
    tolerance: Tolerance,
    fast: impl Fn([ViewMut<'_>; O], [View<'_>; I]) -> Result<()> + Sync,
) {
    let mut first: Option<[Vec<f32>; O]> = None;
    for gap in [0, 3] {
        for threads in [1, 4] {
            let variant = format!("{what}, {threads} thread(s), rows padded by {gap}");
            let inputs = inputs.map(|input| input.padded(gap));
            let mut found = outputs.each_ref().map(|(out, _)| match out {
                Out::Set(rows, cols) => Mat::poisoned(*rows, *cols).padded(gap),
                Out::Add(start) => start.padded(gap),
            });
            pool(threads)
                .install(|| fast(found.each_mut().map(Mat::view_mut), inputs.each_ref().map(Mat::view)))
                .unwrap_or_else(|e| panic!("{variant}: {e}"));
            for (i, (mat, (_, expected))) in found.iter().zip(&outputs).enumerate() {
                assert!(mat.gaps_are_untouched(), "{variant}: output {i} is written outside of its columns");
                assert_close(&format!("{variant}, output {i}"), &mat.values(), expected, tolerance);
            }
            let values = found.each_ref().map(Mat::values);
            match &first {
                None => first = Some(values),
                Some(first) => {
                    for (i, (a, b)) in first.iter().zip(&values).enumerate() {
                        assert!(
                            same_bits(a, b),
                            "{variant}: output {i} has other bits than the first variant"
                        );
                    }
                }
            }
        }
    }
}

/// Runs a computation on one thread and on four and returns its result, which must have the same bits.
pub(crate) fn same_on_one_and_four_threads(what: &str, compute: impl Fn() -> Vec<f32> + Sync) -> Vec<f32> {
    let one = pool(1).install(&compute);
    let four = pool(4).install(&compute);
    assert!(same_bits(&one, &four), "{what} depends on the number of threads");
    one
}

pub(crate) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn pool(threads: usize) -> &'static rayon::ThreadPool {
    static ONE: OnceLock<rayon::ThreadPool> = OnceLock::new();
    static FOUR: OnceLock<rayon::ThreadPool> = OnceLock::new();
    let pool = if threads == 1 { &ONE } else { &FOUR };
    pool.get_or_init(|| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
}

/// Element by element; the message names the worst one. A NaN only equals nothing, infinities themselves.
pub(crate) fn assert_close<F, E>(what: &str, found: &[F], expected: &[E], tolerance: Tolerance)
where
    F: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let excess = |f: f64, e: f64| {
        let allowed = tolerance.abs + tolerance.rel * e.abs();
        match (f - e).abs() {
            _ if f == e => 0.0,
            difference if difference.is_nan() || allowed == 0.0 => f64::INFINITY,
            difference => difference / allowed,
        }
    };
    let mut worst = (0.0, 0);
    let mut count = 0;
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        let excess = excess(f.into(), e.into());
        count += usize::from(excess > 1.0);
        if excess > worst.0 {
            worst = (excess, i);
        }
    }
    let (excess, i) = worst;
    assert!(
        count == 0,
        "{what}: {count} of {} elements differ; the worst is element {i}: found {:e}, expected {:e} ({excess:.2} times \
         the tolerance, rel {:e} abs {:e})",
        found.len(),
        found[i].into(),
        expected[i].into(),
        tolerance.rel,
        tolerance.abs,
    );
}

/// Central differences of `loss` around `x` against its gradient `dx`, at up to 64 evenly spread elements.
///
/// In f64 with a step of 1e-5 the truncation error is about 1e-10 of the third derivative and the
/// rounding error about 1e-11 of the loss, so 1e-6 leaves room for losses of some hundred.
pub(crate) fn check_gradient(what: &str, x: &[f64], dx: &[f64], mut loss: impl FnMut(&[f64]) -> f64) {
    assert_eq!(x.len(), dx.len(), "{what}: number of elements");
    let mut moved = x.to_vec();
    let step = (x.len() / 64).max(1);
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for i in (0..x.len()).step_by(step) {
        let h = 1e-5 * x[i].abs().max(1.0);
        moved[i] = x[i] + h;
        let above = loss(&moved);
        moved[i] = x[i] - h;
        let below = loss(&moved);
        moved[i] = x[i];
        expected.push((above - below) / (2.0 * h));
        found.push(dx[i]);
    }
    assert_close(&format!("{what} against finite differences"), &found, &expected, tolerance(1e-6, 1e-6));
}

/// sum a_i b_i: a loss whose gradient by `a` is `b`.
pub(crate) fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The tensors that PyTorch computed for an op: `testdata/ops/<op>.safetensors`.
pub(crate) struct Golden {
    op: String,
    bytes: Vec<u8>,
}

pub(crate) fn golden(op: &str) -> Golden {
    let path = format!("{}/../testdata/ops/{op}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    Golden { op: op.to_owned(), bytes }
}

impl Golden {
    /// A two-dimensional f32 tensor.
    pub(crate) fn mat(&self, name: &str) -> Mat {
        let file = safetensors::SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.op));
        assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{name}");
        let &[rows, cols] = tensor.shape() else { panic!("{name} is not a matrix") };
        let data = tensor.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        Mat::new(rows, cols, data)
    }

    /// An i64 tensor of indices.
    pub(crate) fn indices(&self, name: &str) -> Vec<u32> {
        let file = safetensors::SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{}: {name}: {e}", self.op));
        assert_eq!(tensor.dtype(), safetensors::Dtype::I64, "{name}");
        tensor.data().as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b) as u32).collect()
    }
}

/// Seconds per call: the best of several runs, after one that warms up. For the ignored timing tests.
pub(crate) fn seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = std::time::Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

mod tests {
    use super::*;

    #[test]
    fn padding_keeps_the_elements_and_marks_the_gaps() {
        let mat = Mat::random(1, 3, 5, 1.0);
        let mut padded = mat.padded(2);
        assert_eq!(padded.values(), mat.values());
        assert_eq!((padded.view().rows, padded.view().cols, padded.view().stride), (3, 5, 7));
        assert!(padded.gaps_are_untouched());
        padded.data[5] = 0.0;
        assert!(!padded.gaps_are_untouched());
    }

    #[test]
    #[should_panic(expected = "element 1: found 2e0, expected 3e0")]
    fn a_difference_names_the_worst_element() {
        assert_close("test", &[1.0, 2.0], &[1.1, 3.0], tolerance(0.0, 0.01));
    }

    #[test]
    #[should_panic(expected = "1 of 1 elements differ")]
    fn a_nan_equals_nothing() {
        assert_close("test", &[f32::NAN], &[f32::NAN], tolerance(1.0, 1.0));
    }

    #[test]
    #[should_panic(expected = "against finite differences")]
    fn a_wrong_gradient_is_found() {
        check_gradient("square", &[1.0, 2.0], &[2.0, 4.1], |x| inner(x, x));
    }
}
