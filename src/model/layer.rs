//! One decoder layer: the list of ops forward, and the same list mirrored backward.

mod activation;
mod inputs;

use qpeft_kernels::ops::attention::{AttentionShape, attention_backward, attention_forward};
use qpeft_kernels::ops::convert::convert;
use qpeft_kernels::ops::rms_norm::{rms_norm_backward, rms_norm_backward_scaled, rms_norm_forward};
use qpeft_kernels::ops::rope::{rope_backward, rope_backward_scaled, rope_forward, rope_forward_scaled};
use qpeft_kernels::ops::row_scale::Output;
use qpeft_kernels::ops::swiglu::{swiglu_forward, swiglu_forward_scaled};
use qpeft_kernels::{Ids, Tensor, View, ViewMut};

use super::buffers::{GradientBuffers, LayerBuffers, Shared};
use super::config::Config;
use super::linear::{BranchGradient, Entry, InputGradient, Linear, Pass, Saved, Scratch};
use crate::error::Result;
use activation::Operands;

/// The linears of a layer, in forward order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the modules")]
pub enum Slot {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

/// Number of [`Slot`]s.
pub const SLOTS: usize = 7;

/// The slots by the inputs that they share, in forward order.
pub const SIBLINGS: [&[Slot]; 4] =
    [&[Slot::Q, Slot::K, Slot::V], &[Slot::O], &[Slot::Gate, Slot::Up], &[Slot::Down]];

impl Slot {
    /// All slots, in forward order.
    pub const ALL: [Slot; SLOTS] = [Slot::Q, Slot::K, Slot::V, Slot::O, Slot::Gate, Slot::Up, Slot::Down];

    /// The module within a layer, as Hugging Face names it.
    pub const fn module(self) -> &'static str {
        match self {
            Slot::Q => "self_attn.q_proj",
            Slot::K => "self_attn.k_proj",
            Slot::V => "self_attn.v_proj",
            Slot::O => "self_attn.o_proj",
            Slot::Gate => "mlp.gate_proj",
            Slot::Up => "mlp.up_proj",
            Slot::Down => "mlp.down_proj",
        }
    }

    /// The slots that read the same input, itself among them.
    pub const fn siblings(self) -> &'static [Slot] {
        match self {
            Slot::Q | Slot::K | Slot::V => SIBLINGS[0],
            Slot::O => SIBLINGS[1],
            Slot::Gate | Slot::Up => SIBLINGS[2],
            Slot::Down => SIBLINGS[3],
        }
    }

    /// (out, in) features.
    pub const fn shape(self, config: &Config) -> (usize, usize) {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
        match self {
            Slot::Q => (queries, c),
            Slot::K | Slot::V => (keys, c),
            Slot::O => (c, queries),
            Slot::Gate | Slot::Up => (f, c),
            Slot::Down => (c, f),
        }
    }

    /// Heads whose rows llama-architecture GGUF files permute; `None` for the other linears.
    pub const fn permuted_heads(self, config: &Config) -> Option<usize> {
        match self {
            Slot::Q => Some(config.n_heads),
            Slot::K => Some(config.n_kv_heads),
            _ => None,
        }
    }
}

/// The frozen weights of one layer, with their adapters.
#[derive(Debug)]
pub struct Layer {
    /// (1, C).
    pub attn_norm: Tensor,
    /// (1, C).
    pub ffn_norm: Tensor,
    /// By [`Slot`].
    pub linears: [Linear; SLOTS],
    /// Whether one op makes the gradients of the activation and of the branches around it: silu(gate) * up is not read in
    /// the backward pass then. See [`Decoder::join_activations`](super::decoder::Decoder::join_activations).
    pub joined: bool,
}

/// What all layers need to know of the micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The decoder's shapes.
    pub config: &'a Config,
    /// Rotary table.
    pub rope: View<'a>,
    /// Position of every token in its sequence.
    pub positions: Ids<'a>,
    /// Boundaries of the sequences among the queries.
    pub q_starts: Ids<'a>,
    /// Boundaries of the sequences among the keys: the same, unless there is a cache.
    pub k_starts: Ids<'a>,
}

/// What the backward pass of every linear needs besides activations and gradients.
#[derive(Debug)]
pub struct Backward<'a> {
    /// Gradients of the parameters, flat.
    pub dparams: ViewMut<'a>,
    /// The pass that the forward was run with.
    pub pass: &'a Pass<'a>,
    /// Shared by all adapters.
    pub scratch: &'a mut Scratch,
}

impl Backward<'_> {
    /// The same with another pass.
    fn with_pass<'a>(&'a mut self, pass: &'a Pass<'a>) -> Backward<'a> {
        Backward { dparams: self.dparams.reborrow(), pass, scratch: self.scratch }
    }
}

