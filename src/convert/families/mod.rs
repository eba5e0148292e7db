//! The model families that convert between Hugging Face folders and GGUF files: one file and one row of
//! [`FAMILIES`] each.
//!
//! A family is a table: which tensors there are, under which two names, of which size, and what happens to
//! their rows on the way; which settings of `config.json` are which GGUF keys; what the architecture of a
//! GGUF file implies and `config.json` must therefore not contradict. Both directions read the same table.
//! Source: `tensor_mapping.py` of gguf-py and llama.cpp's converter, by fact.

mod dims;
mod gemma2;
mod gemma3;
mod gpt2;
pub mod keys;
mod llama;
mod llama3;
mod phi3;
mod qwen2;
mod qwen3;
pub mod rope;

pub use dims::{Dim, Dims};
pub use keys::{Absent, Fixed, Key};

use serde_json::{Map, Value};

use super::settings::Settings;
use crate::error::{Error, Result};
use rope::RopeRules;

/// Every family, in the order of messages.
pub const FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &gemma2::FAMILY,
    &gemma3::FAMILY,
    &phi3::FAMILY,
    &gpt2::FAMILY,
];

/// What is known of one family.
#[derive(Debug)]
pub struct Family {
    /// `general.architecture` of its GGUF files.
    pub arch: &'static str,
    /// Its classes in transformers; a folder is written as the first.
    pub classes: &'static [Class],
    /// What stands before the names of its tensors, except that of the head.
    pub prefix: &'static str,
    /// Its tensors.
    pub tensors: &'static [Tensor],
    /// Its settings, in the order of the GGUF keys.
    pub keys: &'static [Key],
    /// Settings with one supported value.
    pub fixed: &'static [Fixed],
    /// Settings that say whether tensors are there: setting, tensor (GGUF name), value if it is there.
    pub flags: &'static [(&'static str, &'static str, bool)],
    /// Whether embeddings and head are one tensor where `config.json` does not say so.
    pub tied: bool,
    /// Its rotary embedding, if it has one.
    pub rope: Option<RopeRules>,
    /// `tokenizer.ggml.add_space_prefix` of its SentencePiece vocabularies, whatever the files say.
    pub space_prefix: Option<bool>,
    /// What else `config.json` must say; what gets lost is returned, for people.
    pub check: fn(&Settings, &Dims) -> Result<Vec<String>>,
    /// What else is written into `config.json`.
    pub extra: fn(&Dims, &mut Map<String, Value>),
}

/// A class of transformers.
#[derive(Debug)]
pub struct Class {
    /// `architectures`.
    pub architecture: &'static str,
    /// `model_type`.
    pub model_type: &'static str,
}

/// One tensor, or one of every layer: `{}` stands for the layer's number.
#[derive(Debug)]
pub struct Tensor {
    /// Its Hugging Face name without the prefix.
    pub hf: &'static str,
    /// Its GGUF name.
    pub gguf: &'static str,
    /// Its size as Hugging Face has it, slowest dimension first.
    pub shape: &'static [Dim],
    /// What happens to it.
    pub change: Change,
    /// Whether it may be missing.
    pub optional: bool,
}

/// What happens to a tensor on its way from Hugging Face to GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Same,
    /// Rows of rotary pairs lie beside each other; as many heads as queries.
    PermuteQ,
    /// The same with as many heads as keys.
    PermuteK,
    /// 1 is added to every element.
    PlusOne,
    /// Rows become columns.
    Transpose,
    /// It is left out.
    Drop,
}

impl Tensor {
    /// A tensor that is copied.
    pub const fn new(hf: &'static str, gguf: &'static str, shape: &'static [Dim]) -> Tensor {
        Tensor { hf, gguf, shape, change: Change::Same, optional: false }
    }

    /// The same tensor with a change.
    #[must_use]
    pub const fn change(mut self, change: Change) -> Tensor {
        self.change = change;
        self
    }

    /// The same tensor, which may be missing.
    #[must_use]
    pub const fn optional(mut self) -> Tensor {
        self.optional = true;
        self
    }

    /// Whether there is one in every layer.
    pub fn per_layer(&self) -> bool {
        self.gguf.contains("{}")
    }
}

