//! The rules of a mixture: which tensor of which role gets more or fewer bits than the rest.
//!
//! Layers count in the order of (layer, name); the first and last eighth, and every third between, are
//! the ones that get more bits. Source: the type selection of llama.cpp's quantizer, by fact; its
//! published snapshots for twelve models are the test.

use super::facts::ModelFacts;
use super::file_type::FileType as F;
use crate::dtype::GgmlType as T;
use crate::error::{Error, Kind, Result};

/// The part that a tensor plays, as far as the rules care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    TokenEmbedding,
    Output,
    AttentionQ,
    AttentionK,
    AttentionV,
    AttentionQkv,
    AttentionKvB,
    AttentionOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Other,
}

/// Parts of names, in the order in which they are looked for.
const ROLES: [(&str, Role); 9] = [
    ("attn_qkv.weight", Role::AttentionQkv),
    ("attn_kv_b.weight", Role::AttentionKvB),
    ("attn_v.weight", Role::AttentionV),
    ("attn_k.weight", Role::AttentionK),
    ("attn_q.weight", Role::AttentionQ),
    ("attn_output.weight", Role::AttentionOutput),
    ("ffn_up", Role::FfnUp),
    ("ffn_gate", Role::FfnGate),
    ("ffn_down", Role::FfnDown),
];

impl Role {
    pub(super) fn of(name: &str) -> Role {
        match name {
            "output.weight" => Role::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Role::TokenEmbedding,
            _ => ROLES.iter().find(|(part, _)| name.contains(part)).map_or(Role::Other, |(_, role)| *role),
        }
    }

    /// Few values that many heads share: an error there costs most.
    pub(super) fn is_value(self) -> bool {
        matches!(self, Role::AttentionV | Role::AttentionQkv | Role::AttentionKvB)
    }
}

/// The layer of `blk.N.`, as the start of the name has it.
pub(super) fn layer_of(name: &str) -> Option<u32> {
    let rest = name.strip_prefix("blk.")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().ok()
}

/// A tensor as the rules see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub name: &'a str,
    pub role: Role,
    pub row_len: u64,
    /// Size of the third dimension: experts, or heads of an MLA projection.
    pub matrices: u64,
}

/// The rules of one file type for one model, with the counts of what has passed. Tensors come in the
/// order of (layer, name).
#[derive(Debug)]
pub(super) struct Rules<'a> {
    pub file_type: F,
    pub facts: &'a ModelFacts,
    pub has_importance: bool,
    /// The head is the token embedding: there is no `output.weight`.
    pub tied: bool,
    /// `--output-tensor-type`, `--token-embedding-type`.
    pub output_type: Option<T>,
    pub embedding_type: Option<T>,
    /// Tensors with [`Role::is_value`] in the model.
    pub values: usize,
    pub values_seen: usize,
    pub downs_seen: usize,
    pub gates_seen: usize,
    pub ups_seen: usize,
}

/// The first and last eighth, and every third layer between.
fn more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

