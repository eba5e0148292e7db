//! `qpeft bench linear`: one linear layer on a packed weight, forward and backward, and what the branch and the
//! dequantization add to the bare product.
//!
//! The rate counts the operations of the frozen product alone, 2 x tokens x rows x columns, so that all lines
//! divide the same work by their time.

use std::fmt::Write as _;

use qpeft_formats::safetensors::Dtype as Element;
use qpeft_kernels::ops::low_rank::{
    OutScale, low_rank_branch_gradients, low_rank_forward, low_rank_projection_backward,
};
use qpeft_kernels::ops::quant_linear::{
    Branch, quant_linear_backward, quant_linear_backward_with_branch, quant_linear_forward,
};
use qpeft_kernels::ops::quantize::Packers;
use qpeft_kernels::tensor::padding;
use qpeft_kernels::{BaseWeight, Device, Tensor};
use serde_json::{Value, json};

use super::{activations, median_seconds, normal};
use crate::cli::args::BenchLinearArgs;
use crate::cli::printer::Printer;
use crate::cli::session::open_device;

/// Seconds of one way to compute the layer.
struct Timed {
    branch: bool,
    dequantized: bool,
    forward: f64,
    backward: f64,
}

/// Runs the command.
///
/// # Errors
/// The type cannot hold such a matrix, or the device cannot be used or is out of memory.
pub fn run(args: &BenchLinearArgs, printer: &Printer) -> anyhow::Result<()> {
    let device = open_device(&args.compute, printer)?;
    let std = 1.0 / (args.cols as f32).sqrt();
    let dense = BaseWeight::from_f32(args.rows, args.cols, &normal(args.rows, args.cols, std, 0))?;
    let packed = dense.quantized_by(&Packers::of(&device)?, args.base, Element::BF16)?;
    drop(dense);
    let mut lines = Vec::new();
    // Only a GPU can keep the weight dequantized.
    let ways: &[bool] = if device.cuda().is_some() { &[true, false] } else { &[true] };
    for &dequantized in ways {
        for branch in [false, true] {
            let mut weight = packed.clone().to_device(&device)?;
            if !dequantized {
                let ranks: &[usize] = if branch { &[args.lora_r] } else { &[] };
                weight.keep_copy(&device, padding(args.cols, ranks), args.lora_r, branch)?;
            }
            let layer = Layer::new(&device, args, &weight)?;
            let (forward, backward) = if branch { layer.adapted(&device)? } else { layer.plain(&device)? };
            lines.push(Timed { branch, dequantized, forward, backward });
        }
    }
    let flops = 2.0 * (args.tokens * args.rows) as f64 * args.cols as f64;
    if args.json {
        let part = |seconds: f64| json!({ "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12 });
        let ways = lines.iter().map(|line| {
            json!({
                "branch": line.branch,
                "dequantized": line.dequantized,
                "forward": part(line.forward),
                "backward": part(line.backward),
            })
        });
        let ways: Vec<Value> = ways.collect();
        let mut report = json!({
            "device": device.to_string(),
            "type": packed.type_name(),
            "rows": args.rows,
            "cols": args.cols,
            "tokens": args.tokens,
            "lora_r": args.lora_r,
            "ways": ways,
        });
        if let Some(cuda) = device.cuda() {
            report["gpu"] = json!(cuda.model()?);
        }
        return Ok(printer.json(&report)?);
    }
    let mut text = format!(
        "{:<34} {:>12} {:>10} {:>12} {:>10}\n",
        "", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s"
    );
    for Timed { branch, dequantized, forward, backward } in lines {
        let weight = if dequantized { packed.type_name() } else { "bf16 copy" };
        let name = format!("{weight}{}", if branch { ", branch" } else { "" });
        let rate = |seconds: f64| flops / seconds / 1e12;
        writeln!(
            text,
            "{name:<34} {:>12.3} {:>10.3} {:>12.3} {:>10.3}",
            1e3 * forward,
            rate(forward),
            1e3 * backward,
            rate(backward)
        )?;
    }
    Ok(printer.data(&text)?)
}

/// A weight with everything that goes in and comes out.
struct Layer<'a> {
    weight: &'a BaseWeight,
    /// (T, K), with h (T, r) beside it.
    x: Tensor,
    h: Tensor,
    dx: Tensor,
    /// (T, N), with dh (T, r) beside dy.
    y: Tensor,
    dy: Tensor,
    dh: Tensor,
    /// (r, K) and (N, r).
    a: Tensor,
    b: Tensor,
    da: Tensor,
    db: Tensor,
}

impl Layer<'_> {
    fn new<'a>(device: &Device, args: &BenchLinearArgs, weight: &'a BaseWeight) -> anyhow::Result<Layer<'a>> {
        let (rows, cols, tokens, rank) = (args.rows, args.cols, args.tokens, args.lora_r);
        let padded = |cols: usize, seed: u64| -> anyhow::Result<(Tensor, Tensor)> {
            let (mut wide, mut more) = Tensor::with_padding(device, tokens, cols, &[rank])?;
            wide.write(&normal(tokens, cols, 1.0, seed))?;
            Ok((wide, more.remove(0)))
        };
        let ((x, h), (dy, dh)) = (padded(cols, 1)?, padded(rows, 2)?);
        Ok(Layer {
            weight,
            x,
            h,
            dx: Tensor::activations(device, tokens, cols)?,
            y: Tensor::activations(device, tokens, rows)?,
            dy,
            dh,
            a: activations(device, rank, cols, 3)?,
            b: activations(device, rows, rank, 4)?,
            da: Tensor::zeros(device, rank, cols)?,
            db: Tensor::zeros(device, rows, rank)?,
        })
    }

    /// Forward and backward of the frozen product alone.
    fn plain(mut self, device: &Device) -> anyhow::Result<(f64, f64)> {
        let forward = median_seconds(device, |_| {
            Ok(quant_linear_forward(self.y.view_mut(), self.x.view(), self.weight, None, None)?)
        })?;
        let backward = median_seconds(device, |_| {
            let (dx, dy) = (self.dx.view_mut(), self.dy.view());
            Ok(quant_linear_backward(dx, dy, self.weight, None, false)?)
        })?;
        Ok((forward, backward))
    }

    /// The same with a low-rank branch: its product forward, the gradients of both factors backward.
    fn adapted(mut self, device: &Device) -> anyhow::Result<(f64, f64)> {
        let forward = median_seconds(device, |_| {
            low_rank_forward(self.h.view_mut(), self.x.view(), self.a.view())?;
            let branch = Branch { h: self.h.view(), b: self.b.view() };
            Ok(quant_linear_forward(self.y.view_mut(), self.x.view(), self.weight, None, Some(branch))?)
        })?;
        let backward = median_seconds(device, |_| {
            let (dh, db, dy) = (self.dh.view_mut(), self.db.view_mut(), self.dy.view());
            let scale = OutScale { scaling: 1.0, rows: None };
            low_rank_branch_gradients(dh, None, db, dy, self.b.view(), self.h.view(), scale)?;
            let (dx, dh, a) = (self.dx.view_mut(), self.dh.view(), self.a.view());
            quant_linear_backward_with_branch(dx, dh, dy, self.weight, None, a, false)?;
            Ok(low_rank_projection_backward(self.da.view_mut(), dh, self.x.view())?)
        })?;
        Ok((forward, backward))
    }
}
