//! A codebook made searchable: for every code its point, or the points nearby among which to choose.
//!
//! Rounding each element of a group to its nearest level gives a code that is usually not in the
//! codebook. ggml then tries only the points at the smallest few distances from it, in the order of
//! distance and number, and takes the first of the cheapest; so do we.

/// Groups of a codebook have at most this many elements.
const LANES_MAX: usize = 8;

/// Entries of the table of the first lanes, and of a row of the others.
const HEADS: usize = 128;
const ROW: usize = 8;

/// A codebook of groups of `LANES` elements with `LEVELS` levels each: 8 with 3, or 4 with 8.
pub(super) struct Codebook<const LANES: usize, const LEVELS: usize> {
    points: &'static [[u8; LANES]],
    paths: Vec<Path>,
    /// The points to choose from for code c are `nearby[starts[c]..starts[c + 1]]`; a code that is in the
    /// codebook has itself only.
    starts: Vec<u32>,
    nearby: Vec<u16>,
}

/// Where the terms of a point are in the tables that [`Codebook::choose`] makes.
#[derive(Debug, Clone, Copy)]
struct Path {
    code: u16,
    /// Of the first lanes together.
    head: u8,
    /// Of the levels of the other lanes, in the rows of those lanes.
    tail: [u8; LANES_MAX / 2],
}

/// The terms of the sums that [`Codebook::choose`] compares; made once, as filling it takes time.
pub(super) struct Costs {
    /// Of the first lanes added up, for all their levels.
    heads: [f32; HEADS],
    /// Of each other lane by level.
    tails: [[f32; ROW]; LANES_MAX / 2],
}

impl Costs {
    pub(super) const fn new() -> Self {
        Self { heads: [0.0; HEADS], tails: [[0.0; ROW]; LANES_MAX / 2] }
    }
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
    /// Lanes that are looked up together: their sums are worth a table if levels are few.
    const HEAD: usize = if LEVELS < 4 { 4 } else { 1 };
    /// Entries that level 0 of lane 1 takes in that table, in whole vectors.
    const FIRST: usize = LEVELS.next_multiple_of(4);

    /// Lists for every code the points at the `distances` smallest distances that occur.
    pub(super) fn new(points: &'static [[u8; LANES]], distances: usize) -> Self {
        const { assert!(LANES.is_multiple_of(2) && LANES <= LANES_MAX && LEVELS <= ROW) };
        const { assert!(Self::FIRST * LEVELS.pow(Self::HEAD as u32 - 1) <= HEADS) };
        let paths: Vec<Path> = points.iter().map(Self::path).collect();
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
        let halves: Vec<(u8, u8)> = paths
            .iter()
            .map(|path| usize::from(path.code))
            .map(|code| ((code % Self::HALF) as u8, (code / Self::HALF) as u8))
            .collect();
        for code in 0..Self::CODES {
            let low = &half[code % Self::HALF * Self::HALF..][..Self::HALF];
            let high = &half[code / Self::HALF * Self::HALF..][..Self::HALF];
            let mut occurs = [false; 256];
            for (distance, (l, h)) in found.iter_mut().zip(&halves) {
                *distance = low[usize::from(*l)] + high[usize::from(*h)];
                occurs[usize::from(*distance)] = true;
            }
            let wanted = if occurs[0] { 1 } else { distances };
            let farthest = (0..=u8::MAX).filter(|d| occurs[usize::from(*d)]).take(wanted).max();
            let start = nearby.len();
            nearby.extend((0..).zip(&found).filter(|(_, d)| Some(**d) <= farthest).map(|(p, _): (u16, _)| p));
            nearby[start..].sort_by_key(|point| found[usize::from(*point)]);
            starts.push(nearby.len() as u32);
        }
        Self { points, paths, starts, nearby }
    }

