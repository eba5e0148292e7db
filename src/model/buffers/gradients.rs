//! The gradients that flow backward, and whose place some of them take.

use qpeft_kernels::Tensor;

use super::Shared;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::layer::{Layer, SLOTS, Slot};

/// The gradients that flow backward; one set for all layers.
#[derive(Debug)]
pub struct GradientBuffers {
    /// (T, C): gradient of the residual stream, from the loss down to the embedding.
    pub stream: Tensor,
    /// (T, C): gradient of the normalized input of attention, of the feed-forward, and of the output's.
    pub norm: Tensor,
    /// (T, H D).
    pub q: Tensor,
    /// (T, G D).
    pub k: Tensor,
    /// (T, G D).
    pub v: Tensor,
    /// (T, H D).
    pub attn: Tensor,
    /// (H, T): row sums that the attention backward pass needs.
    pub delta: Tensor,
    /// (T, F); no rows where the gradients take the place of the activations.
    pub gate: Tensor,
    /// See `gate`.
    pub up: Tensor,
    /// (T, F): with the stride of the activation, so that products have the same bits where this lies in
    /// [`Shared::act`].
    pub act: Tensor,
    /// (chunk, C): gradient of the supervised rows of one chunk.
    pub hidden: Tensor,
    /// (T, rank) of q, k, v: gradients of the low-rank activations, beside those of the outputs.
    pub beside_qkv: [Tensor; 3],
    /// The same of gate and up; no rows where theirs lie beside the activations.
    pub beside_gate_up: [Tensor; 2],
    /// The same of o and down, which add to the stream, beside its gradient.
    pub beside_stream: [Tensor; 2],
    /// (T, rank) per linear that shares its input: the same once more, side by side. No rows on the CPU.
    pub h: [Tensor; SLOTS],
}

impl GradientBuffers {
    pub(super) fn new(
        model: &Decoder,
        t: usize,
        chunk: usize,
        ranks: &[usize; SLOTS],
        shared: &Shared,
    ) -> Result<GradientBuffers> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::activations(&model.device, rows, cols);
        let [q, k, v, o, gate, up, down] = *ranks;
        let padded = |rows: usize, cols: usize, rank: usize| {
            let (tensor, mut beside) = Tensor::with_padding(&model.device, rows, cols, &[rank])?;
            Ok::<_, Error>((tensor, beside.pop().expect("one width")))
        };
        // Never needed at once, so on a device the two share their place, right behind the rows.
        let (stream, beside_o) = padded(t, c.hidden_size, o.max(down))?;
        let beside_down = beside_o.in_place().map_or_else(|| zeros(t, down), Ok)?;
        let over = shared.act.rows() > 0 && model.layers.iter().all(Layer::remakes_act_late);
        let act = match shared.act.in_place() {
            Some(act) if over => act,
            _ => padded(t, c.intermediate_size, down)?.0,
        };
        let (queries, keys) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        // Neither are these two.
        let norm = zeros(t, c.hidden_size)?;
        let attn = norm.in_place().filter(|norm| norm.cols() == queries);
        let attn = attn.map_or_else(|| zeros(t, queries), Ok)?;
        let (dq, beside_q) = padded(t, queries, q)?;
        let (dk, beside_k) = padded(t, keys, k)?;
        let (dv, beside_v) = padded(t, keys, v)?;
        let swiglu_rows = if swiglu_in_place(model) { 0 } else { t };
        let ([dgate, dup], beside_gate_up) = gate_and_up(model, [swiglu_rows; 2], ranks)?;
        let joint_rows = if model.device.rounds() { t } else { 0 };
        let joint =
            |ranks: &[usize]| Ok::<_, Error>(Tensor::with_padding(&model.device, joint_rows, 0, ranks)?.1);
        let none = || zeros(0, 0);
        let h = joint(&[q, k, v])?.into_iter().chain([none()?]).chain(joint(&[gate, up])?).chain([none()?]);
        let h = h.collect::<Vec<_>>().try_into().expect("one per linear, in the order of the slots");
        Ok(GradientBuffers {
            stream,
            norm,
            q: dq,
            k: dk,
            v: dv,
            attn,
            delta: Tensor::zeros(&model.device, c.n_heads, t)?,
            gate: dgate,
            up: dup,
            act,
            hidden: zeros(chunk, c.hidden_size)?,
            beside_qkv: [beside_q, beside_k, beside_v],
            beside_gate_up,
            beside_stream: [beside_o, beside_down],
            h,
        })
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let attention = [&self.stream, &self.norm, &self.q, &self.k, &self.v, &self.attn, &self.delta];
        let ffn = [&self.gate, &self.up, &self.act, &self.hidden];
        let beside = self.beside_qkv.iter().chain(&self.beside_gate_up).chain(&self.beside_stream);
        attention.into_iter().chain(ffn).chain(beside).chain(&self.h)
    }
}

/// Whether the gradients of gate and up take the place of the activations: on a device, where nothing reads these
/// afterwards.
pub(super) fn swiglu_in_place(model: &Decoder) -> bool {
    model.device.rounds() && model.layers.iter().all(Layer::swiglu_in_place)
}

/// (T, F) twice, and the gradients of the low-rank activations behind the rows of each where they have `rows[1]` rows.
pub(super) fn gate_and_up(
    model: &Decoder,
    rows: [usize; 2],
    ranks: &[usize; SLOTS],
) -> Result<([Tensor; 2], [Tensor; 2])> {
    let cols = model.config.intermediate_size;
    let one = |slot: Slot| {
        if rows[1] == 0 {
            let zeros = |rows, cols| Tensor::activations(&model.device, rows, cols);
            return Ok((zeros(rows[0], cols)?, zeros(0, 0)?));
        }
        let (tensor, mut beside) =
            Tensor::with_padding(&model.device, rows[0], cols, &[ranks[slot as usize]])?;
        Ok::<_, Error>((tensor, beside.pop().expect("one width")))
    };
    let ((gate, beside_gate), (up, beside_up)) = (one(Slot::Gate)?, one(Slot::Up)?);
    Ok(([gate, up], [beside_gate, beside_up]))
}
