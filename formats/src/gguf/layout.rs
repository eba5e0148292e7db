//! Where the data of each tensor lies. This arithmetic exists once, for the reader and the writer.

use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Result};

/// `general.alignment` of a file that does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// Bytes from the start of the data section, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub offset: u64,
    pub size: u64,
}

/// Hands out extents in file order: each tensor starts where the padding of the one before ends.
#[derive(Debug)]
pub(crate) struct Layout {
    alignment: u64,
    end: u64,
}

impl Layout {
    pub fn new(alignment: u64) -> Layout {
        Layout { alignment, end: 0 }
    }

    /// Places the next tensor.
    pub fn push(&mut self, ty: GgmlType, shape: &[u64]) -> Result<Extent> {
        let extent = Extent { offset: self.end, size: tensor_bytes(ty, shape)? };
        self.end = extent
            .offset
            .checked_add(extent.size)
            .and_then(|end| align_up(end, self.alignment))
            .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "tensor offsets" }))?;
        Ok(extent)
    }
}

/// The next multiple of `alignment`, a power of two.
pub(crate) fn align_up(n: u64, alignment: u64) -> Option<u64> {
    n.checked_next_multiple_of(alignment)
}

/// Bytes of a tensor, without padding. A tensor without dimensions holds one element.
pub(crate) fn tensor_bytes(ty: GgmlType, shape: &[u64]) -> Result<u64> {
    let row_len = shape.first().copied().unwrap_or(1);
    if !row_len.is_multiple_of(ty.block_len() as u64) {
        return Err(Error::new(Kind::PartialBlock { dtype: ty.name(), block_len: ty.block_len(), row_len }));
    }
    // A zero must not hide that the other dimensions overflow, because rows and row length are asked
    // for separately; and ggml counts elements in signed 64-bit numbers.
    let overflow = |what| move || Error::new(Kind::SizeOverflow { what });
    shape
        .iter()
        .try_fold(1_u64, |product, &dim| product.checked_mul(dim.max(1)))
        .filter(|&product| i64::try_from(product).is_ok() && usize::try_from(product).is_ok())
        .ok_or_else(overflow("elements"))?;
    (shape.iter().product::<u64>() / ty.block_len() as u64)
        .checked_mul(ty.block_bytes() as u64)
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(overflow("tensor bytes"))
}
