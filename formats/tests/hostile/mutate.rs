//! Damage: small changes to a valid input, some blind, some to the numbers that its format has.

use std::ops::Range;

use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Numbers at which counts, sizes and offsets go wrong.
const EXTREMES: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0xffff,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 60,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

/// One change.
#[derive(Debug, Clone)]
pub enum Mutation {
    FlipBit {
        at: Index,
        bit: u8,
    },
    SetInteger {
        at: Index,
        width: usize,
        value: u64,
    },
    Truncate {
        at: Index,
    },
    Remove {
        at: Index,
        len: usize,
    },
    Repeat {
        from: Index,
        len: usize,
        at: Index,
    },
    Splice {
        other: Index,
        from: Index,
        len: usize,
        at: Index,
    },
    Insert {
        at: Index,
        bytes: Vec<u8>,
    },
    /// A number of the format itself.
    SetField {
        which: Index,
        value: u64,
    },
}

/// A few changes.
pub fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let at = any::<Index>;
    let extreme = || select(&EXTREMES[..]);
    let one = prop_oneof![
        2 => (at(), 0..8u8).prop_map(|(at, bit)| Mutation::FlipBit { at, bit }),
        2 => (at(), select(&[1, 2, 4, 8][..]), extreme())
            .prop_map(|(at, width, value)| Mutation::SetInteger { at, width, value }),
        1 => at().prop_map(|at| Mutation::Truncate { at }),
        1 => (at(), 1..40usize).prop_map(|(at, len)| Mutation::Remove { at, len }),
        1 => (at(), 1..200usize, at()).prop_map(|(from, len, at)| Mutation::Repeat { from, len, at }),
        1 => (at(), at(), 1..400usize, at())
            .prop_map(|(other, from, len, at)| Mutation::Splice { other, from, len, at }),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, bytes)| Mutation::Insert { at, bytes }),
        6 => (at(), extreme()).prop_map(|(which, value)| Mutation::SetField { which, value }),
    ];
    prop::collection::vec(one, 1..4)
}

/// Applies a change; `seeds` are where foreign parts come from.
pub fn apply(data: &mut Vec<u8>, mutation: &Mutation, seeds: &[Vec<u8>]) {
    if data.is_empty() {
        return;
    }
    match mutation {
        Mutation::FlipBit { at, bit } => {
            let at = at.index(data.len());
            data[at] ^= 1 << bit;
        }
        Mutation::SetInteger { at, width, value } => {
            let at = at.index(data.len());
            set(data, at..at + width, *value);
        }
        Mutation::Truncate { at } => data.truncate(at.index(data.len())),
        Mutation::Remove { at, len } => {
            let at = at.index(data.len());
            data.drain(at..(at + len).min(data.len()));
        }
        Mutation::Repeat { from, len, at } => {
            let from = from.index(data.len());
            let part = data[from..(from + len).min(data.len())].to_vec();
            let at = at.index(data.len());
            data.splice(at..at, part);
        }
        Mutation::Splice { other, from, len, at } => {
            let other = &seeds[other.index(seeds.len())];
            if !other.is_empty() {
                let from = from.index(other.len());
                let part = other[from..(from + len).min(other.len())].to_vec();
                let at = at.index(data.len());
                data.splice(at..at, part);
            }
        }
        Mutation::Insert { at, bytes } => {
            let at = at.index(data.len());
            data.splice(at..at, bytes.iter().copied());
        }
        Mutation::SetField { which, value } => {
            let fields = if data.starts_with(b"GGUF") { gguf_fields(data) } else { numbers(data) };
            if fields.is_empty() {
                return;
            }
            let field = fields[which.index(fields.len())].clone();
            if data.starts_with(b"GGUF") {
                set(data, field, *value);
            } else {
                set_number(data, field, *value);
            }
        }
    }
}

/// Writes the low bytes of a number, as far as there is room.
fn set(data: &mut [u8], range: Range<usize>, value: u64) {
    let end = range.end.min(data.len());
    data[range.start..end].copy_from_slice(&value.to_le_bytes()[..end - range.start]);
}

/// Replaces the digits of a number in a text. Half of the values are written as negative ones.
fn set_number(data: &mut Vec<u8>, range: Range<usize>, value: u64) {
    let header = safetensors_start(data).filter(|&start| start < range.start);
    let text = if value % 4 == 3 { value.cast_signed().to_string() } else { value.to_string() };
    let grown = text.len() as u64;
    let shrunk = range.len() as u64;
    data.splice(range, text.into_bytes());
    // The length of the header goes along, or everything behind it would be read as something else.
    if let Some(start) = header {
        let len = u64::from_le_bytes(data[start..start + 8].try_into().expect("eight bytes"));
        set(data, start..start + 8, (len + grown).saturating_sub(shrunk));
    }
}

/// Where a safetensors file starts: at once, or behind the parts that are packed before it.
fn safetensors_start(data: &[u8]) -> Option<usize> {
    let behind_parts = data.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at + 1).take(2);
    std::iter::once(0).chain(behind_parts).find(|&start| data.get(start + 8) == Some(&b'{'))
}

/// The runs of digits, up to a cap.
fn numbers(data: &[u8]) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for (at, _) in data.iter().enumerate().take(20_000).filter(|(_, byte)| byte.is_ascii_digit()) {
        match found.last_mut() {
            Some(last) if last.end == at => last.end = at + 1,
            _ => found.push(at..at + 1),
        }
    }
    found
}

/// Every integer of a GGUF header: counts, lengths, types, values, dimensions, offsets. Ends where the
/// header no longer makes sense. Written apart from the reader under test.
fn gguf_fields(data: &[u8]) -> Vec<Range<usize>> {
    let mut walk = Walk { data, at: 4, fields: Vec::new() };
    let _ = walk.header();
    walk.fields
}

struct Walk<'a> {
    data: &'a [u8],
    at: usize,
    fields: Vec<Range<usize>>,
}

impl Walk<'_> {
    fn header(&mut self) -> Option<()> {
        self.integer(4)?;
        let (tensors, keys) = (self.integer(8)?, self.integer(8)?);
        for _ in 0..keys {
            self.string()?;
            let kind = self.integer(4)?;
            self.value(kind)?;
        }
        for _ in 0..tensors {
            self.string()?;
            for _ in 0..self.integer(4)? {
                self.integer(8)?;
            }
            self.integer(4)?;
            self.integer(8)?;
        }
        Some(())
    }

    fn value(&mut self, kind: u64) -> Option<()> {
        match kind {
            0 | 1 | 7 => self.integer(1).map(drop),
            2 | 3 => self.integer(2).map(drop),
            4..=6 => self.integer(4).map(drop),
            8 => self.string(),
            9 => {
                let (kind, count) = (self.integer(4)?, self.integer(8)?);
                (kind != 9).then_some(())?;
                (0..count).try_for_each(|_| self.value(kind))
            }
            10..=12 => self.integer(8).map(drop),
            _ => None,
        }
    }

    fn string(&mut self) -> Option<()> {
        let len = usize::try_from(self.integer(8)?).ok()?;
        self.at = self.at.checked_add(len).filter(|&end| end <= self.data.len())?;
        Some(())
    }

    fn integer(&mut self, width: usize) -> Option<u64> {
        let bytes = self.data.get(self.at..self.at + width)?;
        self.fields.push(self.at..self.at + width);
        self.at += width;
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(bytes);
        Some(u64::from_le_bytes(wide))
    }
}
