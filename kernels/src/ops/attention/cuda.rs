//! The CUDA twin: one kernel file per head dimension, FlashAttention-2 style, without atomics or workspace.
//!
//! `attention.cuh` says how the kernels work; what [`super::hopper`] serves goes there. Their grids depend on token and sequence counts alone: a block finds
//! its sequence and tile from the starts on the device, so a captured graph serves every packing.

use std::sync::Arc;

use super::{AttentionShape, hopper};
use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::{Error, Result};
use crate::ids::Ids;
use crate::tensor::{View, ViewMut};

/// Threads of a block.
const THREADS: usize = 128;
/// Of a block of `attention_delta`.
const DELTA_THREADS: usize = 128;

/// The kernels for one head dimension, and the rows of their tiles.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) source: Source,
    head_dim: usize,
    forward_queries: usize,
    forward_keys: usize,
    dq_queries: usize,
    dq_keys: usize,
    dkv_keys: usize,
    dkv_queries: usize,
}

/// The numbers are those of the kernel file, in its order; a test compares them.
macro_rules! kernels {
    ($file:literal, $head_dim:literal, $($tile:literal),*) => {
        Kernels::new(
            Source::new(
                $file,
                concat!(
                    include_str!($file),
                    "\n#line 1 \"mma.cuh\"\n",
                    include_str!("../../cuda/mma.cuh"),
                    "\n#line 1 \"attention_common.cuh\"\n",
                    include_str!("attention_common.cuh"),
                    "\n#line 1 \"attention.cuh\"\n",
                    include_str!("attention.cuh"),
                    "\n#line 1 \"attention_forward.cuh\"\n",
                    include_str!("attention_forward.cuh"),
                    "\n#line 1 \"attention_backward.cuh\"\n",
                    include_str!("attention_backward.cuh"),
                ),
            ),
            $head_dim,
            [$($tile),*],
        )
    };
}

pub(crate) static D16: Kernels = kernels!("attention_d16.cu", 16, 128, 64, 128, 64, 128, 64);
pub(crate) static D32: Kernels = kernels!("attention_d32.cu", 32, 128, 64, 128, 64, 128, 64);
pub(crate) static D64: Kernels = kernels!("attention_d64.cu", 64, 128, 64, 128, 64, 128, 64);
pub(crate) static D80: Kernels = kernels!("attention_d80.cu", 80, 128, 64, 128, 32, 64, 64);
pub(crate) static D96: Kernels = kernels!("attention_d96.cu", 96, 128, 64, 128, 32, 64, 64);
pub(crate) static D128: Kernels = kernels!("attention_d128.cu", 128, 128, 64, 128, 32, 64, 64);
pub(crate) static D256: Kernels = kernels!("attention_d256.cu", 256, 64, 32, 64, 16, 64, 16);

pub(super) static ALL: [&Kernels; 7] = [&D16, &D32, &D64, &D80, &D96, &D128, &D256];

impl Kernels {
    const fn new(source: Source, head_dim: usize, tiles: [usize; 6]) -> Kernels {
        let [forward_queries, forward_keys, dq_queries, dq_keys, dkv_keys, dkv_queries] = tiles;
        Kernels {
            source,
            head_dim,
            forward_queries,
            forward_keys,
            dq_queries,
            dq_keys,
            dkv_keys,
            dkv_queries,
        }
    }