impl Family {
    /// The family of a `config.json`: by `architectures`, or by `model_type` where that is missing.
    ///
    /// # Errors
    /// There is no such family; the message names those that are there.
    pub fn of_config(config: &Settings) -> Result<&'static Family> {
        let architecture = match config.get("architectures") {
            None => None,
            Some(value) => match value.as_array().and_then(|list| list.first()).and_then(Value::as_str) {
                Some(name) => Some(name),
                None => return Err(config.wrong("architectures", "list of class names", value)),
            },
        };
        let model_type = config.text("model_type")?;
        let (key, found) = match (architecture, model_type) {
            (Some(name), _) => ("architectures", name),
            (None, Some(name)) => ("model_type", name),
            (None, None) => return Err(config.refuse("architectures", "is missing, and so is `model_type`")),
        };
        let known = |class: &Class| match architecture {
            Some(name) => class.architecture == name,
            None => Some(class.model_type) == model_type,
        };
        FAMILIES.iter().find(|family| family.classes.iter().any(known)).copied().ok_or_else(|| {
            let names = FAMILIES.iter().flat_map(|family| family.classes).map(|class| class.architecture);
            let what = format!("`{found}` cannot be converted; supported: {}", quoted(names));
            config.refuse(key, &what)
        })
    }

    /// The family of a GGUF architecture.
    ///
    /// # Errors
    /// There is no such family; the message names those that are there.
    pub fn of_arch(arch: &str, place: &str) -> Result<&'static Family> {
        FAMILIES.iter().find(|family| family.arch == arch).copied().ok_or_else(|| {
            let names = quoted(FAMILIES.iter().map(|family| family.arch));
            Error::refused(format!(
                "`{place}`: key `general.architecture`: `{arch}` cannot be converted; supported: {names}"
            ))
        })
    }

    /// The GGUF key of this family: `llama.` and `name`.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// The row of a Hugging Face tensor, and its layer.
    ///
    /// Base models without a head lack the prefix, multimodal ones have `language_model.` in it.
    pub fn find_hf(&self, name: &str) -> Option<(&'static Tensor, Option<u32>)> {
        let name = name.replacen("language_model.", "", 1);
        let name = name.strip_prefix(self.prefix).unwrap_or(&name);
        self.find(name, |tensor| tensor.hf)
    }

    /// The row of a GGUF tensor, and its layer.
    pub fn find_gguf(&self, name: &str) -> Option<(&'static Tensor, Option<u32>)> {
        self.find(name, |tensor| tensor.gguf)
    }

    fn find(
        &self,
        name: &str,
        template: fn(&'static Tensor) -> &'static str,
    ) -> Option<(&'static Tensor, Option<u32>)> {
        let tensors: &'static [Tensor] = self.tensors;
        tensors.iter().find_map(|tensor| match template(tensor).split_once("{}") {
            None => (template(tensor) == name).then_some((tensor, None)),
            Some((before, after)) => {
                let number = name.strip_prefix(before)?.strip_suffix(after)?;
                let layer: u32 = number.parse().ok()?;
                // A number has one spelling, without sign or leading zero.
                (layer.to_string() == number).then_some((tensor, Some(layer)))
            }
        })
    }

    /// The Hugging Face name of a row.
    pub fn hf_name(&self, tensor: &Tensor, layer: Option<u32>) -> String {
        let prefix = if tensor.hf == HEAD { "" } else { self.prefix };
        format!("{prefix}{}", numbered(tensor.hf, layer))
    }

    /// The row of the output head, if the family has one of its own.
    pub fn head(&self) -> Option<&'static Tensor> {
        let tensors: &'static [Tensor] = self.tensors;
        tensors.iter().find(|tensor| tensor.hf == HEAD)
    }
}

/// The head's name, the only one without prefix.
pub const HEAD: &str = "lm_head.weight";

/// A template with the layer's number.
pub fn numbered(template: &str, layer: Option<u32>) -> String {
    layer.map_or_else(|| template.to_owned(), |layer| template.replacen("{}", &layer.to_string(), 1))
}

fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// A family without further demands.
#[expect(clippy::unnecessary_wraps, reason = "the table wants functions of one type")]
fn no_check(_: &Settings, _: &Dims) -> Result<Vec<String>> {
    Ok(Vec::new())
}

/// A family without further settings.
fn no_extra(_: &Dims, _: &mut Map<String, Value>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_every_family_goes_there_and_back() {
        for family in FAMILIES {
            for tensor in family.tensors {
                for layer in [0, 9, 31] {
                    let layer = tensor.per_layer().then_some(layer);
                    let hf = family.hf_name(tensor, layer);
                    let (found, at) = family.find_hf(&hf).unwrap_or_else(|| panic!("{hf}"));
                    assert_eq!((found.gguf, at), (tensor.gguf, layer), "{hf}");
                    if tensor.change != Change::Drop {
                        let gguf = numbered(tensor.gguf, layer);
                        let (found, at) = family.find_gguf(&gguf).unwrap_or_else(|| panic!("{gguf}"));
                        assert_eq!((found.hf, at), (tensor.hf, layer), "{gguf}");
                    }
                }
            }
        }
    }

    #[test]
    fn llama_has_the_names_of_the_formats_crate() {
        for tensor in llama::FAMILY.tensors {
            let layer = tensor.per_layer().then_some(3);
            let hf = llama::FAMILY.hf_name(tensor, layer);
            assert_eq!(qpeft_formats::gguf::names::gguf_tensor(&hf), Some(numbered(tensor.gguf, layer)));
        }
    }

    #[test]
    fn a_layer_number_has_one_spelling() {
        for name in ["blk.00.attn_q.weight", "blk.+1.attn_q.weight", "blk.4294967296.attn_q.weight"] {
            assert!(llama::FAMILY.find_gguf(name).is_none(), "{name}");
        }
    }
}
