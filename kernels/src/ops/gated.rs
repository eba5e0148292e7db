//! What the gated activations y = act(gate) up have in common: their checks, what their kernels are given, their loops
//! on the CPU.
//!
//! [`swiglu`](super::swiglu) and [`geglu`](super::geglu) have the formulas. The kernels of both are in `swiglu.cu`, from
//! one template.

use rayon::prelude::*;

use super::row_scale::{GROUP, add_group_sums, add_partials_cuda};
use super::swiglu::SOURCE;
use crate::cpu::by_isa;
use crate::cpu::rows::{pieces, row, rows_per_task};
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

/// act(gate) and its derivative.
pub(super) struct Activated {
    pub(super) value: f32,
    pub(super) slope: f32,
}

/// The activation of an op. `at` must be `#[inline(always)]`: it is compiled into the loops below.
pub(super) trait Gate {
    fn at(gate: f32) -> Activated;
}

pub(super) fn forward_fast<G: Gate>(op: &'static str, y: ViewMut, gate: View, up: View) -> Result<()> {
    let (cols, strides) = (gate.cols, [y.stride, gate.stride, up.stride]);
    let (y, gate, up) = (y.cpu(op)?, gate.cpu(op)?, up.cpu(op)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [y_stride, gate_stride, up_stride] = walk.strides;
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(walk.cols)).for_each(|(i, y)| {
        let n = y.len().min(walk.cols);
        forward_piece::<G>(&mut y[..n], &gate[i * gate_stride..][..n], &up[i * up_stride..][..n]);
    });
    Ok(())
}

by_isa! {
    fn forward_piece<G: Gate>(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = G::at(*gate).value * up;
        }
    }
}

pub(super) fn forward_scaled_fast<G: Gate>(
    op: &'static str,
    y: ViewMut,
    [gate, up]: [View; 2],
    factors: [View; 2],
) -> Result<()> {
    let (cols, y_stride, gate_stride, up_stride) = (gate.cols, y.stride, gate.stride, up.stride);
    let (y, gate, up) = (y.cpu(op)?, gate.cpu(op)?, up.cpu(op)?);
    let factors = [factors[0].cpu(op)?, factors[1].cpu(op)?];
    if cols == 0 {
        return Ok(());
    }
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(cols)).for_each(|(i, y)| {
        let (gate, up) = (row(gate, i, cols, gate_stride), row(up, i, cols, up_stride));
        forward_scaled_row::<G>(&mut y[..cols], [gate, up], factors);
    });
    Ok(())
}

by_isa! {
    fn forward_scaled_row<G: Gate>(y: &mut [f32], inputs: [&[f32]; 2], factors: [&[f32]; 2]) {
        let n = y.len();
        let [gate, up] = inputs.map(|x| &x[..n]);
        let [by_gate, by_up] = factors.map(|x| &x[..n]);
        for i in 0..n {
            y[i] = G::at(gate[i] * by_gate[i]).value * (up[i] * by_up[i]);
        }
    }
}

pub(super) fn backward_fast<G: Gate>(
    op: &'static str,
    [dgate, dup]: [ViewMut; 2],
    [dy, gate, up]: [View; 3],
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
            backward_piece::<G>(&mut dgate[..n], &mut dup[..n], dy, gate, up);
        });
    Ok(())
}

by_isa! {
    fn backward_piece<G: Gate>(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        let n = dgate.len();
        let (dup, dy, gate, up) = (&mut dup[..n], &dy[..n], &gate[..n], &up[..n]);
        for i in 0..n {
            let act = G::at(gate[i]);
            dgate[i] = dy[i] * up[i] * act.slope;
            dup[i] = dy[i] * act.value;
        }
    }
}

/// The gradients of gate and up as they are given, and those of what the factors are multiples of.
pub(super) fn backward_scaled_fast<G: Gate>(
    op: &'static str,
    [dgate, dup]: [ViewMut; 2],
    [dgate_scale, dup_scale]: [ViewMut; 2],
    [dy, gate, up]: [View; 3],
    factors: [View; 2],
    scales: [View; 2],
) -> Result<()> {
    let (rows, cols, strides) = (gate.rows, gate.cols, [dy.stride, gate.stride, up.stride]);
    let (dgate_stride, dup_stride) = (dgate.stride, dup.stride);
    let (dgate, dup, dy) = (dgate.cpu(op)?, dup.cpu(op)?, dy.cpu(op)?);
    let (gate, up, factors) = (gate.cpu(op)?, up.cpu(op)?, [factors[0].cpu(op)?, factors[1].cpu(op)?]);
    let (dgate_scale, dup_scale) = (dgate_scale.cpu(op)?, dup_scale.cpu(op)?);
    let scales = [scales[0].cpu(op)?, scales[1].cpu(op)?];
    if cols == 0 {
        return Ok(());
    }
    with_scratch(rows.div_ceil(GROUP) * 2 * cols, |sums| {
        sums.par_chunks_mut(2 * cols)
            .zip(dgate.par_chunks_mut(GROUP * dgate_stride))
            .zip(dup.par_chunks_mut(GROUP * dup_stride))
            .enumerate()
            .for_each(|(group, ((sums, dgate), dup))| {
                sums.fill(0.0);
                let (gate_sums, up_sums) = sums.split_at_mut(cols);
                let gradients = dgate.chunks_mut(dgate_stride).zip(dup.chunks_mut(dup_stride));
                for (i, (dgate, dup)) in (group * GROUP..).zip(gradients) {
                    let [dy, gate, up] = [(dy, strides[0]), (gate, strides[1]), (up, strides[2])]
                        .map(|(x, s)| row(x, i, cols, s));
                    backward_scaled_row::<G>(
                        &mut dgate[..cols],
                        &mut dup[..cols],
                        gate_sums,
                        up_sums,
                        [dy, gate, up],
                        factors,
                    );
                }
            });
        add_group_sums(&mut dgate_scale[..cols], sums, 2 * cols, scales[0]);
        add_group_sums(&mut dup_scale[..cols], sums.get(cols..).unwrap_or_default(), 2 * cols, scales[1]);
    });
    Ok(())
}

by_isa! {
    fn backward_scaled_row<G: Gate>(
        dgate: &mut [f32],
        dup: &mut [f32],
        gate_sums: &mut [f32],
        up_sums: &mut [f32],
        inputs: [&[f32]; 3],
        factors: [&[f32]; 2],
    ) {
        let n = dgate.len();
        let (dup, gate_sums, up_sums) = (&mut dup[..n], &mut gate_sums[..n], &mut up_sums[..n]);
        let [dy, gate, up] = inputs.map(|x| &x[..n]);
        let [by_gate, by_up] = factors.map(|x| &x[..n]);
        for i in 0..n {
            let act = G::at(gate[i] * by_gate[i]);
            let dg = dy[i] * (up[i] * by_up[i]) * act.slope * by_gate[i];
            let du = dy[i] * act.value * by_up[i];
            gate_sums[i] += dg * gate[i];
            up_sums[i] += du * up[i];
            dgate[i] = dg;
            dup[i] = du;
        }
    }
}