    /// The row of the table for this head dimension.
    pub(super) fn of(op: &'static str, device: &str, head_dim: usize) -> Result<&'static Kernels> {
        ALL.into_iter().find(|kernels| kernels.head_dim == head_dim).ok_or_else(|| {
            let known: Vec<String> = ALL.iter().map(|kernels| kernels.head_dim.to_string()).collect();
            let device =
                format!("{device} and {head_dim} elements a head (it has one for {})", known.join(", "));
            Error::NoKernel { op, device }
        })
    }

    /// Bytes of a row in shared memory: a row that is not whole 128-byte lines gets 16 more.
    fn pitch(&self) -> usize {
        2 * self.head_dim + if self.head_dim.is_multiple_of(64) { 0 } else { 16 }
    }

    fn forward_shared(&self) -> usize {
        // Queries, and two stages of keys and values.
        (self.forward_queries + 4 * self.forward_keys) * self.pitch()
    }

    fn backward_shared(&self) -> usize {
        // Queries and their gradients, two stages of keys and values; or the reverse, with lse and delta.
        let dq = (2 * self.dq_queries + 4 * self.dq_keys) * self.pitch();
        let dkv = (2 * self.dkv_keys + 4 * self.dkv_queries) * self.pitch()
            + 4 * self.dkv_queries * size_of::<f32>();
        dq.max(dkv)
    }

    /// Whether a block sums both dk and dv; else each has its own.
    fn dk_with_dv(&self) -> bool {
        self.head_dim <= 128
    }
}

/// Places for tiles of `rows` tokens in all sequences: at least as many as there are tiles.
pub(super) fn slots(tokens: usize, sequences: usize, rows: usize) -> usize {
    tokens / rows + sequences
}

/// The last arguments of both kernels.
fn scoring(shape: &AttentionShape) -> [Arg; 3] {
    // Wider than any sequence is as good as none.
    let window =
        shape.window.and_then(|window| i32::try_from(window).ok()).filter(|&window| window < 1 << 30);
    [Arg::F32(shape.scale), Arg::F32(shape.softcap.unwrap_or(0.0)), Arg::I32(window.unwrap_or(0))]
}

pub(super) fn forward(
    op: &'static str,
    cuda: &Arc<Cuda>,
    o: &ViewMut<'_>,
    lse: &ViewMut<'_>,
    [q, k, v]: [View<'_>; 3],
    q_starts: Ids<'_>,
    k_starts: Ids<'_>,
    shape: &AttentionShape,
) -> Result<()> {
    if let Some(kernels) = hopper::forward_kernels(op, cuda, o, [q, k, v], shape)? {
        return kernels.forward(op, cuda, o, lse, [q, k, v], q_starts, shape);
    }
    let kernels = Kernels::of(op, &cuda.name(), shape.head_dim)?;
    let sequences = q_starts.len() - 1;
    let mut args = vec![
        Arg::Ptr(o.bf16(op)?),
        Arg::Ptr(lse.f32(op)?),
        Arg::Ptr(q.bf16(op)?),
        Arg::Ptr(k.bf16(op)?),
        Arg::Ptr(v.bf16(op)?),
        Arg::Ptr(q_starts.device(op)?),
        Arg::Ptr(k_starts.device(op)?),
        Arg::size(sequences),
        Arg::size(shape.n_heads),
        Arg::size(shape.n_heads / shape.n_kv_heads),
    ];
    args.extend([o.stride, lse.stride, q.stride, k.stride, v.stride].map(Arg::size));
    args.extend(scoring(shape));
    let blocks = slots(q.rows, sequences, kernels.forward_queries) * shape.n_heads;
    let grid = Grid { shared: kernels.forward_shared(), ..Grid::of(blocks, THREADS) };
    cuda.launch(&kernels.source, "attention_forward", grid, &args)
}

pub(super) fn backward(
    op: &'static str,
    cuda: &Arc<Cuda>,
    [dq, dk, dv, delta]: [&ViewMut<'_>; 4],
    [do_, o, lse, q, k, v]: [View<'_>; 6],
    starts: Ids<'_>,
    shape: &AttentionShape,
) -> Result<()> {
    if let Some(kernels) = hopper::backward_kernels(op, cuda, [dq, dk, dv], [do_, q, k, v], shape)? {
        return kernels.backward(op, cuda, [dq, dk, dv, delta], [do_, o, lse, q, k, v], starts, shape);
    }
    let kernels = Kernels::of(op, &cuda.name(), shape.head_dim)?;
    let (tokens, sequences) = (q.rows, starts.len() - 1);
    sum_delta(op, cuda, &kernels.source, delta, [do_, o], shape)?;

    let key_blocks = slots(tokens, sequences, kernels.dkv_keys) * shape.n_kv_heads;
    let mut args = vec![
        Arg::Ptr(dq.bf16(op)?),
        Arg::Ptr(dk.bf16(op)?),
        Arg::Ptr(dv.bf16(op)?),
        Arg::Ptr(delta.f32(op)?),
        Arg::Ptr(do_.bf16(op)?),
        Arg::Ptr(lse.f32(op)?),
        Arg::Ptr(q.bf16(op)?),
        Arg::Ptr(k.bf16(op)?),
        Arg::Ptr(v.bf16(op)?),
        Arg::Ptr(starts.device(op)?),
        Arg::size(sequences),
        Arg::size(key_blocks),
        Arg::size(shape.n_heads),
        Arg::size(shape.n_heads / shape.n_kv_heads),
    ];
    args.extend([dq, dk, dv, delta].map(|to| Arg::size(to.stride)));
    args.extend([do_, lse, q, k, v].map(|from| Arg::size(from.stride)));
    args.extend(scoring(shape));
    let of_keys = if kernels.dk_with_dv() { key_blocks } else { 2 * key_blocks };
    let of_queries = slots(tokens, sequences, kernels.dq_queries) * shape.n_heads;
    let grid = Grid { shared: kernels.backward_shared(), ..Grid::of(of_keys + of_queries, THREADS) };
    cuda.launch(&kernels.source, "attention_backward", grid, &args)
}

/// delta, which every kernel file has a kernel for.
pub(super) fn sum_delta(
    op: &'static str,
    cuda: &Arc<Cuda>,
    source: &'static Source,
    delta: &ViewMut<'_>,
    [do_, o]: [View<'_>; 2],
    shape: &AttentionShape,
) -> Result<()> {
    // Threads that add up one head of one token.
    let lanes = (shape.head_dim / 8).next_power_of_two();
    let grid = Grid::over(o.rows * shape.n_heads * lanes, DELTA_THREADS);
    let mut args = vec![Arg::Ptr(delta.f32(op)?), Arg::Ptr(do_.bf16(op)?), Arg::Ptr(o.bf16(op)?)];
    args.extend([o.rows, shape.n_heads, delta.stride, do_.stride, o.stride].map(Arg::size));
    cuda.launch(source, "attention_delta", grid, &args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiles_of_the_table_are_those_of_the_kernel_files() {
        for kernels in ALL {
            let sizes = [
                ("HEAD_DIM", kernels.head_dim),
                ("FORWARD_QUERIES", kernels.forward_queries),
                ("FORWARD_KEYS", kernels.forward_keys),
                ("DQ_QUERIES", kernels.dq_queries),
                ("DQ_KEYS", kernels.dq_keys),
                ("DKV_KEYS", kernels.dkv_keys),
                ("DKV_QUERIES", kernels.dkv_queries),
            ];
            for (name, size) in sizes {
                let line = format!("#define {name} {size}\n");
                assert!(kernels.source.text.contains(&line), "{}: {line}", kernels.source.name);
            }
        }
    }

    #[test]
    fn the_tiles_fit_the_shared_memory_of_every_architecture() {
        // What a block may have on 8.6, 8.9 and 12.0, the least of all.
        let limit = 99 << 10;
        for kernels in ALL {
            assert!(kernels.forward_shared() <= limit && kernels.backward_shared() <= limit, "{kernels:?}");
        }
    }

    #[test]
    fn every_tile_has_a_slot_of_its_own() {
        // What find_place of attention.cuh does, over sequences of every length around a tile.
        let rows = 64;
        let mut starts = vec![0];
        for i in 0..400 {
            starts.push(starts[i] + [0, 1, 63, 64, 65, 127, 128, 129, 5, 200][i * 7 % 10]);
        }
        let mut next = 0;
        for (i, sequence) in starts.windows(2).enumerate() {
            let first = sequence[0] / rows + i;
            assert!(first >= next, "sequence {i} starts among the tiles of the one before");
            next = first + (sequence[1] - sequence[0]).div_ceil(rows);
        }
        assert!(next <= slots(starts[400], 400, rows));
    }
}
