//! What attention is: the definition that the CPU and CUDA versions are tested against.

use super::AttentionShape;

/// Calls `visit(head, query, keys)` for every query of every head with the keys that it sees.
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
                let end = keys.end - (queries.end - 1 - query);
                let hidden = shape.window.map_or(0, |window| (end - keys.start).saturating_sub(window));
                visit(head, query, keys.start + hidden..end);
            }
        }
    }
}

/// The elements of a head of a token.
fn head_of(token: usize, head: usize, heads: usize, dim: usize) -> std::ops::Range<usize> {
    (token * heads + head) * dim..(token * heads + head + 1) * dim
}

/// The score of a pair and its derivative by scale q . k.
fn score(scaled: f64, softcap: Option<f32>) -> (f64, f64) {
    match softcap.map(f64::from) {
        Some(cap) => (cap * (scaled / cap).tanh(), 1.0 - (scaled / cap).tanh().powi(2)),
        None => (scaled, 1.0),
    }
}

fn dot_naive(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(super) fn forward_naive(
    o: &mut [f64],
    lse: &mut [f64],
    q: &[f64],
    k: &[f64],
    v: &[f64],
    q_starts: &[u32],
    k_starts: &[u32],
    shape: &AttentionShape,
) {
    let &AttentionShape { n_heads, n_kv_heads, head_dim, scale, softcap, .. } = shape;
    let tokens = lse.len() / n_heads;
    for_each_query(q_starts, k_starts, shape, |head, query, keys| {
        let kv_head = head / (n_heads / n_kv_heads);
        let (i, first) = (head_of(query, head, n_heads, head_dim), keys.start);
        let kv = |key| head_of(key, kv_head, n_kv_heads, head_dim);
        let scores: Vec<f64> = keys
            .clone()
            .map(|key| score(scale as f64 * dot_naive(&q[i.clone()], &k[kv(key)]), softcap).0)
            .collect();
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

pub(super) fn backward_naive(
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
    let &AttentionShape { n_heads, n_kv_heads, head_dim, scale, softcap, .. } = shape;
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
            // s = score(scale q . k), p = exp(s - lse)
            let (s, slope) = score(scale as f64 * dot_naive(&q[i.clone()], &k[j.clone()]), softcap);
            let p = (s - lse[head * tokens + query]).exp();
            // o = sum p v
            let dp = dot_naive(&do_[i.clone()], &v[j.clone()]);
            let ds = p * (dp - delta[head * tokens + query]) * slope * scale as f64;
            for d in 0..head_dim {
                dv[j.start + d] += p * do_[i.start + d];
                dq[i.start + d] += ds * k[j.start + d];
                dk[j.start + d] += ds * q[i.start + d];
            }
        }
    });
}
