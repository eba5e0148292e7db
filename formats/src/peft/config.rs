//! `adapter_config.json`: the settings that have a meaning here as typed fields, all others kept.

use std::path::Path;

use fancy_regex::Regex;
use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::check;
use crate::error::{Error, Kind, Place, Result};
use crate::file::write_atomic;
use crate::json::read_json;

/// Which modules are adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Every linear layer but the output head.
    AllLinear,
    /// A module matches when it is one of these paths or ends with `.` and one of them.
    List(Vec<String>),
    /// A module matches when this regular expression matches its whole path.
    Regex(String),
}

/// How the factors were initialized: PEFT's `true` (A random, B zero), `false`, or a method's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// The default, or none at all.
    Bool(bool),
    /// `gaussian`, `pissa`, `pissa_niter_16`, `olora`, ...
    Named(String),
}

/// The configuration of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    /// The method: `LORA`.
    pub peft_type: String,
    /// `CAUSAL_LM` for language models.
    pub task_type: Option<String>,
    /// The model that the adapter belongs to.
    pub base_model_name_or_path: Option<String>,
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Probability with which an input of A is dropped in training.
    pub lora_dropout: f64,
    /// Which modules are adapted.
    pub target_modules: Option<TargetModules>,
    /// Which modules are not, although `target_modules` matches.
    pub exclude_modules: Option<TargetModules>,
    /// Whether magnitudes are trained apart (DoRA).
    pub use_dora: bool,
    /// Whether the scaling is `alpha / sqrt(r)` (rank-stabilized).
    pub use_rslora: bool,
    /// How the factors were initialized.
    pub init_lora_weights: InitLoraWeights,
    /// Ranks of modules that differ; the first key that matches counts.
    pub rank_pattern: IndexMap<String, usize>,
    /// Alphas of modules that differ; the first key that matches counts.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Which biases are trained: `none`.
    pub bias: String,
    /// Whether the base weight is stored transposed: `false`.
    pub fan_in_fan_out: bool,
    /// Modules that are saved as a whole: none.
    pub modules_to_save: Option<Vec<String>>,
    /// All other keys, as they were read.
    pub other: Map<String, Value>,
}

impl PeftConfig {
    /// A LoRA configuration with every key that PEFT 0.21 writes, at its default but rank and alpha.
    pub fn new(r: usize, lora_alpha: f64) -> PeftConfig {
        let other = json!({
            "alora_invocation_tokens": null,
            "arrow_config": null,
            "auto_mapping": null,
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "inference_mode": true,
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_bias": false,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "monteclora_config": null,
            "peft_version": "0.21.2",
            "qalora_group_size": 16,
            "revision": null,
            "target_parameters": null,
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_qalora": false,
            "velora_config": null,
        });
        let Value::Object(other) = other else { unreachable!("the literal above is an object") };
        PeftConfig {
            peft_type: "LORA".to_owned(),
            task_type: Some("CAUSAL_LM".to_owned()),
            base_model_name_or_path: None,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            use_dora: false,
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Bool(true),
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            bias: "none".to_owned(),
            fan_in_fan_out: false,
            modules_to_save: None,
            other,
        }
    }

    /// Reads and checks `adapter_config.json`.
    ///
    /// # Errors
    /// The file is missing or not JSON, a key has the wrong type, or a setting is not supported.
    pub fn read(path: &Path) -> Result<PeftConfig> {
        let object = read_json(path)?;
        let read = || {
            let config = PeftConfig::from_object(object)?;
            check::config(&config)?;
            Ok(config)
        };
        read().map_err(|e: Error| e.in_file(path))
    }

