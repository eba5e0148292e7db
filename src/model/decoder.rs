//! The decoder: embedding, layers, norm, head; forward, loss, and the mirrored backward pass.

use qpeft_kernels::ops::cross_entropy::{cross_entropy_forward, cross_entropy_forward_backward};
use qpeft_kernels::ops::embedding::embedding_forward;
use qpeft_kernels::ops::gather::{gather_backward, gather_forward};
use qpeft_kernels::ops::quant_linear::{quant_linear_backward, quant_linear_forward};
use qpeft_kernels::ops::rms_norm::{rms_norm_backward, rms_norm_forward};
use qpeft_kernels::{Device, Tensor, View, ViewMut};

use super::batch::Batch;
use super::buffers::{Buffers, Keep};
use super::config::Config;
use super::layer::{Backward, Layer, LayerCache, Place};
use super::linear::{BaseWeight, Linear, Pass};
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
        let zeros = || Tensor::zeros(&model.device, capacity, width);
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
    pub fn refresh(&mut self, params: View<'_>) -> Result<()> {
        for linear in self.linears_mut() {
            if let Some(adapter) = &mut linear.adapter {
                adapter.refresh(params, &linear.weight)?;
            }
        }
        Ok(())
    }

    /// Runs all layers on `batch` and leaves the normalized output in `buffers.final_norm`.
    fn run(&self, buffers: &mut Buffers, batch: &Batch, pass: &Pass<'_>) -> Result<()> {
        self.check(batch, buffers)?;
        let (t, positions) = (batch.len(), batch.positions());
        let place = self.place(&positions, &batch.starts, &batch.starts);
        embedding_forward(buffers.stream_mut(0, t), &batch.tokens, &self.embedding)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let (y, x, s, branch, scratch) = buffers.layer_forward(index, t);
            layer.forward(y, x, s, branch, &place, None, pass, scratch)?;
        }
        self.normalize(buffers, t)
    }

    fn normalize(&self, buffers: &mut Buffers, t: usize) -> Result<()> {
        let (mut norm, mut rstd) = (
            std::mem::replace(&mut buffers.final_norm, Tensor::zeros(&self.device, 0, 0)?),
            std::mem::replace(&mut buffers.final_rstd, Tensor::zeros(&self.device, 0, 0)?),
        );
        let x = buffers.stream(self.layers.len(), t);
        let eps = self.config.rms_norm_eps;
        let done = rms_norm_forward(
            norm.top_mut(t),
            rstd.view_mut().into_column_range(0, t),
            x,
            self.final_norm.view(),
            eps,
        );
        buffers.final_norm = norm;
        buffers.final_rstd = rstd;
        Ok(done?)
    }

    /// Mean loss over the supervised tokens of `batch`, without gradients.
    ///
    /// # Errors
    /// The batch does not fit the buffers or the vocabulary.
    pub fn loss(&self, buffers: &mut Buffers, batch: &Batch, pass: &Pass<'_>) -> Result<Loss> {
        self.run(buffers, batch, pass)?;
        let (rows, targets) = batch.supervised();
        let mut loss = Loss::default();
        for (rows, targets) in rows.chunks(buffers.chunk()).zip(targets.chunks(buffers.chunk())) {
            self.chunk_logits(buffers, rows, batch.len())?;
            let nll = buffers.nll.view_mut().into_column_range(0, rows.len());
            cross_entropy_forward(nll, buffers.logits.top(rows.len()), targets)?;
            loss += chunk_loss(buffers, rows.len())?;
        }
        Ok(loss)
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
        self.run(buffers, batch, pass)?;
        let t = batch.len();
        let (rows, targets) = batch.supervised();
        let mut loss = Loss::default();

        // The gradient of the normalized output is zero but in the supervised rows.
        buffers.training()?.norm.view_mut().into_row_range(0, t).zero("loss")?;
        for (rows, targets) in rows.chunks(buffers.chunk()).zip(targets.chunks(buffers.chunk())) {
            self.chunk_logits(buffers, rows, t)?;
            let n = rows.len();
            let nll = buffers.nll.view_mut().into_column_range(0, n);
            cross_entropy_forward_backward(nll, buffers.logits.top_mut(n), targets, scale)?;
            loss += chunk_loss(buffers, n)?;
            let g = buffers.grads.as_mut().expect("checked by training()");
            let dlogits = buffers.logits.top(n);
            quant_linear_backward(g.hidden.top_mut(n), None, dlogits, self.head(), None, None, false)?;
            gather_backward(g.norm.top_mut(t), g.hidden.top(n), rows)?;
        }
        self.run_backward(buffers, batch, dparams, pass)?;
        Ok(loss)
    }

    /// The mirror of [`Decoder::run`].
    fn run_backward(
        &self,
        buffers: &mut Buffers,
        batch: &Batch,
        dparams: &mut ViewMut<'_>,
        pass: &Pass<'_>,
    ) -> Result<()> {
        let (t, positions) = (batch.len(), batch.positions());
        let place = self.place(&positions, &batch.starts, &batch.starts);
        // Nothing is trained below the lowest adapted layer, so its input needs no gradient.
        let adapted = |layer: &Layer| layer.linears.iter().any(|l| l.adapter.is_some());
        let Some(lowest) = self.layers.iter().position(adapted) else { return Ok(()) };

        let mut stream =
            std::mem::replace(&mut buffers.training()?.stream, Tensor::zeros(&self.device, 0, 0)?);
        stream.view_mut().into_row_range(0, t).zero("loss")?;
        let x = buffers.stream(self.layers.len(), t);
        let dy = buffers.grads.as_ref().expect("checked by training()").norm.top(t);
        let rstd = buffers.final_rstd.view().column_range(0, t);
        rms_norm_backward(stream.top_mut(t), dy, x, rstd, self.final_norm.view())?;
        buffers.training()?.stream = stream;

        for (index, layer) in self.layers.iter().enumerate().skip(lowest).rev() {
            if buffers.keep == Keep::LayerInputs {
                let (y, x, s, branch, scratch) = buffers.layer_forward(index, t);
                layer.forward(y, x, s, branch, &place, None, pass, scratch)?;
            }
            let (x, s, g, scratch) = buffers.layer_backward(index, t);
            let g = g.expect("checked by training()");
            let mut to = Backward { dparams: dparams.reborrow(), pass, scratch };
            layer.backward(g, x, s, &place, index > lowest, &mut to)?;
        }
        Ok(())
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
        self.run(buffers, batch, pass)?;
        let rows: Vec<u32> = (0..batch.len() as u32).collect();
        for rows in rows.chunks(buffers.chunk()) {
            self.chunk_logits(buffers, rows, batch.len())?;
            each(rows[0] as usize, buffers.logits.top(rows.len()))?;
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
        let positions: Vec<u32> = (cached as u32..(cached + t) as u32).collect();
        let (q_starts, k_starts) = ([0, t as u32], [0, (cached + t) as u32]);
        let place = self.place(&positions, &q_starts, &k_starts);
        embedding_forward(buffers.stream_mut(0, t), tokens, &self.embedding)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let (y, x, s, branch, scratch) = buffers.layer_forward(index, t);
            layer.forward(
                y,
                x,
                s,
                branch,
                &place,
                Some((&mut cache.layers[index], cached)),
                pass,
                scratch,
            )?;
        }
        cache.len += t;
        self.normalize(buffers, t)?;
        self.chunk_logits(buffers, &[t as u32 - 1], t)?;
        let logits = buffers.logits.top(1);
        Ok(logits.cpu("generate")?.to_vec())
    }

    /// logits = head of the chosen rows of the normalized output.
    fn chunk_logits(&self, buffers: &mut Buffers, rows: &[u32], t: usize) -> Result<()> {
        let n = rows.len();
        gather_forward(buffers.hidden.top_mut(n), buffers.final_norm.top(t), rows)?;
        Ok(quant_linear_forward(buffers.logits.top_mut(n), buffers.hidden.top(n), self.head(), None, None)?)
    }

    fn place<'a>(&'a self, positions: &'a [u32], q_starts: &'a [u32], k_starts: &'a [u32]) -> Place<'a> {
        Place { config: &self.config, rope: self.rope.view(), positions, q_starts, k_starts }
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

fn chunk_loss(buffers: &Buffers, rows: usize) -> Result<Loss> {
    let nll = buffers.nll.view().column_range(0, rows).cpu("loss")?;
    Ok(Loss { sum: nll.iter().map(|&x| f64::from(x)).sum(), tokens: rows })
}
