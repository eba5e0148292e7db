//! The sizes of a model, by which the shapes of its tensors are checked, read from its GGUF keys.

use qpeft_formats::gguf::Metadata;

use super::Family;
use crate::error::{Error, Result};

/// A size that is a dimension of some tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// Tokens of the vocabulary.
    Vocab,
    /// Positions with a learned embedding.
    Positions,
    /// Channels between the layers.
    Hidden,
    /// Channels inside the feed-forward.
    Ffn,
    /// Gate and up in one.
    GateUp,
    /// Channels of all query heads.
    Q,
    /// Channels of all key (or value) heads.
    Kv,
    /// Q, K and V in one.
    Qkv,
    /// Channels of one head.
    Head,
}

/// The sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Tokens of the vocabulary.
    pub vocab: u64,
    /// Longest sequence.
    pub positions: u64,
    /// Channels between the layers.
    pub hidden: u64,
    /// Channels inside the feed-forward.
    pub ffn: u64,
    /// Layers.
    pub layers: u32,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Channels of one head.
    pub head_dim: u64,
}

impl Dims {
    /// Reads the keys of a family.
    ///
    /// # Errors
    /// A key is missing or of another type, or the sizes cannot belong together. `place` serves the
    /// messages.
    pub fn read(family: &Family, metadata: &Metadata, vocab: u64, place: &str) -> Result<Dims> {
        let size = |name: &str| -> Result<u64> { Ok(metadata.require_u32(&family.key(name))?.into()) };
        let optional =
            |name: &str| -> Result<Option<u64>> { Ok(metadata.u32(&family.key(name))?.map(u64::from)) };
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let head_dim = match optional("attention.key_length")? {
            Some(length) => length,
            None => hidden.checked_div(heads).unwrap_or(0),
        };
        let dims = Dims {
            vocab,
            positions: size("context_length")?,
            hidden,
            ffn: size("feed_forward_length")?,
            layers: metadata.require_u32(&family.key("block_count"))?,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
        };
        if let Some(length) = optional("attention.value_length")?
            && length != head_dim
        {
            let what = format!("heads of {head_dim} channels in keys and {length} in values");
            return Err(Error::refused(format!("`{place}`: {what} are not supported")));
        }
        dims.check(place)?;
        Ok(dims)
    }

    fn check(&self, place: &str) -> Result<()> {
        let refuse = |what: String| Err(Error::refused(format!("`{place}`: {what}")));
        for (what, size) in [
            ("vocabulary size", self.vocab),
            ("number of positions", self.positions),
            ("hidden size", self.hidden),
            ("feed-forward size", self.ffn),
            ("number of layers", self.layers.into()),
            ("number of heads", self.heads),
            ("number of key/value heads", self.kv_heads),
            ("head dimension", self.head_dim),
        ] {
            if size == 0 {
                return refuse(format!("the {what} is 0"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return refuse(format!("{heads} heads are not a multiple of {kv} key/value heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse(format!("head dimension {} is odd", self.head_dim));
        }
        Ok(())
    }

    /// One size. All factors have 32 bits, so that products of two fit; sums saturate, and no tensor has
    /// such a dimension.
    pub fn of(&self, dim: Dim) -> u64 {
        let kv = self.kv_heads * self.head_dim;
        match dim {
            Dim::Vocab => self.vocab,
            Dim::Positions => self.positions,
            Dim::Hidden => self.hidden,
            Dim::Ffn => self.ffn,
            Dim::GateUp => 2 * self.ffn,
            Dim::Q => self.heads * self.head_dim,
            Dim::Kv => kv,
            Dim::Qkv => (self.heads * self.head_dim).saturating_add(kv).saturating_add(kv),
            Dim::Head => self.head_dim,
        }
    }

    /// The sizes of a tensor, slowest dimension first.
    pub fn shape(&self, dims: &[Dim]) -> Vec<u64> {
        dims.iter().map(|&dim| self.of(dim)).collect()
    }
}