    fn path(levels: &[u8; LANES]) -> Path {
        let head = levels[1..Self::HEAD].iter().rev().fold(0, |head, l| head * LEVELS + usize::from(*l));
        let mut tail = [0; LANES_MAX / 2];
        for (lane, level) in levels[Self::HEAD..].iter().enumerate() {
            tail[lane] = *level;
        }
        Path {
            code: Self::code(levels) as u16,
            head: (head * Self::FIRST + usize::from(levels[0])) as u8,
            tail,
        }
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
        costs: &mut Costs,
        code: usize,
        x: &[f32; LANES],
        weights: &[f32; LANES],
        scale: f32,
        values: &[f32; LEVELS],
    ) -> Choice {
        let nearby = &self.nearby[self.starts[code] as usize..self.starts[code + 1] as usize];
        let mut best = nearby[0];
        if nearby.len() > 1 {
            Self::fill(costs, x, weights, scale, values);
            let Costs { heads, tails } = costs;
            let mut best_cost = f32::MAX;
            for &point in nearby {
                let path = &self.paths[usize::from(point)];
                let mut cost = heads[usize::from(path.head) % HEADS];
                // No term is negative, so what is too much already cannot win.
                if cost >= best_cost {
                    continue;
                }
                for lane in 0..LANES - Self::HEAD {
                    cost += tails[lane][usize::from(path.tail[lane]) % ROW];
                }
                if cost < best_cost {
                    (best, best_cost) = (point, cost);
                }
            }
        }
        Choice { point: best, exact: usize::from(self.paths[usize::from(best)].code) == code }
    }

    /// Fills in what depends on lane and level only.
    #[inline(always)]
    fn fill(costs: &mut Costs, x: &[f32; LANES], weights: &[f32; LANES], scale: f32, values: &[f32; LEVELS]) {
        let Costs { heads, tails } = costs;
        let cost = |lane: usize, level: usize| {
            let diff = scale * values[level] - x[lane];
            weights[lane] * diff * diff
        };
        for level in 0..LEVELS {
            heads[level] = cost(0, level);
        }
        let mut entries = Self::FIRST;
        for lane in 1..Self::HEAD {
            for level in (0..LEVELS).rev() {
                let cost = cost(lane, level);
                for i in 0..entries {
                    heads[level * entries + i] = heads[i] + cost;
                }
            }
            entries *= LEVELS;
        }
        for lane in Self::HEAD..LANES {
            for level in 0..LEVELS {
                tails[lane - Self::HEAD][level] = cost(lane, level);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::iq_grids;
    use super::*;

    #[test]
    fn points_nearby_are_those_at_the_smallest_distances_in_order() {
        let points = &iq_grids::IQ3_XXS;
        let book = Codebook::<4, 8>::new(points, 2);
        for code in 0..4096usize {
            let digits: [usize; 4] = std::array::from_fn(|lane| code >> (3 * lane) & 7);
            let mut all: Vec<(usize, u16)> = points
                .iter()
                .zip(0..)
                .map(|(p, n)| ((0..4).map(|i| usize::from(p[i]).abs_diff(digits[i]).pow(2)).sum(), n))
                .collect();
            all.sort_unstable();
            let second = all.iter().map(|(d, _)| *d).find(|d| *d > all[0].0).expect("points differ");
            let farthest = if all[0].0 == 0 { 0 } else { second };
            let expected: Vec<u16> = all.iter().filter(|(d, _)| *d <= farthest).map(|(_, n)| *n).collect();
            let nearby = &book.nearby[book.starts[code] as usize..book.starts[code + 1] as usize];
            assert_eq!(nearby, expected, "code {code}");
        }
    }

    #[test]
    fn the_chosen_point_costs_least_and_the_first_of_equal_ones_wins() {
        let book = Codebook::<8, 3>::new(&iq_grids::IQ2_XS, 2);
        let values = [1.0, 3.0, 5.0];
        for code in (0..6561).step_by(7) {
            let x: [f32; 8] = std::array::from_fn(|i| ((code * (i + 3) * 2_654_435_761) % 97) as f32 / 16.0);
            let weights: [f32; 8] = std::array::from_fn(|i| ((code + 5 * i) % 4) as f32);
            let cost = |point: u16| {
                (0..8).fold(0.0, |sum, i| {
                    let diff = 1.1 * values[usize::from(book.point(point)[i])] - x[i];
                    sum + weights[i] * diff * diff
                })
            };
            let nearby = &book.nearby[book.starts[code] as usize..book.starts[code + 1] as usize];
            let first = nearby.iter().fold(nearby[0], |best, &p| if cost(p) < cost(best) { p } else { best });
            let choice = book.choose(&mut Costs::new(), code, &x, &weights, 1.1, &values);
            assert_eq!(choice.point, first, "code {code}");
            assert_eq!(choice.exact, Codebook::<8, 3>::code(book.point(first)) == code);
        }
    }
}
