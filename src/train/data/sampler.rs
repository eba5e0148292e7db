//! The order in which examples are met: one integer says where it is, so a resumed run goes on exactly
//! where the interrupted one stopped.

/// An endless walk over `len` examples, each exactly once per epoch, in another order in every epoch.
#[derive(Debug, Clone)]
pub struct Sampler {
    len: usize,
    seed: u64,
    shuffle: bool,
    position: u64,
    /// The order of the epoch that `position` lies in, and which epoch that is.
    order: Option<(u64, Vec<u32>)>,
}

impl Sampler {
    /// A walk from the beginning. `len` is not 0.
    pub fn new(len: usize, seed: u64, shuffle: bool) -> Sampler {
        Sampler::from_position(len, seed, shuffle, 0)
    }

    /// The same walk after `position` examples.
    pub fn from_position(len: usize, seed: u64, shuffle: bool, position: u64) -> Sampler {
        assert!(len > 0 && u32::try_from(len).is_ok(), "a sampler walks over 1 to 2^32 examples");
        Sampler { len, seed, shuffle, position, order: None }
    }

    /// Examples met so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Epochs begun and finished so far, as a number with a fraction.
    pub fn epoch(&self) -> f64 {
        self.position as f64 / self.len as f64
    }

    /// The index of the next example.
    pub fn next_index(&mut self) -> usize {
        let (epoch, at) = (self.position / self.len as u64, (self.position % self.len as u64) as usize);
        self.position += 1;
        if !self.shuffle {
            return at;
        }
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, shuffled(self.len, self.seed, epoch)));
        }
        self.order.as_ref().map_or(at, |(_, order)| order[at] as usize)
    }
}

/// 0..len in the order of (seed, stream): Fisher-Yates, each draw a function of its own counter.
pub(super) fn shuffled(len: usize, seed: u64, stream: u64) -> Vec<u32> {
    let key = mix(seed, stream);
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        // The high half of a 64 x 64 product: uniform below i + 1 up to a bias of 2^-32.
        let below = ((u128::from(mix(key, i as u64)) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, below);
    }
    order
}

/// A random number as a function of a key and a counter: SplitMix64's finalizer (Steele, Lea and Flood,
/// 2014) over the counter times the golden ratio, twice, so that neighbouring keys share nothing.
fn mix(key: u64, counter: u64) -> u64 {
    let finish = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let golden = 0x9E37_79B9_7F4A_7C15u64;
    finish(finish(key.wrapping_add(golden)).wrapping_add(counter.wrapping_add(1).wrapping_mul(golden)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_finalizer_is_splitmix64() {
        // First outputs of SplitMix64 with the seed 1234567, from its reference implementation.
        let golden = 0x9E37_79B9_7F4A_7C15u64;
        let mut state = 1_234_567u64;
        let mut next = || {
            state = state.wrapping_add(golden);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        assert_eq!([next(), next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
        // mix(key, 0) is the second finalizer over the first one of the key.
        let first = 6_457_827_717_110_365_317u64;
        let mut z = first.wrapping_add(golden);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        assert_eq!(mix(1_234_567, 0), z ^ (z >> 31));
    }

    #[test]
    fn every_epoch_meets_every_example_once_and_in_another_order() {
        let mut sampler = Sampler::new(100, 7, true);
        let epochs: Vec<Vec<usize>> =
            (0..3).map(|_| (0..100).map(|_| sampler.next_index()).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        let mut other = Sampler::new(100, 8, true);
        assert_ne!((0..100).map(|_| other.next_index()).collect::<Vec<_>>(), epochs[0]);
        assert_eq!(sampler.position(), 300);
        assert_eq!(sampler.epoch(), 3.0);
    }

    #[test]
    fn a_sampler_resumes_from_its_position() {
        for shuffle in [true, false] {
            let mut whole = Sampler::new(13, 3, shuffle);
            let all: Vec<usize> = (0..60).map(|_| whole.next_index()).collect();
            for stop in [0, 1, 12, 13, 14, 39, 59] {
                let mut resumed = Sampler::from_position(13, 3, shuffle, stop as u64);
                assert_eq!((stop..60).map(|_| resumed.next_index()).collect::<Vec<_>>(), all[stop..]);
            }
            if !shuffle {
                assert_eq!(all[..15], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 1]);
            }
        }
    }

    #[test]
    fn a_shuffle_is_uniform() {
        // 6 orders of 3 examples over 60,000 streams: each about 10,000 times, standard deviation 91.
        let mut counts = std::collections::BTreeMap::new();
        for stream in 0..60_000 {
            *counts.entry(shuffled(3, 42, stream)).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|n| n.abs_diff(10_000) < 500), "{counts:?}");
    }
}
