//! The decoder: embedding, layers, norm, head; forward, loss, and the mirrored backward pass.

use std::ops::Range;

use qpeft_kernels::ops::cross_entropy::{cross_entropy_forward, cross_entropy_forward_backward};
use qpeft_kernels::ops::embedding::embedding_forward;
use qpeft_kernels::ops::gather::{gather_backward, gather_forward};
use qpeft_kernels::ops::quant_linear::{quant_linear_backward, quant_linear_forward};
use qpeft_kernels::ops::rms_norm::rms_norm_forward;
use qpeft_kernels::{Device, Tensor, View, ViewMut};
use rayon::prelude::*;

use super::batch::Batch;
use super::buffers::{BatchIds, Buffers, FinalBackward, LayerBackward, LayerForward};
use super::config::Config;
use super::layer::{Added, Backward, Below, Layer, LayerCache, Place, Slot, norm_backward};
use super::linear::{BaseWeight, Linear, Parameters, Pass};
use super::replay::{Key, Replays};
use crate::error::{Error, Result};

/// A llama decoder with frozen, packed weights.
#[derive(Debug)]
pub struct Decoder {
    /// Shapes and constants.
    pub config: Config,
    /// Where it lives.
    pub device: Device,
    /// (V, C).
    pub embedding: BaseWeight,
    /// The layers, adapters included.
    pub layers: Vec<Layer>,
    /// (1, C).
    pub final_norm: Tensor,
    /// (V, C); `None` when it is the embedding table.
    pub head: Option<BaseWeight>,
    /// Rotary table, one row per position.
    pub rope: Tensor,
    /// Recordings of [`Decoder::refresh`].
    pub replays: Replays,
}

/// Loss of a micro-batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Loss {
    /// Sum of the negative log-likelihoods, in nats.
    pub sum: f64,
    /// Tokens that it sums over.
    pub tokens: usize,
}

impl Loss {
    /// Mean per token; NaN without tokens.
    pub fn mean(self) -> f64 {
        self.sum / self.tokens as f64
    }
}

impl std::ops::AddAssign for Loss {
    fn add_assign(&mut self, other: Loss) {
        self.sum += other.sum;
        self.tokens += other.tokens;
    }
}

/// Keys and values of one sequence that is being generated.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    /// Tokens in it.
    pub len: usize,
}

impl Cache {
    /// Room for `capacity` tokens.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(model: &Decoder, capacity: usize) -> Result<Cache> {
        let width = model.config.n_kv_heads * model.config.head_dim;
        let zeros = || Tensor::activations(&model.device, capacity, width);
        let layers = (0..model.config.n_layers)
            .map(|_| Ok(LayerCache { k: zeros()?, v: zeros()? }))
            .collect::<Result<_>>()?;
        Ok(Cache { layers, len: 0 })
    }
}

