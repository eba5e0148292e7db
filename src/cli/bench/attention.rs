//! `qpeft bench attention`: causal attention of one layer, forward and backward.
//!
//! Operations are counted as the literature does: two products of length x length x head forward, half of them
//! masked, and five for two backward.

use qpeft_kernels::ops::attention::{AttentionShape, attention_backward, attention_forward};
use qpeft_kernels::{IdBuffer, Tensor};
use serde_json::json;

use super::{activations, median_seconds};
use crate::cli::args::BenchAttentionArgs;
use crate::cli::printer::Printer;
use crate::cli::report::Usage;
use crate::cli::session::open_device;

/// Runs the command.
///
/// # Errors
/// The device cannot be used, has no kernel for the heads, or is out of memory.
pub fn run(args: &BenchAttentionArgs, printer: &Printer) -> anyhow::Result<()> {
    let (heads, kv_heads, dim) = (args.heads, args.kv_heads, args.head_dim);
    if !heads.is_multiple_of(kv_heads) {
        return Err(Usage::new(format!("`--heads {heads}` is no multiple of `--kv-heads {kv_heads}`")).into());
    }
    let device = open_device(&args.compute, printer)?;
    let (sequences, length) = (args.batch_size, args.max_seq_length);
    let tokens = sequences * length;
    let shape = AttentionShape {
        n_heads: heads,
        n_kv_heads: kv_heads,
        head_dim: dim,
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: None,
        window: None,
    };
    let queries = |seed| activations(&device, tokens, heads * dim, seed);
    let keys = |seed| activations(&device, tokens, kv_heads * dim, seed);
    let (q, do_, k, v) = (queries(1)?, queries(2)?, keys(3)?, keys(4)?);
    let empty = |cols| Tensor::activations(&device, tokens, cols);
    let (mut o, mut dq) = (empty(heads * dim)?, empty(heads * dim)?);
    let (mut dk, mut dv) = (empty(kv_heads * dim)?, empty(kv_heads * dim)?);
    let mut lse = Tensor::zeros(&device, heads, tokens)?;
    let mut delta = Tensor::zeros(&device, heads, tokens)?;
    let mut starts = IdBuffer::new(&device, sequences + 1)?;
    starts.set(&(0..=sequences).map(|s| (s * length) as u32).collect::<Vec<_>>())?;

    let forward = median_seconds(&device, |_| {
        let (o, lse, ids) = (o.view_mut(), lse.view_mut(), starts.ids());
        Ok(attention_forward(o, lse, q.view(), k.view(), v.view(), ids, ids, &shape)?)
    })?;
    let backward = median_seconds(&device, |_| {
        Ok(attention_backward(
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
            starts.ids(),
            &shape,
        )?)
    })?;
    let flops = 2.0 * (length * length) as f64 * (heads * dim * sequences) as f64;
    let passes = [("forward", forward, flops), ("backward", backward, 2.5 * flops)];
    if args.json {
        let mut report = json!({
            "device": device.to_string(),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "batch_size": sequences,
            "sequence_length": length,
        });
        if let Some(cuda) = device.cuda() {
            report["gpu"] = json!(cuda.model()?);
        }
        for (name, seconds, flops) in passes {
            report[name] = json!({ "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12 });
        }
        return Ok(printer.json(&report)?);
    }
    let lines = passes.map(|(name, seconds, flops)| {
        format!("{name:<9} {:10.3} ms {:10.3} TFLOP/s\n", 1e3 * seconds, flops / seconds / 1e12)
    });
    Ok(printer.data(&lines.concat())?)
}
