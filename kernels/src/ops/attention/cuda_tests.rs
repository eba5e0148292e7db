//! The CUDA kernels against the definition in f64, on inputs that are bf16 numbers already.
//!
//! What remains is the rounding of probabilities, of ds and of the results to bf16: each 2^-9 of its value, and
//! a row mixes values up to the largest. So 2^-7 of the largest value bounds every element with some room.

use super::tests::{run_naive, run_naive_backward, shape};
use super::*;
use crate::device::Device;
use crate::ids::IdBuffer;
use crate::tensor::Tensor;
use crate::testing::cuda::device;
use crate::testing::{Mat, assert_close, tolerance};

/// Rows of a wider poisoned tensor: `before` and `after` elements lie beside each.
struct Padded {
    tensor: Tensor,
    before: usize,
    after: usize,
}

impl Padded {
    fn activations(device: &Device, values: &Mat, [before, after]: [usize; 2]) -> Padded {
        let tensor = Tensor::activations(device, values.rows, before + values.cols + after).unwrap();
        let mut padded = Padded { tensor, before, after };
        padded.write(&values.values());
        padded
    }

    fn statistics(device: &Device, values: &Mat, [before, after]: [usize; 2]) -> Padded {
        let tensor = Tensor::zeros(device, values.rows, before + values.cols + after).unwrap();
        let mut padded = Padded { tensor, before, after };
        padded.write(&values.values());
        padded
    }

    fn cols(&self) -> usize {
        self.tensor.cols() - self.before - self.after
    }

    fn write(&mut self, values: &[f32]) {
        let (wide, cols) = (self.tensor.cols(), self.cols());
        let mut all = vec![f32::NAN; self.tensor.len()];
        for (to, from) in all.chunks_exact_mut(wide).zip(values.chunks_exact(cols)) {
            to[self.before..self.before + cols].copy_from_slice(from);
        }
        self.tensor.write(&all).unwrap();
    }

    fn view(&self) -> View<'_> {
        self.tensor.view().column_range(self.before, self.cols())
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        let (before, cols) = (self.before, self.cols());
        self.tensor.view_mut().into_column_range(before, cols)
    }

    /// The values; what lies beside them must still be poison.
    fn read(&self, what: &str) -> Vec<f32> {
        let (before, end) = (self.before, self.before + self.cols());
        let all = self.tensor.read().unwrap();
        let rows = all.chunks_exact(self.tensor.cols());
        let beside = rows.clone().flat_map(|row| row[..before].iter().chain(&row[end..]));
        assert!(beside.into_iter().all(|x| x.is_nan()), "{what} is written outside of its columns");
        rows.flat_map(|row| &row[before..end]).copied().collect()
    }
}

/// Random numbers that bf16 can hold.
fn random(seed: u64, rows: usize, cols: usize, std: f32) -> Mat {
    let values = Mat::random(seed, rows, cols, std).values();
    Mat::new(rows, cols, values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect())
}

fn rounded(rows: usize, cols: usize, values: &[f64], to_bf16: bool) -> Mat {
    let round = |x: f32| if to_bf16 { half::bf16::from_f32(x).to_f32() } else { x };
    Mat::new(rows, cols, values.iter().map(|&x| round(x as f32)).collect())
}

fn assert_near(what: &str, found: &[f32], expected: &[f64]) {
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    // One key per query: ds is 0, and what is left of it is the rounding of delta.
    assert_close(what, found, expected, tolerance(0.0, (largest / 128.0).max(1e-3)));
}

fn ids(device: &Device, values: &[u32]) -> IdBuffer {
    let mut ids = IdBuffer::new(device, values.len()).unwrap();
    ids.set(values).unwrap();
    ids
}

/// Elements beside the rows: none; whole 16 bytes; and few, so that no row is aligned.
const PADDINGS: [[usize; 2]; 3] = [[0, 0], [16, 8], [1, 2]];

