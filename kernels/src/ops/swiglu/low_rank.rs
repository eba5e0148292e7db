//! The backward pass of the activation, and all that the low-rank branches on either side of it take from the same
//! elements, in one pass over memory.
//!
//! y feeds the branch of the linear above; gate and up each come from a linear with a branch. Apart, three ops write y and
//! read it, dgate and dup once more.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::super::gated;
use super::{swiglu_backward, swiglu_backward_scaled};
use crate::cpu::scratch::with_scratch;
use crate::cuda::compile::Arch;
use crate::cuda::{Arg, Cuda, Grid, Scratch, Source};
use crate::device::Device;
use crate::error::{Error, Result, check};
use crate::ops::low_rank::{Branch, low_rank_branch_gradients, low_rank_projection_backward};
use crate::tensor::{Dtype, View, ViewMut};

const OP: &str = "swiglu_backward_low_rank";

/// The factors of gate and of up, and the gradients of what they are multiples of; see [`swiglu_backward_scaled`].
#[derive(Debug)]
pub struct Scales<'a> {
    /// (1, N) each.
    pub dscales: [ViewMut<'a>; 2],
    /// (1, N) each.
    pub factors: [View<'a>; 2],
    /// (1, N) each.
    pub scales: [View<'a>; 2],
}

/// Three ops at once: the gradients of the activation, of the projection that reads its result, and of the branches that
/// gate and up come from.
///
/// dgate, dup, y as [`swiglu_backward`], or with `scales` as [`swiglu_backward_scaled`]; dA += dh^T y as
/// [`low_rank_projection_backward`]; for gate and up dh = dgate b, dB += s diag(g) dgate^T h as
/// [`low_rank_branch_gradients`]. y itself is kept nowhere.
///
/// Shapes: `dgate`, `dup`, `dy`, `gate`, `up` (T, N); `da` (R, N); `dh` (T, R); ranks may differ. On CUDA `dgate` and `dup`
/// may lie where `gate` and `up` do, with the same strides.
/// Accumulates: `da`, `db` and `dscales` are added to; all else is overwritten.
/// Precision: as the three ops. On CUDA y, dgate and dup are rounded to bf16 before products, and the sums over tokens are
/// split among blocks, by the number of multiprocessors. Equal bits for equal operands on the same device.
///
/// # Errors
/// Shapes that do not belong together, or a device where [`serves`] says no.
///
/// Source: the three ops.
pub fn swiglu_backward_low_rank(
    mut dgate: ViewMut,
    mut dup: ViewMut,
    da: ViewMut,
    branches: [Branch; 2],
    scales: Option<Scales>,
    dh: View,
    dy: View,
    gate: View,
    up: View,
) -> Result<()> {
    gated::check_gradients(OP, [&dgate, &dup], [dy, gate, up])?;
    check(OP, "rows of da", dh.cols, da.rows)?;
    check(OP, "columns of da", gate.cols, da.cols)?;
    check(OP, "rows of dh", gate.rows, dh.rows)?;
    for branch in &branches {
        check_branch(branch, gate)?;
    }
    if let Some(Scales { dscales, factors, scales }) = &scales {
        gated::check_factors(OP, *factors, gate)?;
        gated::check_scales(OP, dscales, *scales, gate)?;
    }
    if let Some(cuda) = dy.cuda() {
        return in_one_pass(cuda, [&dgate, &dup], &da, &branches, scales.as_ref(), dh, [dy, gate, up]);
    }
    with_scratch(gate.rows * gate.cols, |y| {
        let mut y = ViewMut::from_slice(y, gate.rows, gate.cols);
        let (to_gate, to_up, output) = (dgate.reborrow(), dup.reborrow(), Some(y.reborrow()));
        match scales {
            None => swiglu_backward(to_gate, to_up, output, dy, gate, up)?,
            Some(Scales { dscales, factors, scales }) => {
                swiglu_backward_scaled(to_gate, to_up, output, dscales, dy, gate, up, factors, scales)?;
            }
        }
        low_rank_projection_backward(da, dh, y.as_view())?;
        for (branch, dy) in branches.into_iter().zip([dgate.as_view(), dup.as_view()]) {
            let Branch { dh, twin, db, b, h, out_scale } = branch;
            low_rank_branch_gradients(dh, twin, db, dy, b, h, out_scale)?;
        }
        Ok(())
    })
}

fn check_branch(branch: &Branch, gate: View) -> Result<()> {
    let Branch { dh, twin, db, b, h, out_scale } = branch;
    for (what, rows, operand) in [
        (["rows of a branch's dh", "columns of a branch's dh"], gate.rows, Some(dh.as_view())),
        (["rows of a twin", "columns of a twin"], gate.rows, twin.as_ref().map(ViewMut::as_view)),
        (["rows of h", "columns of h"], gate.rows, Some(*h)),
        (["rows of b", "columns of b"], gate.cols, Some(*b)),
        (["rows of db", "columns of db"], gate.cols, Some(db.as_view())),
    ] {
        let Some(operand) = operand else { continue };
        check(OP, what[0], rows, operand.rows)?;
        check(OP, what[1], h.cols, operand.cols)?;
    }
    let Some(rows) = out_scale.rows else { return Ok(()) };
    check(OP, "rows of the row scale", 1, rows.rows)?;
    check(OP, "columns of the row scale", gate.cols, rows.cols)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new(
    "swiglu_low_rank.cu",
    concat!(
        "#line 1 \"mma.cuh\"\n",
        include_str!("../../cuda/mma.cuh"),
        "\n#line 1 \"gated.cuh\"\n",
        include_str!("../gated.cuh"),
        "\n#line 1 \"swiglu_low_rank.cu\"\n",
        include_str!("swiglu_low_rank.cu"),
    ),
);

/// The numbers of the kernel file.
const TOKENS: usize = 16;
const RANK: usize = 16;
const WARPS: usize = 8;
const COLUMNS: usize = 512;
const STAGES: usize = 3;
const FINISHERS: usize = 256;

/// Tiles of dy, gate and up and of the three narrow operands per stage; b of both branches; two buffers of all warps' sums of
/// dh for both; the factors.
const SHARED: usize = STAGES * 3 * TOKENS * (COLUMNS + RANK) * 2
    + 2 * COLUMNS * RANK * 2
    + 2 * 2 * WARPS * TOKENS * RANK * 4
    + 2 * COLUMNS * 4;

/// Tokens that a block has at least, unless there are fewer.
const LEAST_TOKENS: usize = 64;

/// What a block costs apart from its tokens, in tokens: its first copies, its sums over tokens and their addition.
const BLOCK_COST: usize = 96;

/// Blocks one after another on a multiprocessor at most: each leaves sums in memory.
const MOST_WAVES: usize = 2;

/// Multiprocessors that are made use of; no device has more.
const LARGEST_DEVICE: usize = 192;

/// Whether a device has a kernel for activations of `cols` columns between branches of these ranks: aligned, up to 16, and
/// with the shared memory of data centre GPUs from compute capability 9.0 on.
pub fn serves(device: &Device, cols: usize, ranks: [usize; 3]) -> bool {
    let enough_shared = match device {
        Device::Cpu => false,
        // A plan is made for the largest need.
        Device::Meta(_) => true,
        Device::Cuda(cuda) => has_shared_memory(cuda.arch()),
    };
    let whole = |rank: usize| rank > 0 && rank <= RANK && rank.is_multiple_of(8);
    enough_shared && cols > 0 && cols.is_multiple_of(8) && ranks.into_iter().all(whole)
}

/// 227 KiB a block on 9.0 and 10.x; 163 on 8.0, 99 on 8.6, 8.9 and 12.0.
fn has_shared_memory(arch: Arch) -> bool {
    matches!(arch.major, 9 | 10)
}

/// How the columns and tokens of a matrix are shared out to blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Blocks {
    columns: usize,
    tokens: usize,
    /// Tokens of a block.
    rows: usize,
}

impl Blocks {
    /// The fastest: as many as a device has at once, or twice as many where that leaves fewer multiprocessors idle.
    fn of(tokens: usize, cols: usize, multiprocessors: usize) -> Blocks {
        let (columns, multiprocessors) = (cols.div_ceil(COLUMNS), multiprocessors.clamp(1, LARGEST_DEVICE));
        let share = |waves: usize| {
            let wanted = (waves * multiprocessors / columns).clamp(1, tokens.div_ceil(LEAST_TOKENS).max(1));
            let rows = tokens.div_ceil(wanted).next_multiple_of(TOKENS).max(TOKENS);
            Blocks { columns, tokens: tokens.div_ceil(rows), rows }
        };
        let cost = |blocks: &Blocks| {
            (blocks.columns * blocks.tokens).div_ceil(multiprocessors) * (blocks.rows + BLOCK_COST)
        };
        (1..=MOST_WAVES).map(share).min_by_key(cost).expect("one at least")
    }

    /// Bytes of the sums of dh, of the factors' and of the scales'.
    fn sums(self, tokens: usize, cols: usize) -> [usize; 3] {
        [2 * self.columns * tokens * RANK, 3 * self.tokens * RANK * cols, 2 * self.tokens * cols]
            .map(|floats| floats.saturating_mul(Dtype::F32.size()))
    }
}

/// Bytes of [`Scratch::Partials`] that [`swiglu_backward_low_rank`] takes at most for up to so many tokens, on any device.
pub fn swiglu_low_rank_scratch(tokens: usize, cols: usize) -> usize {
    let columns = cols.div_ceil(COLUMNS);
    let most = (MOST_WAVES * LARGEST_DEVICE / columns.max(1)).clamp(1, tokens.div_ceil(LEAST_TOKENS).max(1));
    let bytes = Blocks { columns, tokens: most, rows: 0 }.sums(tokens, cols);
    bytes.into_iter().fold(0, usize::saturating_add)
}

/// Whether the kernels read and write these rows, sixteen bytes at a time.
fn aligned(view: View) -> Result<bool> {
    let bits = view.bf16(OP)? | (view.stride * Dtype::Bf16.size()) as u64;
    Ok(bits.is_multiple_of(16))
}

fn in_one_pass(
    cuda: &Arc<Cuda>,
    [dgate, dup]: [&ViewMut; 2],
    da: &ViewMut,
    branches: &[Branch; 2],
    scales: Option<&Scales>,
    dh: View,
    [dy, gate, up]: [View; 3],
) -> Result<()> {
    let (tokens, cols) = (gate.rows, gate.cols);
    let ranks = [dh.cols, branches[0].h.cols, branches[1].h.cols];
    let twins = branches.iter().filter_map(|branch| branch.twin.as_ref()).map(ViewMut::as_view);
    let beside = branches.iter().flat_map(|branch| [branch.b, branch.h, branch.dh.as_view()]);
    let mut wide = [dgate.as_view(), dup.as_view(), dy, gate, up, dh].into_iter().chain(beside).chain(twins);
    let all_aligned = wide.try_fold(true, |all, view| Ok::<_, Error>(all && aligned(view)?))?;
    // Kernels count tokens, columns and elements of narrow matrices in 31 bits.
    let countable = tokens.max(cols).checked_mul(4 * RANK).is_some_and(|n| i32::try_from(n).is_ok());
    if !(serves(&Device::Cuda(Arc::clone(cuda)), cols, ranks) && all_aligned && countable) {
        let device = format!("{} ({}) with these ranks or rows", cuda.name(), cuda.arch());
        return Err(Error::NoKernel { op: OP, device });
    }
    if tokens == 0 {
        return Ok(());
    }
    let blocks = Blocks::of(tokens, cols, cuda.sms());
    let [dh_bytes, factor_bytes, scale_bytes] = blocks.sums(tokens, cols);
    let dh_sums = cuda.scratch(Scratch::Partials, dh_bytes + factor_bytes + scale_bytes)?;
    let factor_sums = dh_sums + dh_bytes as u64;
    let scale_sums = factor_sums + factor_bytes as u64;
    let [of_gate, of_up] = branches;

    let mut args = Vec::new();
    for to in [dgate, dup] {
        args.extend([Arg::Ptr(to.bf16(OP)?), Arg::size(to.stride)]);
    }
    args.extend([dh_sums, factor_sums, scale_sums].map(Arg::Ptr));
    for from in [dy, gate, up] {
        args.extend([Arg::Ptr(from.bf16(OP)?), Arg::size(from.stride)]);
    }
    for i in 0..2 {
        args.push(Arg::Ptr(scales.map_or(Ok(0), |scales| scales.factors[i].f32(OP))?));
    }
    for narrow in [dh, of_gate.b, of_up.b] {
        args.extend([Arg::Ptr(narrow.bf16(OP)?), Arg::size(narrow.stride), Arg::size(narrow.cols)]);
    }
    for narrow in [of_gate.h, of_up.h] {
        args.extend([Arg::Ptr(narrow.bf16(OP)?), Arg::size(narrow.stride)]);
    }
    args.extend([tokens, cols, blocks.rows].map(Arg::size));
    let kernel = if scales.is_some() { "swiglu_backward_low_rank_scaled" } else { OP };
    let grid = Grid { blocks: (blocks.columns, blocks.tokens, 1), threads: WARPS * 32, shared: SHARED };
    cuda.launch(&SOURCE, kernel, grid, &args)?;
    add_up(cuda, da, branches, scales, [dh_sums, factor_sums, scale_sums], tokens, blocks)
}

/// The second stage: what the blocks left.
fn add_up(
    cuda: &Cuda,
    da: &ViewMut,
    branches: &[Branch; 2],
    scales: Option<&Scales>,
    sums: [u64; 3],
    tokens: usize,
    blocks: Blocks,
) -> Result<()> {
    let cols = da.cols;
    let mut args: Vec<Arg> = sums.map(Arg::Ptr).to_vec();
    for Branch { dh, twin, .. } in branches {
        let (twin, stride) = match twin {
            Some(twin) => (twin.bf16(OP)?, twin.stride),
            None => (0, 0),
        };
        args.extend([Arg::Ptr(dh.bf16(OP)?), Arg::size(dh.stride), Arg::Ptr(twin), Arg::size(stride)]);
    }
    args.extend([Arg::Ptr(da.f32(OP)?), Arg::size(da.stride), Arg::size(da.rows)]);
    for Branch { db, out_scale, .. } in branches {
        let g = out_scale.rows.map_or(Ok(0), |rows| rows.f32(OP))?;
        args.extend([Arg::Ptr(db.f32(OP)?), Arg::size(db.stride), Arg::Ptr(g), Arg::F32(out_scale.scaling)]);
        args.push(Arg::size(db.cols));
    }
    for i in 0..2 {
        let (dscale, scale) = match scales {
            Some(scales) => (scales.dscales[i].f32(OP)?, scales.scales[i].f32(OP)?),
            None => (0, 0),
        };
        args.extend([dscale, scale].map(Arg::Ptr));
    }
    args.extend([tokens, cols, blocks.columns, blocks.tokens].map(Arg::size));
    // Four elements a thread of whichever is the longest.
    let threads = (tokens * (RANK / 4)).max(cols * (RANK / 4));
    let jobs = if scales.is_some() { 7 } else { 5 };
    let grid = Grid { blocks: (threads.div_ceil(FINISHERS), jobs, 1), threads: FINISHERS, shared: 0 };
    cuda.launch(&SOURCE, "swiglu_low_rank_finish", grid, &args)
}
