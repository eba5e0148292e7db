//! Every activation and gradient of a run, allocated once for the largest micro-batch.
//!
//! The step loop borrows the first T rows of each ([`Tensor::top`]); nothing is allocated in it.

use qpeft_kernels::{Tensor, View, ViewMut};

use super::decoder::Decoder;
use super::layer::SLOTS;
use super::linear::Scratch;
use crate::error::{Error, Result};

/// What the forward pass keeps for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All activations of all layers: the fastest backward pass.
    Everything,
    /// Only what enters each layer; the backward pass runs each layer's forward again.
    LayerInputs,
    /// Nothing: evaluation and generation.
    Nothing,
}

/// Logits held at a time: 32 Mi floats (128 MiB), so that a large vocabulary is walked in chunks of
/// supervised rows. Fewer rows would dequantize the head more often than they save.
const LOGITS: usize = 32 << 20;

/// The activations of one layer; shapes with T the micro-batch's tokens.
#[derive(Debug)]
pub struct LayerBuffers {
    /// (T, C) and (1, T): the normalized input of attention, and its reciprocal rms.
    pub attn_norm: Tensor,
    /// See `attn_norm`.
    pub attn_rstd: Tensor,
    /// (T, H D): queries after rotation.
    pub q: Tensor,
    /// (T, G D): keys after rotation.
    pub k: Tensor,
    /// (T, G D): values.
    pub v: Tensor,
    /// (T, H D): attention output.
    pub attn: Tensor,
    /// (H, T): log-sum-exp of the attention logits.
    pub lse: Tensor,
    /// (T, C): output of `o_proj`; no rows unless its adapter asks for it.
    pub attn_out: Tensor,
    /// (T, C): the residual stream between attention and feed-forward.
    pub middle: Tensor,
    /// (T, C) and (1, T): the normalized input of the feed-forward, and its reciprocal rms.
    pub ffn_norm: Tensor,
    /// See `ffn_norm`.
    pub ffn_rstd: Tensor,
    /// (T, F).
    pub gate: Tensor,
    /// (T, F).
    pub up: Tensor,
    /// (T, F): silu(gate) * up.
    pub act: Tensor,
    /// (T, C): output of `down_proj`; no rows unless its adapter asks for it.
    pub ffn_out: Tensor,
    /// (T, rank) per linear: the low-rank activations.
    pub h: [Tensor; SLOTS],
}

/// The gradients that flow backward; one set for all layers.
#[derive(Debug)]
pub struct GradientBuffers {
    /// (T, C): gradient of the residual stream, from the loss down to the embedding.
    pub stream: Tensor,
    /// (T, C): gradient of a normalized input.
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
    /// (T, F).
    pub gate: Tensor,
    /// (T, F).
    pub up: Tensor,
    /// (T, F).
    pub act: Tensor,
    /// (chunk, C): gradient of the supervised rows of one chunk.
    pub hidden: Tensor,
}

/// All buffers of a run.
#[derive(Debug)]
pub struct Buffers {
    /// Tokens that fit.
    pub capacity: usize,
    /// What is kept.
    pub keep: Keep,
    /// (T, C) each: the residual stream entering layer l, and leaving the last one.
    streams: Vec<Tensor>,
    layers: Vec<LayerBuffers>,
    /// (T, C): output of a residual branch that nobody reads later.
    pub branch: Tensor,
    /// (T, C) and (1, T): the normalized output of the last layer.
    pub final_norm: Tensor,
    /// See `final_norm`.
    pub final_rstd: Tensor,
    /// (chunk, C): supervised rows of `final_norm`.
    pub hidden: Tensor,
    /// (chunk, V).
    pub logits: Tensor,
    /// (1, chunk): negative log-likelihoods.
    pub nll: Tensor,
    /// Only while training.
    pub grads: Option<GradientBuffers>,
    /// Shared by all adapters.
    pub scratch: Scratch,
}

/// The largest rank that any layer has in each slot, and whether its output is needed.
#[derive(Debug, Clone, Copy, Default)]
struct Needs {
    rank: usize,
    output: bool,
}

