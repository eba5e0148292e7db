//! Causal grouped-query attention over sequences laid end to end.
//!
//! Blocks of queries meet tiles of keys with a streaming softmax, so no T x T matrix exists; the backward
//! pass recomputes the probabilities from the saved log-sum-exp. Tiles above the diagonal are skipped.

use rayon::prelude::*;

use crate::cpu::scratch::with_scratch;
use crate::cpu::shared::SharedMut;
use crate::cpu::tile::{Tile, product};
use crate::cpu::{by_isa, math};
use crate::error::{Error, Result, check};
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "attention_forward";
const BACKWARD: &str = "attention_backward";

/// Queries of one task and keys of one tile: a tile of scores (32 KiB) stays in the first-level cache.
const QUERY_BLOCK: usize = 64;
const KEY_TILE: usize = 128;

/// The heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// H: query heads.
    pub n_heads: usize,
    /// G: key and value heads; query head h uses key head h / (H / G).
    pub n_kv_heads: usize,
    /// D: elements of a head.
    pub head_dim: usize,
    /// What the scores are multiplied by, usually 1 / sqrt(D).
    pub scale: f32,
}

/// Mixes the values of the keys that each query may see.
///
/// o_i = sum_j p_ij v_j, p_ij = exp(s_ij - lse_i), s_ij = scale q_i . k_j, lse_i = ln sum_j exp(s_ij); j runs over
/// the keys of the sequence up to the query's own position. Sequence s has the queries
/// `q_starts[s]..q_starts[s + 1]`, which are the last of its keys `k_starts[s]..k_starts[s + 1]`: equal starts
/// for training, more keys than queries with a cache.
///
/// Shapes: `o`, `q` (Tq, H * D); `k`, `v` (Tk, G * D); `lse` (H, Tq), saved for backward; starts: one more than
/// sequences, from 0 to Tq, and within 0..=Tk.
/// Accumulates: nothing, `o` and `lse` are overwritten.
/// Precision: f32; within 1e-5 of f64, relative to the largest value, for scores up to some ten.
///
/// # Errors
/// Shapes or starts that do not belong together, or no kernel for the device.
///
/// Source: Dao et al., arXiv 2205.14135, algorithm 1; Ainslie et al., arXiv 2305.13245 for the groups.
pub fn attention_forward(
    o: ViewMut,
    lse: ViewMut,
    q: View,
    k: View,
    v: View,
    q_starts: &[u32],
    k_starts: &[u32],
    shape: &AttentionShape,
) -> Result<()> {
    check_heads(FORWARD, q, k, v, shape)?;
    check(FORWARD, "rows of o", q.rows, o.rows)?;
    check(FORWARD, "columns of o", q.cols, o.cols)?;
    check(FORWARD, "rows of lse", shape.n_heads, lse.rows)?;
    check(FORWARD, "columns of lse", q.rows, lse.cols)?;
    check_starts(FORWARD, q_starts, k_starts, q.rows, k.rows)?;
    forward_fast(o, lse, q, k, v, q_starts, k_starts, shape)
}

/// The gradients of [`attention_forward`] with as many queries as keys.
///
/// delta_i = do_i . o_i; ds_ij = p_ij (do_i . v_j - delta_i) scale; dq_i = sum_j ds_ij k_j,
/// dk_j = sum_i ds_ij q_i, dv_j = sum_i p_ij do_i, over the query heads of the group.
///
/// Shapes: `dq`, `do_`, `o`, `q` (T, H * D); `dk`, `dv`, `k`, `v` (T, G * D); `lse`, `delta` (H, T).
/// Accumulates: nothing, `dq`, `dk`, `dv` and the scratch `delta` are overwritten.
/// Precision: f32; within 1e-5 of f64, relative to the largest gradient.
///
/// # Errors
/// Shapes or starts that do not belong together, or no kernel for the device.
///
/// Source: Dao et al., arXiv 2205.14135, algorithm 4.
pub fn attention_backward(
    dq: ViewMut,
    dk: ViewMut,
    dv: ViewMut,
    delta: ViewMut,
    do_: View,
    o: View,
    lse: View,
    q: View,
    k: View,
    v: View,
    starts: &[u32],
    shape: &AttentionShape,
) -> Result<()> {
    check_heads(BACKWARD, q, k, v, shape)?;
    check(BACKWARD, "rows of k", q.rows, k.rows)?;
    let operands = [
        ("rows of dq", "columns of dq", dq.as_view(), q),
        ("rows of dk", "columns of dk", dk.as_view(), k),
        ("rows of dv", "columns of dv", dv.as_view(), v),
        ("rows of do", "columns of do", do_, q),
        ("rows of o", "columns of o", o, q),
    ];
    for (rows, columns, operand, like) in operands {
        check(BACKWARD, rows, like.rows, operand.rows)?;
        check(BACKWARD, columns, like.cols, operand.cols)?;
    }
    check(BACKWARD, "rows of delta", shape.n_heads, delta.rows)?;
    check(BACKWARD, "columns of delta", q.rows, delta.cols)?;
    check(BACKWARD, "rows of lse", shape.n_heads, lse.rows)?;
    check(BACKWARD, "columns of lse", q.rows, lse.cols)?;
    check_starts(BACKWARD, starts, starts, q.rows, k.rows)?;
    backward_fast(dq, dk, dv, delta, do_, o, lse, q, k, v, starts, shape)
}

