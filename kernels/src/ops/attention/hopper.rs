//! The CUDA twin for compute capability 9.0: the copy engine fetches the tiles, warpgroups multiply them.
//!
//! `attention_hopper.cuh` says how the kernels work. They serve training: as many keys as queries, heads of 64 or 128
//! elements, rows of whole 16 bytes, neither window nor soft-cap; the kernels of [`super::cuda`] serve the rest. A
//! sequence's last tile reads on into the next one and weighs it with zero, so an infinity there spreads.

use std::sync::Arc;

use super::AttentionShape;
use super::cuda::{slots, sum_delta};
use crate::cuda::{Arch, Arg, Cuda, Grid, Source, TensorMap};
use crate::error::Result;
use crate::ids::Ids;
use crate::tensor::{View, ViewMut};

/// Threads of a warpgroup: one copies, the others multiply.
const WARPGROUP: usize = 128;
/// Rows of a tile that a warpgroup multiplies.
const SIDE_ROWS: usize = 64;
/// Rows of a block's tile in the backward, and of forward's tiles of keys.
const ROWS: usize = 128;
/// Threads of a block in the backward.
const THREADS: usize = (1 + ROWS / SIDE_ROWS) * WARPGROUP;
/// Rows of the tiles that stream through the backward.
const MOVING_ROWS: usize = 64;
const FORWARD_STAGES: usize = 2;
const BACKWARD_STAGES: usize = 4;
/// At least the bytes of all barriers of a block.
const BARRIERS: usize = 128;

/// The kernels for one head dimension.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) source: Source,
    head_dim: usize,
    /// Warpgroups that multiply in the forward.
    sides: usize,
}

macro_rules! kernels {
    ($file:literal, $head_dim:literal, $sides:literal) => {
        Kernels {
            source: Source::hopper(
                $file,
                concat!(
                    include_str!($file),
                    "\n#line 1 \"mma.cuh\"\n",
                    include_str!("../../cuda/mma.cuh"),
                    "\n#line 1 \"attention_common.cuh\"\n",
                    include_str!("attention_common.cuh"),
                    "\n#line 1 \"attention_hopper.cuh\"\n",
                    include_str!("attention_hopper.cuh"),
                    "\n#line 1 \"attention_hopper_forward.cuh\"\n",
                    include_str!("attention_hopper_forward.cuh"),
                    "\n#line 1 \"attention_hopper_backward.cuh\"\n",
                    include_str!("attention_hopper_backward.cuh"),
                ),
            ),
            head_dim: $head_dim,
            sides: $sides,
        }
    };
}

pub(crate) static D64: Kernels = kernels!("attention_d64_hopper.cu", 64, 3);
pub(crate) static D128: Kernels = kernels!("attention_d128_hopper.cu", 128, 2);

/// The kernels for this device and shape, if there are any.
pub(super) fn kernels(cuda: &Cuda, shape: &AttentionShape) -> Option<&'static Kernels> {
    let plain = shape.window.is_none() && shape.softcap.is_none() && shape.scale > 0.0;
    let found = [&D64, &D128].into_iter().find(|kernels| kernels.head_dim == shape.head_dim);
    found.filter(|_| plain && cuda.arch() == Arch::HOPPER)
}

/// The kernels that serve a forward with these operands.
pub(super) fn forward_kernels(
    op: &'static str,
    cuda: &Cuda,
    o: &ViewMut<'_>,
    [q, k, v]: [View<'_>; 3],
    shape: &AttentionShape,
) -> Result<Option<&'static Kernels>> {
    let fit = all_fit(op, &[o.as_view(), q, k, v])?;
    // With as many keys as queries the starts of both are the same, and no row lies outside of all sequences.
    Ok(kernels(cuda, shape).filter(|_| fit && q.rows == k.rows))
}

