//! What holds for every adapter folder that is read or written here.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::names::{Part, parse_key, tensor_key};
use super::{HostTensor, InitLoraWeights, PeftConfig};
use crate::error::{Error, Kind, Place, Result};

/// Settings that change what an adapter computes or holds, in ways that nothing here implements.
const ABSENT: [&str; 11] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

fn unsupported(key: &str, found: &Value, supported: &'static str) -> Error {
    Error::new(Kind::UnsupportedSetting { found: format!("`{found}`").into(), supported })
        .at(Place::Key(key.to_owned()))
}

/// Refuses other methods than LoRA.
pub(crate) fn peft_type(found: String) -> Result<String> {
    if found == "LORA" { Ok(found) } else { Err(unsupported("peft_type", &found.into(), "`LORA`")) }
}

/// Refuses a key whose value is anything but null, false or empty.
pub(crate) fn absent(other: &Map<String, Value>, key: &str) -> Result<()> {
    let unset = match other.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(object)) => object.is_empty(),
        Some(_) => false,
    };
    if unset { Ok(()) } else { Err(unsupported(key, &other[key], "`null`")) }
}

/// Checks the settings.
pub(crate) fn config(config: &PeftConfig) -> Result<()> {
    peft_type(config.peft_type.clone())?;
    if config.bias != "none" {
        return Err(unsupported("bias", &config.bias.as_str().into(), "`none`"));
    }
    if config.fan_in_fan_out {
        return Err(unsupported("fan_in_fan_out", &true.into(), "`false`"));
    }
    if let Some(modules) = config.modules_to_save.as_ref().filter(|m| !m.is_empty()) {
        return Err(unsupported("modules_to_save", &modules.clone().into(), "`null`"));
    }
    for key in ABSENT {
        absent(&config.other, key)?;
    }
    let setting = |key: &str, expected, found: String| {
        Error::new(Kind::WrongSetting { expected, found: found.into() }).at(Place::Key(key.to_owned()))
    };
    if config.r == 0 {
        return Err(setting("r", "positive integer", "`0`".to_owned()));
    }
    if config.rank_pattern.values().any(|&r| r == 0) {
        return Err(setting("rank_pattern", "object of positive integers", "one with `0`".to_owned()));
    }
    let mut alphas = std::iter::once(("lora_alpha", &config.lora_alpha))
        .chain(config.alpha_pattern.values().map(|alpha| ("alpha_pattern", alpha)));
    if let Some((key, alpha)) = alphas.find(|(_, alpha)| !alpha.is_finite()) {
        return Err(setting(key, "finite number", format!("`{alpha}`")));
    }
    if !(0.0..1.0).contains(&config.lora_dropout) {
        let found = format!("`{}`", config.lora_dropout);
        return Err(setting("lora_dropout", "number from 0 to below 1", found));
    }
    Ok(())
}

/// Checks that every adapted module has its factors, with shapes that belong together and to the
/// configured rank, and a magnitude exactly if the method is DoRA.
pub(crate) fn tensors(config: &PeftConfig, tensors: &BTreeMap<String, HostTensor>) -> Result<()> {
    if tensors.is_empty() {
        return Err(Error::new(Kind::NoTensors));
    }
    let ranks = config.ranks()?;
    for (key, tensor) in tensors {
        let at = |kind| Error::new(kind).at(Place::Tensor(key.clone()));
        let supported = if config.use_dora {
            "`lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector`"
        } else {
            "`lora_A.weight`, `lora_B.weight`"
        };
        let Some((module, part)) =
            parse_key(key).filter(|(_, part)| config.use_dora || *part != Part::Magnitude)
        else {
            return Err(at(Kind::UnexpectedTensor { supported }));
        };
        let rank = ranks.of(module)?;
        let factor = |part| {
            let name = tensor_key(module, part);
            tensors.get(&name).ok_or_else(|| Error::new(Kind::MissingTensor).at(Place::Tensor(name)))
        };
        let b = factor(Part::B)?;
        factor(Part::A)?;
        if config.use_dora {
            factor(Part::Magnitude)?;
        }
        let out = b.shape.first().copied();
        let (fits, expected) = match part {
            Part::A => (matches!(tensor.shape[..], [r, _] if r == rank), format!("[{rank}, in]")),
            Part::B => (matches!(tensor.shape[..], [_, r] if r == rank), format!("[out, {rank}]")),
            Part::Magnitude => {
                let fits = matches!(tensor.shape[..], [len] if Some(len) == out);
                (fits, format!("[{}]", out.unwrap_or(0)))
            }
        };
        if !fits {
            let found = format!("{:?}", tensor.shape).into();
            return Err(at(Kind::WrongShape { expected: expected.into(), found }));
        }
        let elements = tensor.shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim));
        if elements != Some(tensor.data.len()) {
            let expected = elements.map_or(u64::MAX, |n| n as u64 * 4);
            return Err(at(Kind::WrongLength { expected, found: tensor.data.len() as u64 * 4 }));
        }
    }
    Ok(())
}

/// Refuses factors that belong to a base which their initialization has changed, and is not at hand. PiSSA's is: its run has
/// the residual.
pub(super) fn init(found: InitLoraWeights) -> Result<InitLoraWeights> {
    const SUPPORTED: [&str; 4] = ["gaussian", "eva", "orthogonal", "pissa"];
    match &found {
        InitLoraWeights::Named(name)
            if !SUPPORTED.contains(&name.as_str()) && !name.starts_with("pissa_niter_") =>
        {
            let supported = "true, false, `gaussian`, `eva`, `orthogonal` and `pissa`, which leave the base as it is or come with what they made of it";
            Err(unsupported("init_lora_weights", &Value::from(name.as_str()), supported))
        }
        _ => Ok(found),
    }
}