fn cases() -> Vec<(AttentionShape, Vec<u32>)> {
    let mut cases = Vec::new();
    for dim in [16, 32, 64, 80, 96, 128, 256] {
        cases.push((shape(1, 1, dim), vec![0, 1]));
        cases.push((shape(3, 1, dim), vec![0, 7, 7, 8, 71]));
        cases.push((shape(8, 1, dim), vec![0, 129, 256]));
        cases.push((shape(4, 4, dim), vec![0, 65, 66, 391]));
        cases.push((AttentionShape { window: Some(70), ..shape(4, 2, dim) }, vec![0, 40, 340]));
        cases.push((
            AttentionShape { window: Some(33), softcap: Some(5.0), ..shape(2, 2, dim) },
            vec![0, 200],
        ));
        cases.push((AttentionShape { softcap: Some(20.0), scale: 1.0, ..shape(2, 1, dim) }, vec![0, 150]));
        cases.push((AttentionShape { scale: -0.1, ..shape(2, 1, dim) }, vec![0, 150]));
    }
    // Rings of tiles that wrap around, and tiles that end in the next sequence.
    for dim in [64, 128] {
        cases.push((shape(4, 2, dim), vec![0, 900, 1410]));
    }
    // More sequences than a warp has lanes.
    let starts = (0..200u32).scan(0, |start, i| Some(std::mem::replace(start, *start + i * 7 % 4))).collect();
    cases.push((shape(2, 1, 64), starts));
    cases
}

#[test]
fn cuda_forward_and_backward_equal_the_naive_ones() {
    let Some(device) = device() else { return };
    let cuda = device.cuda().unwrap();
    for (shape, starts) in cases() {
        let tokens = *starts.last().unwrap() as usize;
        let (q_cols, k_cols) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
        let q = random(1, tokens, q_cols, 2.0);
        let [k, v] = [2, 3].map(|seed| random(seed, tokens, k_cols, 1.0));
        let do_ = random(4, tokens, q_cols, 1.0);
        let [o, lse] = run_naive(&q.f64(), &k.f64(), &v.f64(), &starts, &starts, &shape);
        let o_saved = rounded(tokens, q_cols, &o, true);
        let lse_saved = rounded(shape.n_heads, tokens, &lse, false);
        let expected = run_naive_backward(
            &do_.f64(),
            &o_saved.f64(),
            &lse_saved.f64(),
            [&q.f64(), &k.f64(), &v.f64()],
            &starts,
            &shape,
        );
        let ids = ids(&device, &starts);
        let mut first: Option<Vec<Vec<f32>>> = None;
        for padding in PADDINGS {
            let what = format!("{shape:?} {starts:?} padded by {padding:?}");
            let put = |values: &Mat| Padded::activations(&device, values, padding);
            let poisoned = |rows, cols| put(&Mat::poisoned(rows, cols));
            let poisoned_statistics =
                || Padded::statistics(&device, &Mat::poisoned(shape.n_heads, tokens), padding);
            let [q, k, v, do_] = [&q, &k, &v, &do_].map(put);
            let (mut o_found, mut lse_found) = (poisoned(tokens, q_cols), poisoned_statistics());
            let views = [&q, &k, &v].map(Padded::view);
            attention_forward(
                o_found.view_mut(),
                lse_found.view_mut(),
                views[0],
                views[1],
                views[2],
                ids.ids(),
                ids.ids(),
                &shape,
            )
            .unwrap();
            let (o_saved, lse_saved) = (put(&o_saved), Padded::statistics(&device, &lse_saved, padding));
            let mut delta = poisoned_statistics();
            let [mut dq, mut dk, mut dv] = [q_cols, k_cols, k_cols].map(|cols| poisoned(tokens, cols));
            attention_backward(
                dq.view_mut(),
                dk.view_mut(),
                dv.view_mut(),
                delta.view_mut(),
                do_.view(),
                o_saved.view(),
                lse_saved.view(),
                views[0],
                views[1],
                views[2],
                ids.ids(),
                &shape,
            )
            .unwrap();
            let found = [&o_found, &lse_found, &dq, &dk, &dv, &delta].map(|padded| padded.read(&what));
            assert_near(&format!("o of {what}"), &found[0], &o);
            assert_close(&format!("lse of {what}"), &found[1], &lse, tolerance(1e-6, 2e-4));
            for (name, (found, expected)) in
                ["dq", "dk", "dv"].into_iter().zip(found[2..].iter().zip(&expected))
            {
                assert_near(&format!("{name} of {what}"), found, expected);
            }
            assert_close(&format!("delta of {what}"), &found[5], &expected[3], tolerance(1e-5, 1e-4));
            // Hopper's own kernels ask for aligned rows; the portable ones add in another order.
            let portable = padding == PADDINGS[2] && hopper::kernels(cuda, &shape).is_some();
            match &first {
                None => first = Some(found.to_vec()),
                Some(_) if portable => {}
                Some(first) => assert!(first[..] == found, "{what}: other bits than without padding"),
            }
        }
    }
}

