//! Memory as a dial: what a training run takes on a device, and which settings make it fit.
//!
//! Nothing is estimated: a candidate is built on a device that only counts ([`Device::Meta`]) by the code that
//! builds it for real, so that a buffer cannot be forgotten. Settings are tried from the fastest to the
//! smallest.

use std::ops::RangeInclusive;

use qpeft_kernels::Device;
use qpeft_kernels::cuda::gemm::WORKSPACE;
use qpeft_kernels::cuda::spans::{column_sums, column_sums_by_rows};
use qpeft_kernels::cuda::{Cuda, Scratch};
use qpeft_kernels::device::Meter;
use qpeft_kernels::ops::low_rank::branch_gradients_scratch;
use qpeft_kernels::ops::quant_linear::weight_scratch;
use qpeft_kernels::ops::swiglu::low_rank::swiglu_low_rank_scratch;
use qpeft_kernels::tensor::padding;

use super::buffers::{Buffers, Keep};
use super::decoder::Decoder;
use super::layer::{SIBLINGS, SLOTS, Slot};
use super::linear::Linear;
use crate::error::{Error, Result};

/// What can be traded for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// So many of the linears, the smallest first, have a bf16 copy, so that products need not dequantize.
    pub copied: usize,
    /// silu(gate) * up of every layer is made again in the backward pass.
    pub remakes_act: bool,
    /// So many of the lowest layers are computed again in the backward pass.
    pub recomputed: usize,
    /// The embedding table stays in pinned host memory.
    pub embedding_on_host: bool,
    /// What enters each layer waits for the backward pass in pinned host memory.
    pub streams_on_host: bool,
    /// Sequences of a micro-batch that go through the model at once.
    pub batch: usize,
}

impl Settings {
    /// What the forward pass of a decoder of so many layers keeps.
    pub fn keep(&self, n_layers: usize) -> Keep {
        let layers = n_layers - self.recomputed;
        if self.remakes_act && layers > 0 { Keep::LayersWithoutAct(layers) } else { Keep::Layers(layers) }
    }
}

impl std::fmt::Display for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.copied {
            0 => f.write_str("linears dequantized in every pass")?,
            1 => f.write_str("a bf16 copy of one linear")?,
            linears => write!(f, "bf16 copies of {linears} linears")?,
        }
        if self.recomputed > 0 {
            write!(f, ", {} layers computed again", self.recomputed)?;
        }
        if self.remakes_act {
            f.write_str(", silu(gate) * up made again")?;
        }
        if self.embedding_on_host {
            f.write_str(", embedding table in host memory")?;
        }
        if self.streams_on_host {
            f.write_str(", layer inputs in host memory")?;
        }
        write!(f, ", {} sequence{} at once", self.batch, if self.batch == 1 { "" } else { "s" })
    }
}

/// Bytes on the device, by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Packed weights, norms, the rotary table.
    pub weights: usize,
    /// bf16 copies of linears.
    pub copies: usize,
    /// Activations and their gradients.
    pub activations: usize,
    /// Parameters, their gradients, the optimizer's moments.
    pub adapter: usize,
    /// What kernels use besides.
    pub scratch: ScratchNeed,
}

/// Bytes of scratch, by purpose; see [`Scratch`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScratchNeed {
    /// A dequantized weight.
    pub weight: usize,
    /// cuBLASLt's workspace.
    pub gemm: usize,
    /// Partial sums, a small product.
    pub partials: usize,
}

impl ScratchNeed {
    /// Everything.
    pub fn total(&self) -> usize {
        self.weight + self.gemm + self.partials
    }
}

impl Need {
    /// The parts by name.
    pub fn parts(&self) -> [(&'static str, usize); 5] {
        [
            ("packed base", self.weights),
            ("bf16 copies", self.copies),
            ("activations and gradients", self.activations),
            ("adapter and optimizer", self.adapter),
            ("kernels", self.scratch.total()),
        ]
    }

    /// Everything.
    pub fn total(&self) -> usize {
        self.weights + self.copies + self.activations + self.adapter + self.scratch.total()
    }

    /// Takes it all from the driver at once, scratch first: scratch that grew in the middle would leave what it had.
    ///
    /// # Errors
    /// The device has not so much memory left.
    pub fn reserve(&self, cuda: &Cuda) -> Result<()> {
        let ScratchNeed { weight, gemm, partials } = self.scratch;
        cuda.reserve(self.total())?;
        for (purpose, bytes) in
            [(Scratch::Weight, weight), (Scratch::Gemm, gemm), (Scratch::Partials, partials)]
        {
            cuda.scratch(purpose, bytes)?;
        }
        Ok(())
    }
}

/// A run built on a device that only counts.
pub struct DryRun<'a> {
    /// On [`Device::Meta`], with its adapters.
    pub decoder: &'a mut Decoder,
    /// The device's.
    pub meter: &'a Meter,
    /// Bytes of parameters, of what follows from them, and of the optimizer.
    pub adapter_bytes: usize,
    /// Tokens of one sequence.
    pub length: usize,
    /// How many layers may be computed again.
    pub recomputed: RangeInclusive<usize>,
}

