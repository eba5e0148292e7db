//! What the linears of one input make together: the products with their first factors, where these lie one below the other,
//! and the gradients of their branches.

use qpeft_kernels::ops::low_rank::{
    Branch, low_rank_branch_gradients_together, low_rank_forward, low_rank_projection_backward,
};
use qpeft_kernels::{Tensor, View, ViewMut};

use super::super::linear::{Entry, LowRankBranch, Pass};
use super::{Backward, Layer, SLOTS, Slot};
use crate::error::Result;

/// The first rows of the tensors of `slots` as one matrix, if they lie side by side.
fn side_by_side<'a>(h: &'a mut [Tensor; SLOTS], slots: &[Slot], rows: usize) -> Option<ViewMut<'a>> {
    let (first, last) = (slots.first().copied()? as usize, slots.last().copied()? as usize);
    let mut views = h[first..=last].iter_mut().map(|tensor| tensor.top_mut(rows));
    let first = views.next()?;
    views.try_fold(first, ViewMut::joined)
}

impl Layer {
    /// `pass`, or the same that says that the products with the first factors of `slots` are made together: where these
    /// lie one below the other, and the low-rank matrices `h` side by side.
    pub(super) fn shared_pass<'p>(
        &self,
        slots: &[Slot],
        h: &[Tensor; SLOTS],
        rows: usize,
        pass: &Pass<'p>,
    ) -> Pass<'p> {
        let tensors = slots.iter().map(|&slot| &h[slot as usize]);
        let mut views = tensors.filter(|h| h.rows() >= rows).map(|h| h.top(rows));
        let joined = views.next().and_then(|first| views.try_fold(first, View::joined));
        let cols = joined.map(|joined| joined.cols);
        Pass { shared: cols.is_some() && cols == self.factors_of(slots, pass).map(|a| a.rows), ..*pass }
    }

    /// The low-rank activations of all of `slots`, which share the input x, in one product if the pass is shared.
    pub(super) fn project_down(
        &self,
        slots: &[Slot],
        h: &mut [Tensor; SLOTS],
        x: View<'_>,
        pass: &Pass<'_>,
    ) -> Result<()> {
        if !pass.shared {
            return Ok(());
        }
        match (self.factors_of(slots, pass), side_by_side(h, slots, x.rows)) {
            (Some(a), Some(h)) => Ok(low_rank_forward(h, x, a)?),
            _ => Ok(()),
        }
    }

    /// The mirror of [`Layer::project_down`]: the gradients of all first factors in one product if the pass is shared.
    pub(super) fn project_down_backward(
        &self,
        slots: &[Slot],
        dh: &mut [Tensor; SLOTS],
        x: View<'_>,
        to: &mut Backward<'_>,
    ) -> Result<()> {
        if !to.pass.shared {
            return Ok(());
        }
        match (side_by_side(dh, slots, x.rows), self.linear(slots[0]).projection()) {
            (Some(dh), Some(first)) => {
                let da = to.dparams.reborrow().into_slice(first.offset, dh.cols, x.cols);
                Ok(low_rank_projection_backward(da, dh.as_view(), x)?)
            }
            _ => Ok(()),
        }
    }

    /// The gradients of the low-rank activations and of the second factors of q, k and v together, if each has a branch; says
    /// whether it has.
    pub(super) fn branches_backward(
        &self,
        dys: [View<'_>; 3],
        beside: &mut [Tensor; 3],
        twins: &mut [Tensor; SLOTS],
        h: &[Tensor; SLOTS],
        to: &mut Backward<'_>,
    ) -> Result<bool> {
        let slots = [Slot::Q, Slot::K, Slot::V];
        let [Some(q), Some(k), Some(v)] = slots.map(|slot| self.linear(slot).branch()) else {
            return Ok(false);
        };
        let rows = dys[0].rows;
        let [dq, dk, dv] = Entry::views_mut([q.entry, k.entry, v.entry], to.dparams.reborrow());
        let [twin_q, twin_k, twin_v, ..] = twins;
        let [twin_q, twin_k, twin_v] =
            [twin_q, twin_k, twin_v].map(|twin| Some(twin).filter(|_| to.pass.shared));
        let [beside_q, beside_k, beside_v] = beside;
        low_rank_branch_gradients_together([
            (dys[0], self.branch(Slot::Q, q, beside_q, twin_q, dq, h, rows)),
            (dys[1], self.branch(Slot::K, k, beside_k, twin_k, dk, h, rows)),
            (dys[2], self.branch(Slot::V, v, beside_v, twin_v, dv, h, rows)),
        ])?;
        Ok(true)
    }

    /// The operands of the branch of `slot`.
    pub(super) fn branch<'a>(
        &self,
        slot: Slot,
        of: LowRankBranch<'a>,
        dh: &'a mut Tensor,
        twin: Option<&'a mut Tensor>,
        db: ViewMut<'a>,
        h: &'a [Tensor; SLOTS],
        rows: usize,
    ) -> Branch<'a> {
        let rank = self.linear(slot).rank();
        let top = |tensor: &'a mut Tensor| tensor.top_mut(rows).into_column_range(0, rank);
        Branch {
            dh: top(dh),
            twin: twin.map(top),
            db,
            b: of.b,
            h: h[slot as usize].top(rows).column_range(0, rank),
            out_scale: of.out_scale,
        }
    }

    /// The first factors of `slots` as one matrix, if each has one and they lie side by side.
    fn factors_of<'p>(&self, slots: &[Slot], pass: &Pass<'p>) -> Option<View<'p>> {
        let entries: Option<Vec<&Entry>> = slots.iter().map(|&slot| self.linear(slot).projection()).collect();
        let entries = entries.filter(|entries| entries.len() > 1)?;
        entries.windows(2).all(|pair| pair[0].end() == pair[1].offset).then_some(())?;
        let (first, rows) = (entries[0], entries.iter().map(|e| e.shape[0]).sum());
        Some(pass.factors.slice(first.offset, rows, first.shape[1]))
    }
}