#[test]
fn cuda_queries_are_the_last_of_more_keys() {
    let Some(device) = device() else { return };
    for shape in [
        shape(4, 2, 16),
        shape(6, 2, 64),
        AttentionShape { window: Some(50), ..shape(8, 1, 128) },
        shape(2, 2, 80),
    ] {
        let (q_starts, k_starts) = ([0, 1, 1, 71], [3, 203, 210, 400]);
        let (q_cols, k_cols) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
        let q = random(1, 71, q_cols, 2.0);
        let [k, v] = [2, 3].map(|seed| random(seed, 405, k_cols, 1.0));
        let [o, lse] = run_naive(&q.f64(), &k.f64(), &v.f64(), &q_starts, &k_starts, &shape);
        let [q, k, v] = [&q, &k, &v].map(|values| Padded::activations(&device, values, [0, 8]));
        let mut o_found = Padded::activations(&device, &Mat::poisoned(71, q_cols), [0, 8]);
        let mut lse_found = Padded::statistics(&device, &Mat::poisoned(shape.n_heads, 71), [0, 8]);
        let (q_ids, k_ids) = (ids(&device, &q_starts), ids(&device, &k_starts));
        attention_forward(
            o_found.view_mut(),
            lse_found.view_mut(),
            q.view(),
            k.view(),
            v.view(),
            q_ids.ids(),
            k_ids.ids(),
            &shape,
        )
        .unwrap();
        assert_near(&format!("o of {shape:?}"), &o_found.read("o"), &o);
        assert_close(&format!("lse of {shape:?}"), &lse_found.read("lse"), &lse, tolerance(1e-6, 2e-4));
    }
}

#[test]
fn cuda_refuses_other_head_dimensions_by_name() {
    let Some(device) = device() else { return };
    let shape = shape(1, 1, 72);
    let [q, mut o] = [0; 2].map(|_| Tensor::activations(&device, 4, 72).unwrap());
    let mut lse = Tensor::zeros(&device, 1, 4).unwrap();
    let ids = ids(&device, &[0, 4]);
    let refused = attention_forward(
        o.view_mut(),
        lse.view_mut(),
        q.view(),
        q.view(),
        q.view(),
        ids.ids(),
        ids.ids(),
        &shape,
    );
    assert_eq!(
        refused.unwrap_err().to_string(),
        "attention_forward has no kernel for cuda:0 and 72 elements a head (it has one for 16, 32, 64, 80, 96, 128, 256)"
    );
}

#[test]
#[ignore = "prints a timing"]
fn cuda_timing() {
    let Some(device) = device() else { return };
    let cuda = device.cuda().unwrap();
    for (sequences, length, shape) in [
        (4, 2048, shape(32, 8, 128)),
        (4, 2048, shape(32, 8, 64)),
        (1, 8192, shape(32, 8, 128)),
        (1, 512, shape(32, 8, 128)),
        (8, 256, shape(9, 3, 64)),
    ] {
        let tokens = sequences * length;
        let (q_cols, k_cols) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
        let put = |seed, cols| Padded::activations(&device, &random(seed, tokens, cols, 1.0), [0, 0]);
        let (q, do_, k, v) = (put(1, q_cols), put(2, q_cols), put(3, k_cols), put(4, k_cols));
        let (mut o, mut dq, mut dk, mut dv) =
            (put(5, q_cols), put(5, q_cols), put(5, k_cols), put(5, k_cols));
        let statistics = Mat::poisoned(shape.n_heads, tokens);
        let [mut lse, mut delta] = [0; 2].map(|_| Padded::statistics(&device, &statistics, [0, 0]));
        let ids = ids(&device, &(0..=sequences).map(|s| (s * length) as u32).collect::<Vec<_>>());
        let runs = 20;
        let time = |run: &mut dyn FnMut()| {
            crate::testing::seconds(|| {
                (0..runs).for_each(|_| run());
                cuda.synchronize().unwrap();
            }) / runs as f64
        };
        let forward = time(&mut || {
            let (o, lse) = (o.view_mut(), lse.view_mut());
            attention_forward(o, lse, q.view(), k.view(), v.view(), ids.ids(), ids.ids(), &shape).unwrap();
        });
        let backward = time(&mut || {
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
                ids.ids(),
                &shape,
            )
            .unwrap();
        });
        let tera = (sequences * length * (length + 1) / 2 * shape.n_heads * 2 * shape.head_dim) as f64 / 1e12;
        println!(
            "attention {sequences} x {length}, {}/{} heads of {}: forward {:.3} ms, {:.0} TFLOP/s; backward {:.3} ms, {:.0}",
            shape.n_heads,
            shape.n_kv_heads,
            shape.head_dim,
            1e3 * forward,
            2.0 * tera / forward,
            1e3 * backward,
            5.0 * tera / backward,
        );
    }
}