impl DryRun<'_> {
    /// Bytes that a training run with these settings takes.
    ///
    /// # Errors
    /// A size overflows.
    pub fn need(&mut self, settings: Settings) -> Result<Need> {
        let keep = settings.keep(self.decoder.layers.len());
        let capacity = settings.batch * self.length;
        let (activations, _) =
            self.count(|decoder| Buffers::placed(decoder, capacity, keep, settings.streams_on_host))?;
        let (copies, ()) = self.count(|decoder| decoder.keep_copies(settings.copied))?;
        let embedding = if settings.embedding_on_host { self.decoder.embedding.device_bytes() } else { 0 };
        let ranks = self.decoder.largest_ranks();
        let of = |(i, (layer, slot)): (usize, (usize, Slot))| {
            let l = &self.decoder.layers[layer].linears[slot as usize];
            // The norms of rows are made of the weight alone, before a product has filled its copy, too.
            let norms = if l.output_scale().is_some() { weight_scratch(&l.weight, 0, 0, false) } else { 0 };
            let pads = if l.rank() == 0 { 0 } else { pads(slot, l, &ranks) };
            norms.max(weight_scratch(&l.weight, pads, l.rank(), i < settings.copied))
        };
        let weight = self.decoder.by_size().into_iter().enumerate().map(of).max().unwrap_or(0);
        let gradients = |l: &Linear| branch_gradients_scratch(capacity, &[l.weight.rows()], l.rank());
        let gradients = self.decoder.linears().map(gradients).max().unwrap_or(0);
        let outputs = SIBLINGS[0].iter().map(|slot| slot.shape(&self.decoder.config).0).collect::<Vec<_>>();
        let together = |rank| branch_gradients_scratch(capacity, &outputs, rank);
        let gradients =
            gradients.max(SIBLINGS[0].iter().map(|&slot| together(ranks[slot as usize])).max().unwrap_or(0));
        let joined = self.decoder.layers.iter().any(|layer| layer.joined);
        let activation = self.decoder.config.intermediate_size;
        let joined = if joined { swiglu_low_rank_scratch(capacity, activation) } else { 0 };
        // The gradients of magnitudes are sums over the tokens.
        let sums = |l: &Linear| l.output_scale().map(|_| column_sums(capacity, l.weight.rows()));
        let sums = self.decoder.linears().filter_map(sums).max();
        let by_rows = column_sums_by_rows(capacity, self.decoder.config.hidden_size);
        let sums = sums.map_or(0, |sums| sums.max(by_rows));
        let scratch = ScratchNeed {
            weight: weight.max(weight_scratch(self.decoder.head(), 0, 0, false)),
            gemm: WORKSPACE,
            partials: gradients.max(sums).max(joined),
        };
        Ok(Need {
            weights: self.decoder.device_bytes() - embedding,
            copies,
            activations: activations + capacity * size_of::<f32>(),
            adapter: self.adapter_bytes,
            scratch,
        })
    }

    /// Bytes that `build` allocates.
    fn count<T>(&mut self, build: impl FnOnce(&mut Decoder) -> Result<T>) -> Result<(usize, T)> {
        let before = self.meter.bytes();
        let built = build(self.decoder)?;
        Ok((self.meter.bytes() - before, built))
    }

    /// These settings, which fit, with as many copies as what is left has room for.
    fn with_copies(&mut self, (settings, need): (Settings, Need), limit: usize) -> Result<(Settings, Need)> {
        let (mut found, mut beyond) = ((settings, need), self.decoder.linears().count() + 1);
        while found.0.copied + 1 < beyond {
            let candidate = Settings { copied: usize::midpoint(found.0.copied, beyond), ..settings };
            let need = self.need(candidate)?;
            if need.total() <= limit {
                found = (candidate, need);
            } else {
                beyond = candidate.copied;
            }
        }
        Ok(found)
    }

    /// The fastest settings that fit into `limit` bytes.
    ///
    /// # Errors
    /// None does; the error says what the smallest would take.
    pub fn fit(&mut self, batch: usize, limit: usize) -> Result<(Settings, Need)> {
        let layers = self.decoder.layers.len();
        let (lowest, highest) = (*self.recomputed.start().min(&layers), *self.recomputed.end().min(&layers));
        let mut settings = Settings {
            copied: self.decoder.linears().count(),
            remakes_act: false,
            recomputed: lowest,
            embedding_on_host: false,
            streams_on_host: false,
            batch,
        };
        let mut smallest;
        // For a byte, making the products again costs a quarter of dequantizing again.
        for remakes_act in [false, true] {
            if remakes_act && lowest == layers {
                continue;
            }
            settings.remakes_act = remakes_act;
            let need = self.need(settings)?;
            if need.total() <= limit {
                return Ok((settings, need));
            }
        }
        settings.copied = 0;
        // A tied table is the output head, too, which every token reads whole.
        settings.embedding_on_host = self.decoder.head.is_some();
        loop {
            let mut fits = None;
            // The need falls with every layer that is computed again, so the first that fits can be searched for.
            let (mut low, mut high) = (lowest, highest + 1);
            while low < high {
                let recomputed = usize::midpoint(low, high);
                let remakes_act = recomputed < layers;
                let candidate = Settings { remakes_act, recomputed, ..settings };
                let need = self.need(candidate)?;
                if need.total() <= limit {
                    fits = Some((candidate, need));
                    high = recomputed;
                } else {
                    low = recomputed + 1;
                }
            }
            if let Some(found) = fits {
                return self.with_copies(found, limit);
            }
            smallest = self.need(Settings { recomputed: highest, ..settings })?;
            if !settings.streams_on_host {
                settings.streams_on_host = true;
                continue;
            }
            if settings.batch == 1 {
                break;
            }
            settings.batch = settings.batch.div_ceil(2);
        }
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        Err(Error::refused(format!(
            "the run does not fit into {:.2} GiB of device memory: one sequence of {} tokens with every layer \
             recomputed takes {:.2} GiB (weights {:.2}, activations {:.2}, adapter {:.2}, scratch {:.2})",
            gib(limit),
            self.length,
            gib(smallest.total()),
            gib(smallest.weights),
            gib(smallest.activations),
            gib(smallest.adapter),
            gib(smallest.scratch.total()),
        ))
        .with_hint(if smallest.total() - smallest.activations <= limit {
            "lower `--max-seq-length`, or raise `--memory-limit`".to_owned()
        } else {
            "a base of fewer bits (`--base-quant nf4-dq`, `q4_k`) or a smaller rank would take less".to_owned()
        }))
    }
}