/// The kernels that serve a backward with these operands.
pub(super) fn backward_kernels(
    op: &'static str,
    cuda: &Cuda,
    gradients: [&ViewMut<'_>; 3],
    operands: [View<'_>; 4],
    shape: &AttentionShape,
) -> Result<Option<&'static Kernels>> {
    let fit = all_fit(op, &gradients.map(|gradient| gradient.as_view()))? && all_fit(op, &operands)?;
    Ok(kernels(cuda, shape).filter(|_| fit))
}

fn all_fit(op: &'static str, views: &[View<'_>]) -> Result<bool> {
    for view in views {
        if !TensorMap::fits(view.bf16(op)?, view.stride) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn map(op: &'static str, cuda: &Cuda, view: View<'_>) -> Result<Arg> {
    cuda.tensor_map(view.bf16(op)?, view.rows, view.cols, view.stride).map(Arg::Map)
}

impl Kernels {
    fn tile(&self, rows: usize) -> usize {
        2 * rows * self.head_dim
    }

    fn forward_shared(&self) -> usize {
        // Queries, stages of keys and values.
        self.tile(self.sides * SIDE_ROWS) + 2 * FORWARD_STAGES * self.tile(ROWS) + BARRIERS
    }

    fn backward_shared(&self) -> usize {
        // Two tiles that stay, stages of two that do not, with lse and delta.
        2 * self.tile(ROWS)
            + 2 * BACKWARD_STAGES * (self.tile(MOVING_ROWS) + MOVING_ROWS * size_of::<f32>())
            + BARRIERS
    }

    pub(super) fn forward(
        &'static self,
        op: &'static str,
        cuda: &Arc<Cuda>,
        o: &ViewMut<'_>,
        lse: &ViewMut<'_>,
        [q, k, v]: [View<'_>; 3],
        starts: Ids<'_>,
        shape: &AttentionShape,
    ) -> Result<()> {
        if q.rows == 0 {
            return Ok(());
        }
        let sequences = starts.len() - 1;
        let args = [
            map(op, cuda, q)?,
            map(op, cuda, k)?,
            map(op, cuda, v)?,
            Arg::Ptr(o.bf16(op)?),
            Arg::Ptr(lse.f32(op)?),
            Arg::Ptr(starts.device(op)?),
            Arg::size(sequences),
            Arg::size(shape.n_heads),
            Arg::size(shape.n_heads / shape.n_kv_heads),
            Arg::size(o.stride),
            Arg::size(lse.stride),
            Arg::F32(shape.scale),
        ];
        let blocks = slots(q.rows, sequences, self.sides * SIDE_ROWS) * shape.n_heads;
        let threads = (1 + self.sides) * WARPGROUP;
        let grid = Grid { shared: self.forward_shared(), ..Grid::of(blocks, threads) };
        cuda.launch(&self.source, "attention_forward", grid, &args)
    }

    pub(super) fn backward(
        &'static self,
        op: &'static str,
        cuda: &Arc<Cuda>,
        [dq, dk, dv, delta]: [&ViewMut<'_>; 4],
        [do_, o, lse, q, k, v]: [View<'_>; 6],
        starts: Ids<'_>,
        shape: &AttentionShape,
    ) -> Result<()> {
        if q.rows == 0 {
            return Ok(());
        }
        sum_delta(op, cuda, &self.source, delta, [do_, o], shape)?;
        let sequences = starts.len() - 1;
        let key_blocks = slots(q.rows, sequences, ROWS) * shape.n_kv_heads;
        let mut args = vec![map(op, cuda, q)?, map(op, cuda, k)?, map(op, cuda, v)?, map(op, cuda, do_)?];
        args.extend([dq.bf16(op)?, dk.bf16(op)?, dv.bf16(op)?, delta.f32(op)?, lse.f32(op)?].map(Arg::Ptr));
        args.push(Arg::Ptr(starts.device(op)?));
        args.extend([sequences, key_blocks, shape.n_heads, shape.n_heads / shape.n_kv_heads].map(Arg::size));
        args.extend([dq.stride, dk.stride, dv.stride, delta.stride, lse.stride].map(Arg::size));
        args.push(Arg::F32(shape.scale));
        let blocks = key_blocks + slots(q.rows, sequences, ROWS) * shape.n_heads;
        let grid = Grid { shared: self.backward_shared(), ..Grid::of(blocks, THREADS) };
        cuda.launch(&self.source, "attention_backward", grid, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_are_those_of_the_kernel_files() {
        for kernels in [&D64, &D128] {
            for line in [
                format!("#define HEAD_DIM {}\n", kernels.head_dim),
                format!("constexpr int THREADS = {THREADS};\n"),
                format!("KEYS = {ROWS}, FORWARD_STAGES = {FORWARD_STAGES};\n"),
                format!("constexpr int SIDES = D == 64 ? {} : {};\n", D64.sides, D128.sides),
                format!("constexpr int BACKWARD_STAGES = {BACKWARD_STAGES};\n"),
            ] {
                assert!(kernels.source.text.contains(&line), "{}: {line}", kernels.source.name);
            }
            // What a block may have on 9.0.
            let limit = 227 << 10;
            assert!(kernels.forward_shared() <= limit && kernels.backward_shared() <= limit, "{kernels:?}");
        }
    }
}
