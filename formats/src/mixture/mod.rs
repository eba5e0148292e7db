//! Mixtures: which type each tensor of a file gets when the file as a whole is quantized to `Q4_K_M`.
//!
//! The choice is llama-quantize's, tensor for tensor: what is not quantized (`eligible`), rules by role
//! and layer (`rules`), a smaller block where a row is not a whole number of blocks, and the user's
//! own choices before all of these.

mod eligible;
mod facts;
mod file_type;
mod rules;
#[cfg(test)]
mod tests;

use fancy_regex::{Regex, RegexBuilder};

pub use facts::ModelFacts;
pub use file_type::FileType;
use rules::{Role, Rules, Subject, layer_of};

use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Place, Result};
use crate::gguf::TensorDecl;

/// A type for every tensor whose name matches: `ffn_down=q8_0`.
#[derive(Debug, Clone)]
pub struct TypeOverride {
    pattern: Regex,
    dtype: GgmlType,
}

impl TypeOverride {
    /// A regular expression, found anywhere in a name and in any case, and the type of what it matches.
    ///
    /// # Errors
    /// The expression does not parse.
    pub fn new(pattern: &str, dtype: GgmlType) -> Result<TypeOverride> {
        let unusable = |e: fancy_regex::Error| {
            Error::new(Kind::BadPattern { pattern: pattern.into(), reason: e.to_string().into() })
        };
        let pattern = RegexBuilder::new(pattern).case_insensitive(true).build().map_err(unusable)?;
        Ok(TypeOverride { pattern, dtype })
    }

    fn matches(&self, name: &str) -> Result<bool> {
        self.pattern.is_match(name).map_err(|e| {
            let pattern = self.pattern.as_str();
            Error::new(Kind::BadPattern { pattern: pattern.into(), reason: e.to_string().into() })
        })
    }
}

/// What a file is quantized to: a file type, and the user's exceptions.
#[derive(Debug, Clone)]
pub struct Mixture {
    /// The file type.
    pub file_type: FileType,
    /// Every quantized tensor gets the default type; no rules.
    pub pure: bool,
    /// `output.weight` keeps its type.
    pub leave_output: bool,
    /// The type of `output.weight`, or of the token embedding where that is the head.
    pub output_type: Option<GgmlType>,
    /// The type of the token embedding.
    pub embedding_type: Option<GgmlType>,
    /// The first match decides.
    pub overrides: Vec<TypeOverride>,
}

/// What was chosen for one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Its type in the new file.
    pub dtype: GgmlType,
    /// The type that it would have if its row length were a whole number of blocks.
    pub wanted: GgmlType,
    /// Whether the result would be garbage without importance.
    pub requires_importance: bool,
}

impl Mixture {
    /// A file type without exceptions.
    pub fn new(file_type: FileType) -> Mixture {
        Mixture {
            file_type,
            pure: false,
            leave_output: false,
            output_type: None,
            embedding_type: None,
            overrides: Vec::new(),
        }
    }

    /// The types of all tensors of a model, in the order of `tensors`, whose own types are the present ones.
    ///
    /// # Errors
    /// A feed-forward tensor of a mixture of experts lies in no layer, or a row fits neither the type nor
    /// anything that could take its place.
    pub fn choose(
        &self,
        facts: &ModelFacts,
        tensors: &[TensorDecl],
        has_importance: bool,
    ) -> Result<Vec<Choice>> {
        let mut rules = Rules {
            file_type: self.file_type,
            facts,
            has_importance,
            tied: !tensors.iter().any(|t| t.name == "output.weight"),
            output_type: self.output_type,
            embedding_type: self.embedding_type,
            values: tensors.iter().filter(|t| Role::of(&t.name).is_value()).count(),
            values_seen: 0,
            downs_seen: 0,
            gates_seen: 0,
            ups_seen: 0,
        };
        let mut choices = vec![None; tensors.len()];
        for i in file_order(tensors) {
            let tensor = &tensors[i];
            let choice =
                self.one(&mut rules, tensor).map_err(|e| e.at(Place::Tensor(tensor.name.clone())))?;
            choices[i] = Some(choice);
        }
        Ok(choices.into_iter().map(|c| c.expect("the order visits every tensor")).collect())
    }

