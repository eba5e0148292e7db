//! Every activation and gradient of a run, allocated once for the largest micro-batch.
//!
//! The step loop borrows the first T rows of each ([`Tensor::top`]); nothing is allocated in it.

use std::ops::Range;

use qpeft_kernels::{Device, IdBuffer, Ids, Tensor, View, ViewMut};

use super::batch::Batch;
use super::decoder::{Decoder, Loss};
use super::layer::{Layer, SLOTS};
use super::linear::Scratch;
use super::replay::Replays;
use super::streams::Streams;
use crate::error::{Error, Result};

/// What the forward pass keeps for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All activations of the topmost so many layers, and what enters each of the others, whose forward the
    /// backward pass runs again.
    Layers(usize),
    /// Nothing: evaluation and generation.
    Nothing,
}

impl Keep {
    /// All activations of all layers: the fastest backward pass.
    pub const EVERYTHING: Keep = Keep::Layers(usize::MAX);
    /// Only what enters each layer: the smallest memory of a training run.
    pub const LAYER_INPUTS: Keep = Keep::Layers(0);
}

/// Logits held at a time, in elements: a large vocabulary is walked in chunks of supervised rows. On the CPU
/// 128 MiB; fewer rows would dequantize the head more often than they save.
const LOGITS: usize = 32 << 20;

/// On a GPU 256 MiB: with the 128 thousand tokens of llama 3 that is a thousand rows, which a product needs to
/// read the head no slower than it multiplies.
const LOGITS_CUDA: usize = 128 << 20;

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
    /// (T, rank) per linear: the low-rank activations, beside the inputs that they are made of
    /// ([`Tensor::with_padding`]).
    pub h: [Tensor; SLOTS],
}

/// The gradients that flow backward; one set for all layers.
#[derive(Debug)]
pub struct GradientBuffers {
    /// (T, C): gradient of the residual stream, from the loss down to the embedding.
    pub stream: Tensor,
    /// (T, C): gradient of the normalized input of attention, and of the output's.
    pub norm: Tensor,
    /// (T, C): gradient of the normalized input of the feed-forward.
    pub ffn_norm: Tensor,
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
    /// (T, F).
    pub act: Tensor,
    /// (chunk, C): gradient of the supervised rows of one chunk.
    pub hidden: Tensor,
    /// (T, rank) per linear: gradients of the low-rank activations, beside those of the inputs.
    pub h: [Tensor; SLOTS],
}

/// The indices of a micro-batch, where the ops want them.
#[derive(Debug)]
pub struct BatchIds {
    /// T token ids.
    pub tokens: IdBuffer,
    /// T positions.
    pub positions: IdBuffer,
    /// Boundaries of the sequences among the queries.
    pub q_starts: IdBuffer,
    /// Boundaries of the sequences among the keys.
    pub k_starts: IdBuffer,
    /// Supervised rows.
    pub rows: IdBuffer,
    /// The tokens that they predict.
    pub targets: IdBuffer,
}

impl BatchIds {
    fn new(device: &Device, capacity: usize) -> Result<BatchIds> {
        let ids = |n| IdBuffer::new(device, n);
        Ok(BatchIds {
            tokens: ids(capacity)?,
            positions: ids(capacity)?,
            q_starts: ids(capacity + 1)?,
            k_starts: ids(capacity + 1)?,
            rows: ids(capacity)?,
            targets: ids(capacity)?,
        })
    }

    /// Takes the indices of a batch.
    ///
    /// # Errors
    /// The batch is too large, or the device refuses.
    pub fn set(&mut self, batch: &Batch) -> Result<()> {
        let (rows, targets) = batch.supervised();
        self.tokens.set(&batch.tokens)?;
        self.positions.set(&batch.positions())?;
        self.q_starts.set(&batch.starts)?;
        self.k_starts.set(&batch.starts)?;
        self.rows.set(&rows)?;
        Ok(self.targets.set(&targets)?)
    }

    /// Takes the indices of tokens that continue a cached sequence; the last one is to be predicted from.
    ///
    /// # Errors
    /// The batch is too large, or the device refuses.
    pub fn set_continued(&mut self, tokens: &[u32], cached: usize) -> Result<()> {
        let (t, cached) = (tokens.len() as u32, cached as u32);
        self.tokens.set(tokens)?;
        self.positions.set(&(cached..cached + t).collect::<Vec<_>>())?;
        self.q_starts.set(&[0, t])?;
        self.k_starts.set(&[0, cached + t])?;
        Ok(self.rows.set(&[t - 1])?)
    }
}

