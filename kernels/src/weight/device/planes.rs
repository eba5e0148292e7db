//! Which parts of a ggml block lie together on a device, for every type: one row of the table each.
//!
//! A block of 210 or 34 bytes has no field that is aligned, and its codes lie where a CPU's vectors want them. On a device each
//! field of all blocks is a plane of its own, and codes are in the order of the elements, so that one aligned
//! word holds those of eight neighbours. The kernels name the planes by their position here.

use qpeft_formats::GgmlType;
use rayon::prelude::*;

/// A part of every block.
pub(super) enum Plane {
    /// The bytes from one position on, as they are.
    Bytes { from: usize, len: usize },
    /// So many bits of every element, the first element in the lowest; `bit` says at which bit of the
    /// block those of an element start.
    Codes { bits: usize, bit: fn(usize) -> usize },
}

use Plane::{Bytes, Codes};

/// Planes of a weight at most.
pub(crate) const PLANES: usize = 4;

/// The 16-bit scale at the start of a block.
const D: Plane = Bytes { from: 0, len: 2 };
/// Two of them, or a scale and a minimum.
const D_AND_M: Plane = Bytes { from: 0, len: 4 };
/// Scales, minima and their scales in the K-quants of 4 and 5 bits.
const HEAD: Plane = Bytes { from: 0, len: 16 };

/// Nibbles of 32 elements from byte `FROM` on: elements 0..16 low, 16..32 high.
const fn nibbles<const FROM: usize>() -> Plane {
    Codes { bits: 4, bit: |i| 8 * (FROM + i % 16) + 4 * (i / 16) }
}

/// Nibbles of 256 elements from byte `FROM` on: of each 64 the first 32 low, the others high.
const fn super_nibbles<const FROM: usize>() -> Plane {
    Codes { bits: 4, bit: |i| 8 * (FROM + 32 * (i / 64) + i % 32) + 4 * (i / 32 % 2) }
}

/// Pairs of bits of 256 elements from byte `FROM` on: of each 128 four runs of 32.
const fn super_pairs<const FROM: usize>() -> Plane {
    Codes { bits: 2, bit: |i| 8 * (FROM + 32 * (i / 128) + i % 32) + 2 * (i / 32 % 4) }
}

/// Bits of 256 elements from byte `FROM` on: eight runs of 32.
const fn super_bits<const FROM: usize>() -> Plane {
    Codes { bits: 1, bit: |i| 8 * (FROM + i % 32) + i / 32 }
}

/// The planes of a block type; none of the dense types, whose rows lie as they are.
#[rustfmt::skip]
pub(super) fn planes(dtype: GgmlType) -> Vec<Plane> {
    const LOW_6: Plane = Codes { bits: 4, bit: |i| 8 * (64 * (i / 128) + 32 * (i / 32 % 2) + i % 32) + 4 * (i / 64 % 2) };
    const XS: Plane = Codes { bits: 4, bit: |i| 8 * (8 + 16 * (i / 32) + i % 16) + 4 * (i / 16 % 2) };
    const NV: Plane = Codes { bits: 4, bit: |i| 8 * (4 + 8 * (i / 16) + i % 8) + 4 * (i / 8 % 2) };
    const FIFTH: Plane = Codes { bits: 1, bit: |i| 16 + i };
    const FIFTH_1: Plane = Codes { bits: 1, bit: |i| 32 + i };
    match dtype {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 | GgmlType::F64
        | GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 => vec![],
        GgmlType::Q4_0 | GgmlType::IQ4_NL => vec![nibbles::<2>(), D],
        GgmlType::Q4_1 => vec![nibbles::<4>(), D_AND_M],
        GgmlType::Q5_0 => vec![nibbles::<6>(), D, FIFTH],
        GgmlType::Q5_1 => vec![nibbles::<8>(), D_AND_M, FIFTH_1],
        GgmlType::Q8_0 => vec![Bytes { from: 2, len: 32 }, D],
        // Sums of the codes, which follow from the rest, stay behind: here and in Q8_K.
        GgmlType::Q8_1 => vec![Bytes { from: 4, len: 32 }, D],
        GgmlType::Q8_K => vec![Bytes { from: 4, len: 256 }, Bytes { from: 0, len: 4 }],
        GgmlType::Q1_0 | GgmlType::Q2_0 => vec![Bytes { from: 2, len: 16 }, D],
        GgmlType::TQ1_0 => vec![Bytes { from: 0, len: 48 }, Bytes { from: 52, len: 2 }, Bytes { from: 48, len: 4 }],
        GgmlType::TQ2_0 => vec![super_pairs::<0>(), Bytes { from: 64, len: 2 }],
        GgmlType::Q2_K => vec![super_pairs::<16>(), Bytes { from: 80, len: 4 }, Bytes { from: 0, len: 16 }],
        GgmlType::Q3_K => vec![super_pairs::<32>(), Bytes { from: 108, len: 2 }, super_bits::<0>(), Bytes { from: 96, len: 12 }],
        GgmlType::Q4_K => vec![super_nibbles::<16>(), HEAD],
        GgmlType::Q5_K => vec![super_nibbles::<48>(), HEAD, super_bits::<16>()],
        GgmlType::Q6_K => vec![LOW_6, Bytes { from: 208, len: 2 }, super_pairs::<128>(), Bytes { from: 192, len: 16 }],
        GgmlType::IQ4_XS => vec![XS, Bytes { from: 0, len: 8 }],
        GgmlType::MXFP4 => vec![nibbles::<1>(), Bytes { from: 0, len: 1 }],
        GgmlType::NVFP4 => vec![NV, Bytes { from: 0, len: 4 }],
        GgmlType::IQ2_XXS => vec![Bytes { from: 2, len: 64 }, D],
        GgmlType::IQ2_XS => vec![Bytes { from: 2, len: 64 }, D, Bytes { from: 66, len: 8 }],
        GgmlType::IQ2_S => vec![Bytes { from: 2, len: 64 }, D, Bytes { from: 66, len: 16 }],
        GgmlType::IQ3_XXS => vec![Bytes { from: 2, len: 64 }, D, Bytes { from: 66, len: 32 }],
        GgmlType::IQ3_S => vec![Bytes { from: 2, len: 64 }, D, Bytes { from: 66, len: 44 }],
        GgmlType::IQ1_S => vec![Bytes { from: 2, len: 32 }, D, Bytes { from: 34, len: 16 }],
        GgmlType::IQ1_M => vec![Bytes { from: 0, len: 32 }, Bytes { from: 32, len: 16 }, Bytes { from: 48, len: 8 }],
    }
}

