//! The adapter methods, one file each, behind the seam [`Adapter`]; this file puts them on a decoder,
//! and their values into and out of PEFT folders.

pub mod dora;
pub mod folder;
pub mod lora;
pub mod method;
pub mod pissa;
pub mod staged;

use qpeft_formats::peft::{HostTensor, PeftAdapter, PeftConfig, TargetModules};
use qpeft_kernels::weight::WeightType;

pub use folder::AdapterFolder;
pub use method::Method;

use crate::error::{Error, Result};
use crate::model::layer::{SIBLINGS, SLOTS, Slot};
use crate::model::replay::Replays;
use crate::model::{Adapter, BaseWeight, Decoder, Entry, Linear, Parameters};
use dora::Dora;
use lora::Lora;

/// Puts an adapter on every linear that `config` targets; all values are zero until they are
/// initialized ([`initialize`]) or loaded ([`load`]).
///
/// # Errors
/// Nothing is targeted, a listed name matches no linear, or the device is out of memory.
pub fn attach(decoder: &mut Decoder, config: &PeftConfig) -> Result<Parameters> {
    check_targets(decoder, config)?;
    let device = decoder.device.clone();
    // What was recorded holds the former adapters.
    decoder.replays = Replays::default();
    let mut entries = Vec::new();
    let mut offset = 0;
    for (layer_index, layer) in decoder.layers.iter_mut().enumerate() {
        for group in SIBLINGS {
            // The first factors of linears that share an input lie side by side: one product serves them all.
            let mut targets = Vec::new();
            for &slot in group {
                let linear = &mut layer.linears[slot as usize];
                linear.adapter = None;
                if config.targets(&linear.module)? {
                    targets.push((slot, offset));
                    offset += config.rank_of(&linear.module)? * linear.weight.cols();
                }
            }
            for (slot, a_offset) in targets {
                let linear = &mut layer.linears[slot as usize];
                let id = (layer_index * SLOTS + slot as usize) as u64;
                let lora = new_lora(config, linear, [a_offset, offset], id, &device)?;
                let adapter: Box<dyn Adapter> = if config.use_dora {
                    Box::new(Dora::new(&device, &linear.module, &linear.weight, lora)?)
                } else {
                    Box::new(lora)
                };
                entries.extend(adapter.entries().into_iter().cloned());
                offset = entries.last().map_or(0, Entry::end);
                linear.adapter = Some(adapter);
            }
        }
        layer.leave_factors();
    }
    decoder.join_activations();
    entries.sort_by_key(|entry| entry.offset);
    Parameters::new(&device, entries)
}

fn new_lora(
    config: &PeftConfig,
    linear: &Linear,
    offsets: [usize; 2],
    id: u64,
    device: &qpeft_kernels::Device,
) -> Result<Lora> {
    let (rank, scaling) = (config.rank_of(&linear.module)?, config.scaling(&linear.module)? as f32);
    Lora::new(device, &linear.module, &linear.weight, rank, scaling, config.lora_dropout as f32, offsets, id)
}

/// Refuses targets that are not there, naming those that are.
fn check_targets(decoder: &Decoder, config: &PeftConfig) -> Result<()> {
    let modules = || Slot::ALL.map(|s| s.module().rsplit('.').next().unwrap_or_default()).join(", ");
    if let Some(TargetModules::List(names)) = &config.target_modules {
        for name in names {
            let mut alone = config.clone();
            alone.target_modules = Some(TargetModules::List(vec![name.clone()]));
            alone.exclude_modules = None;
            if !any_target(decoder, &alone)? {
                return Err(Error::refused(format!("target module `{name}` matches no linear of the model"))
                    .with_hint(format!("the linears are {}, or `all-linear` for all of them", modules())));
            }
        }
    }
    if any_target(decoder, config)? {
        return Ok(());
    }
    Err(Error::refused("the target modules match no linear of the model")
        .with_hint(format!("the linears are {}, or `all-linear` for all of them", modules())))
}