/// All buffers of a run.
#[derive(Debug)]
pub struct Buffers {
    /// Tokens that fit.
    pub capacity: usize,
    /// So many of the lowest layers share one set of activations and are computed again.
    pub recomputed: usize,
    /// (T, C) each: the residual stream entering layer l, and leaving the last one.
    pub streams: Streams,
    /// The shared activations first, if there are any, then those of the layers that keep theirs.
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
    /// (1, T) per micro-batch that is not read yet: negative log-likelihoods of the supervised rows.
    nll: Vec<Tensor>,
    /// Supervised rows of each of them.
    nll_rows: Vec<usize>,
    /// The indices of the micro-batch.
    pub ids: BatchIds,
    /// Passes over these buffers that were recorded.
    replays: Replays,
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
        Buffers::placed(model, capacity, keep, false)
    }

    /// As [`Buffers::new`], with the streams between the layers in host memory if asked for; see [`Streams`].
    ///
    /// # Errors
    /// The device or the host is out of memory.
    pub fn placed(model: &Decoder, capacity: usize, keep: Keep, streams_on_host: bool) -> Result<Buffers> {
        let c = &model.config;
        let device = &model.device;
        let zeros = |rows: usize, cols: usize| Tensor::activations(device, rows, cols);
        let t = capacity;
        let chunk = chunk_rows(device, capacity, c.vocab_size);
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
        let kept = match keep {
            Keep::Layers(kept) => kept.min(c.n_layers),
            Keep::Nothing => 0,
        };
        let recomputed = c.n_layers - kept;
        let layers = (recomputed > 0)
            .then_some(&largest)
            .into_iter()
            .chain(&needs[recomputed..])
            .map(|needs| LayerBuffers::new(model, t, needs, &largest))
            .collect::<Result<_>>()?;
        let streams = if keep == Keep::Nothing { 2 } else { c.n_layers + 1 };
        let drops_out = keep != Keep::Nothing
            && model.linears().any(|l| l.adapter.as_ref().is_some_and(|adapter| adapter.drops_out()));
        let max_in = if drops_out { model.linears().map(|l| l.weight.cols()).max().unwrap_or(0) } else { 0 };
        let grads =
            if keep == Keep::Nothing { None } else { Some(GradientBuffers::new(model, t, chunk, &largest)?) };
        Ok(Buffers {
            capacity,
            recomputed,
            streams: Streams::new(device, streams, t, c.hidden_size, streams_on_host)?,
            layers,
            branch: zeros(t, c.hidden_size)?,
            final_norm: zeros(t, c.hidden_size)?,
            final_rstd: Tensor::zeros(device, 1, t)?,
            hidden: zeros(chunk, c.hidden_size)?,
            logits: zeros(chunk, c.vocab_size)?,
            nll: Vec::new(),
            nll_rows: Vec::new(),
            ids: BatchIds::new(device, t)?,
            replays: Replays::default(),
            grads,
            scratch: Scratch { dropped: zeros(if drops_out { t } else { 0 }, max_in)? },
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
        let own = [&self.branch, &self.final_norm, &self.final_rstd, &self.hidden, &self.logits];
        let all = self.streams.tensors().chain(own).chain([&self.scratch.dropped]).chain(&self.nll);
        let layers = self.layers.iter().flat_map(LayerBuffers::tensors);
        let grads = self.grads.iter().flat_map(GradientBuffers::tensors);
        all.chain(layers).chain(grads).map(Tensor::bytes).sum()
    }

    /// Runs `pass` over these buffers with their recordings.
    pub fn with_replays(
        &mut self,
        pass: impl FnOnce(&mut Buffers, &mut Replays) -> Result<()>,
    ) -> Result<()> {
        let mut replays = std::mem::take(&mut self.replays);
        let done = pass(self, &mut replays);
        self.replays = replays;
        done
    }

    /// Micro-batches whose loss is not read yet.
    pub fn unread(&self) -> usize {
        self.nll_rows.len()
    }

    /// Begins a micro-batch of so many supervised rows: where their negative log-likelihoods go, (1, T).
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn next_nll(&mut self, rows: usize) -> Result<&mut Tensor> {
        let index = self.nll_rows.len();
        if index == self.nll.len() {
            self.nll.push(Tensor::zeros(self.branch.device(), 1, self.capacity)?);
        }
        self.nll_rows.push(rows);
        Ok(&mut self.nll[index])
    }

    /// The loss of all micro-batches since the last call. On CUDA this waits for the stream.
    ///
    /// # Errors
    /// The device refuses to be read.
    pub fn take_loss(&mut self) -> Result<Loss> {
        let mut loss = Loss::default();
        for (nll, rows) in self.nll.iter().zip(self.nll_rows.drain(..)) {
            let values = nll.view().column_range(0, rows).read()?;
            loss += Loss { sum: values.iter().map(|&x| f64::from(x)).sum(), tokens: rows };
        }
        Ok(loss)
    }

    /// The first `rows` rows of the stream entering `layer`, to write to, and the indices.
    pub fn stream_and_ids(&mut self, layer: usize, rows: usize) -> (ViewMut<'_>, &BatchIds) {
        (self.streams.write(layer, rows), &self.ids)
    }

    /// What one layer's forward pass borrows, and the indices.
    pub fn layer_forward(&mut self, layer: usize, rows: usize) -> (LayerForward<'_>, &BatchIds) {
        let index = self.activations_of(layer);
        let (x, y) = self.streams.around(layer, rows);
        let borrowed = LayerForward {
            y,
            x,
            s: &mut self.layers[index],
            branch: &mut self.branch,
            scratch: &mut self.scratch,
        };
        (borrowed, &self.ids)
    }

    /// What one layer's backward pass borrows, and the indices.
    ///
    /// # Panics
    /// The buffers were made for evaluation; see [`Buffers::training`].
    pub fn layer_backward(&mut self, layer: usize, rows: usize) -> (LayerBackward<'_>, &BatchIds) {
        let index = self.activations_of(layer);
        let borrowed = LayerBackward {
            x: self.streams.read(layer, rows),
            s: &mut self.layers[index],
            g: self.grads.as_mut().expect("buffers with gradients"),
            scratch: &mut self.scratch,
        };
        (borrowed, &self.ids)
    }

    fn activations_of(&self, layer: usize) -> usize {
        if self.recomputed == 0 { layer } else { (layer + 1).saturating_sub(self.recomputed) }
    }

    /// The normalized output and its statistics, to write to, and the stream that leaves the last layer.
    pub fn final_norm(&mut self, layers: usize, rows: usize) -> (ViewMut<'_>, ViewMut<'_>, View<'_>) {
        let x = self.streams.read(layers, rows);
        (self.final_norm.top_mut(rows), self.final_rstd.view_mut().into_column_range(0, rows), x)
    }

    /// The stream that leaves the last layer, its statistics, and the gradients.
    ///
    /// # Panics
    /// The buffers were made for evaluation; see [`Buffers::training`].
    pub fn final_backward(
        &mut self,
        layers: usize,
        rows: usize,
    ) -> (View<'_>, View<'_>, &mut GradientBuffers) {
        let x = self.streams.read(layers, rows);
        let rstd = self.final_rstd.view().column_range(0, rows);
        (x, rstd, self.grads.as_mut().expect("buffers with gradients"))
    }

    /// Of the supervised rows `rows`: where their negative log-likelihoods go, their logits, their targets.
    ///
    /// # Panics
    /// No micro-batch was begun; see [`Buffers::next_nll`].
    pub fn chunk_loss(&mut self, rows: Range<usize>) -> (ViewMut<'_>, ViewMut<'_>, Ids<'_>) {
        let nll = &mut self.nll[self.nll_rows.len() - 1];
        let n = rows.len();
        let nll = nll.view_mut().into_column_range(rows.start, n);
        (nll, self.logits.top_mut(n), self.ids.targets.ids().slice(rows))
    }
}

/// What one layer's forward pass borrows.
#[derive(Debug)]
pub struct LayerForward<'a> {
    /// The stream that leaves the layer.
    pub y: ViewMut<'a>,
    /// The stream that enters it.
    pub x: View<'a>,
    /// Its activations.
    pub s: &'a mut LayerBuffers,
    /// See [`Buffers::branch`].
    pub branch: &'a mut Tensor,
    /// Shared by all adapters.
    pub scratch: &'a mut Scratch,
}

