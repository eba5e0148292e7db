//! The fast CPU version: blocks of queries meet tiles of keys with a streaming softmax, so no T x T matrix exists;
//! the backward pass recomputes the probabilities from the saved log-sum-exp. Tiles that are all hidden are skipped.

use std::ops::Range;

use rayon::prelude::*;

use super::AttentionShape;
use crate::cpu::scratch::with_scratch;
use crate::cpu::shared::SharedMut;
use crate::cpu::tile::{Tile, product};
use crate::cpu::{by_isa, math};
use crate::error::Result;
use crate::tensor::{View, ViewMut};

/// Queries of one task and keys of one tile: a tile of scores (32 KiB) stays in the first-level cache.
const QUERY_BLOCK: usize = 64;
const KEY_TILE: usize = 128;

pub(super) fn forward(
    op: &'static str,
    o: ViewMut,
    lse: ViewMut,
    q: View,
    k: View,
    v: View,
    q_starts: &[u32],
    k_starts: &[u32],
    shape: &AttentionShape,
) -> Result<()> {
    let &AttentionShape { n_heads, n_kv_heads, head_dim: dim, scale, softcap, window } = shape;
    let (q_stride, k_stride, v_stride) = (q.stride, k.stride, v.stride);
    let (q, k, v) = (q.cpu(op)?, k.cpu(op)?, v.cpu(op)?);
    let (o, lse) = (SharedMut::new(o, op)?, SharedMut::new(lse, op)?);
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
            let block = Block::new(task % blocks, queries, keys, window);
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
                    if let Some(softcap) = softcap {
                        cap(s, softcap);
                    }
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
    /// Keys up to the first query's own.
    seen: usize,
    /// Of these, how many the first query sees at most.
    window: usize,
}

/// Some keys of a sequence, counted within it.
#[derive(Clone, Copy)]
struct KeyTile {
    start: usize,
    width: usize,
    /// Keys of the tile up to the own one of the block's first query: none or less if negative.
    seen: isize,
    /// Of these, how many a query sees at most.
    window: isize,
}

impl Block {
    fn new(index: usize, queries: usize, keys: usize, window: Option<usize>) -> Block {
        let start = index * QUERY_BLOCK;
        Block {
            start,
            rows: (queries - start).min(QUERY_BLOCK),
            seen: keys - queries + start + 1,
            window: window.map_or(keys, |window| window.min(keys)),
        }
    }

    /// The tiles that at least one query sees, cut off after the last key that it sees.
    fn tiles(&self) -> impl Iterator<Item = KeyTile> {
        let (seen, end, window) = (self.seen, self.seen + self.rows - 1, self.window);
        let first = seen.saturating_sub(window) / KEY_TILE * KEY_TILE;
        (first..end).step_by(KEY_TILE).map(move |start| KeyTile {
            start,
            width: (end - start).min(KEY_TILE),
            seen: seen as isize - start as isize,
            window: window as isize,
        })
    }
}

impl KeyTile {
    /// Keys of the tile that query `i` of the block sees.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "called in the bodies that are compiled per instruction set")]
    fn seen_by(&self, i: usize) -> Range<usize> {
        let end = self.seen + i as isize;
        let inside = |key: isize| key.clamp(0, self.width as isize) as usize;
        inside(end - self.window)..inside(end)
    }
}

by_isa! {
    /// Scores become softcap tanh(score / softcap).
    fn cap(s: &mut [f32], softcap: f32) {
        // tanh x = 2 / (1 + e^-2x) - 1
        let per_softcap = 2.0 / softcap;
        for s in s {
            *s = softcap * (2.0 * math::sigmoid(*s * per_softcap) - 1.0);
        }
    }
}

by_isa! {
    /// Scores become exp(score - maximum so far), hidden ones 0; earlier sums and mixes shrink to the new maximum.
    fn streaming_softmax(s: &mut [f32], tile: KeyTile, max: &mut [f32], sum: &mut [f32], mix: &mut [f32], dim: usize) {
        for (i, s) in s.chunks_exact_mut(tile.width).enumerate() {
            let keys = tile.seen_by(i);
            s[..keys.start].fill(0.0);
            s[keys.end..].fill(0.0);
            let seen = &mut s[keys];
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

pub(super) fn backward(
    op: &'static str,
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
    let &AttentionShape { n_heads, n_kv_heads, head_dim: dim, scale, softcap, window } = shape;
    let [do_stride, o_stride, q_stride, k_stride, v_stride] = [do_, o, q, k, v].map(|view| view.stride);
    let lse_stride = lse.stride;
    let (do_, o, lse) = (do_.cpu(op)?, o.cpu(op)?, lse.cpu(op)?);
    let (q, k, v) = (q.cpu(op)?, k.cpu(op)?, v.cpu(op)?);
    let (dq, dk) = (SharedMut::new(dq, op)?, SharedMut::new(dk, op)?);
    let (dv, delta) = (SharedMut::new(dv, op)?, SharedMut::new(delta, op)?);
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
                    for block in
                        (0..tokens.div_ceil(QUERY_BLOCK)).map(|i| Block::new(i, tokens, tokens, window))
                    {
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
                            if let Some(softcap) = softcap {
                                cap(s, softcap);
                            }
                            let per_softcap = softcap.map_or(0.0, f32::recip);
                            probabilities_and_ds(s, dp, tile, lse, delta, scale, per_softcap);
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
    /// Scores become probabilities, dp becomes ds; both are 0 where hidden. `per_softcap` is 0 without a cap.
    fn probabilities_and_ds(s: &mut [f32], dp: &mut [f32], tile: KeyTile, lse: &[f32], delta: &[f32], scale: f32, per_softcap: f32) {
        let rows = s.chunks_exact_mut(tile.width).zip(dp.chunks_exact_mut(tile.width));
        for (i, (s, dp)) in rows.enumerate() {
            let keys = tile.seen_by(i);
            for hidden in [&mut *s, &mut *dp] {
                hidden[..keys.start].fill(0.0);
                hidden[keys.end..].fill(0.0);
            }
            for (s, dp) in s[keys.clone()].iter_mut().zip(&mut dp[keys]) {
                let p = math::exp(*s - lse[i]);
                let tanh = *s * per_softcap;
                *s = p;
                *dp = p * (*dp - delta[i]) * scale * (1.0 - tanh * tanh);
            }
        }
    }
}