impl Decoder {
    /// All linears that an adapter can sit on.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|layer| &layer.linears)
    }

    /// All linears that an adapter can sit on, to put one there.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(|layer| &mut layer.linears)
    }

    /// The output head's weight, (V, C).
    pub fn head(&self) -> &BaseWeight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Scalars of all weights (a tied head counts once).
    pub fn parameter_count(&self) -> usize {
        let packed = self.linears().map(|l| &l.weight).chain([&self.embedding]).chain(&self.head);
        let norms = self.final_norm.len() * (1 + 2 * self.layers.len());
        packed.map(|w| w.rows() * w.cols()).sum::<usize>() + norms
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.linears()
            .map(|l| &l.weight)
            .chain([&self.embedding])
            .chain(&self.head)
            .map(BaseWeight::size_bytes)
            .sum()
    }

    /// Lets every adapter recompute what depends on the parameters alone.
    ///
    /// # Errors
    /// An op refuses.
    pub fn refresh(&mut self, params: &Parameters) -> Result<()> {
        let device = self.device.clone();
        let Some(cuda) = device.cuda().filter(|cuda| !cuda.is_profiling()) else {
            return self.refresh_each(params);
        };
        let Some(ptr) = params.values.view().f32("refresh").ok().filter(|_| params.count() > 0) else {
            return Ok(());
        };
        let key = Key {
            sizes: [0; 3],
            places: [ptr, 0],
            slot: 0,
            scale: 0,
            fresh: self.linears().all(|l| l.weight.is_fresh()),
            scratch: cuda.scratch_moves(),
        };
        let mut replays = std::mem::take(&mut self.replays);
        let done = replays.run(cuda, key, true, || self.refresh_each(params));
        self.replays = replays;
        self.linears().filter(|l| l.adapter.is_some()).for_each(|l| l.weight.set_refreshed(l.rank()));
        done
    }

    /// As [`Decoder::refresh`], from the packed weights alone, as a run does that begins with these parameters.
    ///
    /// Otherwise the rows that a copy holds with the factors of the step before serve once more, and a norm differs in
    /// its last bits from that of a resumed run.
    ///
    /// # Errors
    /// An op refuses.
    pub fn refresh_anew(&mut self, params: &Parameters) -> Result<()> {
        if !self.linears().any(|l| l.weight.is_cached()) {
            return Ok(());
        }
        self.linears().for_each(|l| l.weight.set_fresh(false));
        self.refresh_each(params)
    }

    fn refresh_each(&mut self, params: &Parameters) -> Result<()> {
        let device = self.device.clone();
        let refresh = |linear: &mut Linear| match &mut linear.adapter {
            Some(adapter) => adapter.refresh(params, &linear.weight),
            None => Ok(()),
        };
        match device.cuda() {
            Some(cuda) => {
                cuda.side_by_side(self.linears_mut(), |linear| linear.refreshes_by_scratch(params), refresh)
            }
            // A layer's linears differ in size; tasks within them fill the gaps.
            None => {
                self.linears_mut().collect::<Vec<_>>().into_par_iter().with_max_len(1).try_for_each(refresh)
            }
        }
    }

    /// Runs all layers on the batch whose indices are set and leaves the normalized output in
    /// `buffers.final_norm`.
    fn run(&self, buffers: &mut Buffers, pass: &Pass<'_>) -> Result<()> {
        let t = buffers.ids.tokens.ids().len();
        buffers.streams.begin()?;
        let (stream, ids) = buffers.stream_and_ids(0, t);
        embedding_forward(stream, ids.tokens.ids(), &self.embedding)?;
        for (index, layer) in self.layers.iter().enumerate() {
            buffers.streams.before_forward(index)?;
            let (LayerForward { y, x, s, shared, scratch }, ids) = buffers.layer_forward(index, t);
            layer.forward(Some(y), x, s, shared, &self.place(ids), None, pass, scratch)?;
            buffers.keep_low_rank_of_down(index, t)?;
            buffers.streams.after_forward(index, t)?;
        }
        self.normalize(buffers, t)
    }

    fn normalize(&self, buffers: &mut Buffers, t: usize) -> Result<()> {
        let (norm, rstd, x) = buffers.final_norm(self.layers.len(), t);
        Ok(rms_norm_forward(norm, rstd, x, self.final_norm.view(), self.config.rms_norm_eps)?)
    }

    /// Mean loss over the supervised tokens of `batch`, without gradients.
    ///
    /// # Errors
    /// The batch does not fit the buffers or the vocabulary.
    pub fn loss(&self, buffers: &mut Buffers, batch: &Batch, pass: &Pass<'_>) -> Result<Loss> {
        self.check(batch, buffers)?;
        buffers.ids.set(batch)?;
        self.run(buffers, pass)?;
        let n = buffers.ids.rows.ids().len();
        buffers.next_nll(n)?;
        for start in (0..n).step_by(buffers.chunk()) {
            let rows = start..(start + buffers.chunk()).min(n);
            self.chunk_logits(buffers, rows.clone(), batch.len())?;
            let (nll, logits, targets) = buffers.chunk_loss(rows);
            cross_entropy_forward(nll, logits.as_view(), targets)?;
        }
        buffers.take_loss()
    }

    /// Loss of `batch` and its gradients, multiplied by `scale` and added to `dparams` (flat).
    ///
    /// `scale` is 1 / (supervised tokens of the whole optimizer step), so that accumulated micro-batches
    /// give the gradient of one large batch.
    ///
    /// # Errors
    /// The batch does not fit the buffers or the vocabulary, or the buffers were made without gradients.
    pub fn loss_and_gradients(
        &self,
        buffers: &mut Buffers,
        batch: &Batch,
        dparams: &mut ViewMut<'_>,
        scale: f32,
        pass: &Pass<'_>,
    ) -> Result<Loss> {
        self.accumulate(buffers, batch, dparams, scale, pass)?;
        buffers.take_loss()
    }

    /// As [`Decoder::loss_and_gradients`], but the loss stays where it is computed until
    /// [`Buffers::take_loss`]: on CUDA nothing waits for the device.
    ///
    /// # Errors
    /// See [`Decoder::loss_and_gradients`].
    pub fn accumulate(
        &self,
        buffers: &mut Buffers,
        batch: &Batch,
        dparams: &mut ViewMut<'_>,
        scale: f32,
        pass: &Pass<'_>,
    ) -> Result<()> {
        self.check(batch, buffers)?;
        buffers.training()?;
        buffers.ids.set(batch)?;
        buffers.next_nll(buffers.ids.rows.ids().len())?;
        // Dropout draws other numbers every time, a second stream is at work beside, a profile wants every launch.
        let records = pass.dropout.is_none() && !buffers.streams.on_host();
        let Some(cuda) = self.device.cuda().filter(|cuda| !cuda.is_profiling()) else {
            return self.forward_backward(buffers, dparams, scale, pass);
        };
        let key = Key {
            sizes: [batch.len(), batch.starts.len() - 1, buffers.ids.rows.ids().len()],
            places: [pass.params.f32("loss")?, dparams.f32("loss")?],
            slot: buffers.unread(),
            scale: scale.to_bits(),
            fresh: self.linears().all(|l| l.weight.is_fresh()),
            scratch: cuda.scratch_moves(),
        };
        buffers.with_replays(|buffers, replays| {
            replays.run(cuda, key, records, || self.forward_backward(buffers, dparams, scale, pass))
        })?;
        self.linears().for_each(|l| l.weight.set_fresh(true));
        Ok(())
    }

    /// Everything between the indices of a micro-batch and its gradients: enqueued, never waited for.
    fn forward_backward(
        &self,
        buffers: &mut Buffers,
        dparams: &mut ViewMut<'_>,
        scale: f32,
        pass: &Pass<'_>,
    ) -> Result<()> {
        self.run(buffers, pass)?;
        let (t, n) = (buffers.ids.tokens.ids().len(), buffers.ids.rows.ids().len());
        // The gradient of the normalized output is zero but in the supervised rows.
        buffers.training()?.norm.view_mut().into_row_range(0, t).zero("loss")?;
        for start in (0..n).step_by(buffers.chunk()) {
            let rows = start..(start + buffers.chunk()).min(n);
            self.chunk_logits(buffers, rows.clone(), t)?;
            let (nll, logits, targets) = buffers.chunk_loss(rows.clone());
            cross_entropy_forward_backward(nll, logits, targets, scale)?;
            let dlogits = buffers.logits.top(rows.len());
            let g = buffers.grads.as_mut().expect("checked by training()");
            let dhidden = g.hidden.top_mut(rows.len());
            quant_linear_backward(dhidden, dlogits, self.head(), None, false)?;
            gather_backward(g.norm.top_mut(t), g.hidden.top(rows.len()), buffers.ids.rows.ids().slice(rows))?;
        }
        self.run_backward(buffers, dparams, pass)
    }

    /// The mirror of [`Decoder::run`].
    fn run_backward(&self, buffers: &mut Buffers, dparams: &mut ViewMut<'_>, pass: &Pass<'_>) -> Result<()> {
        let t = buffers.ids.tokens.ids().len();
        // Nothing is trained below the lowest adapted layer, so its input needs no gradient.
        let adapted = |layer: &Layer| layer.linears.iter().any(|l| l.adapter.is_some());
        let Some(lowest) = self.layers.iter().position(adapted) else { return Ok(()) };

        let FinalBackward { x, rstd, middle, g, scratch } = buffers.final_backward(self.layers.len(), t);
        g.stream.view_mut().into_row_range(0, t).zero("loss")?;
        let added = self
            .layers
            .last()
            .and_then(|layer| layer.output_scale(Slot::Down))
            .map(|scale| Added { scale, to: middle });
        let mut to = Backward { dparams: dparams.reborrow(), pass, scratch };
        norm_backward(g.stream.top_mut(t), g.norm.top(t), x, rstd, self.final_norm.view(), added, &mut to)?;

        for (index, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            buffers.streams.before_backward(index, t)?;
            // Of the layers that share activations, the topmost has just left its own there.
            let recomputed = index + 1 < buffers.recomputed;
            if recomputed {
                let (LayerForward { x, s, shared, scratch, .. }, ids) = buffers.layer_forward(index, t);
                layer.forward(None, x, s, shared, &self.place(ids), None, pass, scratch)?;
                buffers.restore_low_rank_of_down(index, t)?;
            }
            let (LayerBackward { x, y, s, below, shared, g, scratch }, ids) =
                buffers.layer_backward(index, t);
            let below = if index == lowest {
                Below::Frozen
            } else {
                let scale = self.layers[index - 1].output_scale(Slot::Down);
                Below::Trained(scale.zip(below).map(|(scale, to)| Added { scale, to }))
            };
            let mut to = Backward { dparams: dparams.reborrow(), pass, scratch };
            layer.backward(g, x, recomputed.then_some(y), s, shared, &self.place(ids), below, &mut to)?;
        }
        buffers.streams.after_backward()
    }

    /// Calls `each` with logits chunk by chunk: the first row's index and the (n, V) chunk.
    ///
    /// # Errors
    /// The batch does not fit the buffers or the vocabulary, or `each` fails.
    pub fn logits(
        &self,
        buffers: &mut Buffers,
        batch: &Batch,
        pass: &Pass<'_>,
        mut each: impl FnMut(usize, View<'_>) -> Result<()>,
    ) -> Result<()> {
        self.check(batch, buffers)?;
        buffers.ids.set(batch)?;
        let t = batch.len();
        buffers.ids.rows.set(&(0..t as u32).collect::<Vec<_>>())?;
        self.run(buffers, pass)?;
        for start in (0..t).step_by(buffers.chunk()) {
            let rows = start..(start + buffers.chunk()).min(t);
            self.chunk_logits(buffers, rows.clone(), t)?;
            each(start, buffers.logits.top(rows.len()))?;
        }
        Ok(())
    }

    /// Appends `tokens` to the cached sequence and returns the logits (V) that follow the last one.
    ///
    /// # Errors
    /// The tokens do not fit the cache, the buffers or the vocabulary.
    pub fn step(
        &self,
        buffers: &mut Buffers,
        cache: &mut Cache,
        tokens: &[u32],
        pass: &Pass<'_>,
    ) -> Result<Vec<f32>> {
        let (t, cached) = (tokens.len(), cache.len);
        let room = cache.layers.first().map_or(0, |l| l.k.rows());
        if cached + t > room || cached + t > self.rope.rows() {
            return Err(Error::refused(format!(
                "{} tokens do not fit: the cache holds {room}, the model {} positions",
                cached + t,
                self.rope.rows()
            )));
        }
        let mut batch = Batch::new();
        batch.push(tokens, &vec![super::batch::IGNORE; t]);
        self.check(&batch, buffers)?;
        buffers.ids.set_continued(tokens, cached)?;
        let (stream, ids) = buffers.stream_and_ids(0, t);
        embedding_forward(stream, ids.tokens.ids(), &self.embedding)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let (LayerForward { y, x, s, shared, scratch }, ids) = buffers.layer_forward(index, t);
            let keys = Some((&mut cache.layers[index], cached));
            layer.forward(Some(y), x, s, shared, &self.place(ids), keys, pass, scratch)?;
        }
        cache.len += t;
        self.normalize(buffers, t)?;
        self.chunk_logits(buffers, 0..1, t)?;
        Ok(buffers.logits.top(1).read()?)
    }

    /// logits = head of the chosen rows of the normalized output; `rows` counts the supervised ones.
    fn chunk_logits(&self, buffers: &mut Buffers, rows: Range<usize>, t: usize) -> Result<()> {
        let n = rows.len();
        let rows = buffers.ids.rows.ids().slice(rows);
        gather_forward(buffers.hidden.top_mut(n), buffers.final_norm.top(t), rows)?;
        Ok(quant_linear_forward(buffers.logits.top_mut(n), buffers.hidden.top(n), self.head(), None, None)?)
    }

    fn place<'a>(&'a self, ids: &'a BatchIds) -> Place<'a> {
        Place {
            config: &self.config,
            rope: self.rope.view(),
            positions: ids.positions.ids(),
            q_starts: ids.q_starts.ids(),
            k_starts: ids.k_starts.ids(),
        }
    }

    fn check(&self, batch: &Batch, buffers: &Buffers) -> Result<()> {
        if batch.len() > buffers.capacity {
            return Err(Error::refused(format!(
                "a batch of {} tokens does not fit buffers of {}",
                batch.len(),
                buffers.capacity
            )));
        }
        let longest = batch.starts.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0) as usize;
        self.config.check_length(longest)
    }
}
