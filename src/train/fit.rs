//! What a run will take of a device's memory, decided before any weight is loaded.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use qpeft_formats::peft::PeftConfig;
use qpeft_kernels::Device;
use qpeft_kernels::ops::adamw::AdamW;
use qpeft_kernels::weight::WeightType;

use super::error::Result;
use super::optimizer::Optimizer;
use crate::adapters;
use crate::model::memory::{DryRun, Need, Settings, meta};
use crate::model::{Base, BaseWeight, Decoder};

/// Device memory that stays free for the driver's own use when no limit is given.
const SPARE: usize = 512 << 20;

/// The settings of a run, what they take, and what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// What was decided.
    pub settings: Settings,
    /// Bytes that it takes.
    pub need: Need,
    /// Bytes that it may take.
    pub limit: usize,
}

/// Fits a run into `limit` bytes by building it on a device that only counts.
///
/// `residual`: the type of the targets, if they are split to another one; `recomputed`: how many layers may be;
/// `batch`: sequences of a micro-batch; `length`: tokens of the longest.
///
/// # Errors
/// The base or the adapter is refused, or nothing fits; the error says what the smallest would take.
pub fn fit(
    base: &Base,
    peft: &PeftConfig,
    residual: Option<WeightType>,
    (batch, length): (usize, usize),
    recomputed: RangeInclusive<usize>,
    limit: usize,
) -> Result<Fit> {
    let (device, meter) = meta();
    let mut decoder = Decoder::load(base, &device)?;
    if let Some(residual) = residual {
        retype_targets(&mut decoder, peft, residual)?;
    }
    fit_decoder(decoder, peft, (batch, length), recomputed, limit, &meter)
}

/// Gives the targets of a decoder that only counts the type of their residuals, as if they had been split.
///
/// # Errors
/// Rows of a target are not whole blocks of the type.
pub fn retype_targets(decoder: &mut Decoder, peft: &PeftConfig, to: WeightType) -> Result<()> {
    // What does not matter is shared by all weights of a shape.
    let mut made = HashMap::new();
    for linear in decoder.linears_mut() {
        if peft.targets(&linear.module).map_err(crate::Error::from)? {
            let shape = (linear.weight.rows(), linear.weight.cols());
            let weight = match made.get(&shape) {
                Some(weight) => BaseWeight::clone(weight),
                None => BaseWeight::empty(to, shape.0, shape.1).map_err(crate::Error::from)?,
            };
            made.insert(shape, weight.clone());
            linear.weight = weight;
        }
    }
    Ok(())
}

/// As [`fit`], for a decoder that was built on a device that only counts.
///
/// # Errors
/// See [`fit`].
pub fn fit_decoder(
    mut decoder: Decoder,
    peft: &PeftConfig,
    (batch, length): (usize, usize),
    recomputed: RangeInclusive<usize>,
    limit: usize,
    meter: &qpeft_kernels::device::Meter,
) -> Result<Fit> {
    let before = meter.bytes();
    let params = adapters::attach(&mut decoder, peft)?;
    let device = decoder.device.clone();
    let hyper = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    Optimizer::new(&device, params.count(), hyper, 1.0)?;
    let adapter_bytes = meter.bytes() - before;
    let mut run = DryRun { decoder: &mut decoder, meter, adapter_bytes, length, recomputed };
    let (settings, need) = run.fit(batch, limit)?;
    Ok(Fit { settings, need, limit })
}

/// All layers, however many there are.
pub const ALL_LAYERS: RangeInclusive<usize> = usize::MAX..=usize::MAX;

/// As few layers as memory allows.
pub const ANY_LAYERS: RangeInclusive<usize> = 0..=usize::MAX;

/// Bytes that a run may take on `device`: the limit, or what is free.
///
/// # Errors
/// The device does not answer.
pub fn limit_of(device: &Device, limit: Option<usize>) -> Result<Option<usize>> {
    let Some(cuda) = device.cuda() else { return Ok(None) };
    let (free, _) = cuda.free_memory().map_err(crate::Error::from)?;
    let free = free.saturating_sub(SPARE);
    Ok(Some(limit.map_or(free, |limit| limit.min(free))))
}