/// A linear with factors whose output was the last to be added to the stream that enters a norm: their gradient comes
/// out of the norm's backward pass on the way.
#[derive(Debug, Clone, Copy)]
pub struct Added<'a> {
    /// The factors.
    pub scale: &'a Entry,
    /// The stream before, (T, C).
    pub to: View<'a>,
}

/// What lies below a layer in the backward pass.
#[derive(Debug, Clone, Copy)]
pub enum Below<'a> {
    /// Nothing that is trained: the input's gradient is not made.
    Frozen,
    /// A layer; what it added last, if that has factors and is still there.
    Trained(Option<Added<'a>>),
}

/// The mirror of a norm of the stream x in the stream's gradient dx; the factors of `added` get theirs.
///
/// # Errors
/// An op refuses.
pub fn norm_backward(
    dx: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    rstd: View<'_>,
    weight: View<'_>,
    added: Option<Added<'_>>,
    to: &mut Backward<'_>,
) -> Result<()> {
    let Some(Added { scale, to: before }) = added else {
        return Ok(rms_norm_backward(dx, dy, x, rstd, weight)?);
    };
    let (dm, m) = (scale.view_mut(to.dparams.reborrow()), scale.view(to.pass.params));
    Ok(rms_norm_backward_scaled(dx, dm, dy, x, before, rstd, weight, m)?)
}

