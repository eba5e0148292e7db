//! Every activation and gradient of a run, allocated once for the largest micro-batch.
//!
//! The step loop borrows the first T rows of each ([`Tensor::top`]); nothing is allocated in it.

mod gradients;

use std::ops::Range;

use qpeft_kernels::ops::convert::convert;
use qpeft_kernels::{Device, IdBuffer, Ids, Tensor, View, ViewMut};

pub use self::gradients::GradientBuffers;
use self::gradients::{gate_and_up, swiglu_in_place};
use super::batch::Batch;
use super::decoder::{Decoder, Loss};
use super::layer::{Layer, SLOTS, Slot};
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
    /// The same without silu(gate) * up, the widest of them, which the backward pass makes again from the two.
    LayersWithoutAct(usize),
    /// Nothing: evaluation and generation.
    Nothing,
}

impl Keep {
    /// All activations of all layers: the fastest backward pass.
    pub const EVERYTHING: Keep = Keep::Layers(usize::MAX);
    /// Only what enters each layer: the smallest memory of a training run.
    pub const LAYER_INPUTS: Keep = Keep::Layers(0);

    /// Of so many layers, how many keep their activations.
    fn layers(self, n_layers: usize) -> usize {
        match self {
            Keep::Layers(kept) | Keep::LayersWithoutAct(kept) => kept.min(n_layers),
            Keep::Nothing => 0,
        }
    }
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
    /// (T, F): silu(gate) * up; no rows where all layers share [`Shared::act`].
    pub act: Tensor,
    /// (T, rank) per linear: the low-rank activations, beside the inputs that they are made of
    /// ([`Tensor::with_padding`]).
    pub h: [Tensor; SLOTS],
    /// (T, rank) of gate and up: gradients of the low-rank activations beside those of the outputs, where these take the
    /// place of `gate` and `up`; else no rows.
    pub beside_gate_up: [Tensor; 2],
}

