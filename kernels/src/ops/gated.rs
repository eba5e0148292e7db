//! What the gated activations y = act(gate) up have in common: their checks, what their kernels are given, their walk over
//! the rows on the CPU.
//!
//! [`swiglu`](super::swiglu) and [`geglu`](super::geglu) have the formulas. The kernels of both are in `swiglu.cu`, from
//! one template.

use rayon::prelude::*;

use super::row_scale::{Output, add_partials_cuda, row_scale_backward};
use super::swiglu::SOURCE;
use crate::cpu::by_isa;
use crate::cpu::rows::{pieces, rows_per_task};
use crate::cpu::scratch::with_scratch;
use crate::cuda::spans::{self, Chunks};
use crate::cuda::{Arg, Cuda, Scratch};
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};

/// All like `gate`.
pub(super) fn check_forward(op: &'static str, y: &ViewMut, gate: View, up: View) -> Result<()> {
    check(op, "rows of y", gate.rows, y.rows)?;
    check(op, "columns of y", gate.cols, y.cols)?;
    check(op, "rows of up", gate.rows, up.rows)?;
    check(op, "columns of up", gate.cols, up.cols)
}

/// All like `gate`: the gradients, then dy, gate, up.
pub(super) fn check_gradients(
    op: &'static str,
    [dgate, dup]: [&ViewMut; 2],
    [dy, gate, up]: [View; 3],
) -> Result<()> {
    let operands = [
        ("rows of dgate", "columns of dgate", dgate.as_view()),
        ("rows of dup", "columns of dup", dup.as_view()),
        ("rows of dy", "columns of dy", dy),
        ("rows of up", "columns of up", up),
    ];
    for (rows, columns, operand) in operands {
        check(op, rows, gate.rows, operand.rows)?;
        check(op, columns, gate.cols, operand.cols)?;
    }
    Ok(())
}

/// One factor per column of gate and of up.
pub(super) fn check_factors(op: &'static str, factors: [View; 2], gate: View) -> Result<()> {
    for factor in factors {
        check(op, "rows of factors", 1, factor.rows)?;
        check(op, "columns of factors", gate.cols, factor.cols)?;
    }
    Ok(())
}

