//! DoRA: `y = diag(m / ‖W + s B A‖) (W + s B A) x`, with A, B and the magnitudes m (out) trained
//! (Liu et al. 2024). On a quantized base this is QDoRA.
//!
//! The row norms depend on A and B alone, so they are computed once per optimizer step, in factored
//! form: `‖W + sBA‖² = ‖W‖² + 2s rowsum((W Aᵀ) ⊙ B) + s² rowsum((B A Aᵀ) ⊙ B)`, with `‖W‖²` known
//! for ever. The row factor g = m / norm then rides on the dequantized rows and on B, or on what is made of the
//! output, and a token pays what it pays for LoRA. The norm is a constant in the backward pass (section 4.3 of the paper, PEFT).

use std::ops::Range;

use qpeft_kernels::ops::dequantize::row_norms_squared;
use qpeft_kernels::ops::fold::fold_row_factor;
use qpeft_kernels::ops::merge::merge_row_lengths;
use qpeft_kernels::ops::quant_linear::scale_copy_anew;
use qpeft_kernels::ops::row_norm::{row_norm_fold, row_norm_packed};
use qpeft_kernels::ops::row_scale::row_scale_backward;
use qpeft_kernels::{Device, Tensor, View, ViewMut};

use super::lora::Lora;
use crate::error::Result;
use crate::model::linear::{
    Adapter, BaseWeight, BranchGradient, Entry, InputGradient, LowRankBranch, Parameters, Pass, Saved,
    Scratch,
};

/// A low-rank pair and a magnitude per output row.
#[derive(Debug)]
pub struct Dora {
    lora: Lora,
    /// (out): m.
    magnitude: Entry,
    /// (1, out): ‖W‖² of the dequantized rows, constant.
    w_squared: Tensor,
    /// (1, out): ‖W + s B A‖.
    norm: Tensor,
    /// (1, out): g.
    factor: Tensor,
    /// Whether the caller multiplies by g, and not the rows of the weight and of B.
    leaves_factor: bool,
}

impl Dora {
    /// Puts a magnitude behind `lora`, right after it in the flat buffer.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(device: &Device, module: &str, weight: &BaseWeight, lora: Lora) -> Result<Dora> {
        let out = weight.rows();
        let magnitude = Entry {
            key: format!("base_model.model.{module}.lora_magnitude_vector"),
            shape: vec![out],
            offset: lora.b.offset + lora.b.len(),
        };
        let row = || Tensor::zeros(device, 1, out);
        let mut w_squared = row()?;
        if !device.is_meta() {
            row_norms_squared(w_squared.view_mut(), weight)?;
        }
        Ok(Dora { lora, magnitude, w_squared, norm: row()?, factor: row()?, leaves_factor: false })
    }

    /// g, where the rows of the weight are multiplied by it.
    fn row_factor(&self) -> Option<View<'_>> {
        (!self.leaves_factor).then(|| self.factor.view())
    }

    fn refresh_norm(&mut self, params: &Parameters, weight: &BaseWeight) -> Result<()> {
        let Pass { params, factors, .. } = params.pass(None);
        Ok(row_norm_packed(
            self.norm.view_mut(),
            self.w_squared.view(),
            self.lora.a.view(factors),
            self.lora.b.view(params),
            self.lora.scaling,
            weight,
            self.factor.view(),
        )?)
    }
}

impl Adapter for Dora {
    fn entries(&self) -> Vec<&Entry> {
        vec![&self.lora.a, &self.lora.b, &self.magnitude]
    }

    fn rank(&self) -> usize {
        self.lora.rank()
    }

    fn needs_output(&self) -> bool {
        true
    }

    fn projection(&self) -> Option<&Entry> {
        self.lora.projection()
    }

    fn branch(&self) -> Option<LowRankBranch<'_>> {
        Some(self.lora.branch_scaled(self.row_factor()))
    }

    fn output_scale(&self) -> Option<&Entry> {
        Some(&self.magnitude)
    }

    fn leave_factor(&mut self) {
        self.leaves_factor = true;
    }

    fn left(&self) -> Option<View<'_>> {
        self.leaves_factor.then(|| self.factor.view())
    }

    fn drops_out(&self) -> bool {
        self.lora.drops_out()
    }

    /// A and B as LoRA's.
    fn init(&mut self, values: &mut [f32], weight: &BaseWeight, seed: u64) -> Result<()> {
        self.lora.init(values, weight, seed)
    }

    /// m = ‖W + s B A‖, so that training starts from the base's own output.
    fn derive(
        &mut self,
        params: &Parameters,
        weight: &BaseWeight,
    ) -> Result<Option<(Range<usize>, Vec<f32>)>> {
        self.refresh_norm(params, weight)?;
        Ok(Some((self.magnitude.range(), self.norm.read()?)))
    }

    fn refresh(&mut self, params: &Parameters, weight: &BaseWeight) -> Result<()> {
        if self.leaves_factor {
            self.refresh_norm(params, weight)?;
            let m = self.magnitude.view(params.values.view());
            fold_row_factor(self.factor.view_mut(), m, self.norm.view())?;
            return self.lora.refresh(params, weight);
        }
        let Pass { params, factors, .. } = params.pass(None);
        let Lora { a, b, scaling, folded, .. } = &mut self.lora;
        row_norm_fold(
            self.norm.view_mut(),
            self.factor.view_mut(),
            folded.view_mut(),
            self.w_squared.view(),
            a.view(factors),
            b.view(params),
            self.magnitude.view(params),
            *scaling,
            weight,
        )?;
        scale_copy_anew(weight, self.factor.view(), folded.view(), a.view(factors))?;
        weight.set_refreshed(self.rank());
        Ok(())
    }

    fn project(&self, h: ViewMut<'_>, x: View<'_>, pass: &Pass<'_>, scratch: &mut Scratch) -> Result<()> {
        self.lora.project(h, x, pass, scratch)
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
        self.lora.forward_scaled(y, onto, h, x, weight, self.row_factor(), pass, scratch)
    }

    fn backward(
        &self,
        dx: Option<InputGradient<'_>>,
        dh: BranchGradient<'_>,
        mut dparams: ViewMut<'_>,
        dy: View<'_>,
        saved: Saved<'_>,
        weight: &BaseWeight,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        // y = diag(m / norm) (W + s B A) x, so dm = sum over tokens of dy * y / m
        if let Some(y) = saved.y {
            let dm = self.magnitude.view_mut(dparams.reborrow());
            row_scale_backward(dm, dy, y, self.magnitude.view(pass.params))?;
        }
        let g = self.row_factor();
        self.lora.backward_scaled(dx, dh, dparams, dy, saved, weight, g, pass, scratch)
    }

    /// The norm is taken of the merged rows themselves.
    fn merge(&self, rows: Range<usize>, mut w: ViewMut<'_>, params: View<'_>) -> Result<()> {
        self.lora.merge(rows.clone(), w.reborrow(), params)?;
        let m = self.magnitude.view(params).column_range(rows.start, rows.len());
        Ok(merge_row_lengths(w, m)?)
    }
}