impl Buffers {
    /// Buffers for micro-batches of at most `capacity` tokens on `model` with its adapters.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(model: &Decoder, capacity: usize, keep: Keep) -> Result<Buffers> {
        let c = &model.config;
        let device = &model.device;
        let zeros = |rows: usize, cols: usize| Tensor::zeros(device, rows, cols);
        let t = capacity;
        let chunk = chunk_rows(capacity, c.vocab_size);
        let needs: Vec<[Needs; SLOTS]> = model
            .layers
            .iter()
            .map(|layer| {
                std::array::from_fn(|i| Needs {
                    rank: layer.linears[i].rank(),
                    output: keep != Keep::Nothing && layer.linears[i].needs_output(),
                })
            })
            .collect();
        let largest: [Needs; SLOTS] = std::array::from_fn(|i| Needs {
            rank: needs.iter().map(|n| n[i].rank).max().unwrap_or(0),
            output: needs.iter().any(|n| n[i].output),
        });
        let layers = match keep {
            Keep::Everything => {
                needs.iter().map(|n| LayerBuffers::new(model, t, n)).collect::<Result<_>>()?
            }
            Keep::LayerInputs | Keep::Nothing => vec![LayerBuffers::new(model, t, &largest)?],
        };
        let streams = if keep == Keep::Nothing { 2 } else { c.n_layers + 1 };
        let max_rank = largest.iter().map(|n| n.rank).max().unwrap_or(0);
        let drops_out = keep != Keep::Nothing
            && model.linears().any(|l| l.adapter.as_ref().is_some_and(|adapter| adapter.drops_out()));
        let max_in = if drops_out { model.linears().map(|l| l.weight.cols()).max().unwrap_or(0) } else { 0 };
        let grads = if keep == Keep::Nothing { None } else { Some(GradientBuffers::new(model, t, chunk)?) };
        Ok(Buffers {
            capacity,
            keep,
            streams: (0..streams).map(|_| zeros(t, c.hidden_size)).collect::<Result<_, _>>()?,
            layers,
            branch: zeros(t, c.hidden_size)?,
            final_norm: zeros(t, c.hidden_size)?,
            final_rstd: zeros(1, t)?,
            hidden: zeros(chunk, c.hidden_size)?,
            logits: zeros(chunk, c.vocab_size)?,
            nll: zeros(1, chunk)?,
            grads,
            scratch: Scratch {
                dropped: zeros(if drops_out { t } else { 0 }, max_in)?,
                dh: zeros(t, max_rank)?,
            },
        })
    }

    /// The gradient buffers.
    ///
    /// # Errors
    /// The buffers were made for evaluation.
    pub fn training(&mut self) -> Result<&mut GradientBuffers> {
        self.grads.as_mut().ok_or_else(|| Error::refused("these buffers hold no gradients"))
    }

    /// Rows of logits computed at a time.
    pub fn chunk(&self) -> usize {
        self.logits.rows()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        let mut floats = self.streams.iter().map(Tensor::len).sum::<usize>();
        floats += self.layers.iter().map(|l| l.tensors().map(Tensor::len).sum::<usize>()).sum::<usize>();
        let own = [&self.branch, &self.final_norm, &self.final_rstd, &self.hidden, &self.logits, &self.nll];
        floats += own.iter().map(|t| t.len()).sum::<usize>();
        floats += self.scratch.dropped.len() + self.scratch.dh.len();
        floats += self.grads.as_ref().map_or(0, |g| g.tensors().map(Tensor::len).sum());
        floats * size_of::<f32>()
    }

    /// The first `rows` rows of the stream entering `layer`, to write to.
    pub fn stream_mut(&mut self, layer: usize, rows: usize) -> ViewMut<'_> {
        let index = layer % self.streams.len();
        self.streams[index].top_mut(rows)
    }

    /// The first `rows` rows of the stream entering `layer`.
    pub fn stream(&self, layer: usize, rows: usize) -> View<'_> {
        self.streams[layer % self.streams.len()].top(rows)
    }

    /// What one layer's forward pass borrows: the stream in, the stream out, its activations, and the
    /// buffers shared by all layers.
    pub fn layer_forward(
        &mut self,
        layer: usize,
        rows: usize,
    ) -> (ViewMut<'_>, View<'_>, &mut LayerBuffers, &mut Tensor, &mut Scratch) {
        let n = self.streams.len();
        let (enter, leave) = (layer % n, (layer + 1) % n);
        let [enter, leave] =
            self.streams.get_disjoint_mut([enter, leave]).expect("two neighbouring streams are distinct");
        let index = layer % self.layers.len();
        (leave.top_mut(rows), enter.top(rows), &mut self.layers[index], &mut self.branch, &mut self.scratch)
    }

    /// What one layer's backward pass borrows: the stream that entered it, its activations, the
    /// gradients (`None` unless training) and the adapters' scratch.
    pub fn layer_backward(
        &mut self,
        layer: usize,
        rows: usize,
    ) -> (View<'_>, &mut LayerBuffers, Option<&mut GradientBuffers>, &mut Scratch) {
        let enter = layer % self.streams.len();
        let index = layer % self.layers.len();
        (self.streams[enter].top(rows), &mut self.layers[index], self.grads.as_mut(), &mut self.scratch)
    }
}