    /// Writes `adapter_config.json` as PEFT does: keys sorted, two spaces of indentation.
    ///
    /// # Errors
    /// The reader would refuse the configuration, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        check::config(self).map_err(|e| e.in_file(path))?;
        let text =
            serde_json::to_string_pretty(&self.to_object()).map_err(|e| Error::from(e).in_file(path))?;
        write_atomic(path, text.as_bytes())
    }

    fn from_object(object: Map<String, Value>) -> Result<PeftConfig> {
        let mut keys = Keys(object);
        Ok(PeftConfig {
            // The method first: the keys of others mean other things.
            peft_type: check::peft_type(keys.required("peft_type", "string", as_string)?)?,
            task_type: keys.optional("task_type", "string", as_string)?,
            base_model_name_or_path: keys.optional("base_model_name_or_path", "string", as_string)?,
            r: keys.required("r", "positive integer", as_size)?,
            lora_alpha: keys.required("lora_alpha", "number", as_f64)?,
            lora_dropout: keys.optional("lora_dropout", "number", as_f64)?.unwrap_or(0.0),
            target_modules: keys.optional("target_modules", "string or list of strings", as_modules)?,
            exclude_modules: keys.optional("exclude_modules", "string or list of strings", as_modules)?,
            use_dora: keys.optional("use_dora", "boolean", as_bool)?.unwrap_or(false),
            use_rslora: keys.optional("use_rslora", "boolean", as_bool)?.unwrap_or(false),
            init_lora_weights: keys
                .optional("init_lora_weights", "boolean or string", as_init)?
                .map_or(Ok(InitLoraWeights::Bool(true)), check::init)?,
            rank_pattern: keys
                .optional("rank_pattern", "object of positive integers", |v| as_pattern(v, as_size))?
                .unwrap_or_default(),
            alpha_pattern: keys
                .optional("alpha_pattern", "object of numbers", |v| as_pattern(v, as_f64))?
                .unwrap_or_default(),
            bias: keys.optional("bias", "string", as_string)?.unwrap_or_else(|| "none".to_owned()),
            fan_in_fan_out: keys.optional("fan_in_fan_out", "boolean", as_bool)?.unwrap_or(false),
            modules_to_save: keys.optional("modules_to_save", "list of strings", as_strings)?,
            other: keys.0,
        })
    }

    fn to_object(&self) -> Map<String, Value> {
        let modules = |modules: &Option<TargetModules>| match modules {
            None => Value::Null,
            Some(TargetModules::AllLinear) => json!("all-linear"),
            Some(TargetModules::List(list)) => json!(list),
            Some(TargetModules::Regex(regex)) => json!(regex),
        };
        let ranks: Map<String, Value> =
            self.rank_pattern.iter().map(|(key, &rank)| (key.clone(), json!(rank))).collect();
        let alphas: Map<String, Value> =
            self.alpha_pattern.iter().map(|(key, &alpha)| (key.clone(), number(alpha))).collect();
        let typed = [
            ("peft_type", json!(self.peft_type)),
            ("task_type", json!(self.task_type)),
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("target_modules", modules(&self.target_modules)),
            ("exclude_modules", modules(&self.exclude_modules)),
            ("use_dora", json!(self.use_dora)),
            ("use_rslora", json!(self.use_rslora)),
            (
                "init_lora_weights",
                match &self.init_lora_weights {
                    InitLoraWeights::Bool(b) => json!(b),
                    InitLoraWeights::Named(name) => json!(name),
                },
            ),
            ("rank_pattern", Value::Object(ranks)),
            ("alpha_pattern", Value::Object(alphas)),
            ("bias", json!(self.bias)),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("modules_to_save", json!(self.modules_to_save)),
        ];
        let mut object = self.other.clone();
        object.extend(typed.map(|(key, value)| (key.to_owned(), value)));
        object.sort_keys();
        object
    }

    /// The rank of a module (its path without `base_model.model.`).
    ///
    /// # Errors
    /// A key of `rank_pattern` is not a regular expression.
    pub fn rank_of(&self, module: &str) -> Result<usize> {
        self.ranks()?.of(module)
    }

    /// The ranks of many modules: the patterns are compiled once.
    pub(crate) fn ranks(&self) -> Result<Ranks> {
        Ok(Ranks { patterns: compile("rank_pattern", &self.rank_pattern)?, otherwise: self.r })
    }

    /// The alpha of a module.
    ///
    /// # Errors
    /// A key of `alpha_pattern` is not a regular expression.
    pub fn alpha_of(&self, module: &str) -> Result<f64> {
        let patterns = compile("alpha_pattern", &self.alpha_pattern)?;
        Ok(first_match("alpha_pattern", &patterns, module)?.unwrap_or(self.lora_alpha))
    }

    /// The factor of a module's `B A`: `alpha / r`, or `alpha / sqrt(r)` if rank-stabilized.
    ///
    /// # Errors
    /// A key of a pattern is not a regular expression.
    pub fn scaling(&self, module: &str) -> Result<f64> {
        let (alpha, rank) = (self.alpha_of(module)?, self.rank_of(module)? as f64);
        Ok(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }

    /// Whether the configuration adapts a module. The caller offers linear layers only and, for
    /// `all-linear`, leaves out the output head: which modules these are is the model's to know.
    ///
    /// # Errors
    /// A pattern is not a regular expression, `layers_to_transform` holds something else than numbers, or
    /// `layers_pattern` is set, which is not supported.
    pub fn targets(&self, module: &str) -> Result<bool> {
        check::absent(&self.other, "layers_pattern")?;
        let matches = |key, modules: &Option<TargetModules>| match modules {
            None => Ok(false),
            Some(modules) => modules.matches(key, module),
        };
        Ok(!matches("exclude_modules", &self.exclude_modules)?
            && matches("target_modules", &self.target_modules)?
            && self.in_layers(module)?)
    }

    /// Whether `layers_to_transform` (one layer or a list; all if it is not set) has the module's layer: the
    /// first number of its path that is not the first or second part.
    fn in_layers(&self, module: &str) -> Result<bool> {
        const KEY: &str = "layers_to_transform";
        let refuse = |value: &Value| {
            let found = format!("`{value}`").into();
            Error::new(Kind::WrongSetting { expected: "layer number or list of them", found })
                .at(Place::Key(KEY.to_owned()))
        };
        let layers = match self.other.get(KEY) {
            None | Some(Value::Null) => return Ok(true),
            Some(Value::Array(list)) if list.is_empty() => return Ok(true),
            Some(Value::Array(list)) => list.iter().map(|x| x.as_u64().ok_or_else(|| refuse(x))).collect(),
            Some(one) => one.as_u64().map(|layer| vec![layer]).ok_or_else(|| refuse(one)),
        }?;
        // PEFT lets a module that is named in full through.
        if let Some(TargetModules::List(list)) = &self.target_modules
            && list.iter().any(|target| target == module)
        {
            return Ok(true);
        }
        let parts: Vec<&str> = module.split('.').collect();
        let inner = parts.get(2..parts.len().saturating_sub(1)).unwrap_or_default();
        let layer = inner.iter().find_map(|part| part.parse::<u64>().ok());
        Ok(layer.is_some_and(|layer| layers.contains(&layer)))
    }
}

