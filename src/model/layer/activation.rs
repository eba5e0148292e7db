//! The activation's backward pass: alone, or joined with what the branches of gate, up and down take from the same elements,
//! where a device has an op that does.

use qpeft_kernels::ops::low_rank::low_rank_projection_backward;
use qpeft_kernels::ops::swiglu::low_rank::{self, Scales, swiglu_backward_low_rank};
use qpeft_kernels::ops::swiglu::{swiglu_backward, swiglu_backward_scaled};
use qpeft_kernels::{Device, Tensor, View};

use super::super::config::Config;
use super::super::decoder::Decoder;
use super::super::linear::Entry;
use super::{Backward, Layer, SLOTS, Slot};
use crate::error::Result;

/// What the op reads, and the gradients that it makes but those of parameters.
pub(super) struct Operands<'a> {
    /// (T, F): gradient of silu(gate) * up.
    pub(super) dact: View<'a>,
    /// (T, F): gate and up.
    pub(super) inputs: [View<'a>; 2],
    /// (T, F): their gradients, maybe in their place.
    pub(super) gradients: [&'a mut Tensor; 2],
    /// (T, rank): gradients of the low-rank activations of gate and up.
    pub(super) beside: [&'a mut Tensor; 2],
    /// The same once more, by [`Slot`], if the pass is shared.
    pub(super) twins: Option<&'a mut [Tensor; SLOTS]>,
    /// (T, rank): the low-rank activations, by [`Slot`].
    pub(super) h: &'a [Tensor; SLOTS],
    /// (T, rank): gradient of those of down.
    pub(super) dh: View<'a>,
}

impl Decoder {
    /// Joins the activation's backward pass with the branches around it in every layer where the device has an op that does,
    /// and the adapters are of a kind that it serves.
    pub fn join_activations(&mut self) {
        let ranks = self.largest_ranks();
        for layer in &mut self.layers {
            layer.joined = layer.joins(&self.device, &self.config, &ranks);
        }
    }
}

impl Layer {
    /// `ranks`: the largest of all layers, which say where low-rank activations lie.
    fn joins(&self, device: &Device, config: &Config, ranks: &[usize; SLOTS]) -> bool {
        let [gate, up, down] = [Slot::Gate, Slot::Up, Slot::Down].map(|slot| self.linear(slot));
        let [has_branch, scaled] =
            [[gate, up].map(|l| l.branch().is_some()), [gate, up].map(|l| l.output_scale().is_some())];
        // Factors that are in the rows of the weights have their gradients made of gate and up, which would be gone.
        let factors = if scaled == [false; 2] {
            !(gate.needs_output() || up.needs_output())
        } else {
            self.gate_factors().is_some()
        };
        has_branch == [true; 2]
            && factors
            && down.projection().is_some()
            && config.hidden_size.is_multiple_of(8)
            && ranks[Slot::Gate as usize].is_multiple_of(8)
            && low_rank::serves(device, config.intermediate_size, [down.rank(), gate.rank(), up.rank()])
    }

    /// The gradients of gate and up, and of the factors of both if they have any. In a [joined](Layer::joined) layer that of A of
    /// down, and dh and dB of gate and up, too; else that of A if it is `late`, for which silu(gate) * up is made again in
    /// the tensor beside it.
    pub(super) fn activation_backward<'a>(
        &'a self,
        operands: Operands<'a>,
        late: Option<(&Entry, &mut Tensor)>,
        to: &'a mut Backward<'_>,
    ) -> Result<()> {
        if self.joined {
            return self.joined_backward(operands, to);
        }
        let Operands { dact, inputs: [gate, up], gradients: [dgate, dup], dh, .. } = operands;
        let t = dact.rows;
        let (a, mut act) = late.unzip();
        let again = act.as_mut().map(|act| act.top_mut(t));
        let scales = self.output_scale(Slot::Gate).zip(self.output_scale(Slot::Up));
        if let Some(((gate_scale, up_scale), factors)) = scales.zip(self.gate_factors()) {
            let dscales = Entry::views_mut([gate_scale, up_scale], to.dparams.reborrow());
            let scales = [gate_scale, up_scale].map(|entry| entry.view(to.pass.params));
            let (dgate, dup) = (dgate.top_mut(t), dup.top_mut(t));
            swiglu_backward_scaled(dgate, dup, again, dscales, dact, gate, up, factors, scales)?;
        } else {
            swiglu_backward(dgate.top_mut(t), dup.top_mut(t), again, dact, gate, up)?;
        }
        let Some((a, act)) = a.zip(act) else { return Ok(()) };
        Ok(low_rank_projection_backward(a.view_mut(to.dparams.reborrow()), dh, act.top(t))?)
    }

    /// The gradients of gate and up, of dA of down, of dh and dB of gate and up, and of the factors of both if they have any.
    fn joined_backward<'a>(&'a self, operands: Operands<'a>, to: &'a mut Backward<'_>) -> Result<()> {
        let Operands { dact, inputs: [gate, up], gradients: [dgate, dup], beside, twins, h, dh } = operands;
        let t = dact.rows;
        let slots = [Slot::Gate, Slot::Up];
        let [of_gate, of_up] =
            slots.map(|slot| self.linear(slot).branch().expect("a joined layer has branches"));
        let a = self.linear(Slot::Down).projection().expect("a joined layer has a projection");
        let scaled = self.output_scale(Slot::Gate).zip(self.output_scale(Slot::Up)).zip(self.gate_factors());
        let params = to.pass.params;
        let ([da, gate_db, up_db], scales) = match scaled {
            None => (Entry::views_mut([a, of_gate.entry, of_up.entry], to.dparams.reborrow()), None),
            Some(((gate_scale, up_scale), factors)) => {
                let entries = [a, of_gate.entry, of_up.entry, gate_scale, up_scale];
                let [da, gate_db, up_db, gate, up] = Entry::views_mut(entries, to.dparams.reborrow());
                let scales = [gate_scale, up_scale].map(|entry| entry.view(params));
                ([da, gate_db, up_db], Some(Scales { dscales: [gate, up], factors, scales }))
            }
        };
        let [gate_twin, up_twin] = match twins {
            Some([_, _, _, _, gate, up, _]) => [Some(gate), Some(up)],
            None => [None, None],
        };
        let [beside_gate, beside_up] = beside;
        let branches = [
            self.branch(Slot::Gate, of_gate, beside_gate, gate_twin, gate_db, h, t),
            self.branch(Slot::Up, of_up, beside_up, up_twin, up_db, h, t),
        ];
        Ok(swiglu_backward_low_rank(
            dgate.top_mut(t),
            dup.top_mut(t),
            da,
            branches,
            scales,
            dh,
            dact,
            gate,
            up,
        )?)
    }
}
