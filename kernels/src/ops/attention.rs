//! Causal grouped-query attention over sequences laid end to end.
//!
//! The op and its checks; [`cpu`], [`cuda`] and [`hopper`] compute it, without ever holding a T x T matrix.

mod cpu;
pub(crate) mod cuda;
#[cfg(test)]
mod cuda_tests;
pub(crate) mod hopper;
#[cfg(test)]
mod naive;
#[cfg(test)]
mod tests;

use crate::device::Device;
use crate::error::{Error, Result, check};
use crate::ids::Ids;
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "attention_forward";
const BACKWARD: &str = "attention_backward";

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
    /// c, positive: scores become c tanh(score / c).
    pub softcap: Option<f32>,
    /// How many keys a query sees, its own and those just before it; at least one.
    pub window: Option<usize>,
}

/// Refuses heads that `device` has no kernel for; asked before anything is loaded.
///
/// # Errors
/// There is no kernel; the error lists the sizes that there are one for.
pub fn check_head_dim(device: &Device, head_dim: usize) -> Result<()> {
    match device {
        Device::Cpu => Ok(()),
        Device::Cuda(cuda) => cuda::Kernels::of(FORWARD, &cuda.name(), head_dim).map(|_| ()),
        Device::Meta(_) => cuda::Kernels::of(FORWARD, "a GPU", head_dim).map(|_| ()),
    }
}

/// Mixes the values of the keys that each query may see.
///
/// o_i = sum_j p_ij v_j, p_ij = exp(s_ij - lse_i), s_ij = scale q_i . k_j, lse_i = ln sum_j exp(s_ij); j runs over
/// the keys of the sequence up to the query's own position, or the last `window` of them. With a soft-cap,
/// s_ij = c tanh(scale q_i . k_j / c). Sequence s has the queries
/// `q_starts[s]..q_starts[s + 1]`, which are the last of its keys `k_starts[s]..k_starts[s + 1]`: equal starts
/// for training, more keys than queries with a cache.
///
/// Shapes: `o`, `q` (Tq, H * D); `k`, `v` (Tk, G * D); `lse` (H, Tq), saved for backward; starts: one more than
/// sequences, from 0 to Tq, and within 0..=Tk.
/// Accumulates: nothing, `o` and `lse` are overwritten.
/// Precision: f32; within 1e-5 of f64, relative to the largest value, for scores up to some ten. On CUDA operands and
/// `o` are bf16, as are the probabilities in the product with v; sums and `lse` f32: within 2^-7, relative to the
/// largest value; heads of 16, 32, 64, 80, 96, 128 or 256 elements. Equal bits every time.
///
/// # Errors
/// Shapes or starts that do not belong together, or no kernel for the device.
///
/// Source: Dao et al., arXiv 2205.14135, algorithm 1; Ainslie et al., arXiv 2305.13245 for the groups.
pub fn attention_forward<'a>(
    o: ViewMut,
    lse: ViewMut,
    q: View,
    k: View,
    v: View,
    q_starts: impl Into<Ids<'a>>,
    k_starts: impl Into<Ids<'a>>,
    shape: &AttentionShape,
) -> Result<()> {
    let (q_starts, k_starts) = (q_starts.into(), k_starts.into());
    check_heads(FORWARD, q, k, v, shape)?;
    check(FORWARD, "rows of o", q.rows, o.rows)?;
    check(FORWARD, "columns of o", q.cols, o.cols)?;
    check(FORWARD, "rows of lse", shape.n_heads, lse.rows)?;
    check(FORWARD, "columns of lse", q.rows, lse.cols)?;
    check_starts(FORWARD, q_starts.host(), k_starts.host(), q.rows, k.rows)?;
    if let Some(cuda) = q.cuda() {
        return cuda::forward(FORWARD, cuda, &o, &lse, [q, k, v], q_starts, k_starts, shape);
    }
    cpu::forward(FORWARD, o, lse, q, k, v, q_starts.host(), k_starts.host(), shape)
}

/// The gradients of [`attention_forward`] with as many queries as keys.
///
/// delta_i = do_i . o_i; ds_ij = p_ij (do_i . v_j - delta_i) scale; dq_i = sum_j ds_ij k_j,
/// dk_j = sum_i ds_ij q_i, dv_j = sum_i p_ij do_i, over the query heads of the group. With a soft-cap, ds_ij is
/// multiplied by 1 - (s_ij / c)^2.
///
/// Shapes: `dq`, `do_`, `o`, `q` (T, H * D); `dk`, `dv`, `k`, `v` (T, G * D); `lse`, `delta` (H, T).
/// Accumulates: nothing, `dq`, `dk`, `dv` and the scratch `delta` are overwritten.
/// Precision: f32; within 1e-5 of f64, relative to the largest gradient. On CUDA as the forward, and ds is bf16 in
/// its products.
///
/// # Errors
/// Shapes or starts that do not belong together, or no kernel for the device.
///
/// Source: Dao et al., arXiv 2205.14135, algorithm 4.
pub fn attention_backward<'a>(
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
    starts: impl Into<Ids<'a>>,
    shape: &AttentionShape,
) -> Result<()> {
    let starts = starts.into();
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
    check_starts(BACKWARD, starts.host(), starts.host(), q.rows, k.rows)?;
    if let Some(cuda) = q.cuda() {
        return cuda::backward(
            BACKWARD,
            cuda,
            [&dq, &dk, &dv, &delta],
            [do_, o, lse, q, k, v],
            starts,
            shape,
        );
    }
    cpu::backward(BACKWARD, dq, dk, dv, delta, do_, o, lse, q, k, v, starts.host(), shape)
}

fn check_heads(op: &'static str, q: View, k: View, v: View, shape: &AttentionShape) -> Result<()> {
    let group = shape.n_heads.checked_div(shape.n_kv_heads).unwrap_or(0);
    check(op, "number of query heads (whole groups)", group * shape.n_kv_heads, shape.n_heads)?;
    let columns = |heads: usize| heads.saturating_mul(shape.head_dim);
    check(op, "columns of q", columns(shape.n_heads), q.cols)?;
    check(op, "columns of k", columns(shape.n_kv_heads), k.cols)?;
    check(op, "columns of v", columns(shape.n_kv_heads), v.cols)?;
    check(op, "rows of v", k.rows, v.rows)?;
    check(op, "window", shape.window.unwrap_or(1).max(1), shape.window.unwrap_or(1))
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