    fn one(&self, rules: &mut Rules<'_>, tensor: &TensorDecl) -> Result<Choice> {
        let role = Role::of(&tensor.name);
        let row_len = tensor.shape.first().copied().unwrap_or(1);
        let wanted = match self.wanted(rules, tensor, role, row_len)? {
            Wanted::Present => {
                return Ok(Choice { dtype: tensor.dtype, wanted: tensor.dtype, requires_importance: false });
            }
            Wanted::Exactly(dtype) => {
                dtype.row_bytes(row_len as usize)?;
                return Ok(self.choice(dtype, dtype, role));
            }
            Wanted::Fitting(dtype) => dtype,
        };
        Ok(self.choice(fitting(wanted, row_len)?, wanted, role))
    }

    fn choice(&self, dtype: GgmlType, wanted: GgmlType, role: Role) -> Choice {
        let is_ends = matches!(role, Role::TokenEmbedding | Role::Output);
        let requires_importance = !is_ends
            && match dtype {
                GgmlType::IQ3_XXS
                | GgmlType::IQ2_XXS
                | GgmlType::IQ2_XS
                | GgmlType::IQ2_S
                | GgmlType::IQ1_M
                | GgmlType::IQ1_S => true,
                GgmlType::Q2_K => self.file_type == FileType::Q2_K_S,
                _ => false,
            };
        Choice { dtype, wanted, requires_importance }
    }

    fn wanted(&self, rules: &mut Rules<'_>, tensor: &TensorDecl, role: Role, row_len: u64) -> Result<Wanted> {
        let (name, default) = (tensor.name.as_str(), self.file_type.default_type());
        let is_kept = !eligible::is_quantized(&rules.facts.arch, name, &tensor.shape);
        if is_kept || (self.leave_output && name == "output.weight") {
            return Ok(Wanted::Present);
        }
        let mut named = None;
        for candidate in &self.overrides {
            if candidate.matches(name)? {
                named = Some(candidate.dtype);
                break;
            }
        }
        match (role, self.embedding_type, self.output_type) {
            // The second embedding of Gemma 3n is large: a pattern that names it wins.
            (Role::TokenEmbedding, Some(asked), _)
                if name != "per_layer_token_embd.weight" || named.is_none() =>
            {
                return Ok(Wanted::Exactly(asked));
            }
            (Role::Output, _, Some(asked)) => return Ok(Wanted::Exactly(asked)),
            _ => {}
        }
        let matrices = tensor.shape.get(2).copied().unwrap_or(1);
        Ok(Wanted::Fitting(match named {
            Some(dtype) => dtype,
            None if self.pure || default.is_dense() => default,
            None => rules.next(Subject { name, role, row_len, matrices })?,
        }))
    }
}

/// What a tensor should become.
enum Wanted {
    /// Nothing else.
    Present,
    /// This, or an error.
    Exactly(GgmlType),
    /// This, or what its row length allows.
    Fitting(GgmlType),
}

/// The type, or where a row is not a whole number of its blocks, the one of smaller blocks that is closest,
/// or F16.
fn fitting(wanted: GgmlType, row_len: u64) -> Result<GgmlType> {
    use GgmlType as T;
    let fits = |dtype: GgmlType| row_len.is_multiple_of(dtype.block_len() as u64);
    if fits(wanted) {
        return Ok(wanted);
    }
    let smaller = match wanted {
        T::IQ1_S | T::IQ1_M | T::IQ2_XXS | T::IQ2_XS | T::IQ2_S | T::IQ3_XXS | T::IQ3_S | T::IQ4_XS => {
            T::IQ4_NL
        }
        T::Q2_0 | T::Q2_K | T::Q3_K | T::TQ1_0 | T::TQ2_0 => T::Q4_0,
        T::Q4_K => T::Q5_0,
        T::Q5_K => T::Q5_1,
        T::Q6_K => T::Q8_0,
        other if other.block_len() <= 32 => T::F16,
        other => {
            return Err(Error::new(Kind::PartialBlock {
                dtype: other.name(),
                block_len: other.block_len(),
                row_len,
            }));
        }
    };
    Ok(if fits(smaller) { smaller } else { T::F16 })
}

/// The order in which llama.cpp counts and writes tensors: those outside of layers first, then layer by
/// layer, by name within each.
pub fn file_order(tensors: &[TensorDecl]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (layer_of(&tensors[i].name).map_or(-1, i64::from), tensors[i].name.as_str()));
    order
}
