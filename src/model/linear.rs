//! One frozen linear and the seam behind which every adapter method lives.
//!
//! A linear is `y = W x` with a packed, frozen `W`. An adapter replaces that product by its own,
//! built from the verbs of [`BaseWeight`] and a few ops, so methods never see a quantization format
//! and formats never see a method. The trained values of all adapters lie in one flat buffer
//! ([`Parameters`]), because the optimizer, the clipping norm and a checkpoint want them so.

use std::ops::Range;

use qpeft_kernels::ops::low_rank::OutScale;
use qpeft_kernels::ops::quant_linear::{
    quant_linear_backward, quant_linear_forward, quant_linear_forward_onto,
};
use qpeft_kernels::ops::row_norm::row_norm_uses_scratch;
use qpeft_kernels::ops::row_scale::Output;
use qpeft_kernels::rng::RngKey;
use qpeft_kernels::{Device, Tensor, View, ViewMut};

pub use qpeft_kernels::weight::BaseWeight;

use crate::error::Result;

/// One trained matrix: its name in an adapter file and its place in the flat buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The tensor's key in a PEFT folder.
    pub key: String,
    /// Shape in that file: (r, in), (out, r) or (out).
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
}

impl Entry {
    /// One past the last element in the flat buffer.
    pub fn end(&self) -> usize {
        self.offset + self.len()
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// (rows, cols) as a matrix; a vector is one row.
    fn dims(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, self.len()),
        }
    }

    /// The matrix in a flat buffer of values.
    pub fn view<'a>(&self, flat: View<'a>) -> View<'a> {
        let (rows, cols) = self.dims();
        flat.slice(self.offset, rows, cols)
    }

    /// The matrix in a flat buffer of gradients.
    pub fn view_mut<'a>(&self, flat: ViewMut<'a>) -> ViewMut<'a> {
        let (rows, cols) = self.dims();
        flat.into_slice(self.offset, rows, cols)
    }

    /// The matrices of several entries in a flat buffer of gradients, all at once.
    ///
    /// # Panics
    /// Two of them share elements.
    pub fn views_mut<'a, const N: usize>(entries: [&Entry; N], flat: ViewMut<'a>) -> [ViewMut<'a>; N] {
        let mut order: [usize; N] = std::array::from_fn(|i| i);
        order.sort_by_key(|&i| entries[i].offset);
        let mut views = [const { None }; N];
        let (mut rest, mut at) = (flat, 0);
        for i in order {
            let (entry, (rows, cols)) = (entries[i], entries[i].dims());
            let (_, from) = rest.split_row(entry.offset - at);
            let (own, behind) = from.split_row(entry.len());
            views[i] = Some(own.into_slice(0, rows, cols));
            (rest, at) = (behind, entry.end());
        }
        views.map(|view| view.expect("the order names every entry"))
    }

    /// The elements in a flat host buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// All trained values, in one flat f32 buffer.
#[derive(Debug)]
pub struct Parameters {
    /// The matrices, in the order of their offsets.
    pub entries: Vec<Entry>,
    /// (1, total): what the optimizer updates.
    pub values: Tensor,
    /// (1, total): the same rounded to the type of activations, where that is another one.
    pub rounded: Option<Tensor>,
}

impl Parameters {
    /// Zeros for these entries.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(device: &Device, entries: Vec<Entry>) -> Result<Parameters> {
        let count = entries.last().map_or(0, |e| e.range().end);
        let values = Tensor::zeros(device, 1, count)?;
        let rounded = device.rounds().then(|| Tensor::activations(device, 1, count)).transpose()?;
        Ok(Parameters { entries, values, rounded })
    }

    /// No parameter at all: the frozen model.
    ///
    /// # Errors
    /// The device refuses an empty tensor.
    pub fn none(device: &Device) -> Result<Parameters> {
        Parameters::new(device, Vec::new())
    }

    /// Overwrites all values.
    ///
    /// # Errors
    /// Their number differs, or the device refuses.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        self.values.write(values)?;
        if let Some(rounded) = &mut self.rounded {
            rounded.write(values)?;
        }
        Ok(())
    }

    /// A pass over these values.
    pub fn pass(&self, dropout: Option<RngKey>) -> Pass<'_> {
        let params = self.values.view();
        let factors = self.rounded.as_ref().map_or(params, Tensor::view);
        Pass { params, factors, dropout, shared: false, late: false, branched: false }
    }

    /// Trained scalars.
    pub fn count(&self) -> usize {
        self.values.len()
    }
}