/// What one layer at a time uses.
#[derive(Debug)]
pub struct Shared {
    /// (T, F): silu(gate) * up; no rows where each layer keeps its own. On a device its gradient takes its place.
    pub act: Tensor,
    /// (T, rank): the low-rank activations beside `act`.
    pub act_h: Tensor,
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
    /// (T, rank) of the layers that are computed again without silu(gate) * up, if they are [joined](super::layer::Layer::joined):
    /// the low-rank activations of down, which are made of it; else no rows.
    down_h: Vec<Tensor>,
    /// Used by one layer at a time.
    pub shared: Shared,
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
        let ranks = model.largest_ranks();
        let recomputed = c.n_layers - keep.layers(c.n_layers);
        let shares_act = matches!(keep, Keep::LayersWithoutAct(_));
        let sets = c.n_layers - recomputed + usize::from(recomputed > 0);
        let layers = (0..sets).map(|_| LayerBuffers::new(model, t, &ranks, shares_act));
        let layers = layers.collect::<Result<_>>()?;
        // The topmost layer that shares activations leaves its own there.
        let again = model.layers.iter().take(recomputed.saturating_sub(1));
        let kept = |layer: &Layer| {
            zeros(if layer.joined && keep != Keep::Nothing { t } else { 0 }, ranks[Slot::Down as usize])
        };
        let down_h = again.map(kept).collect::<Result<_, _>>()?;
        let streams = if keep == Keep::Nothing { 2 } else { c.n_layers + 1 };
        let drops_out = keep != Keep::Nothing
            && model.linears().any(|l| l.adapter.as_ref().is_some_and(|adapter| adapter.drops_out()));
        let max_in = if drops_out { model.linears().map(|l| l.weight.cols()).max().unwrap_or(0) } else { 0 };
        let shared = Shared::new(model, if shares_act { t } else { 0 }, &ranks)?;
        let grads = match keep {
            Keep::Nothing => None,
            _ => Some(GradientBuffers::new(model, t, chunk, &ranks, &shared)?),
        };
        Ok(Buffers {
            capacity,
            recomputed,
            streams: Streams::new(device, streams, t, c.hidden_size, streams_on_host)?,
            layers,
            down_h,
            shared,
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
        let own = [
            &self.shared.act,
            &self.shared.act_h,
            &self.final_norm,
            &self.final_rstd,
            &self.hidden,
            &self.logits,
        ];
        let all = self
            .streams
            .tensors()
            .chain(own)
            .chain([&self.scratch.dropped])
            .chain(&self.nll)
            .chain(&self.down_h);
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
            self.nll.push(Tensor::zeros(self.final_norm.device(), 1, self.capacity)?);
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

    /// Puts the low-rank activations of down of a layer aside, if they will not be made again.
    ///
    /// # Errors
    /// The device refuses.
    pub fn keep_low_rank_of_down(&mut self, layer: usize, rows: usize) -> Result<()> {
        let index = self.activations_of(layer);
        let Some(kept) = self.down_h.get_mut(layer).filter(|kept| kept.rows() > 0) else { return Ok(()) };
        Ok(convert(kept.top_mut(rows), self.layers[index].h[Slot::Down as usize].top(rows))?)
    }

    /// Puts them back for the layer's backward pass.
    ///
    /// # Errors
    /// The device refuses.
    pub fn restore_low_rank_of_down(&mut self, layer: usize, rows: usize) -> Result<()> {
        let index = self.activations_of(layer);
        let Some(kept) = self.down_h.get(layer).filter(|kept| kept.rows() > 0) else { return Ok(()) };
        Ok(convert(self.layers[index].h[Slot::Down as usize].top_mut(rows), kept.top(rows))?)
    }

    /// What one layer's forward pass borrows, and the indices.
    pub fn layer_forward(&mut self, layer: usize, rows: usize) -> (LayerForward<'_>, &BatchIds) {
        let index = self.activations_of(layer);
        let (x, y) = self.streams.around(layer, rows);
        let borrowed = LayerForward {
            y,
            x,
            s: &mut self.layers[index],
            shared: &mut self.shared,
            scratch: &mut self.scratch,
        };
        (borrowed, &self.ids)
    }

    /// What one layer's backward pass borrows, and the indices.
    ///
    /// # Panics
    /// The buffers were made for evaluation; see [`Buffers::training`].
    pub fn layer_backward(&mut self, layer: usize, rows: usize) -> (LayerBackward<'_>, &BatchIds) {
        // Activations that another layer has overwritten since are made again only after this layer's backward pass.
        let is_below_kept = layer > 0 && layer >= self.recomputed;
        let index = self.activations_of(layer);
        let (lower, upper) = self.layers.split_at_mut(index);
        let borrowed = LayerBackward {
            x: self.streams.read(layer, rows),
            y: self.streams.read(layer + 1, rows),
            below: lower.last().filter(|_| is_below_kept).map(|below| below.middle.top(rows)),
            shared: &mut self.shared,
            s: &mut upper[0],
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

    /// What the backward pass of the last norm borrows.
    ///
    /// # Panics
    /// The buffers were made for evaluation; see [`Buffers::training`].
    pub fn final_backward(&mut self, layers: usize, rows: usize) -> FinalBackward<'_> {
        FinalBackward {
            x: self.streams.read(layers, rows),
            rstd: self.final_rstd.view().column_range(0, rows),
            middle: self.layers.last().expect("activations of a layer").middle.top(rows),
            g: self.grads.as_mut().expect("buffers with gradients"),
            scratch: &mut self.scratch,
        }
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
    /// See [`Buffers::shared`].
    pub shared: &'a mut Shared,
    /// Shared by all adapters.
    pub scratch: &'a mut Scratch,
}

/// What the backward pass of the last norm borrows.
#[derive(Debug)]
pub struct FinalBackward<'a> {
    /// The stream that left the last layer.
    pub x: View<'a>,
    /// Its statistics.
    pub rstd: View<'a>,
    /// The stream in the middle of the last layer.
    pub middle: View<'a>,
    /// The gradients.
    pub g: &'a mut GradientBuffers,
    /// Shared by all adapters.
    pub scratch: &'a mut Scratch,
}

/// What one layer's backward pass borrows.
#[derive(Debug)]
pub struct LayerBackward<'a> {
    /// The stream that entered the layer.
    pub x: View<'a>,
    /// The stream that left it.
    pub y: View<'a>,
    /// The stream in the middle of the layer below, where that still has its activations.
    pub below: Option<View<'a>>,
    /// See [`Buffers::shared`].
    pub shared: &'a mut Shared,
    /// Its activations.
    pub s: &'a mut LayerBuffers,
    /// The gradients.
    pub g: &'a mut GradientBuffers,
    /// Shared by all adapters.
    pub scratch: &'a mut Scratch,
}

/// What enters the linears, with the low-rank activations beside it.
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
    fn new(model: &Decoder, t: usize, ranks: &[usize; SLOTS], act_rows: usize) -> Result<Padded> {
        let c = &model.config;
        let [q, k, v, o, gate, up, down] = *ranks;
        let padded = |cols: usize, ranks: &[usize]| Tensor::with_padding(&model.device, t, cols, ranks);
        let (attn_norm, qkv) = padded(c.hidden_size, &[q, k, v])?;
        let (attn, o) = padded(c.n_heads * c.head_dim, &[o])?;
        let (ffn_norm, gate_up) = padded(c.hidden_size, &[gate, up])?;
        let (act, down) = if act_rows > 0 {
            padded(c.intermediate_size, &[down])?
        } else {
            let alone = |rows, cols| Tensor::activations(&model.device, rows, cols);
            (alone(0, c.intermediate_size)?, vec![alone(t, down)?])
        };
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

impl Shared {
    fn new(model: &Decoder, rows: usize, ranks: &[usize; SLOTS]) -> Result<Shared> {
        let c = &model.config;
        let rank = if rows > 0 { ranks[Slot::Down as usize] } else { 0 };
        let (act, mut h) = Tensor::with_padding(&model.device, rows, c.intermediate_size, &[rank])?;
        let act_h = h.pop().expect("one width");
        Ok(Shared { act, act_h })
    }
}

impl LayerBuffers {
    /// `ranks`: the largest of all layers, so that their rows are padded alike.
    fn new(model: &Decoder, t: usize, ranks: &[usize; SLOTS], shares_act: bool) -> Result<LayerBuffers> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::activations(&model.device, rows, cols);
        let statistics = |rows: usize| Tensor::zeros(&model.device, rows, t);
        let act_rows = if shares_act { 0 } else { t };
        let Padded { norms: [attn_norm, ffn_norm], attn, act, h } = Padded::new(model, t, ranks, act_rows)?;
        let (queries, keys) = (c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim);
        let beside_rows = if swiglu_in_place(model) { t } else { 0 };
        let ([gate, up], beside_gate_up) = gate_and_up(model, [t, beside_rows], ranks)?;
        Ok(LayerBuffers {
            attn_norm,
            attn_rstd: statistics(1)?,
            q: zeros(t, queries)?,
            k: zeros(t, keys)?,
            v: zeros(t, keys)?,
            attn,
            lse: statistics(c.n_heads)?,
            middle: zeros(t, c.hidden_size)?,
            ffn_norm,
            ffn_rstd: statistics(1)?,
            gate,
            up,
            act,
            h,
            beside_gate_up,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let norms = [&self.attn_norm, &self.attn_rstd, &self.ffn_norm, &self.ffn_rstd, &self.middle];
        let attention = [&self.q, &self.k, &self.v, &self.attn, &self.lse];
        let ffn = [&self.gate, &self.up, &self.act];
        norms.into_iter().chain(attention).chain(ffn).chain(&self.h)
    }
}