fn check_heads(op: &'static str, q: View, k: View, v: View, shape: &AttentionShape) -> Result<()> {
    let group = shape.n_heads.checked_div(shape.n_kv_heads).unwrap_or(0);
    check(op, "number of query heads (whole groups)", group * shape.n_kv_heads, shape.n_heads)?;
    let columns = |heads: usize| heads.saturating_mul(shape.head_dim);
    check(op, "columns of q", columns(shape.n_heads), q.cols)?;
    check(op, "columns of k", columns(shape.n_kv_heads), k.cols)?;
    check(op, "columns of v", columns(shape.n_kv_heads), v.cols)?;
    check(op, "rows of v", k.rows, v.rows)
}

fn check_starts(
    op: &'static str,
    q_starts: &[u32],
    k_starts: &[u32],
    queries: usize,
    keys: usize,
) -> Result<()> {
    check(op, "number of key starts", q_starts.len(), k_starts.len())?;
    check(op, "first query start", 0, q_starts.first().map_or(1, |&start| start as usize))?;
    check(op, "last query start", queries, q_starts[q_starts.len() - 1] as usize)?;
    let outside = |what, index: u32, last: usize| {
        Err(Error::IndexOutOfRange { op, what, index: index as usize, limit: last + 1 })
    };
    for (q, k) in q_starts.windows(2).zip(k_starts.windows(2)) {
        if q[0] > q[1] {
            return outside("query start", q[0], q[1] as usize);
        }
        if k[0] > k[1] {
            return outside("key start", k[0], k[1] as usize);
        }
        if q[1] - q[0] > k[1] - k[0] {
            return outside("number of queries of a sequence", q[1] - q[0], (k[1] - k[0]) as usize);
        }
    }
    match k_starts.last() {
        Some(&last) if last as usize > keys => outside("last key start", last, keys),
        _ => Ok(()),
    }
}

// ------------------------------------------------------------------------------------------ CPU

/// Calls `visit(head, query, keys)` for every query of every head with the keys that it sees.
#[cfg(test)]
fn for_each_query(
    q_starts: &[u32],
    k_starts: &[u32],
    shape: &AttentionShape,
    mut visit: impl FnMut(usize, usize, std::ops::Range<usize>),
) {
    for (qs, ks) in q_starts.windows(2).zip(k_starts.windows(2)) {
        let (queries, keys) = (qs[0] as usize..qs[1] as usize, ks[0] as usize..ks[1] as usize);
        for head in 0..shape.n_heads {
            for query in queries.clone() {
                visit(head, query, keys.start..keys.end - (queries.end - 1 - query));
            }
        }
    }
}

/// The elements of a head of a token.
#[cfg(test)]
fn head_of(token: usize, head: usize, heads: usize, dim: usize) -> std::ops::Range<usize> {
    (token * heads + head) * dim..(token * heads + head + 1) * dim
}