/// What one forward or backward pass carries besides activations.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// The flat buffer of [`Parameters`].
    pub params: View<'a>,
    /// The same in the type of activations: what matrix products take.
    pub factors: View<'a>,
    /// Seed and number of this micro-batch while training; `None` switches dropout off.
    pub dropout: Option<RngKey>,
    /// Whether the caller makes the products with [`Adapter::projection`], for all linears of an input at once.
    pub shared: bool,
    /// Whether the caller makes the gradient of [`Adapter::projection`] itself, later: the backward pass of this linear
    /// cannot read its input yet.
    pub late: bool,
    /// Whether the caller has made the gradients of [`Adapter::branch`] already: that of the low-rank activations is where
    /// the linear would put it.
    pub branched: bool,
}

/// Buffers that adapters may use within one call; nothing in them outlives it.
#[derive(Debug)]
pub struct Scratch {
    /// (T, largest in-features): the input after dropout. Empty when no adapter drops out.
    pub dropped: Tensor,
}

/// What the forward pass left for the backward pass of one linear.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// (T, in): the input.
    pub x: View<'a>,
    /// (T, rank): the low-rank activations.
    pub h: View<'a>,
    /// The output, if [`Adapter::needs_output`]; `None` where the gradient of [`Adapter::output_scale`] was made
    /// already.
    pub y: Option<Output<'a>>,
}

/// The low-rank branch of a linear, y = ... + h b^T, for who makes the gradients that it takes from dy along with dy.
#[derive(Debug, Clone, Copy)]
pub struct LowRankBranch<'a> {
    /// (out, rank): s diag(g) B, of the type of activations.
    pub b: View<'a>,
    /// The place of B.
    pub entry: &'a Entry,
    /// s and g.
    pub out_scale: OutScale<'a>,
}

/// Where the gradient of a linear's input goes.
#[derive(Debug)]
pub struct InputGradient<'a> {
    /// (T, in).
    pub dx: ViewMut<'a>,
    /// Add to what is there instead of overwriting it: linears that share an input.
    pub accumulate: bool,
}

/// Where the gradient of the low-rank activations goes.
#[derive(Debug)]
pub struct BranchGradient<'a> {
    /// (T, rank): on CUDA in the padding behind the rows of dy ([`Tensor::with_padding`]), so that one product reads both.
    pub dh: ViewMut<'a>,
    /// (T, rank): the same once more, beside that of the other linears of the input, where the pass is
    /// [shared](Pass::shared).
    pub twin: Option<ViewMut<'a>>,
}

/// One method on one linear.
pub trait Adapter: Send + Sync + std::fmt::Debug {
    /// The trained matrices of this linear.
    fn entries(&self) -> Vec<&Entry>;

    /// Columns of the low-rank activations that forward leaves for backward.
    fn rank(&self) -> usize;

    /// Whether backward reads the linear's output.
    fn needs_output(&self) -> bool;

    /// The factor A, where the low-rank activations are h = x A^T of the input as it is, so that dA = dh^T x, whoever
    /// makes it.
    fn projection(&self) -> Option<&Entry> {
        None
    }

