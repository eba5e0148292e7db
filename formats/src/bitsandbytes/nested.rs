//! Double quantization: the scales of the blocks in 8 bits, relative to their mean.
//!
//! The code book is the signed "dynamic" map: 7 decades, each with twice the steps of the one below, and
//! 0 and 1 (Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561). The
//! order of the operations is that of bitsandbytes and torch on a CPU with 8 float lanes and one thread, because the
//! bytes depend on it.

use std::sync::LazyLock;

use crate::file::Bytes;

/// Scales that share a scale of their own.
pub(super) const NESTED_BLOCKSIZE: usize = 256;

/// Scales in 8 bits.
#[derive(Debug, Clone)]
pub(super) struct Nested {
    /// One code per block of the weight.
    pub codes: Bytes,
    /// Scale of every `blocksize` codes.
    pub absmax: Vec<f32>,
    /// Codes that share a scale.
    pub blocksize: usize,
    /// Value of every code.
    pub map: Box<[f32; 256]>,
    /// Mean of the scales.
    pub offset: f32,
}

impl Nested {
    /// The scale of a block of the weight: `map[code] * absmax + offset`.
    #[inline(always)]
    pub fn scale(&self, block: usize) -> f32 {
        self.map[usize::from(self.codes[block])] * self.absmax[block / self.blocksize] + self.offset
    }

    pub fn size_bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.absmax[..])
    }

    /// Quantizes scales.
    pub fn quantize(scales: &[f32]) -> Nested {
        let offset = mean_of_scales(scales);
        let mut codes = Vec::with_capacity(scales.len());
        let mut absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCKSIZE));
        for block in scales.chunks(NESTED_BLOCKSIZE) {
            let centred: Vec<f32> = block.iter().map(|scale| scale - offset).collect();
            let largest = centred.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let inverse = 1.0 / largest;
            absmax.push(largest);
            // A block of equal scales has code 0, whose value does not matter: it is multiplied by 0.
            codes.extend(centred.iter().map(|x| if largest == 0.0 { 0 } else { code_of(x * inverse) }));
        }
        Nested {
            codes: codes.into(),
            absmax,
            blocksize: NESTED_BLOCKSIZE,
            map: Box::new(*DYNAMIC_MAP),
            offset,
        }
    }
}

/// The dynamic map, sorted.
pub(super) static DYNAMIC_MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut map = Vec::with_capacity(256);
    for (exponent, decade) in [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0].into_iter().enumerate() {
        let steps = 1 << exponent;
        for i in 0..steps {
            // In f32: `f32::midpoint` goes through f64, and torch does not.
            let sum = linspace(i, steps) + linspace(i + 1, steps);
            let value = decade * (sum / 2.0);
            map.extend([value, -value]);
        }
    }
    map.extend([0.0, 1.0]);
    map.sort_by(f32::total_cmp);
    <[f32; 256]>::try_from(map).expect("2 * 127 + 2 values")
});

/// Point i of `steps + 1` points from 0.1 to 1, as torch computes it: from the nearer end, rounded once.
fn linspace(i: usize, steps: usize) -> f32 {
    let step = (1.0 - 0.1f32) / steps as f32;
    if 2 * i < steps { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((steps - i) as f32, 1.0) }
}

/// Positions of the table that stands between an element of -1..=1 and its code.
const POSITIONS: usize = 1 << 16;

/// The nearest code of every position.
static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = &*DYNAMIC_MAP;
    let mut code = 0;
    (0..POSITIONS)
        .map(|k| {
            let x = -1.0 + 2.0 * k as f64 / (POSITIONS - 1) as f64;
            while code < 255 && x > f64::midpoint(f64::from(map[code]), f64::from(map[code + 1])) {
                code += 1;
            }
            code as u8
        })
        .collect()
});

/// The code of an element of -1..=1, through the table: bitsandbytes' CPU path rounds the element to one of
/// 65536 positions first.
fn code_of(x: f32) -> u8 {
    let position = ((x + 1.0) * 32767.5 + 0.5) as usize;
    CODES[position.min(POSITIONS - 1)]
}

/// Mean of scales in f32, bit for bit as torch computes it on one thread with 8 lanes: 4 vectors of 8 partial sums,
/// kept on four levels so that small terms do not meet large sums.
pub fn mean_of_scales(x: &[f32]) -> f32 {
    const LANES: usize = 8;
    let sum = if x.len() < LANES {
        cascade_sum(x.as_chunks::<1>().0)[0]
    } else {
        let (vectors, rest) = x.as_chunks::<LANES>();
        let rest = rest.iter().fold(0.0f32, |a, b| a + b);
        cascade_sum(vectors).iter().fold(rest, |a, b| a + b)
    };
    sum / x.len() as f32
}

const LEVELS: usize = 4;
const INTERLEAVED: usize = 4;

/// Sum of vectors.
fn cascade_sum<const N: usize>(x: &[[f32; N]]) -> [f32; N] {
    let add = |a: &mut [f32; N], b: &[f32; N]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    let (groups, rest) = x.as_chunks::<INTERLEAVED>();
    let power = (ceil_log2(groups.len()) / LEVELS as u32).max(4);
    let step = 1usize << power;
    let mut sums = [[[0.0f32; N]; INTERLEAVED]; LEVELS];
    let (whole, left) = groups.split_at(groups.len() / step * step);
    for (i, steps) in whole.chunks_exact(step).enumerate() {
        for group in steps {
            sums[0].iter_mut().zip(group).for_each(|(sum, x)| add(sum, x));
        }
        let done = (i + 1) * step;
        for level in 1..LEVELS {
            let lower = std::mem::replace(&mut sums[level - 1], [[0.0; N]; INTERLEAVED]);
            sums[level].iter_mut().zip(&lower).for_each(|(sum, x)| add(sum, x));
            if done & ((step - 1) << (level as u32 * power)) != 0 {
                break;
            }
        }
    }
    for group in left {
        sums[0].iter_mut().zip(group).for_each(|(sum, x)| add(sum, x));
    }
    let [mut total, upper @ ..] = sums;
    for level in &upper {
        total.iter_mut().zip(level).for_each(|(sum, x)| add(sum, x));
    }
    let [mut first, others @ ..] = total;
    for x in rest {
        add(&mut first, x);
    }
    for other in &others {
        add(&mut first, other);
    }
    first
}

/// The smallest n with 2^n >= x.
fn ceil_log2(x: usize) -> u32 {
    x.max(1).next_power_of_two().trailing_zeros()
}