/// What one layer's backward pass borrows.
#[derive(Debug)]
pub struct LayerBackward<'a> {
    /// The stream that entered the layer.
    pub x: View<'a>,
    /// Its activations.
    pub s: &'a mut LayerBuffers,
    /// The gradients.
    pub g: &'a mut GradientBuffers,
    /// Shared by all adapters.
    pub scratch: &'a mut Scratch,
}

/// What enters the linears, with the low-rank activations beside it: the same shapes for activations and for
/// their gradients.
struct Padded {
    /// (T, C) twice: the inputs of q, k, v and of gate, up.
    norms: [Tensor; 2],
    /// (T, H D): the input of o.
    attn: Tensor,
    /// (T, F): the input of down.
    act: Tensor,
    /// (T, rank) per linear.
    h: [Tensor; SLOTS],
}

impl Padded {
    fn new(model: &Decoder, t: usize, needs: &[Needs; SLOTS]) -> Result<Padded> {
        let c = &model.config;
        let [q, k, v, o, gate, up, down] = needs.map(|n| n.rank);
        let padded = |cols: usize, ranks: &[usize]| Tensor::with_padding(&model.device, t, cols, ranks);
        let (attn_norm, qkv) = padded(c.hidden_size, &[q, k, v])?;
        let (attn, o) = padded(c.n_heads * c.head_dim, &[o])?;
        let (ffn_norm, gate_up) = padded(c.hidden_size, &[gate, up])?;
        let (act, down) = padded(c.intermediate_size, &[down])?;
        let h: Vec<Tensor> = [qkv, o, gate_up, down].into_iter().flatten().collect();
        let h = h.try_into().expect("one per linear, in the order of the slots");
        Ok(Padded { norms: [attn_norm, ffn_norm], attn, act, h })
    }
}