/// One scale per column of gate and of up, and its gradient.
pub(super) fn check_scales(
    op: &'static str,
    dscales: &[ViewMut; 2],
    scales: [View; 2],
    gate: View,
) -> Result<()> {
    for (dscale, scale) in dscales.iter().zip(scales) {
        check(op, "rows of dscales", 1, dscale.rows)?;
        check(op, "columns of dscales", gate.cols, dscale.cols)?;
        check(op, "rows of scales", 1, scale.rows)?;
        check(op, "columns of scales", gate.cols, scale.cols)?;
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------- CUDA

/// The kernels have the names of the ops.
pub(super) fn forward_cuda(op: &'static str, cuda: &Cuda, y: &ViewMut, gate: View, up: View) -> Result<()> {
    let (rows, cols, strides) = spans::flat(gate.rows, gate.cols, [y.stride, gate.stride, up.stride]);
    let grid = spans::grid(op, rows, cols, 2)?;
    let args = [
        Arg::Ptr(y.bf16(op)?),
        Arg::size(strides[0]),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(strides[1]),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(strides[2]),
        Arg::size(rows),
        Arg::size(cols),
    ];
    cuda.launch(&SOURCE, op, grid, &args)
}

/// As [`forward_cuda`].
pub(super) fn forward_scaled_cuda(
    op: &'static str,
    cuda: &Cuda,
    y: &ViewMut,
    [gate, up]: [View; 2],
    factors: [View; 2],
) -> Result<()> {
    let grid = spans::grid(op, gate.rows, gate.cols, 2)?;
    let args = [
        Arg::Ptr(y.bf16(op)?),
        Arg::size(y.stride),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(gate.stride),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(up.stride),
        Arg::size(gate.rows),
        Arg::size(gate.cols),
        Arg::Ptr(factors[0].f32(op)?),
        Arg::Ptr(factors[1].f32(op)?),
    ];
    cuda.launch(&SOURCE, op, grid, &args)
}

/// With y the kernel is the form that leaves it.
pub(super) fn backward_cuda(
    op: &'static str,
    kernel: &'static str,
    cuda: &Cuda,
    [dgate, dup]: [&ViewMut; 2],
    y: Option<&ViewMut>,
    [dy, gate, up]: [View; 3],
) -> Result<()> {
    let y_stride = y.map_or(dgate.stride, |y| y.stride);
    let strides = [dgate.stride, dup.stride, dy.stride, gate.stride, up.stride, y_stride];
    let (rows, cols, strides) = spans::flat(gate.rows, gate.cols, strides);
    let grid = spans::grid(op, rows, cols, 2)?;
    let mut args = vec![
        Arg::Ptr(dgate.bf16(op)?),
        Arg::size(strides[0]),
        Arg::Ptr(dup.bf16(op)?),
        Arg::size(strides[1]),
        Arg::Ptr(dy.bf16(op)?),
        Arg::size(strides[2]),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(strides[3]),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(strides[4]),
        Arg::size(rows),
        Arg::size(cols),
    ];
    if let Some(y) = y {
        args.extend([Arg::Ptr(y.bf16(op)?), Arg::size(strides[5])]);
    }
    cuda.launch(&SOURCE, kernel, grid, &args)
}

/// As [`backward_cuda`].
pub(super) fn scaled_cuda(
    op: &'static str,
    kernel: &'static str,
    cuda: &Cuda,
    [dgate, dup]: [&ViewMut; 2],
    y: Option<&ViewMut>,
    dscales: [&ViewMut; 2],
    [dy, gate, up]: [View; 3],
    factors: [View; 2],
    scales: [View; 2],
) -> Result<()> {
    let chunks = Chunks::of(gate.rows, gate.cols);
    let bytes = chunks.count * gate.cols * size_of::<f32>();
    let partials = cuda.scratch(Scratch::Partials, 2 * bytes)?;
    let partials = [partials, partials + bytes as u64];
    let mut args = vec![
        Arg::Ptr(dgate.bf16(op)?),
        Arg::size(dgate.stride),
        Arg::Ptr(dup.bf16(op)?),
        Arg::size(dup.stride),
        Arg::Ptr(partials[0]),
        Arg::Ptr(partials[1]),
        Arg::Ptr(dy.bf16(op)?),
        Arg::size(dy.stride),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(gate.stride),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(up.stride),
        Arg::Ptr(factors[0].f32(op)?),
        Arg::Ptr(factors[1].f32(op)?),
        Arg::size(gate.rows),
        Arg::size(gate.cols),
        Arg::size(chunks.rows),
    ];
    if let Some(y) = y {
        args.extend([Arg::Ptr(y.bf16(op)?), Arg::size(y.stride)]);
    }
    cuda.launch(&SOURCE, kernel, chunks.grid(), &args)?;
    for i in 0..2 {
        add_partials_cuda(op, cuda, dscales[i], partials[i], chunks, scales[i])?;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------ CPU

/// y, from gate and up.
type ForwardPiece = fn(&mut [f32], &[f32], &[f32]);

/// dgate and dup, from dy, gate and up.
type BackwardPiece = fn(&mut [f32], &mut [f32], &[f32], &[f32], &[f32]);

/// Calls `piece` for some elements at a time.
pub(super) fn forward_fast(
    op: &'static str,
    y: ViewMut,
    gate: View,
    up: View,
    piece: ForwardPiece,
) -> Result<()> {
    let (cols, strides) = (gate.cols, [y.stride, gate.stride, up.stride]);
    let (y, gate, up) = (y.cpu(op)?, gate.cpu(op)?, up.cpu(op)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [y_stride, gate_stride, up_stride] = walk.strides;
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(walk.cols)).for_each(|(i, y)| {
        let n = y.len().min(walk.cols);
        piece(&mut y[..n], &gate[i * gate_stride..][..n], &up[i * up_stride..][..n]);
    });
    Ok(())
}

/// Calls `piece` for a row at a time, of gate and up multiplied by their factors.
pub(super) fn forward_scaled_fast(
    op: &'static str,
    y: ViewMut,
    [gate, up]: [View; 2],
    factors: [View; 2],
    piece: ForwardPiece,
) -> Result<()> {
    let (cols, y_stride, gate_stride, up_stride) = (gate.cols, y.stride, gate.stride, up.stride);
    let (y, gate, up) = (y.cpu(op)?, gate.cpu(op)?, up.cpu(op)?);
    let factors = [factors[0].cpu(op)?, factors[1].cpu(op)?];
    if cols == 0 {
        return Ok(());
    }
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(cols)).for_each(|(i, y)| {
        let (gate, up) = (&gate[i * gate_stride..][..cols], &up[i * up_stride..][..cols]);
        with_scaled([gate, up], factors, |gate, up| piece(&mut y[..cols], gate, up));
    });
    Ok(())
}

/// As [`forward_scaled_fast`]; the gradients are those of gate and up as they are given.
pub(super) fn backward_scaled_fast(
    op: &'static str,
    [dgate, dup]: [ViewMut; 2],
    [dy, gate, up]: [View; 3],
    factors: [View; 2],
    piece: BackwardPiece,
) -> Result<()> {
    let (cols, strides) = (gate.cols, [dgate.stride, dup.stride, dy.stride, gate.stride, up.stride]);
    let (dgate, dup, dy) = (dgate.cpu(op)?, dup.cpu(op)?, dy.cpu(op)?);
    let (gate, up, factors) = (gate.cpu(op)?, up.cpu(op)?, [factors[0].cpu(op)?, factors[1].cpu(op)?]);
    if cols == 0 {
        return Ok(());
    }
    let [dgate_stride, dup_stride, dy_stride, gate_stride, up_stride] = strides;
    dgate
        .par_chunks_mut(dgate_stride)
        .zip(dup.par_chunks_mut(dup_stride))
        .enumerate()
        .with_min_len(rows_per_task(cols))
        .for_each(|(i, (dgate, dup))| {
            let (dgate, dup) = (&mut dgate[..cols], &mut dup[..cols]);
            let (gate, up) = (&gate[i * gate_stride..][..cols], &up[i * up_stride..][..cols]);
            let dy = &dy[i * dy_stride..][..cols];
            with_scaled([gate, up], factors, |gate, up| piece(dgate, dup, dy, gate, up));
            multiply(dgate, factors[0]);
            multiply(dup, factors[1]);
        });
    Ok(())
}

/// Calls `visit` with rows of gate and up, multiplied by their factors.
fn with_scaled(rows: [&[f32]; 2], factors: [&[f32]; 2], visit: impl FnOnce(&[f32], &[f32])) {
    let cols = rows[0].len();
    with_scratch(2 * cols, |scratch| {
        let (gate, up) = scratch.split_at_mut(cols);
        gate.copy_from_slice(rows[0]);
        up.copy_from_slice(rows[1]);
        multiply(gate, factors[0]);
        multiply(up, factors[1]);
        visit(gate, up);
    });
}

by_isa! {
    fn multiply(x: &mut [f32], by: &[f32]) {
        for (x, by) in x.iter_mut().zip(by) {
            *x *= by;
        }
    }
}

/// As [`forward_fast`].
pub(super) fn backward_fast(
    op: &'static str,
    [dgate, dup]: [ViewMut; 2],
    [dy, gate, up]: [View; 3],
    piece: BackwardPiece,
) -> Result<()> {
    let (cols, strides) = (gate.cols, [dgate.stride, dup.stride, dy.stride, gate.stride, up.stride]);
    let (dgate, dup, dy) = (dgate.cpu(op)?, dup.cpu(op)?, dy.cpu(op)?);
    let (gate, up) = (gate.cpu(op)?, up.cpu(op)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [dgate_stride, dup_stride, dy_stride, gate_stride, up_stride] = walk.strides;
    dgate
        .par_chunks_mut(dgate_stride)
        .zip(dup.par_chunks_mut(dup_stride))
        .enumerate()
        .with_min_len(rows_per_task(walk.cols))
        .for_each(|(i, (dgate, dup))| {
            let n = dgate.len().min(walk.cols);
            let dy = &dy[i * dy_stride..][..n];
            let (gate, up) = (&gate[i * gate_stride..][..n], &up[i * up_stride..][..n]);
            piece(&mut dgate[..n], &mut dup[..n], dy, gate, up);
        });
    Ok(())
}

/// The gradients of the factors of both inputs' columns, from those of the inputs.
pub(super) fn scale_gradients(
    [dgate_scale, dup_scale]: [ViewMut; 2],
    [dgate, dup]: [View; 2],
    [gate, up]: [View; 2],
    scales: [View; 2],
) -> Result<()> {
    row_scale_backward(dgate_scale, dgate, Output::Kept(gate), scales[0])?;
    row_scale_backward(dup_scale, dup, Output::Kept(up), scales[1])
}
