//! LoRA: `y = W x + s B A x`, with A (r, in), B (out, r) trained and s = alpha / r (Hu et al. 2021; rsLoRA:
//! alpha / sqrt(r)). Also the low-rank core that DoRA and PiSSA train.

use std::ops::Range;

use qpeft_kernels::ops::convert::convert;
use qpeft_kernels::ops::dropout::{dropout_backward, dropout_forward};
use qpeft_kernels::ops::fold::fold_branch_beside;
use qpeft_kernels::ops::low_rank::{
    OutScale, low_rank_branch_gradients, low_rank_forward, low_rank_input_gradient,
    low_rank_projection_backward,
};
use qpeft_kernels::ops::merge::merge_low_rank;
use qpeft_kernels::ops::quant_linear::{
    Branch, quant_linear_backward, quant_linear_backward_with_branch, quant_linear_forward,
    quant_linear_forward_onto,
};
use qpeft_kernels::rng::RngKey;
use qpeft_kernels::{Device, Tensor, View, ViewMut};

use crate::error::Result;
use crate::model::linear::{
    Adapter, BaseWeight, BranchGradient, Entry, InputGradient, LowRankBranch, Parameters, Pass, Saved,
    Scratch,
};

/// The low-rank pair on one linear.
#[derive(Debug)]
pub struct Lora {
    /// (r, in).
    pub a: Entry,
    /// (out, r).
    pub b: Entry,
    /// s.
    pub scaling: f32,
    /// Probability with which an input of the branch is zeroed while training.
    pub dropout: f32,
    /// Tells the dropout of this linear from that of the others.
    pub id: u64,
    /// (out, r): s diag(g) B, folded once per optimizer step.
    pub folded: Tensor,
}

impl Lora {
    /// The pair with A and B at these places of the flat buffer, A first.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(
        device: &Device,
        module: &str,
        weight: &BaseWeight,
        rank: usize,
        scaling: f32,
        dropout: f32,
        [a_offset, b_offset]: [usize; 2],
        id: u64,
    ) -> Result<Lora> {
        let key = |matrix: &str| format!("base_model.model.{module}.{matrix}.weight");
        let a = Entry { key: key("lora_A"), shape: vec![rank, weight.cols()], offset: a_offset };
        let b = Entry { key: key("lora_B"), shape: vec![weight.rows(), rank], offset: b_offset };
        Ok(Lora { a, b, scaling, dropout, id, folded: Tensor::activations(device, weight.rows(), rank)? })
    }

    /// y = onto + diag(g) W x + folded B (A drop(x)); leaves h = A drop(x).
    ///
    /// # Errors
    /// An op refuses.
    pub fn forward_scaled(
        &self,
        y: ViewMut<'_>,
        onto: Option<View<'_>>,
        mut h: ViewMut<'_>,
        x: View<'_>,
        weight: &BaseWeight,
        g: Option<View<'_>>,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        if !pass.shared {
            self.project(h.reborrow(), x, pass, scratch)?;
        }
        let branch = Branch { h: h.as_view(), b: self.folded.view() };
        match onto {
            None => Ok(quant_linear_forward(y, x, weight, g, Some(branch))?),
            Some(to) => Ok(quant_linear_forward_onto(y, to, x, weight, g, Some(branch))?),
        }
    }

    /// The mirror of [`Lora::forward_scaled`].
    ///
    /// # Errors
    /// An op refuses.
    pub fn backward_scaled(
        &self,
        dx: Option<InputGradient<'_>>,
        BranchGradient { mut dh, twin }: BranchGradient<'_>,
        dparams: ViewMut<'_>,
        dy: View<'_>,
        saved: Saved<'_>,
        weight: &BaseWeight,
        g: Option<View<'_>>,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let a = self.a.view(pass.factors);
        let LowRankBranch { b, out_scale, .. } = self.branch_scaled(g);
        let [da, db] = Entry::views_mut([&self.a, &self.b], dparams);

        // y = diag(g) W x + h folded^T
        if !pass.branched {
            low_rank_branch_gradients(dh.reborrow(), twin, db, dy, b, saved.h, out_scale)?;
        }
        let dh = dh.as_view();
        // h = A drop(x)
        let Some(key) = self.dropout_key(pass) else {
            if let Some(InputGradient { dx, accumulate }) = dx {
                quant_linear_backward_with_branch(dx, dh, dy, weight, g, a, accumulate)?;
            }
            let by_caller = pass.shared || pass.late;
            return if by_caller { Ok(()) } else { Ok(low_rank_projection_backward(da, dh, saved.x)?) };
        };
        let t = saved.x.rows;
        let mut input = scratch.dropped.top_mut(t).into_column_range(0, saved.x.cols);
        dropout_forward(input.reborrow(), saved.x, self.dropout, key)?;
        low_rank_projection_backward(da, dh, input.as_view())?;
        if let Some(InputGradient { mut dx, accumulate }) = dx {
            quant_linear_backward(dx.reborrow(), dy, weight, g, accumulate)?;
            input.reborrow().zero("dropout")?;
            low_rank_input_gradient(input.reborrow(), dh, a)?;
            dropout_backward(dx, input.as_view(), self.dropout, key)?;
        }
        Ok(())
    }

    /// The branch, with diag(g) in its rows.
    pub fn branch_scaled<'a>(&'a self, g: Option<View<'a>>) -> LowRankBranch<'a> {
        let out_scale = OutScale { scaling: self.scaling, rows: g };
        LowRankBranch { b: self.folded.view(), entry: &self.b, out_scale }
    }

    fn dropout_key(&self, pass: &Pass<'_>) -> Option<RngKey> {
        let key = pass.dropout.filter(|_| self.dropout > 0.0)?;
        Some(RngKey { seed: key.seed, stream: key.stream << 20 | self.id })
    }

    /// The branch's input: x itself, or x with dropout in `dropped`.
    fn drop<'a>(&self, x: View<'a>, pass: &Pass<'_>, dropped: &'a mut Tensor) -> Result<View<'a>> {
        let Some(key) = self.dropout_key(pass) else { return Ok(x) };
        dropout_forward(dropped.top_mut(x.rows).into_column_range(0, x.cols), x, self.dropout, key)?;
        Ok(dropped.top(x.rows).column_range(0, x.cols))
    }
}