#[cfg(test)]
fn dot_naive(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
fn forward_naive(
    o: &mut [f64],
    lse: &mut [f64],
    q: &[f64],
    k: &[f64],
    v: &[f64],
    q_starts: &[u32],
    k_starts: &[u32],
    shape: &AttentionShape,
) {
    let &AttentionShape { n_heads, n_kv_heads, head_dim, scale } = shape;
    let tokens = lse.len() / n_heads;
    for_each_query(q_starts, k_starts, shape, |head, query, keys| {
        let kv_head = head / (n_heads / n_kv_heads);
        let (i, first) = (head_of(query, head, n_heads, head_dim), keys.start);
        let kv = |key| head_of(key, kv_head, n_kv_heads, head_dim);
        let scores: Vec<f64> =
            keys.clone().map(|key| scale as f64 * dot_naive(&q[i.clone()], &k[kv(key)])).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        lse[head * tokens + query] = log_sum;
        o[i.clone()].fill(0.0);
        for key in keys {
            let p = (scores[key - first] - log_sum).exp();
            for (o, v) in o[i.clone()].iter_mut().zip(&v[kv(key)]) {
                *o += p * v;
            }
        }
    });
}

#[cfg(test)]
fn backward_naive(
    dq: &mut [f64],
    dk: &mut [f64],
    dv: &mut [f64],
    delta: &mut [f64],
    do_: &[f64],
    o: &[f64],
    lse: &[f64],
    q: &[f64],
    k: &[f64],
    v: &[f64],
    starts: &[u32],
    shape: &AttentionShape,
) {
    let &AttentionShape { n_heads, n_kv_heads, head_dim, scale } = shape;
    let tokens = lse.len() / n_heads;
    for x in [&mut *dq, &mut *dk, &mut *dv] {
        x.fill(0.0);
    }
    for_each_query(starts, starts, shape, |head, query, keys| {
        let kv_head = head / (n_heads / n_kv_heads);
        let i = head_of(query, head, n_heads, head_dim);
        delta[head * tokens + query] = dot_naive(&do_[i.clone()], &o[i.clone()]);
        for key in keys {
            let j = head_of(key, kv_head, n_kv_heads, head_dim);
            // s = scale q . k, p = exp(s - lse)
            let s = scale as f64 * dot_naive(&q[i.clone()], &k[j.clone()]);
            let p = (s - lse[head * tokens + query]).exp();
            // o = sum p v
            let dp = dot_naive(&do_[i.clone()], &v[j.clone()]);
            let ds = p * (dp - delta[head * tokens + query]) * scale as f64;
            for d in 0..head_dim {
                dv[j.start + d] += p * do_[i.start + d];
                dq[i.start + d] += ds * k[j.start + d];
                dk[j.start + d] += ds * q[i.start + d];
            }
        }
    });
}

fn forward_fast(
    o: ViewMut,
    lse: ViewMut,
    q: View,
    k: View,
    v: View,
    q_starts: &[u32],
    k_starts: &[u32],
    shape: &AttentionShape,
) -> Result<()> {
    let &AttentionShape { n_heads, n_kv_heads, head_dim: dim, scale } = shape;
    let (q_stride, k_stride, v_stride) = (q.stride, k.stride, v.stride);
    let (q, k, v) = (q.cpu(FORWARD)?, k.cpu(FORWARD)?, v.cpu(FORWARD)?);
    let (o, lse) = (SharedMut::new(o, FORWARD)?, SharedMut::new(lse, FORWARD)?);
    if n_heads == 0 || dim == 0 {
        return Ok(());
    }
    q_starts.par_windows(2).zip(k_starts.par_windows(2)).for_each(|(qs, ks)| {
        let (q_start, k_start) = (qs[0] as usize, ks[0] as usize);
        let (queries, keys) = ((qs[1] - qs[0]) as usize, (ks[1] - ks[0]) as usize);
        let blocks = queries.div_ceil(QUERY_BLOCK);
        (0..n_heads * blocks).into_par_iter().for_each(|task| {
            let head = task / blocks;
            let kv_col = head / (n_heads / n_kv_heads) * dim;
            let block = Block::new(task % blocks, queries, keys);
            let rows = block.rows;
            let first = q_start + block.start;
            let q = Tile::rows(&q[first * q_stride + head * dim..], q_stride);
            with_scratch(QUERY_BLOCK * (KEY_TILE + dim + 2), |scratch| {
                let (s, rest) = scratch.split_at_mut(QUERY_BLOCK * KEY_TILE);
                let (mix, rest) = rest.split_at_mut(QUERY_BLOCK * dim);
                let (max, sum) = rest.split_at_mut(QUERY_BLOCK);
                let (mix, max, sum) = (&mut mix[..rows * dim], &mut max[..rows], &mut sum[..rows]);
                mix.fill(0.0);
                max.fill(f32::NEG_INFINITY);
                sum.fill(0.0);
                for tile in block.tiles() {
                    let s = &mut s[..rows * tile.width];
                    let key = k_start + tile.start;
                    let k = Tile::rows(&k[key * k_stride + kv_col..], k_stride);
                    let v = Tile::rows(&v[key * v_stride + kv_col..], v_stride);
                    product(s, false, [rows, tile.width, dim], scale, q, k.transposed());
                    streaming_softmax(s, tile, max, sum, mix, dim);
                    product(mix, true, [rows, dim, tile.width], 1.0, Tile::rows(s, tile.width), v);
                }
                for (i, mix) in mix.chunks_exact(dim).enumerate() {
                    // SAFETY: this task alone writes these queries of this head.
                    let o = unsafe { o.row(first + i, head * dim, dim) };
                    let weight = 1.0 / sum[i];
                    o.iter_mut().zip(mix).for_each(|(o, mix)| *o = mix * weight);
                }
                // SAFETY: as above.
                let lse = unsafe { lse.row(head, first, rows) };
                for ((lse, max), sum) in lse.iter_mut().zip(max).zip(sum) {
                    *lse = *max + sum.ln();
                }
            });
        });
    });
    Ok(())
}

/// Some queries of a sequence, counted within it, and the keys that they see.
struct Block {
    start: usize,
    rows: usize,
    /// Keys that the first query sees.
    seen: usize,
}

/// Some keys of a sequence, counted within it.
#[derive(Clone, Copy)]
struct KeyTile {
    start: usize,
    width: usize,
    /// Keys of the tile that the first query of the block sees: none or less if negative.
    seen: isize,
}

impl Block {
    fn new(index: usize, queries: usize, keys: usize) -> Block {
        let start = index * QUERY_BLOCK;
        Block { start, rows: (queries - start).min(QUERY_BLOCK), seen: keys - queries + start + 1 }
    }

    /// The tiles that at least one query sees, cut off after the last key that it sees.
    fn tiles(&self) -> impl Iterator<Item = KeyTile> {
        let (seen, end) = (self.seen, self.seen + self.rows - 1);
        (0..end).step_by(KEY_TILE).map(move |start| KeyTile {
            start,
            width: (end - start).min(KEY_TILE),
            seen: seen as isize - start as isize,
        })
    }
}

impl KeyTile {
    /// Keys of the tile that query `i` of the block sees.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "called in the bodies that are compiled per instruction set")]
    fn seen_by(&self, i: usize) -> usize {
        (self.seen + i as isize).clamp(0, self.width as isize) as usize
    }
}

by_isa! {
    /// Scores become exp(score - maximum so far), hidden ones 0; earlier sums and mixes shrink to the new maximum.
    fn streaming_softmax(s: &mut [f32], tile: KeyTile, max: &mut [f32], sum: &mut [f32], mix: &mut [f32], dim: usize) {
        for (i, s) in s.chunks_exact_mut(tile.width).enumerate() {
            let (seen, hidden) = s.split_at_mut(tile.seen_by(i));
            hidden.fill(0.0);
            if seen.is_empty() {
                continue;
            }
            let largest = math::max(seen);
            if largest > max[i] {
                let shrink = math::exp(max[i] - largest);
                max[i] = largest;
                sum[i] *= shrink;
                mix[i * dim..(i + 1) * dim].iter_mut().for_each(|mix| *mix *= shrink);
            }
            sum[i] += math::exp_and_sum(seen, max[i]);
        }
    }
}

fn backward_fast(
    dq: ViewMut,
    dk: ViewMut,
    dv: ViewMut,
    delta: ViewMut,
    do_: View,
    o: View,
    lse: View,
    q: View,
    k: View,
    v: View,
    starts: &[u32],
    shape: &AttentionShape,
) -> Result<()> {
    let &AttentionShape { n_heads, n_kv_heads, head_dim: dim, scale } = shape;
    let [do_stride, o_stride, q_stride, k_stride, v_stride] = [do_, o, q, k, v].map(|view| view.stride);
    let lse_stride = lse.stride;
    let (do_, o, lse) = (do_.cpu(BACKWARD)?, o.cpu(BACKWARD)?, lse.cpu(BACKWARD)?);
    let (q, k, v) = (q.cpu(BACKWARD)?, k.cpu(BACKWARD)?, v.cpu(BACKWARD)?);
    let (dq, dk) = (SharedMut::new(dq, BACKWARD)?, SharedMut::new(dk, BACKWARD)?);
    let (dv, delta) = (SharedMut::new(dv, BACKWARD)?, SharedMut::new(delta, BACKWARD)?);
    if n_heads == 0 || dim == 0 {
        return Ok(());
    }
    let group = n_heads / n_kv_heads;
    starts.par_windows(2).for_each(|starts| {
        let (start, tokens) = (starts[0] as usize, (starts[1] - starts[0]) as usize);
        (0..n_kv_heads).into_par_iter().for_each(|kv_head| {
            let kv_col = kv_head * dim;
            with_scratch(2 * QUERY_BLOCK * KEY_TILE + (QUERY_BLOCK + 2 * tokens) * dim, |scratch| {
                let (s, rest) = scratch.split_at_mut(QUERY_BLOCK * KEY_TILE);
                let (dp, rest) = rest.split_at_mut(QUERY_BLOCK * KEY_TILE);
                let (dq_block, rest) = rest.split_at_mut(QUERY_BLOCK * dim);
                rest.fill(0.0);
                let (dk_sum, dv_sum) = rest.split_at_mut(tokens * dim);
                for head in kv_head * group..(kv_head + 1) * group {
                    let col = head * dim;
                    for block in (0..tokens.div_ceil(QUERY_BLOCK)).map(|i| Block::new(i, tokens, tokens)) {
                        let (rows, first) = (block.rows, start + block.start);
                        let do_ = &do_[first * do_stride + col..];
                        // SAFETY: this task alone writes these queries of the heads of its group.
                        let delta = unsafe { delta.row(head, first, rows) };
                        row_dots(delta, do_, do_stride, &o[first * o_stride + col..], o_stride, dim);
                        let lse = &lse[head * lse_stride + first..][..rows];
                        let do_ = Tile::rows(do_, do_stride);
                        let q = Tile::rows(&q[first * q_stride + col..], q_stride);
                        let dq_block = &mut dq_block[..rows * dim];
                        dq_block.fill(0.0);
                        for tile in block.tiles() {
                            let width = tile.width;
                            let key = start + tile.start;
                            let k = Tile::rows(&k[key * k_stride + kv_col..], k_stride);
                            let v = Tile::rows(&v[key * v_stride + kv_col..], v_stride);
                            let (s, dp) = (&mut s[..rows * width], &mut dp[..rows * width]);
                            let keys = tile.start * dim..(tile.start + width) * dim;
                            // s = scale q k^T and o = p v:
                            product(s, false, [rows, width, dim], scale, q, k.transposed());
                            product(dp, false, [rows, width, dim], 1.0, do_, v.transposed());
                            probabilities_and_ds(s, dp, tile, lse, delta, scale);
                            let (p, ds) = (Tile::rows(s, width), Tile::rows(dp, width));
                            product(
                                &mut dv_sum[keys.clone()],
                                true,
                                [width, dim, rows],
                                1.0,
                                p.transposed(),
                                do_,
                            );
                            product(&mut dk_sum[keys], true, [width, dim, rows], 1.0, ds.transposed(), q);
                            product(dq_block, true, [rows, dim, width], 1.0, ds, k);
                        }
                        for (i, row) in dq_block.chunks_exact(dim).enumerate() {
                            // SAFETY: as above.
                            unsafe { dq.row(first + i, col, dim) }.copy_from_slice(row);
                        }
                    }
                }
                for (j, (dk_row, dv_row)) in
                    dk_sum.chunks_exact(dim).zip(dv_sum.chunks_exact(dim)).enumerate()
                {
                    // SAFETY: this task alone writes these keys of this key head.
                    unsafe { dk.row(start + j, kv_col, dim) }.copy_from_slice(dk_row);
                    // SAFETY: as above.
                    unsafe { dv.row(start + j, kv_col, dim) }.copy_from_slice(dv_row);
                }
            });
        });
    });
    Ok(())
}

by_isa! {
    /// y_i = a_i . b_i over rows of `dim` elements.
    fn row_dots(y: &mut [f32], a: &[f32], a_stride: usize, b: &[f32], b_stride: usize, dim: usize) {
        for (i, y) in y.iter_mut().enumerate() {
            *y = math::dot(&a[i * a_stride..][..dim], &b[i * b_stride..][..dim]);
        }
    }
}

by_isa! {
    /// Scores become probabilities, dp becomes ds; both are 0 where hidden.
    fn probabilities_and_ds(s: &mut [f32], dp: &mut [f32], tile: KeyTile, lse: &[f32], delta: &[f32], scale: f32) {
        let rows = s.chunks_exact_mut(tile.width).zip(dp.chunks_exact_mut(tile.width));
        for (i, (s, dp)) in rows.enumerate() {
            let (s, s_hidden) = s.split_at_mut(tile.seen_by(i));
            let (dp, dp_hidden) = dp.split_at_mut(tile.seen_by(i));
            for (s, dp) in s.iter_mut().zip(dp) {
                let p = math::exp(*s - lse[i]);
                *s = p;
                *dp = p * (*dp - delta[i]) * scale;
            }
            s_hidden.fill(0.0);
            dp_hidden.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Mat, Out, assert_close, check_fast, check_gradient, golden, inner, seconds, tolerance,
    };

    fn shape(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttentionShape {
        AttentionShape { n_heads, n_kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
    }

    fn run_naive(
        q: &[f64],
        k: &[f64],
        v: &[f64],
        q_starts: &[u32],
        k_starts: &[u32],
        shape: &AttentionShape,
    ) -> [Vec<f64>; 2] {
        let mut o = vec![f64::NAN; q.len()];
        let mut lse = vec![f64::NAN; q.len() / shape.head_dim];
        forward_naive(&mut o, &mut lse, q, k, v, q_starts, k_starts, shape);
        [o, lse]
    }

    /// Heads, groups and head dimensions; sequences of one token, of odd lengths, and longer than a tile.
    fn cases() -> Vec<(AttentionShape, Vec<u32>)> {
        vec![
            (shape(1, 1, 16), vec![0, 1]),
            (shape(3, 3, 32), vec![0, 7, 7, 8]),
            (shape(9, 3, 64), vec![0, 129, 256]),
            (shape(8, 2, 80), vec![0, 64, 65, 199]),
            (shape(4, 1, 16), vec![0, 391]),
            (shape(2, 1, 6), vec![0]),
        ]
    }

    #[test]
    fn the_fast_forward_equals_the_naive_one() {
        for (shape, starts) in cases() {
            let tokens = *starts.last().unwrap() as usize;
            let q = Mat::random(1, tokens, shape.n_heads * shape.head_dim, 2.0);
            let [k, v] = [2, 3].map(|seed| Mat::random(seed, tokens, shape.n_kv_heads * shape.head_dim, 1.0));
            let [o, lse] = run_naive(&q.f64(), &k.f64(), &v.f64(), &starts, &starts, &shape);
            check_fast(
                &format!("attention_forward {shape:?} {starts:?}"),
                [(Out::Set(q.rows, q.cols), &o), (Out::Set(shape.n_heads, tokens), &lse)],
                [&q, &k, &v],
                tolerance(1e-5, 1e-5),
                |[o, lse], [q, k, v]| attention_forward(o, lse, q, k, v, &starts, &starts, &shape),
            );
        }
    }

    #[test]
    fn queries_are_the_last_of_more_keys() {
        let shape = shape(6, 2, 32);
        let (q_starts, k_starts) = ([0, 1, 1, 71], [3, 203, 210, 400]);
        let q = Mat::random(1, 71, 6 * 32, 2.0);
        let [k, v] = [2, 3].map(|seed| Mat::random(seed, 405, 2 * 32, 1.0));
        let [o, lse] = run_naive(&q.f64(), &k.f64(), &v.f64(), &q_starts, &k_starts, &shape);
        check_fast(
            "attention_forward with a cache",
            [(Out::Set(q.rows, q.cols), &o), (Out::Set(6, 71), &lse)],
            [&q, &k, &v],
            tolerance(1e-5, 1e-5),
            |[o, lse], [q, k, v]| attention_forward(o, lse, q, k, v, &q_starts, &k_starts, &shape),
        );
    }

    #[test]
    fn huge_scores_stay_finite_and_pick_the_largest() {
        let shape = AttentionShape { scale: 1.0, ..shape(1, 1, 16) };
        let starts = [0, 300];
        let q = Mat::new(300, 16, vec![1e3; 300 * 16]);
        // The key that matches best moves forward through the tiles: the maximum grows all the time.
        let k = Mat::new(300, 16, (0..300 * 16).map(|i| (i / 16) as f32).collect());
        let v = Mat::random(3, 300, 16, 1.0);
        let (mut o, mut lse) = (Mat::poisoned(300, 16), Mat::poisoned(1, 300));
        attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            &starts,
            &starts,
            &shape,
        )
        .unwrap();
        assert_eq!(o.values(), v.values());
        assert_eq!(lse.values()[299], 299.0 * 16e3);
    }

    #[test]
    fn the_fast_backward_equals_the_naive_one() {
        for (shape, starts) in cases() {
            let tokens = *starts.last().unwrap() as usize;
            let (q_cols, k_cols) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
            let q = Mat::random(1, tokens, q_cols, 2.0);
            let [k, v] = [2, 3].map(|seed| Mat::random(seed, tokens, k_cols, 1.0));
            let do_ = Mat::random(4, tokens, q_cols, 1.0);
            let [o, lse] = run_naive(&q.f64(), &k.f64(), &v.f64(), &starts, &starts, &shape);
            // Both versions get the rounded outputs, so that only the backward is compared.
            let round = |rows, cols, x: &[f64]| Mat::new(rows, cols, x.iter().map(|&x| x as f32).collect());
            let (o, lse) = (round(tokens, q_cols, &o), round(shape.n_heads, tokens, &lse));
            let mut dq = vec![f64::NAN; tokens * q_cols];
            let [mut dk, mut dv] = [0; 2].map(|_| vec![f64::NAN; tokens * k_cols]);
            let mut delta = vec![f64::NAN; shape.n_heads * tokens];
            backward_naive(
                &mut dq,
                &mut dk,
                &mut dv,
                &mut delta,
                &do_.f64(),
                &o.f64(),
                &lse.f64(),
                &q.f64(),
                &k.f64(),
                &v.f64(),
                &starts,
                &shape,
            );
            check_fast(
                &format!("attention_backward {shape:?} {starts:?}"),
                [
                    (Out::Set(tokens, q_cols), &dq),
                    (Out::Set(tokens, k_cols), &dk),
                    (Out::Set(tokens, k_cols), &dv),
                    (Out::Set(shape.n_heads, tokens), &delta),
                ],
                [&do_, &o, &lse, &q, &k, &v],
                tolerance(1e-5, 3e-5),
                |[dq, dk, dv, delta], [do_, o, lse, q, k, v]| {
                    attention_backward(dq, dk, dv, delta, do_, o, lse, q, k, v, &starts, &shape)
                },
            );
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let shape = shape(4, 2, 4);
        let starts = [0, 1, 6];
        let [q, do_] = [1, 2].map(|seed| Mat::random(seed, 6, 16, 1.0).f64());
        let [k, v] = [3, 4].map(|seed| Mat::random(seed, 6, 8, 1.0).f64());
        let [o, lse] = run_naive(&q, &k, &v, &starts, &starts, &shape);
        let (mut dq, mut dk, mut dv, mut delta) =
            (vec![0.0; 96], vec![0.0; 48], vec![0.0; 48], vec![0.0; 24]);
        backward_naive(&mut dq, &mut dk, &mut dv, &mut delta, &do_, &o, &lse, &q, &k, &v, &starts, &shape);
        let loss =
            |q: &[f64], k: &[f64], v: &[f64]| inner(&run_naive(q, k, v, &starts, &starts, &shape)[0], &do_);
        check_gradient("dq", &q, &dq, |q| loss(q, &k, &v));
        check_gradient("dk", &k, &dk, |k| loss(&q, k, &v));
        check_gradient("dv", &v, &dv, |v| loss(&q, &k, v));
    }

    #[test]
    fn forward_and_backward_equal_pytorch() {
        let golden = golden("attention");
        let shape = AttentionShape { n_heads: 6, n_kv_heads: 2, head_dim: 16, scale: 0.3 };
        let [q, k, v, do_] = ["q", "k", "v", "do"].map(|name| golden.mat(name));
        let starts = golden.indices("starts");
        let (mut o, mut lse) = (Mat::poisoned(q.rows, q.cols), Mat::poisoned(6, q.rows));
        let (mut dq, mut delta) = (o.clone(), lse.clone());
        let [mut dk, mut dv] = [0; 2].map(|_| Mat::poisoned(k.rows, k.cols));
        attention_forward(
            o.view_mut(),
            lse.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            &starts,
            &starts,
            &shape,
        )
        .unwrap();
        attention_backward(
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            delta.view_mut(),
            do_.view(),
            o.view(),
            lse.view(),
            q.view(),
            k.view(),
            v.view(),
            &starts,
            &shape,
        )
        .unwrap();
        for (name, found) in [("o", o), ("dq", dq), ("dk", dk), ("dv", dv)] {
            assert_close(name, &found.values(), &golden.mat(name).values(), tolerance(1e-5, 1e-5));
        }
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let forward = |shape: AttentionShape, q_starts: &[u32], k_starts: &[u32]| {
            let (mut o, mut lse) = (mat(4, 16), mat(2, 4));
            let (q, kv) = (mat(4, 16), mat(5, 8));
            attention_forward(
                o.view_mut(),
                lse.view_mut(),
                q.view(),
                kv.view(),
                kv.view(),
                q_starts,
                k_starts,
                &shape,
            )
            .unwrap_err()
            .to_string()
        };
        let good = shape(2, 1, 8);
        let refusals = [
            (shape(2, 0, 8), vec![0, 4], vec![0, 4], "number of query heads (whole groups) is 2, expected 0"),
            (shape(3, 2, 8), vec![0, 4], vec![0, 4], "number of query heads (whole groups) is 3, expected 2"),
            (shape(2, 1, 4), vec![0, 4], vec![0, 4], "columns of q is 16, expected 8"),
            (shape(2, 2, 8), vec![0, 4], vec![0, 4], "columns of k is 8, expected 16"),
            (good, vec![], vec![], "first query start is 1, expected 0"),
            (good, vec![1, 4], vec![0, 4], "first query start is 1, expected 0"),
            (good, vec![0, 3], vec![0, 4], "last query start is 3, expected 4"),
            (good, vec![0, 4], vec![0, 2, 4], "number of key starts is 3, expected 2"),
            (good, vec![0, 5, 4], vec![0, 5, 5], "query start 5 is outside of 0..5"),
            (good, vec![0, 2, 4], vec![0, 5, 4], "key start 5 is outside of 0..5"),
            (good, vec![0, 4], vec![0, 3], "number of queries of a sequence 4 is outside of 0..4"),
            (good, vec![0, 4], vec![0, 6], "last key start 6 is outside of 0..6"),
        ];
        for (shape, q_starts, k_starts, expected) in refusals {
            let found = forward(shape, &q_starts, &k_starts);
            assert_eq!(found, format!("attention_forward: {expected}"));
        }
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let (sequences, length, shape) = (4, 512, shape(9, 3, 64));
        let tokens = sequences * length;
        let starts: Vec<u32> = (0..=sequences).map(|s| (s * length) as u32).collect();
        let [q, do_] = [1, 2].map(|seed| Mat::random(seed, tokens, 576, 1.0));
        let [k, v] = [3, 4].map(|seed| Mat::random(seed, tokens, 192, 1.0));
        let (mut o, mut lse) = (Mat::poisoned(tokens, 576), Mat::poisoned(9, tokens));
        let (mut dq, mut delta) = (o.clone(), lse.clone());
        let [mut dk, mut dv] = [0; 2].map(|_| Mat::poisoned(tokens, 192));
        let forward = seconds(|| {
            let (o, lse) = (o.view_mut(), lse.view_mut());
            attention_forward(o, lse, q.view(), k.view(), v.view(), &starts, &starts, &shape).unwrap();
        });
        let backward = seconds(|| {
            attention_backward(
                dq.view_mut(),
                dk.view_mut(),
                dv.view_mut(),
                delta.view_mut(),
                do_.view(),
                o.view(),
                lse.view(),
                q.view(),
                k.view(),
                v.view(),
                &starts,
                &shape,
            )
            .unwrap();
        });
        // Two products of 2 D operations per visible pair forward, five backward.
        let giga = (sequences * length * (length + 1) / 2 * 9 * 2 * 64) as f64 / 1e9;
        println!(
            "attention: forward {:.1} ms, {:.1} GFLOP/s; backward {:.1} ms, {:.1} GFLOP/s; both {:.1} GFLOP/s",
            1e3 * forward,
            2.0 * giga / forward,
            1e3 * backward,
            5.0 * giga / backward,
            7.0 * giga / (forward + backward)
        );
    }
}

/// stub
pub fn attention_workspace(_: usize, _: usize, _: usize, _: usize) -> usize {
    0
}
