//! Counter-based random numbers: the value at an index is a function of (seed, stream, index).
//!
//! Nothing is advanced and nothing is stored, so a dropout mask is recomputed in the backward pass, a
//! resumed run continues with the same numbers, and the result does not depend on the number of
//! threads or on the device. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers:
//! as easy as 1, 2, 3", SC 2011): the key is the seed, the upper half of the counter is the stream and
//! the lower half counts blocks of four numbers.

/// Names one endless sequence of random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RngKey {
    /// The seed of the run.
    pub seed: u64,
    /// What the numbers are for: one stream per use (an initialized matrix, the mask of a layer and step).
    pub stream: u64,
}

/// The multipliers of the two words that are multiplied in a round.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the two key words after a round: golden ratio and sqrt(3) - 1.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Philox4x32-10: four random words for a 128-bit counter under a 64-bit key, both low word first.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "vectorized inside of the loops that are compiled per instruction set"
)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = MULTIPLIERS[0] as u64 * counter[0] as u64;
        let b = MULTIPLIERS[1] as u64 * counter[2] as u64;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The 24 upper bits of a random word as a float in [0, 1).
#[inline]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

impl RngKey {
    /// The four words at indices `4 block .. 4 block + 4`.
    #[inline(always)]
    #[expect(
        clippy::inline_always,
        reason = "vectorized inside of the loops that are compiled per instruction set"
    )]
    pub fn block(self, block: u64) -> [u32; 4] {
        let words = |x: u64| [x as u32, (x >> 32) as u32];
        let ([b0, b1], [s0, s1]) = (words(block), words(self.stream));
        philox([b0, b1, s0, s1], words(self.seed))
    }

    /// The random word at an index.
    pub fn word(self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// A float in [0, 1) at an index: 24 random bits.
    pub fn uniform(self, index: u64) -> f32 {
        unit(self.word(index))
    }

    /// A normally distributed float at an index (Box-Muller: an even index takes the cosine of its pair of
    /// words, an odd one the sine).
    pub fn normal(self, index: u64) -> f32 {
        let words = self.block(index / 4);
        let pair = (index % 4 / 2) as usize;
        // In (0, 1], so that the logarithm is finite.
        let u = (words[2 * pair] as f64 + 1.0) / (u32::MAX as f64 + 1.0);
        let angle = words[2 * pair + 1] as f64 / (u32::MAX as f64 + 1.0) * std::f64::consts::TAU;
        let radius = (-2.0 * u.ln()).sqrt();
        (radius * if index.is_multiple_of(2) { angle.cos() } else { angle.sin() }) as f32
    }

    /// Fills `values` with the uniform numbers of this key in [-bound, bound).
    pub fn fill_uniform(self, values: &mut [f32], bound: f32) {
        for (block, values) in (0..).zip(values.chunks_mut(4)) {
            for (value, word) in values.iter_mut().zip(self.block(block)) {
                *value = (2.0 * unit(word) - 1.0) * bound;
            }
        }
    }

    /// Fills `values` with normal numbers of this key: mean 0, standard deviation `std`.
    pub fn fill_normal(self, values: &mut [f32], std: f32) {
        for (index, value) in (0..).zip(values) {
            *value = std * self.normal(index);
        }
    }

    /// The initialization of a LoRA `A` of `fan_in` columns: uniform in +-1 / sqrt(fan_in), which is
    /// Kaiming's for a leaky ReLU of slope sqrt(5), the default of `torch.nn.Linear` and of PEFT.
    pub fn fill_kaiming_uniform(self, values: &mut [f32], fan_in: usize) {
        self.fill_uniform(values, 1.0 / (fan_in as f32).sqrt());
    }

    /// A number below `limit` at an index, from 64 random bits (bias below `limit` / 2^64).
    pub fn below(self, index: u64, limit: usize) -> usize {
        let words = self.block(index);
        let wide = (words[1] as u128) << 32 | words[0] as u128;
        ((wide * limit as u128) >> 64) as usize
    }

    /// Puts `items` into the random order of this key (Fisher-Yates).
    pub fn shuffle<T>(self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64, i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: RngKey = RngKey { seed: 7, stream: 3 };

    #[test]
    fn philox_gives_the_published_test_vectors() {
        // The known answers of the authors' library Random123, `philox4x32 10`.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn seed_stream_and_index_each_change_the_number() {
        let words = [
            KEY.word(0),
            KEY.word(1),
            KEY.word(4),
            RngKey { seed: 8, ..KEY }.word(0),
            RngKey { seed: 7 | 1 << 40, ..KEY }.word(0),
            RngKey { stream: 4, ..KEY }.word(0),
            RngKey { stream: 3 | 1 << 40, ..KEY }.word(0),
            KEY.word(1 << 40),
        ];
        for (i, a) in words.iter().enumerate() {
            assert!(words[..i].iter().all(|b| a != b), "word {i} repeats");
        }
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let n = 100_000;
        let mut bins = [0_u32; 10];
        for i in 0..n {
            let u = KEY.uniform(i);
            assert!((0.0..1.0).contains(&u));
            bins[(u * 10.0) as usize] += 1;
        }
        // Each bin is binomial with mean 10 000 and deviation 95: five deviations.
        assert!(bins.iter().all(|&count| count.abs_diff(10_000) < 475), "{bins:?}");
        assert_eq!(unit(u32::MAX), 1.0 - 2.0_f32.powi(-24));
    }

    #[test]
    fn normal_numbers_have_the_moments_of_a_normal_distribution() {
        let n = 100_000;
        let moment = |k| (0..n).map(|i| (KEY.normal(i) as f64).powi(k)).sum::<f64>() / n as f64;
        // Deviations of the sample moments: sqrt(1/n), sqrt(2/n), sqrt(15/n), sqrt(96/n).
        assert!(moment(1).abs() < 0.016);
        assert!((moment(2) - 1.0).abs() < 0.023);
        assert!(moment(3).abs() < 0.062);
        assert!((moment(4) - 3.0).abs() < 0.16);
    }

    #[test]
    fn kaiming_uniform_stays_within_its_bound_and_reaches_it() {
        let mut values = [0.0; 1023];
        KEY.fill_kaiming_uniform(&mut values, 64);
        let largest = values.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        assert!(largest <= 0.125 && largest > 0.124, "{largest}");
    }

    #[test]
    fn shuffling_permutes_and_repeats_with_the_key() {
        let shuffled = |key: RngKey| {
            let mut items: Vec<usize> = (0..100).collect();
            key.shuffle(&mut items);
            items
        };
        let items = shuffled(KEY);
        assert_eq!(items, shuffled(KEY));
        assert_ne!(items, shuffled(RngKey { stream: 4, ..KEY }));
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..100));
        assert!(items.iter().enumerate().filter(|&(i, &item)| i == item).count() < 10);
    }
}
