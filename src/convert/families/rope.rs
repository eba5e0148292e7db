//! Rotary position embedding in both formats: `rope_theta` and `rope_scaling` (or `rope_parameters`, as
//! transformers 5 gathers them) against the `rope.*` keys and the tensors that hold frequency factors.

use qpeft_formats::gguf::{Metadata, Value as GgufValue};
use serde_json::{Map, Value, json};

use super::keys::decimal;
use super::{Dims, Family, llama3};
use crate::convert::settings::Settings;
use crate::error::{Error, Result};

/// What a family allows.
#[derive(Debug)]
pub struct RopeRules {
    /// `rope_theta` where it is absent.
    pub theta: f64,
    /// The same for layers with a window, if they have a base of their own.
    pub local_theta: Option<f64>,
    /// The GGUF key is left out where theta is the default.
    pub theta_implied: bool,
    /// Kinds of scaling that a GGUF of this architecture can say.
    pub scalings: &'static [&'static str],
}

/// The rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// The same for layers with a window.
    pub local_theta: Option<f64>,
    /// Share of a head's channels that are rotated.
    pub partial: f64,
    /// How frequencies are scaled for long texts.
    pub scaling: Scaling,
}

/// How frequencies are scaled for long texts.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// They are not.
    None,
    /// Positions divided by a factor.
    Linear(f64),
    /// Low frequencies divided by a factor.
    Llama3(llama3::Llama3),
    /// `factor` and `original_max_position_embeddings`, then what may be given besides.
    Yarn(f64, u32, Vec<(&'static YarnKey, f64)>),
    /// One factor per frequency, for short and for long texts.
    Long(Vec<f32>, Vec<f32>),
}

/// A setting of YaRN: Hugging Face, GGUF.
type YarnKey = (&'static str, &'static str);

const YARN_KEYS: &[YarnKey] = &[
    ("extrapolation_factor", "rope.scaling.yarn_ext_factor"),
    ("attention_factor", "rope.scaling.yarn_attn_factor"),
    ("beta_fast", "rope.scaling.yarn_beta_fast"),
    ("beta_slow", "rope.scaling.yarn_beta_slow"),
];

const LONG: &str = "rope_factors_long.weight";
const SHORT: &str = "rope_factors_short.weight";
const FREQS: &str = "rope_freqs.weight";

/// The names of tensors that are made from settings.
pub const MADE: [&str; 3] = [FREQS, LONG, SHORT];

impl Rope {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// A setting is mistyped, or a kind of scaling has no place in a GGUF of the family.
    pub fn of_config(family: &Family, rules: &RopeRules, config: &Settings) -> Result<Rope> {
        let outer = match config.object("rope_parameters")? {
            Some(outer) => Some(outer),
            None => config.object("rope_scaling")?,
        };
        let inner = |key| outer.as_ref().map_or(Ok(None), |outer| outer.object(key));
        let (full, sliding) = (inner("full_attention")?, inner("sliding_attention")?);
        let rope = full.or(outer);
        let number = |key: &str| -> Result<Option<f64>> {
            match rope.as_ref().map_or(Ok(None), |rope| rope.number(key))? {
                Some(value) => Ok(Some(value)),
                None => config.number(key),
            }
        };
        let positive = |key: &str, value: f64| {
            if value > 0.0 {
                return Ok(value);
            }
            Err(config.refuse(key, &format!("is {value}, expected a positive number")))
        };
        let theta = positive("rope_theta", number("rope_theta")?.unwrap_or(rules.theta))?;
        let local_theta = match (rules.local_theta, &sliding) {
            (None, _) => None,
            (Some(default), Some(sliding)) => {
                if let Some(kind) = sliding.text("rope_type")?.filter(|kind| *kind != "default") {
                    return Err(sliding.refuse("rope_type", &format!("`{kind}` is not supported here")));
                }
                Some(sliding.number("rope_theta")?.unwrap_or(default))
            }
            (Some(default), None) => Some(config.number("rope_local_base_freq")?.unwrap_or(default)),
        };
        let partial = positive("partial_rotary_factor", number("partial_rotary_factor")?.unwrap_or(1.0))?;
        if partial != 1.0 && !rules.scalings.contains(&"longrope") || partial > 1.0 {
            let what = format!("is {partial}; a GGUF of architecture `{}` rotates all channels", family.arch);
            return Err(config.refuse("partial_rotary_factor", &what));
        }
        let scaling = match &rope {
            Some(rope) => scaling(family, rules, rope, config)?,
            None => Scaling::None,
        };
        Ok(Rope { theta, local_theta, partial, scaling })
    }

    /// Adds the GGUF keys of bases and scaling.
    pub fn put(&self, family: &Family, rules: &RopeRules, out: &mut Metadata) -> Result<()> {
        let kind = match &self.scaling {
            Scaling::Linear(_) => Some("linear"),
            Scaling::Yarn(..) => Some("yarn"),
            _ => None,
        };
        if let Some(kind) = kind {
            out.insert(family.key("rope.scaling.type"), GgufValue::String(kind.to_owned()));
        }
        let float = |out: &mut Metadata, name: &str, value: f64| {
            out.insert(family.key(name), GgufValue::F32(value as f32));
        };
        match &self.scaling {
            Scaling::Linear(factor) => float(out, "rope.scaling.factor", *factor),
            Scaling::Yarn(factor, original, others) => {
                float(out, "rope.scaling.factor", *factor);
                out.insert(family.key("rope.scaling.original_context_length"), GgufValue::U32(*original));
                for ((_, gguf), value) in others {
                    float(out, gguf, *value);
                }
            }
            Scaling::Long(..) => {
                let length = |name: &str| -> Result<f64> { Ok(out.require_u32(&family.key(name))?.into()) };
                let original = length("rope.scaling.original_context_length")?;
                let scale = length("context_length")? / original;
                let factor = if scale > 1.0 { (1.0 + scale.ln() / original.ln()).sqrt() } else { 1.0 };
                float(out, "rope.scaling.attn_factor", factor);
            }
            Scaling::None | Scaling::Llama3(_) => {}
        }
        if !rules.theta_implied || self.theta != rules.theta {
            out.insert(family.key("rope.freq_base"), GgufValue::F32(self.theta as f32));
        }
        if let Some(theta) = self.local_theta {
            out.insert(family.key("rope.freq_base_swa"), GgufValue::F32(theta as f32));
        }
        Ok(())
    }

    /// Adds the number of rotated channels.
    ///
    /// # Errors
    /// The sizes that it follows from are missing.
    pub fn put_dims(&self, family: &Family, out: &mut Metadata) -> Result<()> {
        let size = |name: &str| -> Result<u32> { Ok(out.require_u32(&family.key(name))?) };
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?.max(1));
        let rotated = match out.u32(&family.key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None => (self.partial * f64::from(hidden)).floor() as u32 / heads,
        };
        out.insert(family.key("rope.dimension_count"), GgufValue::U32(rotated));
        Ok(())
    }

    /// The tensors that are made from settings: GGUF name, values.
    ///
    /// # Errors
    /// A list of factors does not have one for each pair of channels.
    pub fn tensors(&self, dims: &Dims, config: &Settings) -> Result<Vec<(&'static str, Vec<f32>)>> {
        match &self.scaling {
            Scaling::Llama3(llama3) => Ok(vec![(FREQS, llama3.factors(self.theta, dims.head_dim))]),
            Scaling::Long(short, long) => {
                let pairs = (self.partial * dims.hidden as f64).floor() as u64 / dims.heads / 2;
                for (key, factors) in [("short_factor", short), ("long_factor", long)] {
                    if factors.len() as u64 != pairs {
                        let what = format!("has {} factors, expected {pairs}", factors.len());
                        return Err(config.refuse(key, &what));
                    }
                }
                Ok(vec![(LONG, long.clone()), (SHORT, short.clone())])
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Reads a GGUF: its keys, and `tensor` for the values of a tensor that was made from settings.
    ///
    /// # Errors
    /// A key is mistyped or missing, or a kind of scaling cannot be expressed in `config.json`.
    pub fn of_gguf(
        family: &Family,
        rules: &RopeRules,
        metadata: &Metadata,
        dims: &Dims,
        place: &str,
        tensor: &dyn Fn(&str) -> Result<Option<Vec<f32>>>,
    ) -> Result<Rope> {
        let key = |name: &str| family.key(name);
        let theta = metadata.f32(&key("rope.freq_base"))?.map_or(rules.theta, shortest);
        let local_theta = match rules.local_theta {
            Some(default) => Some(metadata.f32(&key("rope.freq_base_swa"))?.map_or(default, shortest)),
            None => None,
        };
        let rotated = metadata.u32(&key("rope.dimension_count"))?.map_or(dims.head_dim, u64::from);
        if rotated == 0
            || rotated > dims.head_dim
            || rotated != dims.head_dim && !rules.scalings.contains(&"longrope")
        {
            return Err(Error::refused(format!(
                "`{place}`: key `{}`: {rotated} of {} channels are rotated, which this architecture cannot say in `config.json`",
                key("rope.dimension_count"),
                dims.head_dim
            )));
        }
        let kind = metadata.str(&key("rope.scaling.type"))?.unwrap_or("none");
        let scaling = if let Some(factors) = tensor(FREQS)? {
            Scaling::Llama3(llama3::Llama3::fit(&factors, theta, dims.head_dim).ok_or_else(|| {
                Error::refused(format!(
                    "`{place}`: tensor `{FREQS}`: the factors are not those of a `llama3` scaling, and `config.json` can say no others"
                ))
            })?)
        } else if let Some(long) = tensor(LONG)? {
            let short = tensor(SHORT)?.ok_or_else(|| {
                Error::refused(format!("`{place}`: tensor `{SHORT}` is missing, and `{LONG}` is there"))
            })?;
            Scaling::Long(short, long)
        } else {
            match kind {
                "none" => Scaling::None,
                "linear" => Scaling::Linear(shortest(metadata.require_f32(&key("rope.scaling.factor"))?)),
                "yarn" => {
                    let mut others = Vec::new();
                    for yarn in YARN_KEYS {
                        if let Some(value) = metadata.f32(&key(yarn.1))? {
                            others.push((yarn, shortest(value)));
                        }
                    }
                    Scaling::Yarn(
                        shortest(metadata.require_f32(&key("rope.scaling.factor"))?),
                        metadata.require_u32(&key("rope.scaling.original_context_length"))?,
                        others,
                    )
                }
                other => {
                    return Err(Error::refused(format!(
                        "`{place}`: key `{}`: `{other}` is not supported; supported: `none`, `linear`, `yarn`",
                        key("rope.scaling.type")
                    )));
                }
            }
        };
        Ok(Rope { theta, local_theta, partial: rotated as f64 / dims.head_dim as f64, scaling })
    }

    /// Writes the settings, in the form of transformers 5 and in the older one.
    pub fn write(&self, rules: &RopeRules, out: &mut Map<String, Value>) {
        let mut scaling = Map::new();
        match &self.scaling {
            Scaling::None => {}
            Scaling::Linear(factor) => {
                scaling.insert("rope_type".to_owned(), json!("linear"));
                scaling.insert("factor".to_owned(), json!(factor));
            }
            Scaling::Llama3(llama3) => {
                scaling.insert("rope_type".to_owned(), json!("llama3"));
                scaling.insert("factor".to_owned(), json!(llama3.factor));
                scaling.insert("low_freq_factor".to_owned(), json!(llama3.low_freq_factor));
                scaling.insert("high_freq_factor".to_owned(), json!(llama3.high_freq_factor));
                scaling.insert("original_max_position_embeddings".to_owned(), json!(llama3.original));
            }
            Scaling::Yarn(factor, original, others) => {
                scaling.insert("rope_type".to_owned(), json!("yarn"));
                scaling.insert("factor".to_owned(), json!(factor));
                scaling.insert("original_max_position_embeddings".to_owned(), json!(original));
                for ((name, _), value) in others {
                    scaling.insert((*name).to_owned(), json!(value));
                }
            }
            Scaling::Long(short, long) => {
                scaling.insert("rope_type".to_owned(), json!("longrope"));
                let list = |factors: &[f32]| factors.iter().map(|&x| decimal(x)).collect::<Vec<_>>();
                scaling.insert("short_factor".to_owned(), list(short).into());
                scaling.insert("long_factor".to_owned(), list(long).into());
            }
        }
        let mut rope = scaling.clone();
        rope.insert("rope_theta".to_owned(), json!(self.theta));
        rope.entry("rope_type").or_insert(json!("default"));
        out.insert("rope_theta".to_owned(), json!(self.theta));
        if rules.scalings.contains(&"longrope") {
            rope.insert("partial_rotary_factor".to_owned(), json!(self.partial));
            out.insert("partial_rotary_factor".to_owned(), json!(self.partial));
        }
        let rope = match self.local_theta {
            Some(theta) => {
                out.insert("rope_local_base_freq".to_owned(), json!(theta));
                json!({"full_attention": rope, "sliding_attention": {"rope_theta": theta, "rope_type": "default"}})
            }
            None => Value::Object(rope),
        };
        out.insert("rope_parameters".to_owned(), rope);
        let scaling = if scaling.is_empty() { Value::Null } else { Value::Object(scaling) };
        out.insert("rope_scaling".to_owned(), scaling);
    }
}

/// The f64 with the same shortest decimals.
fn shortest(value: f32) -> f64 {
    decimal(value).as_f64().unwrap_or(f64::from(value))
}

fn scaling(family: &Family, rules: &RopeRules, rope: &Settings, config: &Settings) -> Result<Scaling> {
    let kind = match rope.text("rope_type")? {
        Some(kind) => kind,
        None => rope.text("type")?.unwrap_or("default"),
    };
    let kind = if kind == "su" { "longrope" } else { kind };
    if kind == "default" {
        return Ok(Scaling::None);
    }
    if !rules.scalings.contains(&kind) {
        let names = ["default"].iter().chain(rules.scalings).map(|name| format!("`{name}`"));
        let names = names.collect::<Vec<_>>().join(", ");
        let what =
            format!("`{kind}` has no place in a GGUF of architecture `{}`; supported: {names}", family.arch);
        return Err(rope.refuse("rope_type", &what));
    }
    let factor = || -> Result<f64> {
        let factor = rope.require_number("factor")?;
        if factor > 0.0 {
            Ok(factor)
        } else {
            Err(rope.refuse("factor", &format!("is {factor}, expected a positive number")))
        }
    };
    let original = || -> Result<u32> {
        let key = "original_max_position_embeddings";
        match config.size(key)? {
            Some(size) if rope.get(key).is_none() => Ok(size),
            _ => rope.require_size(key),
        }
    };
    Ok(match kind {
        "linear" => Scaling::Linear(factor()?),
        "llama3" => {
            let number = |key, default| -> Result<f64> { Ok(rope.number(key)?.unwrap_or(default)) };
            let llama3 = llama3::Llama3 {
                factor: factor()?,
                low_freq_factor: number("low_freq_factor", 1.0)?,
                high_freq_factor: number("high_freq_factor", 4.0)?,
                original: original()?,
            };
            if !(llama3.low_freq_factor > 0.0 && llama3.high_freq_factor > llama3.low_freq_factor) {
                return Err(rope.refuse("high_freq_factor", "is not above a positive `low_freq_factor`"));
            }
            Scaling::Llama3(llama3)
        }
        "yarn" => {
            let mut others = Vec::new();
            for yarn in YARN_KEYS {
                let value = match rope.number(yarn.0)? {
                    None if yarn.0 == "attention_factor" => rope.number("attn_factor")?,
                    value => value,
                };
                others.extend(value.map(|value| (yarn, value)));
            }
            Scaling::Yarn(factor()?, original()?, others)
        }
        _ => {
            let list = |key| -> Result<Vec<f32>> {
                rope.numbers(key)?.ok_or_else(|| rope.refuse(key, "is missing"))
            };
            Scaling::Long(list("short_factor")?, list("long_factor")?)
        }
    })
}
