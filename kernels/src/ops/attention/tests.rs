//! Attention against its definition, PyTorch and finite differences, on the CPU and on CUDA.

use super::naive::{backward_naive, forward_naive};
use super::*;
use crate::testing::{Mat, Out, assert_close, check_fast, check_gradient, golden, inner, seconds, tolerance};

pub(super) fn shape(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttentionShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { n_heads, n_kv_heads, head_dim, scale, softcap: None, window: None }
}

pub(super) fn run_naive(
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

/// dq, dk, dv and delta.
pub(super) fn run_naive_backward(
    do_: &[f64],
    o: &[f64],
    lse: &[f64],
    [q, k, v]: [&[f64]; 3],
    starts: &[u32],
    shape: &AttentionShape,
) -> [Vec<f64>; 4] {
    let [mut dq, mut dk, mut dv, mut delta] = [q, k, v, lse].map(|like| vec![f64::NAN; like.len()]);
    backward_naive(&mut dq, &mut dk, &mut dv, &mut delta, do_, o, lse, q, k, v, starts, shape);
    [dq, dk, dv, delta]
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
        (AttentionShape { window: Some(1), ..shape(2, 1, 16) }, vec![0, 5, 200]),
        (AttentionShape { window: Some(130), ..shape(2, 2, 16) }, vec![0, 70, 470]),
        (AttentionShape { window: Some(100), softcap: Some(3.0), ..shape(4, 2, 16) }, vec![0, 300, 391]),
        (AttentionShape { window: Some(1000), softcap: Some(0.5), ..shape(2, 2, 16) }, vec![0, 40]),
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
    attention_forward(o.view_mut(), lse.view_mut(), q.view(), k.view(), v.view(), &starts, &starts, &shape)
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
        let [dq, dk, dv, delta] = run_naive_backward(
            &do_.f64(),
            &o.f64(),
            &lse.f64(),
            [&q.f64(), &k.f64(), &v.f64()],
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
    let plain = shape(4, 2, 4);
    for shape in [plain, AttentionShape { softcap: Some(1.5), window: Some(3), ..plain }] {
        let starts = [0, 1, 6];
        let [q, do_] = [1, 2].map(|seed| Mat::random(seed, 6, 16, 1.0).f64());
        let [k, v] = [3, 4].map(|seed| Mat::random(seed, 6, 8, 1.0).f64());
        let [o, lse] = run_naive(&q, &k, &v, &starts, &starts, &shape);
        let [dq, dk, dv, _] = run_naive_backward(&do_, &o, &lse, [&q, &k, &v], &starts, &shape);
        let loss =
            |q: &[f64], k: &[f64], v: &[f64]| inner(&run_naive(q, k, v, &starts, &starts, &shape)[0], &do_);
        check_gradient("dq", &q, &dq, |q| loss(q, &k, &v));
        check_gradient("dk", &k, &dk, |k| loss(&q, k, &v));
        check_gradient("dv", &v, &dv, |v| loss(&q, &k, v));
    }
}

#[test]
fn forward_and_backward_equal_pytorch() {
    let golden = golden("attention");
    let shape = AttentionShape { scale: 0.3, ..shape(6, 2, 16) };
    let [q, k, v, do_] = ["q", "k", "v", "do"].map(|name| golden.mat(name));
    let starts = golden.indices("starts");
    let (mut o, mut lse) = (Mat::poisoned(q.rows, q.cols), Mat::poisoned(6, q.rows));
    let (mut dq, mut delta) = (o.clone(), lse.clone());
    let [mut dk, mut dv] = [0; 2].map(|_| Mat::poisoned(k.rows, k.cols));
    attention_forward(o.view_mut(), lse.view_mut(), q.view(), k.view(), v.view(), &starts, &starts, &shape)
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
        (AttentionShape { window: Some(0), ..good }, vec![0, 4], vec![0, 4], "window is 0, expected 1"),
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