/// Columns of padding behind the input of a linear, for the branches of all that share it. `ranks`: the largest of each
/// slot.
fn pads(slot: Slot, linear: &Linear, ranks: &[usize; SLOTS]) -> usize {
    let widths: Vec<usize> = slot.siblings().iter().map(|&slot| ranks[slot as usize]).collect();
    padding(linear.weight.cols(), &widths)
}

impl Decoder {
    /// The linears in the order in which copies are made of them. A launch costs about the same for any weight, so that for
    /// a byte the copy of a small one spares the most; among equals the lower layers are the first to be computed again.
    fn by_size(&self) -> Vec<(usize, Slot)> {
        let layers = 0..self.layers.len();
        let mut order: Vec<(usize, Slot)> =
            layers.flat_map(|layer| Slot::ALL.map(|slot| (layer, slot))).collect();
        order.sort_by_key(|&(layer, slot)| {
            let weight = &self.layers[layer].linears[slot as usize].weight;
            weight.rows() * weight.cols()
        });
        order
    }

    /// Gives so many of the linears, the smallest first, room for a bf16 copy; see [`BaseWeight::keep_copy`](super::BaseWeight::keep_copy).
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn keep_copies(&mut self, linears: usize) -> Result<()> {
        let ranks = self.largest_ranks();
        let device = self.device.clone();
        for (layer, slot) in self.by_size().into_iter().take(linears) {
            let linear = &mut self.layers[layer].linears[slot as usize];
            let padding = pads(slot, linear, &ranks);
            linear.weight.keep_copy(&device, padding, linear.rank(), linear.adapter.is_some())?;
        }
        Ok(())
    }

    /// The largest rank that any layer has in each slot.
    pub fn largest_ranks(&self) -> [usize; SLOTS] {
        std::array::from_fn(|i| self.layers.iter().map(|l| l.linears[i].rank()).max().unwrap_or(0))
    }

    /// Bytes of everything that does not depend on the batch, as a device stores it.
    pub fn device_bytes(&self) -> usize {
        let packed = self.linears().map(|l| &l.weight).chain([&self.embedding]).chain(&self.head);
        let norms = self.layers.iter().flat_map(|l| [&l.attn_norm, &l.ffn_norm]);
        let dense = norms.chain([&self.final_norm, &self.rope]).map(|t| t.bytes().next_multiple_of(256));
        packed.map(super::BaseWeight::device_bytes).sum::<usize>() + dense.sum::<usize>()
    }
}

/// A device that only counts, and its meter.
pub fn meta() -> (Device, std::sync::Arc<Meter>) {
    let meter = std::sync::Arc::<Meter>::default();
    (Device::Meta(std::sync::Arc::clone(&meter)), meter)
}