/// Rows of logits per chunk.
fn chunk_rows(device: &Device, capacity: usize, vocab_size: usize) -> usize {
    let logits = if device.rounds() { LOGITS_CUDA } else { LOGITS };
    // Chunks of equal size, so that none is too short for its products.
    let chunks = capacity.div_ceil((logits / vocab_size).max(16)).max(1);
    capacity.div_ceil(chunks)
}

impl LayerBuffers {
    /// `needs`: of this layer; `largest`: of all layers, so that their rows are padded alike.
    fn new(
        model: &Decoder,
        t: usize,
        needs: &[Needs; SLOTS],
        largest: &[Needs; SLOTS],
    ) -> Result<LayerBuffers> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::activations(&model.device, rows, cols);
        let statistics = |rows: usize| Tensor::zeros(&model.device, rows, t);
        let Padded { norms: [attn_norm, ffn_norm], attn, act, h } = Padded::new(model, t, largest)?;
        let (queries, keys) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let kept = |slot: super::layer::Slot| if needs[slot as usize].output { t } else { 0 };
        Ok(LayerBuffers {
            attn_norm,
            attn_rstd: statistics(1)?,
            q: zeros(t, queries)?,
            k: zeros(t, keys)?,
            v: zeros(t, keys)?,
            attn,
            lse: statistics(c.n_heads)?,
            attn_out: zeros(kept(super::layer::Slot::O), c.hidden_size)?,
            middle: zeros(t, c.hidden_size)?,
            ffn_norm,
            ffn_rstd: statistics(1)?,
            gate: zeros(t, c.intermediate_size)?,
            up: zeros(t, c.intermediate_size)?,
            act,
            ffn_out: zeros(kept(super::layer::Slot::Down), c.hidden_size)?,
            h,
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
    fn new(model: &Decoder, t: usize, chunk: usize, largest: &[Needs; SLOTS]) -> Result<GradientBuffers> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::activations(&model.device, rows, cols);
        let Padded { norms: [norm, ffn_norm], attn, act, h } = Padded::new(model, t, largest)?;
        let in_place = model.device.rounds() && model.layers.iter().all(Layer::swiglu_in_place);
        let swiglu_rows = if in_place { 0 } else { t };
        let (queries, keys) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        Ok(GradientBuffers {
            stream: zeros(t, c.hidden_size)?,
            norm,
            ffn_norm,
            q: zeros(t, queries)?,
            k: zeros(t, keys)?,
            v: zeros(t, keys)?,
            attn,
            delta: Tensor::zeros(&model.device, c.n_heads, t)?,
            gate: zeros(swiglu_rows, c.intermediate_size)?,
            up: zeros(swiglu_rows, c.intermediate_size)?,
            act,
            hidden: zeros(chunk, c.hidden_size)?,
            h,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let attention = [&self.stream, &self.norm, &self.q, &self.k, &self.v, &self.attn, &self.delta];
        let ffn = [&self.ffn_norm, &self.gate, &self.up, &self.act, &self.hidden];
        attention.into_iter().chain(ffn).chain(&self.h)
    }
}