impl TargetModules {
    fn matches(&self, key: &str, module: &str) -> Result<bool> {
        match self {
            TargetModules::AllLinear => Ok(true),
            TargetModules::List(list) => Ok(list.iter().any(|target| {
                module
                    .strip_suffix(target.as_str())
                    .is_some_and(|path| path.is_empty() || path.ends_with('.'))
            })),
            TargetModules::Regex(regex) => {
                let compiled = regex_of(key, regex, &format!("^(?:{regex})$"))?;
                is_match(key, &compiled, module)
            }
        }
    }
}

/// The ranks of modules.
pub(crate) struct Ranks {
    patterns: Vec<(Regex, usize)>,
    otherwise: usize,
}

impl Ranks {
    /// The rank of a module.
    pub fn of(&self, module: &str) -> Result<usize> {
        Ok(first_match("rank_pattern", &self.patterns, module)?.unwrap_or(self.otherwise))
    }
}

/// The keys of a pattern table; each matches the end of a module's path, at the start of a component.
fn compile<T: Copy>(key: &str, patterns: &IndexMap<String, T>) -> Result<Vec<(Regex, T)>> {
    let compiled = |(pattern, &value): (&String, &T)| {
        Ok((regex_of(key, pattern, &format!("^(.*\\.)?({pattern})$"))?, value))
    };
    patterns.iter().map(compiled).collect()
}

/// The value of the first pattern that matches.
fn first_match<T: Copy>(key: &str, patterns: &[(Regex, T)], module: &str) -> Result<Option<T>> {
    for (regex, value) in patterns {
        if is_match(key, regex, module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Patterns are Python's, so they may look around and refer back, which the `regex` crate cannot.
fn regex_of(key: &str, pattern: &str, anchored: &str) -> Result<Regex> {
    Regex::new(anchored).map_err(|e| bad_pattern(key, pattern, &e))
}

fn is_match(key: &str, regex: &Regex, module: &str) -> Result<bool> {
    regex.is_match(module).map_err(|e| bad_pattern(key, regex.as_str(), &e))
}

fn bad_pattern(key: &str, pattern: &str, reason: &fancy_regex::Error) -> Error {
    Error::new(Kind::BadPattern { pattern: pattern.into(), reason: reason.to_string().into() })
        .at(Place::Key(key.to_owned()))
}

/// PEFT writes an integral alpha as it was given, mostly as an integer.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 9e15 { json!(x as i64) } else { json!(x) }
}

/// Takes typed keys out of an object.
struct Keys(Map<String, Value>);

impl Keys {
    /// The value of a key; `null` counts as absent.
    fn optional<T>(
        &mut self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.shift_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => convert(&value).map(Some).ok_or_else(|| {
                let found = format!("`{value}`").into();
                Error::new(Kind::WrongSetting { expected, found }).at(Place::Key(key.to_owned()))
            }),
        }
    }

    fn required<T>(
        &mut self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, expected, convert)?
            .ok_or_else(|| Error::new(Kind::MissingKey).at(Place::Key(key.to_owned())))
    }
}

fn as_string(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn as_bool(value: &Value) -> Option<bool> {
    value.as_bool()
}

fn as_f64(value: &Value) -> Option<f64> {
    value.as_f64().filter(|x| x.is_finite())
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0)
}

fn as_strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(as_string).collect()
}

fn as_modules(value: &Value) -> Option<TargetModules> {
    match value {
        Value::String(s) if s.eq_ignore_ascii_case("all-linear") => Some(TargetModules::AllLinear),
        Value::String(s) => Some(TargetModules::Regex(s.clone())),
        list => as_strings(list).map(TargetModules::List),
    }
}

fn as_init(value: &Value) -> Option<InitLoraWeights> {
    match value {
        Value::Bool(b) => Some(InitLoraWeights::Bool(*b)),
        Value::String(name) => Some(InitLoraWeights::Named(name.clone())),
        _ => None,
    }
}

fn as_pattern<T>(value: &Value, each: fn(&Value) -> Option<T>) -> Option<IndexMap<String, T>> {
    value.as_object()?.iter().map(|(key, value)| each(value).map(|v| (key.clone(), v))).collect()
}