impl Adapter for Lora {
    fn entries(&self) -> Vec<&Entry> {
        vec![&self.a, &self.b]
    }

    fn rank(&self) -> usize {
        self.a.shape[0]
    }

    fn needs_output(&self) -> bool {
        false
    }

    fn projection(&self) -> Option<&Entry> {
        (self.dropout == 0.0).then_some(&self.a)
    }

    fn branch(&self) -> Option<LowRankBranch<'_>> {
        Some(self.branch_scaled(None))
    }

    fn drops_out(&self) -> bool {
        self.dropout > 0.0
    }

    /// PEFT's: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5)), B zero.
    fn init(&mut self, values: &mut [f32], _weight: &BaseWeight, seed: u64) -> Result<()> {
        RngKey { seed, stream: self.id }.fill_kaiming_uniform(&mut values[self.a.range()], self.a.shape[1]);
        values[self.b.range()].fill(0.0);
        Ok(())
    }

    fn derive(
        &mut self,
        _params: &Parameters,
        _weight: &BaseWeight,
    ) -> Result<Option<(Range<usize>, Vec<f32>)>> {
        Ok(None)
    }

    fn refresh(&mut self, params: &Parameters, weight: &BaseWeight) -> Result<()> {
        let Pass { params, factors, .. } = params.pass(None);
        if let Some(below) = weight.rows_below_copy(self.rank()) {
            convert(below, self.a.view(factors))?;
        }
        let (b, twin) = (self.b.view(params), weight.branch_in_copy(self.rank()));
        fold_branch_beside(self.folded.view_mut(), twin, b, self.scaling, None)?;
        weight.set_refreshed(self.rank());
        Ok(())
    }

    fn project(&self, h: ViewMut<'_>, x: View<'_>, pass: &Pass<'_>, scratch: &mut Scratch) -> Result<()> {
        let input = self.drop(x, pass, &mut scratch.dropped)?;
        Ok(low_rank_forward(h, input, self.a.view(pass.factors))?)
    }

    fn forward(
        &self,
        y: ViewMut<'_>,
        onto: Option<View<'_>>,
        h: ViewMut<'_>,
        x: View<'_>,
        weight: &BaseWeight,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.forward_scaled(y, onto, h, x, weight, None, pass, scratch)
    }

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
    ) -> Result<()> {
        self.backward_scaled(dx, dh, dparams, dy, saved, weight, None, pass, scratch)
    }

    fn merge(&self, rows: Range<usize>, w: ViewMut<'_>, params: View<'_>) -> Result<()> {
        let b = self.b.view(params).row_range(rows.start, rows.len());
        Ok(merge_low_rank(w, b, self.a.view(params), self.scaling)?)
    }
}