    /// The branch by which the low-rank activations enter the output, if there is one.
    fn branch(&self) -> Option<LowRankBranch<'_>> {
        None
    }

    /// The trained factors of the output's channels, if there are any: y_n = m_n * (...), so that
    /// dm_n = sum_t dy_tn y_tn / m_n. Whoever makes dy from y may make it on the way.
    fn output_scale(&self) -> Option<&Entry> {
        None
    }

    /// From now on forward gives the output less the multiples of its channels that follow from
    /// [`Adapter::output_scale`], backward takes the gradient of that, and the caller multiplies by [`Adapter::left`]: where
    /// it has all elements in hand, that costs less than to have them in the rows of the weight.
    fn leave_factor(&mut self) {}

    /// (1, out): what the caller multiplies the output's channels by.
    fn left(&self) -> Option<View<'_>> {
        None
    }

    /// Whether forward uses [`Scratch::dropped`].
    fn drops_out(&self) -> bool;

    /// Writes the method's initial values into their places in the flat buffer.
    ///
    /// # Errors
    /// An op refuses.
    fn init(&mut self, values: &mut [f32], weight: &BaseWeight, seed: u64) -> Result<()>;

    /// Initial values that follow from those of the low-rank factors (DoRA's magnitudes), and their place in
    /// the flat buffer.
    ///
    /// # Errors
    /// An op refuses.
    fn derive(
        &mut self,
        params: &Parameters,
        weight: &BaseWeight,
    ) -> Result<Option<(Range<usize>, Vec<f32>)>>;

    /// Recomputes what depends on the parameters alone. Called after they are loaded and after every
    /// optimizer step, never per micro-batch.
    ///
    /// # Errors
    /// An op refuses.
    fn refresh(&mut self, params: &Parameters, weight: &BaseWeight) -> Result<()>;

    /// h (T, rank) = the low-rank activations of x alone, as [`Adapter::forward`] leaves them.
    ///
    /// # Errors
    /// An op refuses.
    fn project(&self, h: ViewMut<'_>, x: View<'_>, pass: &Pass<'_>, scratch: &mut Scratch) -> Result<()>;

    /// y (T, out) = the adapted linear of x (T, in), plus `onto` (T, out) if it is given; leaves h (T, rank).
    ///
    /// # Errors
    /// An op refuses.
    fn forward(
        &self,
        y: ViewMut<'_>,
        onto: Option<View<'_>>,
        h: ViewMut<'_>,
        x: View<'_>,
        weight: &BaseWeight,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// Adds the parameters' gradients to `dparams` (flat) and gives the input's gradient, if asked for, and that of the
    /// low-rank activations. In a [shared](Pass::shared) or [late](Pass::late) pass the caller makes the gradient of
    /// [`Adapter::projection`], in a [branched](Pass::branched) one it made those of [`Adapter::branch`].
    ///
    /// # Errors
    /// An op refuses.
    fn backward(
        &self,
        dx: Option<InputGradient<'_>>,
        dh: BranchGradient<'_>,
        dparams: ViewMut<'_>,
        dy: View<'_>,
        saved: Saved<'_>,
        weight: &BaseWeight,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()>;

    /// Turns dense f32 rows `rows` of `W` into the adapted weight's rows, where they and `params` (the flat buffer of
    /// [`Parameters`]) are: in host memory on the calling thread.
    ///
    /// # Errors
    /// An op refuses.
    fn merge(&self, rows: Range<usize>, w: ViewMut<'_>, params: View<'_>) -> Result<()>;
}

/// A frozen linear of the decoder, adapted or not.
#[derive(Debug)]
pub struct Linear {
    /// Path of the module, as Hugging Face names it: `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The frozen weight, (out, in).
    pub weight: BaseWeight,
    /// The method on it, if it is a target.
    pub adapter: Option<Box<dyn Adapter>>,
}

impl Linear {
    /// Columns of the low-rank activations to keep.
    pub fn rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, |a| a.rank())
    }

    /// Whether the output has to be kept for the backward pass.
    pub fn needs_output(&self) -> bool {
        self.adapter.as_ref().is_some_and(|a| a.needs_output())
    }

    /// See [`Adapter::projection`].
    pub fn projection(&self) -> Option<&Entry> {
        self.adapter.as_ref()?.projection()
    }

    /// See [`Adapter::branch`].
    pub fn branch(&self) -> Option<LowRankBranch<'_>> {
        self.adapter.as_ref()?.branch()
    }

    /// See [`Adapter::output_scale`].
    pub fn output_scale(&self) -> Option<&Entry> {
        self.adapter.as_ref()?.output_scale()
    }

    /// Whether [`Adapter::refresh`] dequantizes the weight into scratch, which all linears share.
    pub fn refreshes_by_scratch(&self, params: &Parameters) -> bool {
        let factors = params.pass(None).factors;
        let of = |a: &Entry| row_norm_uses_scratch(&self.weight, a.view(factors));
        self.output_scale().is_some() && self.projection().is_none_or(of)
    }

    /// y (T, out) = the linear of x (T, in), plus `onto` (T, out) if it is given.
    ///
    /// # Errors
    /// An op refuses.
    pub fn forward(
        &self,
        y: ViewMut<'_>,
        onto: Option<View<'_>>,
        h: ViewMut<'_>,
        x: View<'_>,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        match &self.adapter {
            Some(adapter) => adapter.forward(y, onto, h, x, &self.weight, pass, scratch),
            None => match onto {
                None => Ok(quant_linear_forward(y, x, &self.weight, None, None)?),
                Some(to) => Ok(quant_linear_forward_onto(y, to, x, &self.weight, None, None)?),
            },
        }
    }

    /// The mirror of [`Linear::forward`].
    ///
    /// # Errors
    /// An op refuses.
    pub fn backward(
        &self,
        dx: Option<InputGradient<'_>>,
        dh: BranchGradient<'_>,
        dparams: ViewMut<'_>,
        dy: View<'_>,
        saved: Saved<'_>,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        match (&self.adapter, dx) {
            (Some(adapter), dx) => adapter.backward(dx, dh, dparams, dy, saved, &self.weight, pass, scratch),
            (None, Some(dx)) => Ok(quant_linear_backward(dx.dx, dy, &self.weight, None, dx.accumulate)?),
            (None, None) => Ok(()),
        }
    }
}