fn any_target(decoder: &Decoder, config: &PeftConfig) -> Result<bool> {
    for linear in decoder.linears() {
        if config.targets(&linear.module)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Gives every adapter its method's initial values.
///
/// # Errors
/// An op refuses.
pub fn initialize(decoder: &mut Decoder, params: &mut Parameters, seed: u64) -> Result<()> {
    let mut values = params.values.read()?;
    for linear in decoder.linears_mut() {
        if let Some(adapter) = &mut linear.adapter {
            adapter.init(&mut values, &linear.weight, seed)?;
        }
    }
    params.write(&values)?;
    derive(decoder, params, values)
}

/// Fills in the values that follow from the low-rank factors in `values`, which `params` holds already.
fn derive(decoder: &mut Decoder, params: &mut Parameters, mut values: Vec<f32>) -> Result<()> {
    for linear in decoder.linears_mut() {
        if let Some(adapter) = &mut linear.adapter
            && let Some((range, derived)) = adapter.derive(params, &linear.weight)?
        {
            values[range].copy_from_slice(&derived);
        }
    }
    params.write(&values)
}

/// Takes the values of a PEFT folder. All that does not fit is listed in one error.
///
/// # Errors
/// A tensor is missing, is not expected, has another shape, or holds a value that is not finite.
pub fn load(params: &mut Parameters, adapter: &PeftAdapter) -> Result<()> {
    let mut values = params.values.read()?;
    take(&mut values, &params.entries, adapter)?;
    params.write(&values)
}

/// Copies the tensors of `entries` into their places.
fn take(values: &mut [f32], entries: &[Entry], adapter: &PeftAdapter) -> Result<()> {
    let mut wrong = Vec::new();
    for entry in entries {
        match adapter.tensors.get(&entry.key) {
            None => wrong.push(format!("`{}` is missing, expected shape {:?}", entry.key, entry.shape)),
            Some(tensor) if tensor.shape != entry.shape => {
                wrong.push(format!(
                    "`{}` has shape {:?}, expected {:?}",
                    entry.key, tensor.shape, entry.shape
                ));
            }
            Some(tensor) => match tensor.data.iter().position(|x| !x.is_finite()) {
                Some(at) => wrong.push(format!("`{}` holds {} at element {at}", entry.key, tensor.data[at])),
                None => values[entry.range()].copy_from_slice(&tensor.data),
            },
        }
    }
    let known = |key: &str| entries.iter().any(|e| e.key == key);
    wrong.extend(
        adapter.tensors.keys().filter(|k| !known(k)).map(|k| format!("`{k}` fits no linear of the model")),
    );
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Error::refused(format!(
        "the adapter does not fit the model, {} mismatch{}:\n  {}",
        wrong.len(),
        if wrong.len() == 1 { "" } else { "es" },
        wrong.join("\n  ")
    ))
    .with_hint("use the model that the adapter was trained on, and its own adapter_config.json"))
}

/// Takes the low-rank factors of a PEFT folder and fills in the values that follow from them.
///
/// # Errors
/// As [`load`], for the factors.
pub fn load_factors(decoder: &mut Decoder, params: &mut Parameters, factors: &PeftAdapter) -> Result<()> {
    let mut values = params.values.read()?;
    let follows = |entry: &Entry| entry.key.ends_with("lora_magnitude_vector");
    let entries: Vec<Entry> = params.entries.iter().filter(|e| !follows(e)).cloned().collect();
    take(&mut values, &entries, factors)?;
    params.write(&values)?;
    derive(decoder, params, values)
}

/// The values as a PEFT folder.
///
/// # Errors
/// The device refuses to be read.
pub fn save(params: &Parameters, config: &PeftConfig) -> Result<PeftAdapter> {
    let values = params.values.read()?;
    let tensor = |range: std::ops::Range<usize>, shape: &[usize]| HostTensor {
        shape: shape.to_vec(),
        data: values[range].to_vec(),
    };
    let tensors = params.entries.iter().map(|e| (e.key.clone(), tensor(e.range(), &e.shape))).collect();
    Ok(PeftAdapter { config: config.clone(), tensors })
}

/// Splits every target of `decoder` by PiSSA: the targets' weights become their residuals, and the
/// factors come back as the values of an adapter of `config`.
///
/// `given`: factors to take in place of computing them. `residual`: the type of all residuals; without it every
/// target keeps its own. `device`: where to compute.
///
/// # Errors
/// A rank exceeds its weight, given factors do not fit, or a residual is not finite or cannot be stored in its type.
pub fn split_targets(
    decoder: &mut Decoder,
    config: &PeftConfig,
    given: Option<&PeftAdapter>,
    residual: Option<WeightType>,
    options: &pissa::SplitOptions,
    device: &qpeft_kernels::Device,
    mut progress: impl FnMut(usize, usize),
) -> Result<(PeftAdapter, Vec<(String, pissa::SplitError)>)> {
    let mut plain = config.clone();
    plain.use_dora = false;
    let mut params = attach(decoder, &plain)?;
    if let Some(given) = given {
        load(&mut params, given)?;
    }
    let mut values = params.values.read()?;
    let (mut jobs, mut places, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for linear in decoder.linears_mut() {
        let Some(adapter) = linear.adapter.take() else { continue };
        let [a, b] = adapter.entries()[..] else {
            unreachable!("an adapter without magnitudes has two matrices")
        };
        let given =
            given.map(|_| pissa::Pair { a: values[a.range()].to_vec(), b: values[b.range()].to_vec() });
        let scaling = plain.scaling(&linear.module)? as f32;
        let (weight, rank) = (linear.weight.clone(), adapter.rank());
        let residual = residual.unwrap_or(weight.weight_type());
        jobs.push(pissa::Job { weight, rank, scaling, given, residual });
        places.push([a.range(), b.range()]);
        errors.push((linear.module.clone(), pissa::SplitError::default()));
    }
    let mut residuals: Vec<Option<BaseWeight>> = jobs.iter().map(|_| None).collect();
    let mut count = 0;
    pissa::split_all(&jobs, device, options, |i, split| {
        let [a, b] = places[i].clone();
        values[a].copy_from_slice(&split.pair.a);
        values[b].copy_from_slice(&split.pair.b);
        errors[i].1 = split.error;
        residuals[i] = Some(split.residual);
        count += 1;
        progress(count, jobs.len());
        Ok(())
    })?;
    let home = decoder.device.clone();
    let mut residuals = residuals.into_iter();
    let mut modules = errors.iter().map(|(module, _)| module).peekable();
    for linear in decoder.linears_mut() {
        if modules.next_if(|module| **module == linear.module).is_some() {
            let residual = residuals.next().flatten().expect("every job was done");
            linear.weight = residual.to_device(&home)?;
        }
    }
    params.write(&values)?;
    Ok((save(&params, &plain)?, errors))
}