/// Rows of logits per chunk.
fn chunk_rows(capacity: usize, vocab_size: usize) -> usize {
    capacity.min((LOGITS / vocab_size).max(16))
}

impl LayerBuffers {
    fn new(model: &Decoder, t: usize, needs: &[Needs; SLOTS]) -> Result<LayerBuffers> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::zeros(&model.device, rows, cols);
        let (queries, keys) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let kept = |slot: super::layer::Slot| if needs[slot as usize].output { t } else { 0 };
        let [q, k, v, o, gate, up, down] = needs.map(|n| zeros(t, n.rank));
        Ok(LayerBuffers {
            attn_norm: zeros(t, c.hidden_size)?,
            attn_rstd: zeros(1, t)?,
            q: zeros(t, queries)?,
            k: zeros(t, keys)?,
            v: zeros(t, keys)?,
            attn: zeros(t, queries)?,
            lse: zeros(c.n_heads, t)?,
            attn_out: zeros(kept(super::layer::Slot::O), c.hidden_size)?,
            middle: zeros(t, c.hidden_size)?,
            ffn_norm: zeros(t, c.hidden_size)?,
            ffn_rstd: zeros(1, t)?,
            gate: zeros(t, c.intermediate_size)?,
            up: zeros(t, c.intermediate_size)?,
            act: zeros(t, c.intermediate_size)?,
            ffn_out: zeros(kept(super::layer::Slot::Down), c.hidden_size)?,
            h: [q?, k?, v?, o?, gate?, up?, down?],
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let norms = [&self.attn_norm, &self.attn_rstd, &self.ffn_norm, &self.ffn_rstd, &self.middle];
        let attention = [&self.q, &self.k, &self.v, &self.attn, &self.lse, &self.attn_out];
        let ffn = [&self.gate, &self.up, &self.act, &self.ffn_out];
        norms.into_iter().chain(attention).chain(ffn).chain(&self.h)
    }
}

impl GradientBuffers {
    fn new(model: &Decoder, t: usize, chunk: usize) -> Result<GradientBuffers> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::zeros(&model.device, rows, cols);
        let (queries, keys) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        Ok(GradientBuffers {
            stream: zeros(t, c.hidden_size)?,
            norm: zeros(t, c.hidden_size)?,
            q: zeros(t, queries)?,
            k: zeros(t, keys)?,
            v: zeros(t, keys)?,
            attn: zeros(t, queries)?,
            delta: zeros(c.n_heads, t)?,
            gate: zeros(t, c.intermediate_size)?,
            up: zeros(t, c.intermediate_size)?,
            act: zeros(t, c.intermediate_size)?,
            hidden: zeros(chunk, c.hidden_size)?,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let attention = [&self.stream, &self.norm, &self.q, &self.k, &self.v, &self.attn, &self.delta];
        attention.into_iter().chain([&self.gate, &self.up, &self.act, &self.hidden])
    }
}