fn overwrite(dx: ViewMut<'_>) -> InputGradient<'_> {
    InputGradient { dx, accumulate: false }
}

fn accumulate(dx: ViewMut<'_>) -> InputGradient<'_> {
    InputGradient { dx, accumulate: true }
}

impl Place<'_> {
    fn attention(&self) -> AttentionShape {
        AttentionShape {
            n_heads: self.config.n_heads,
            n_kv_heads: self.config.n_kv_heads,
            head_dim: self.config.head_dim,
            scale: self.config.attention_scale(),
            softcap: None,
            window: None,
        }
    }
}

/// Keys and values of the tokens seen so far, (capacity, G D) each.
#[derive(Debug)]
pub struct LayerCache {
    /// Rotated keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

impl Layer {
    /// Whether nothing reads gate and up once their gradients are made: no adapter wants these outputs, or those
    /// that do have their share from the same pass.
    pub fn swiglu_in_place(&self) -> bool {
        let both = [self.linear(Slot::Gate), self.linear(Slot::Up)];
        both.iter().all(|linear| linear.output_scale().is_some()) || !both.iter().any(|l| l.needs_output())
    }

    /// Takes the factors of outputs upon what is made of them: the rotation those of q and of k, the activation those of
    /// gate and up, if both have them.
    pub fn leave_factors(&mut self) {
        for together in [&[Slot::Q][..], &[Slot::K], &[Slot::Gate, Slot::Up]] {
            if together.iter().all(|&slot| self.output_scale(slot).is_some()) {
                for &slot in together {
                    let adapter = &mut self.linears[slot as usize].adapter;
                    adapter.as_mut().expect("it has factors").leave_factor();
                }
            }
        }
    }

    /// See [`Adapter::left`](super::linear::Adapter::left).
    fn left(&self, slot: Slot) -> Option<View<'_>> {
        self.linear(slot).adapter.as_ref()?.left()
    }

    /// The rotation of the output of `slot`.
    fn rotate(&self, slot: Slot, x: ViewMut<'_>, place: &Place<'_>) -> Result<()> {
        let (table, positions, d) = (place.rope, place.positions, place.config.head_dim);
        let done = match self.left(slot) {
            Some(factor) => rope_forward_scaled(x, table, positions, d, factor),
            None => rope_forward(x, table, positions, d),
        };
        Ok(done?)
    }

    /// What the activation multiplies gate and up by, if it does.
    fn gate_factors(&self) -> Option<[View<'_>; 2]> {
        Some([self.left(Slot::Gate)?, self.left(Slot::Up)?])
    }

    /// act = silu(gate) * up.
    fn activate(&self, act: ViewMut<'_>, gate: View<'_>, up: View<'_>) -> Result<()> {
        let done = match self.gate_factors() {
            Some(factors) => swiglu_forward_scaled(act, gate, up, factors),
            None => swiglu_forward(act, gate, up),
        };
        Ok(done?)
    }

    /// The factors of the output of `slot`, if it has any.
    pub fn output_scale(&self, slot: Slot) -> Option<&Entry> {
        self.linear(slot).output_scale()
    }

    /// Whether the gradient of silu(gate) * up can be made without it, so that both may have one place: dropout of
    /// down's input is undone together with the rest.
    pub fn remakes_act_late(&self) -> bool {
        let down = self.linear(Slot::Down);
        down.adapter.is_none() || down.projection().is_some()
    }

    fn linear(&self, slot: Slot) -> &Linear {
        &self.linears[slot as usize]
    }

    /// y = the layer's output for the residual stream x, both (T, C). Without a y only the activations are made
    /// again that the backward pass reads: the last product of the layer is not among them, and if the layer is
    /// [joined](Layer::joined), silu(gate) * up and the low-rank activations that are made of it are neither, which the
    /// caller has kept.
    ///
    /// With a cache, the new keys and values are written behind its first `cached` rows and attention
    /// looks at all of them.
    ///
    /// # Errors
    /// An op refuses.
    pub fn forward(
        &self,
        y: Option<ViewMut<'_>>,
        x: View<'_>,
        s: &mut LayerBuffers,
        common: &mut Shared,
        place: &Place<'_>,
        cache: Option<(&mut LayerCache, usize)>,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let t = x.rows;
        rms_norm_forward(
            s.attn_norm.top_mut(t),
            s.attn_rstd.view_mut().into_column_range(0, t),
            x,
            self.attn_norm.view(),
            place.config.rms_norm_eps,
        )?;
        let norm = s.attn_norm.top(t);
        let (k_all, v_all, cached) = match cache {
            Some((cache, cached)) => (&mut cache.k, &mut cache.v, cached),
            None => (&mut s.k, &mut s.v, 0),
        };
        let shared = &self.shared_pass(SIBLINGS[0], &s.h, t, pass);
        self.project_down(SIBLINGS[0], &mut s.h, norm, shared)?;
        self.project(Slot::Q, s.q.top_mut(t), None, &mut s.h, norm, shared, scratch)?;
        for (slot, all) in [(Slot::K, &mut *k_all), (Slot::V, &mut *v_all)] {
            let new = all.view_mut().into_row_range(cached, t);
            self.project(slot, new, None, &mut s.h, norm, shared, scratch)?;
        }
        self.rotate(Slot::Q, s.q.top_mut(t), place)?;
        self.rotate(Slot::K, k_all.view_mut().into_row_range(cached, t), place)?;
        attention_forward(
            s.attn.top_mut(t),
            s.lse.view_mut().into_column_range(0, t),
            s.q.top(t),
            k_all.top(cached + t),
            v_all.top(cached + t),
            place.q_starts,
            place.k_starts,
            &place.attention(),
        )?;
        let attn = s.attn.top(t);
        self.project(Slot::O, s.middle.top_mut(t), Some(x), &mut s.h, attn, pass, scratch)?;

        rms_norm_forward(
            s.ffn_norm.top_mut(t),
            s.ffn_rstd.view_mut().into_column_range(0, t),
            s.middle.top(t),
            self.ffn_norm.view(),
            place.config.rms_norm_eps,
        )?;
        let norm = s.ffn_norm.top(t);
        let shared = &self.shared_pass(SIBLINGS[2], &s.h, t, pass);
        self.project_down(SIBLINGS[2], &mut s.h, norm, shared)?;
        self.project(Slot::Gate, s.gate.top_mut(t), None, &mut s.h, norm, shared, scratch)?;
        self.project(Slot::Up, s.up.top_mut(t), None, &mut s.h, norm, shared, scratch)?;
        if y.is_none() && self.joined {
            return Ok(());
        }
        let own = s.act.rows() > 0;
        let act = if own { &mut s.act } else { &mut common.act };
        self.activate(act.top_mut(t), s.gate.top(t), s.up.top(t))?;
        let (act, down) = (act.top(t), self.linear(Slot::Down));
        let kept = &mut s.h[Slot::Down as usize];
        let Some(y) = y else {
            let h = kept.top_mut(t).into_column_range(0, down.rank());
            return down.adapter.as_ref().map_or(Ok(()), |adapter| adapter.project(h, act, pass, scratch));
        };
        let h = if own { &mut *kept } else { &mut common.act_h };
        let beside = h.top_mut(t).into_column_range(0, down.rank());
        down.forward(y, Some(s.middle.top(t)), beside, act, pass, scratch)?;
        if !own && down.rank() > 0 {
            let beside = common.act_h.top(t).column_range(0, down.rank());
            convert(kept.top_mut(t).into_column_range(0, down.rank()), beside)?;
        }
        Ok(())
    }

    fn project(
        &self,
        slot: Slot,
        y: ViewMut<'_>,
        onto: Option<View<'_>>,
        h: &mut [Tensor; SLOTS],
        x: View<'_>,
        pass: &Pass<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let linear = self.linear(slot);
        let h = h[slot as usize].top_mut(x.rows).into_column_range(0, linear.rank());
        linear.forward(y, onto, h, x, pass, scratch)
    }

    fn project_backward(
        &self,
        slot: Slot,
        dx: Option<InputGradient<'_>>,
        dh: &mut Tensor,
        twins: &mut [Tensor; SLOTS],
        dy: View<'_>,
        x: View<'_>,
        y: Option<Output<'_>>,
        h: &[Tensor; SLOTS],
        to: &mut Backward<'_>,
    ) -> Result<()> {
        let linear = self.linear(slot);
        let rank = linear.rank();
        let h = h[slot as usize].top(x.rows).column_range(0, rank);
        let twin = to.pass.shared.then(|| twins[slot as usize].top_mut(x.rows).into_column_range(0, rank));
        let dh = BranchGradient { dh: dh.top_mut(x.rows).into_column_range(0, rank), twin };
        linear.backward(dx, dh, to.dparams.reborrow(), dy, Saved { x, h, y }, to.pass, to.scratch)
    }

    /// The mirror of the rotation of the output x of `slot`, in its gradient dx. On the way the factors of that output
    /// get their gradient, and any other adapter that reads it finds it as the linear gave it, before the rotation.
    fn rotate_back(
        &self,
        slot: Slot,
        dx: ViewMut<'_>,
        x: ViewMut<'_>,
        place: &Place<'_>,
        to: &mut Backward<'_>,
    ) -> Result<()> {
        let (linear, table, positions) = (self.linear(slot), place.rope, place.positions);
        let d = place.config.head_dim;
        if let Some((scale, factor)) = linear.output_scale().zip(self.left(slot)) {
            let (dscale, scale) = (scale.view_mut(to.dparams.reborrow()), scale.view(to.pass.params));
            return Ok(rope_backward_scaled(dx, dscale, x.as_view(), table, positions, d, factor, scale)?);
        }
        rope_backward(dx, table, positions, d)?;
        if linear.needs_output() {
            rope_backward(x, table, positions, d)?;
        }
        Ok(())
    }

    /// The mirror of [`Layer::forward`], with the same x: `g.stream` holds the gradient of y on entry and that of x on
    /// return, unless nothing below is trained. `y` is for the gradient of the factors of down's output; without it that
    /// was made already, by the norm above. Where the layers share room for silu(gate) * up, another one may have used it
    /// since.
    ///
    /// # Errors
    /// An op refuses.
    pub fn backward(
        &self,
        g: &mut GradientBuffers,
        x: View<'_>,
        y: Option<View<'_>>,
        s: &mut LayerBuffers,
        common: &mut Shared,
        place: &Place<'_>,
        below: Below<'_>,
        to: &mut Backward<'_>,
    ) -> Result<()> {
        let t = x.rows;
        let input_gradient = !matches!(below, Below::Frozen);

        // y = middle + down(swiglu(gate(norm), up(norm))); the stream's own gradient passes through
        let (gate, up, down) = (s.gate.top(t), s.up.top(t), self.linear(Slot::Down));
        let remade = s.act.rows() == 0;
        // The op that makes the gradients of gate and up leaves act on the way, or dA of down itself.
        let late = if remade || self.joined { down.projection() } else { None };
        if remade && !self.remakes_act_late() {
            self.activate(common.act.top_mut(t), gate, up)?;
        }
        let act = if remade { common.act.top(t) } else { s.act.top(t) };
        let pass = Pass { late: late.is_some(), ..*to.pass };
        self.project_backward(
            Slot::Down,
            Some(overwrite(g.act.top_mut(t))),
            &mut g.beside_stream[1],
            &mut g.h,
            g.stream.top(t),
            act,
            y.map(|sum| Output::Added { to: s.middle.top(t), sum }),
            &s.h,
            &mut to.with_pass(&pass),
        )?;
        let shared = self.shared_pass(SIBLINGS[2], &g.h, t, to.pass);
        let scales = self.output_scale(Slot::Gate).zip(self.output_scale(Slot::Up));
        // On a device the gradients take the place of gate and up, which nothing reads afterwards.
        let mut in_place = if self.swiglu_in_place() { s.gate.in_place().zip(s.up.in_place()) } else { None };
        let (dgate, dup, [beside_gate, beside_up]) = match &mut in_place {
            Some((dgate, dup)) => (dgate, dup, &mut s.beside_gate_up),
            None => (&mut g.gate, &mut g.up, &mut g.beside_gate_up),
        };
        let operands = Operands {
            dact: g.act.top(t),
            inputs: [gate, up],
            gradients: [&mut *dgate, &mut *dup],
            beside: [&mut *beside_gate, &mut *beside_up],
            twins: shared.shared.then_some(&mut g.h),
            h: &s.h,
            dh: g.beside_stream[1].top(t).column_range(0, down.rank()),
        };
        self.activation_backward(operands, late.map(|a| (a, &mut common.act)), to)?;
        let unread = |y| scales.is_none().then_some(Output::Kept(y));
        let pass = Pass { branched: self.joined, ..shared };
        let mut with_shared = to.with_pass(&pass);
        let both = &mut with_shared;
        self.project_backward(
            Slot::Up,
            Some(overwrite(g.norm.top_mut(t))),
            beside_up,
            &mut g.h,
            dup.top(t),
            s.ffn_norm.top(t),
            unread(s.up.top(t)),
            &s.h,
            both,
        )?;
        self.project_backward(
            Slot::Gate,
            Some(accumulate(g.norm.top_mut(t))),
            beside_gate,
            &mut g.h,
            dgate.top(t),
            s.ffn_norm.top(t),
            unread(s.gate.top(t)),
            &s.h,
            both,
        )?;
        self.project_down_backward(SIBLINGS[2], &mut g.h, s.ffn_norm.top(t), both)?;
        // middle = x + o(attention(rope(q(norm)), rope(k(norm)), v(norm)))
        let (rstd, middle) = (s.ffn_rstd.view().column_range(0, t), s.middle.top(t));
        let (dmiddle, dnorm, weight) = (g.stream.top_mut(t), g.norm.top(t), self.ffn_norm.view());
        let magnitude = self.output_scale(Slot::O);
        norm_backward(
            dmiddle,
            dnorm,
            middle,
            rstd,
            weight,
            magnitude.map(|scale| Added { scale, to: x }),
            to,
        )?;
        self.project_backward(
            Slot::O,
            Some(overwrite(g.attn.top_mut(t))),
            &mut g.beside_stream[0],
            &mut g.h,
            g.stream.top(t),
            s.attn.top(t),
            magnitude.is_none().then_some(Output::Added { to: x, sum: middle }),
            &s.h,
            to,
        )?;
        attention_backward(
            g.q.top_mut(t),
            g.k.top_mut(t),
            g.v.top_mut(t),
            g.delta.view_mut().into_column_range(0, t),
            g.attn.top(t),
            s.attn.top(t),
            s.lse.view().column_range(0, t),
            s.q.top(t),
            s.k.top(t),
            s.v.top(t),
            place.q_starts,
            &place.attention(),
        )?;
        self.rotate_back(Slot::Q, g.q.top_mut(t), s.q.top_mut(t), place, to)?;
        self.rotate_back(Slot::K, g.k.top_mut(t), s.k.top_mut(t), place, to)?;
        let unrotated = |slot, y| self.output_scale(slot).is_none().then_some(Output::Kept(y));
        let norm = s.attn_norm.top(t);
        let shared = self.shared_pass(SIBLINGS[0], &g.h, t, to.pass);
        let dys = [g.q.top(t), g.k.top(t), g.v.top(t)];
        let (beside, with_shared) = (&mut g.beside_qkv, &mut to.with_pass(&shared));
        let branched = self.branches_backward(dys, beside, &mut g.h, &s.h, with_shared)?;
        let pass = Pass { branched, ..shared };
        let mut with_pass = to.with_pass(&pass);
        let all = &mut with_pass;
        let [beside_q, beside_k, beside_v] = &mut g.beside_qkv;
        for (slot, dy, beside, y) in [
            (Slot::Q, g.q.top(t), beside_q, unrotated(Slot::Q, s.q.top(t))),
            (Slot::K, g.k.top(t), beside_k, unrotated(Slot::K, s.k.top(t))),
            (Slot::V, g.v.top(t), beside_v, Some(Output::Kept(s.v.top(t)))),
        ] {
            let to = |dx| if slot == Slot::Q { overwrite(dx) } else { accumulate(dx) };
            let dx = if input_gradient { Some(to(g.norm.top_mut(t))) } else { None };
            self.project_backward(slot, dx, beside, &mut g.h, dy, norm, y, &s.h, all)?;
        }
        self.project_down_backward(SIBLINGS[0], &mut g.h, norm, all)?;
        let Below::Trained(added) = below else { return Ok(()) };
        let (rstd, weight) = (s.attn_rstd.view().column_range(0, t), self.attn_norm.view());
        norm_backward(g.stream.top_mut(t), g.norm.top(t), x, rstd, weight, added, to)
    }
}
