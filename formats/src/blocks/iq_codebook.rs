//! A codebook made searchable: for every code its point, or the points nearby among which to choose.
//!
//! Rounding each element of a group to its nearest level gives a code that is usually not in the
//! codebook. ggml then tries only the points at the smallest few distances from it, in the order of
//! distance and number, and takes the first of the cheapest; so do we.

use std::array;

/// Rows of a table of costs, `LANES` wide, that hold it for every codebook.
const COSTS: usize = 32;

/// A codebook of groups of `LANES` elements with `LEVELS` levels each.
pub(super) struct Codebook<const LANES: usize, const LEVELS: usize> {
    points: &'static [[u8; LANES]],
    codes: Vec<u16>,
    /// The points to choose from for code c are `nearby[starts[c]..starts[c + 1]]`; a code that is in the
    /// codebook has itself only.
    starts: Vec<u32>,
    nearby: Vec<u16>,
}

/// The point that was chosen for a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Choice {
    pub point: u16,
    /// The group rounded to this very point.
    pub exact: bool,
}

impl<const LANES: usize, const LEVELS: usize> Codebook<LANES, LEVELS> {
    /// Number of codes.
    const CODES: usize = LEVELS.pow(LANES as u32);
    /// Codes of half a group.
    const HALF: usize = LEVELS.pow(LANES as u32 / 2);

    /// Lists for every code the points at the `distances` smallest distances that occur.
    pub(super) fn new(points: &'static [[u8; LANES]], distances: usize) -> Self {
        const { assert!(LANES * LEVELS <= COSTS && LANES.is_multiple_of(2)) };
        let codes: Vec<u16> = points.iter().map(|p| Self::code(p) as u16).collect();
        // Squared distance between two half codes.
        let digits = |code: usize| (0..LANES / 2).map(move |lane| code / LEVELS.pow(lane as u32) % LEVELS);
        let mut half = vec![0u8; Self::HALF * Self::HALF];
        for (i, distance) in half.iter_mut().enumerate() {
            let (a, b) = (i / Self::HALF, i % Self::HALF);
            *distance = digits(a).zip(digits(b)).map(|(a, b)| (a.abs_diff(b) * a.abs_diff(b)) as u8).sum();
        }

        let mut starts = vec![0];
        let mut nearby = Vec::new();
        let mut found = vec![0u8; points.len()];
        for code in 0..Self::CODES {
            let low = &half[code % Self::HALF * Self::HALF..][..Self::HALF];
            let high = &half[code / Self::HALF * Self::HALF..][..Self::HALF];
            for (distance, &c) in found.iter_mut().zip(&codes) {
                let c = usize::from(c);
                *distance = low[c % Self::HALF] + high[c / Self::HALF];
            }
            let mut occurs = [false; 256];
            for &distance in &found {
                occurs[usize::from(distance)] = true;
            }
            let wanted = if occurs[0] { 1 } else { distances };
            for distance in (0..=u8::MAX).filter(|d| occurs[usize::from(*d)]).take(wanted) {
                nearby.extend((0..).zip(&found).filter(|(_, d)| **d == distance).map(|(p, _): (u16, _)| p));
            }
            starts.push(nearby.len() as u32);
        }
        Self { points, codes, starts, nearby }
    }

    /// The code that the digits of a group spell.
    #[inline(always)]
    pub(super) fn code(digits: &[u8; LANES]) -> usize {
        digits.iter().rev().fold(0, |code, digit| code * LEVELS + usize::from(*digit))
    }

    /// The levels of a point.
    #[inline(always)]
    pub(super) fn point(&self, point: u16) -> &'static [u8; LANES] {
        &self.points[usize::from(point)]
    }

    /// The point for a code: the nearby one with the smallest sum of `weight * (scale * value - x)^2`.
    ///
    /// `values` are what the levels stand for. Sums go from left to right and the first of equal ones
    /// wins, as in the reference.
    #[inline(always)]
    pub(super) fn choose(
        &self,
        code: usize,
        x: &[f32; LANES],
        weights: &[f32; LANES],
        scale: f32,
        values: &[f32; LEVELS],
    ) -> Choice {
        let nearby = &self.nearby[self.starts[code] as usize..self.starts[code + 1] as usize];
        let mut best = nearby[0];
        if nearby.len() > 1 {
            // A term of the sum depends on lane and level only.
            let mut costs = [0.0; COSTS];
            for (costs, value) in costs.as_chunks_mut::<LANES>().0.iter_mut().zip(values) {
                *costs = array::from_fn(|lane| {
                    let diff = scale * value - x[lane];
                    weights[lane] * diff * diff
                });
            }
            let mut best_cost = f32::MAX;
            for &point in nearby {
                let levels = self.point(point);
                let mut cost = 0.0;
                for lane in 0..LANES {
                    cost += costs[(usize::from(levels[lane]) * LANES + lane) % COSTS];
                }
                if cost < best_cost {
                    (best, best_cost) = (point, cost);
                }
            }
        }
        Choice { point: best, exact: usize::from(self.codes[usize::from(best)]) == code }
    }
}
