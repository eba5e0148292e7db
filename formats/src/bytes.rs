//! A little-endian cursor over the bytes of a file: every read is checked and errors carry the offset.

use crate::error::{Error, Kind, Result};

/// A position in a byte slice that only moves forward.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, pos: 0 }
    }

    /// Bytes from the start of the file.
    pub fn offset(&self) -> u64 {
        self.pos as u64
    }

    /// Bytes that have not been read.
    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    /// An error at the current position.
    pub fn error(&self, kind: Kind) -> Error {
        Error::new(kind).offset(self.offset())
    }

    /// The next `len` bytes, which are the file's `what`.
    pub fn take(&mut self, len: u64, what: &'static str) -> Result<&'a [u8]> {
        let left = self.left();
        if len > left {
            return Err(self.error(Kind::Truncated { what, needed: len, left }));
        }
        let start = self.pos;
        self.pos += len as usize;
        Ok(&self.bytes[start..self.pos])
    }

    /// The next `N` bytes, for `from_le_bytes`.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub fn u32(&mut self, what: &'static str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &'static str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of `what`, each at least `min_bytes` long in the file, at most `cap` of them.
    pub fn count(&mut self, what: &'static str, min_bytes: u64, cap: u64) -> Result<usize> {
        let offset = self.offset();
        let found = self.u64(what)?;
        let limit = cap.min(self.left() / min_bytes);
        if found > limit {
            return Err(Error::new(Kind::TooMany { what, found, limit }).offset(offset));
        }
        Ok(found as usize)
    }

    /// A string of at most `cap` bytes: u64 length, then UTF-8 without a closing zero.
    pub fn string(&mut self, what: &'static str, cap: u64) -> Result<&'a str> {
        let offset = self.offset();
        let found = self.u64(what)?;
        if found > cap {
            return Err(Error::new(Kind::TooLong { what, found, limit: cap }).offset(offset));
        }
        let bytes = self.take(found, what)?;
        std::str::from_utf8(bytes).map_err(|_| Error::new(Kind::NotUtf8 { what }).offset(offset))
    }
}