/// Blocks that one task moves.
const BLOCKS_PER_TASK: usize = 1024;

impl Plane {
    /// Bytes that a block of `dtype` has in the plane.
    pub(super) fn bytes_per_block(&self, dtype: GgmlType) -> usize {
        match self {
            Bytes { len, .. } => *len,
            Codes { bits, .. } => dtype.block_len() * bits / 8,
        }
    }

    /// The part of whole blocks of `dtype`, in parallel.
    pub(super) fn pack(&self, dtype: GgmlType, blocks: &[u8]) -> Vec<u8> {
        let (from, to) = (dtype.block_bytes(), self.bytes_per_block(dtype));
        let mut packed = vec![0; blocks.len() / from * to];
        let tasks =
            blocks.par_chunks(BLOCKS_PER_TASK * from).zip(packed.par_chunks_mut(BLOCKS_PER_TASK * to));
        match self {
            Bytes { from: start, len } => tasks.for_each(|(blocks, packed)| {
                for (block, packed) in blocks.chunks_exact(from).zip(packed.chunks_exact_mut(to)) {
                    packed.copy_from_slice(&block[*start..start + len]);
                }
            }),
            Codes { bits, bit } => {
                let places: Vec<(usize, usize)> =
                    (0..dtype.block_len()).map(bit).map(|bit| (bit / 8, bit % 8)).collect();
                let (per_byte, mask) = (8 / bits, (1 << bits) - 1);
                tasks.for_each(|(blocks, packed)| {
                    for (block, packed) in blocks.chunks_exact(from).zip(packed.chunks_exact_mut(to)) {
                        for (packed, places) in packed.iter_mut().zip(places.chunks_exact(per_byte)) {
                            *packed = places.iter().rev().fold(0, |packed, &(byte, shift)| {
                                packed << (bits % 8) | (block[byte] >> shift) & mask
                            });
                        }
                    }
                });
            }
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_hold_every_bit_of_a_block_once() {
        for dtype in GgmlType::ALL {
            let (bits, mut taken) = (8 * dtype.block_bytes(), Vec::new());
            for plane in planes(dtype) {
                match plane {
                    Bytes { from, len } => taken.extend(8 * from..8 * (from + len)),
                    Codes { bits, bit } => {
                        taken.extend((0..dtype.block_len()).flat_map(|i| bit(i)..bit(i) + bits));
                    }
                }
            }
            taken.sort_unstable();
            let expected: Vec<usize> = match dtype {
                _ if dtype.is_dense() => vec![],
                GgmlType::Q8_1 => (0..16).chain(32..bits).collect(),
                GgmlType::Q8_K => (0..8 * 260).collect(),
                _ => (0..bits).collect(),
            };
            assert_eq!(taken, expected, "{dtype}");
            assert!(planes(dtype).len() <= PLANES);
        }
    }

    #[test]
    fn codes_come_in_the_order_of_the_elements() {
        // Of Q4_0, byte j holds elements j and j + 16; of Q6_K, four planes take part.
        let block: Vec<u8> = [0, 0].into_iter().chain((0..16).map(|j| j | (15 - j) << 4)).collect();
        let packed = planes(GgmlType::Q4_0)[0].pack(GgmlType::Q4_0, &block);
        let codes: Vec<u8> = packed.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect();
        assert_eq!(codes, (0..16).chain((0..16).rev()).collect::<Vec<u8>>());
        let blocks: Vec<u8> = (0..3 * 210).map(|i| (i * 7 % 251) as u8).collect();
        let scales = planes(GgmlType::Q6_K)[3].pack(GgmlType::Q6_K, &blocks);
        assert_eq!(scales[16..32], blocks[210 + 192..210 + 208]);
    }
}