impl Rules<'_> {
    /// The type of the next tensor, before its row length is looked at.
    pub(super) fn next(&mut self, tensor: Subject<'_>) -> Result<T> {
        let (default, f) = (self.file_type.default_type(), self.file_type);
        if self.facts.arch == "glm5-next"
            && ["attn_q_a", "attn_q_b", "nextn.eh_proj"].iter().any(|part| tensor.name.contains(part))
        {
            return Ok(T::Q8_0);
        }
        Ok(match tensor.role {
            Role::Output => self.head(tensor),
            Role::TokenEmbedding if self.tied => self.head(tensor),
            _ if f == F::MXFP4_MOE => self.mxfp4(tensor),
            Role::TokenEmbedding => self.embedding_type.unwrap_or_else(|| self.embedding()),
            _ if matches!(f, F::IQ1_S | F::IQ1_M | F::IQ2_XXS | F::IQ2_XS | F::IQ2_S | F::IQ2_M) => {
                self.lowest_bits(tensor.role)
            }
            role if role.is_value() => self.value(),
            Role::AttentionK if self.facts.experts == 8 => T::Q8_0,
            Role::AttentionK | Role::AttentionQ => match f {
                F::IQ3_XS => T::IQ3_XXS,
                F::IQ3_XXS => T::IQ2_S,
                _ => default,
            },
            Role::FfnDown => self.down(tensor.name)?,
            Role::AttentionOutput => self.attention_output(),
            Role::FfnGate => {
                let layer = self.layer(self.gates_seen, tensor.name)?;
                self.gates_seen += 1;
                self.gate_or_up(layer)
            }
            Role::FfnUp => {
                let layer = self.layer(self.ups_seen, tensor.name)?;
                self.ups_seen += 1;
                self.gate_or_up(layer)
            }
            _ => default,
        })
    }

    /// The head, also where it is the token embedding.
    fn head(&self, tensor: Subject<'_>) -> T {
        let default = self.file_type.default_type();
        if let Some(asked) = self.output_type {
            return asked;
        }
        let fits = tensor.row_len.is_multiple_of(default.block_len() as u64);
        match self.file_type {
            F::MXFP4_MOE => T::Q8_0,
            _ if self.facts.arch == "falcon" || !fits => T::Q8_0,
            F::IQ1_S | F::IQ1_M | F::IQ2_XXS | F::IQ2_XS | F::IQ2_S | F::IQ2_M | F::IQ3_XXS => T::Q5_K,
            F::Q8_0 => T::Q8_0,
            _ => T::Q6_K,
        }
    }

    /// Experts are MXFP4, everything else is Q8_0.
    fn mxfp4(&self, tensor: Subject<'_>) -> T {
        // An MLA projection has a third dimension too.
        let is_expert = tensor.matrices > 1
            && (self.facts.arch != "bailingmoe3"
                || matches!(tensor.role, Role::FfnUp | Role::FfnGate | Role::FfnDown));
        if is_expert { T::MXFP4 } else { T::Q8_0 }
    }

    /// A token embedding that is not the head.
    fn embedding(&self) -> T {
        match self.file_type {
            F::IQ1_S | F::IQ1_M | F::IQ2_XXS | F::IQ2_XS => T::Q2_K,
            F::IQ2_S | F::IQ2_M | F::IQ3_XXS => T::IQ3_S,
            F::TQ1_0 | F::TQ2_0 | F::Q2_0 => T::Q4_K,
            other => other.default_type(),
        }
    }

    /// The file types below 3 bits.
    fn lowest_bits(&mut self, role: Role) -> T {
        let (f, facts) = (self.file_type, self.facts);
        let is_iq2_s = matches!(f, F::IQ2_S | F::IQ2_M);
        let better = if is_iq2_s { T::IQ3_S } else { T::Q2_K };
        match role {
            role if role.is_value() => {
                self.values_seen += 1;
                if facts.gqa >= 4 || facts.experts >= 4 { T::Q4_K } else { better }
            }
            Role::AttentionK if facts.experts == 8 => T::Q4_K,
            Role::FfnDown => {
                self.downs_seen += 1;
                if self.downs_seen <= facts.layers / 8 { better } else { f.default_type() }
            }
            Role::AttentionOutput if facts.experts == 8 => T::Q5_K,
            Role::AttentionOutput if matches!(f, F::IQ1_S | F::IQ1_M) => T::IQ2_XXS,
            Role::AttentionOutput if is_iq2_s => T::IQ3_S,
            _ => f.default_type(),
        }
    }

    fn value(&mut self) -> T {
        let (seen, shared) = (self.values_seen, self.facts.gqa >= 4);
        self.values_seen += 1;
        let chosen = match self.file_type {
            F::Q2_K if !shared => T::Q3_K,
            F::IQ3_XXS if !shared => {
                if self.has_importance {
                    T::IQ3_XXS
                } else {
                    T::IQ3_S
                }
            }
            F::Q2_K | F::IQ3_XXS | F::IQ3_M => T::Q4_K,
            F::Q2_K_S | F::IQ3_XS | F::IQ3_S if shared => T::Q4_K,
            F::Q3_K_M => {
                if seen < 2 {
                    T::Q5_K
                } else {
                    T::Q4_K
                }
            }
            F::Q3_K_L => T::Q5_K,
            F::IQ4_NL | F::IQ4_XS if shared => T::Q5_K,
            F::Q4_K_M | F::Q5_K_M if more_bits(seen, self.values) => T::Q6_K,
            F::Q4_K_S if seen < 4 => T::Q5_K,
            other => other.default_type(),
        };
        match chosen {
            // Eight experts share it: the bytes do not count.
            _ if self.facts.experts == 8 => T::Q8_0,
            // Eight heads share it: an eighth of attn_q's bytes.
            T::Q3_K | T::Q4_K if self.facts.is_70b => T::Q5_K,
            other => other,
        }
    }

    fn down(&mut self, name: &str) -> Result<T> {
        let (f, layers) = (self.file_type, self.facts.layers);
        let layer = self.layer(self.downs_seen, name)?;
        self.downs_seen += 1;
        let (first_eighth, falcon) = (layer < layers / 8, self.facts.arch == "falcon");
        Ok(match f {
            F::Q2_K => T::Q3_K,
            F::Q2_K_S if first_eighth => T::Q4_K,
            F::IQ3_XXS if !self.has_importance => {
                if first_eighth {
                    T::Q4_K
                } else {
                    T::Q3_K
                }
            }
            F::Q3_K_M if layer < layers / 16 => T::Q5_K,
            F::Q3_K_M if !falcon || more_bits(layer, layers) => T::Q4_K,
            F::IQ3_M if first_eighth || (self.facts.experts == 8 && more_bits(layer, layers)) => T::Q4_K,
            F::Q3_K_L => {
                if falcon {
                    T::Q4_K
                } else {
                    T::Q5_K
                }
            }
            F::Q4_K_M if falcon => {
                if layer < layers / 16 {
                    T::Q6_K
                } else if more_bits(layer, layers) {
                    T::Q5_K
                } else {
                    T::Q4_K
                }
            }
            F::Q4_K_M | F::Q5_K_M if more_bits(layer, layers) => T::Q6_K,
            F::IQ4_NL | F::IQ4_XS if first_eighth && !self.has_importance => T::Q5_K,
            F::Q4_K_S if first_eighth && !falcon => T::Q5_K,
            // With importance these two can go astray in the first layers.
            F::Q4_0 if first_eighth && self.has_importance => T::Q4_1,
            F::Q5_0 if first_eighth && self.has_importance => T::Q5_1,
            other => other.default_type(),
        })
    }

    fn attention_output(&self) -> T {
        let f = self.file_type;
        if self.facts.arch == "falcon" {
            return if f == F::Q3_K_L { T::Q4_K } else { f.default_type() };
        }
        if self.facts.experts == 8 {
            return match f {
                F::Q2_K
                | F::IQ3_XS
                | F::IQ3_XXS
                | F::Q3_K_S
                | F::Q3_K_M
                | F::IQ4_NL
                | F::Q4_K_S
                | F::Q4_K_M
                | F::IQ3_S
                | F::IQ3_M
                | F::IQ4_XS => T::Q5_K,
                other => other.default_type(),
            };
        }
        match f {
            F::Q2_K => T::Q3_K,
            F::IQ3_XXS => T::IQ3_S,
            F::Q3_K_M | F::IQ3_M => T::Q4_K,
            F::Q3_K_L => T::Q5_K,
            other => other.default_type(),
        }
    }

    fn gate_or_up(&self, layer: usize) -> T {
        let layers = self.facts.layers;
        match self.file_type {
            F::IQ3_XS if layer >= layers / 8 && layer < 7 * layers / 8 => T::IQ3_XXS,
            other => other.default_type(),
        }
    }

    /// The layer of a feed-forward tensor: how many of its kind came before, or where experts may lie in
    /// any order, what its name says.
    fn layer(&self, seen: usize, name: &str) -> Result<usize> {
        if self.facts.experts <= 1 {
            return Ok(seen);
        }
        match layer_of(name).map(|layer| layer as usize) {
            Some(layer) if layer < self.facts.layers => Ok(layer),
            _ => Err(Error::new(Kind::NotInALayer { layers: self.facts.layers as u64 })),
        }
    }
}
