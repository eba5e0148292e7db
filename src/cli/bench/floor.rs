//! What no program could beat on this GPU: the operations and bytes of a step over measured ceilings.

use qpeft_kernels::cuda::Cuda;
use qpeft_kernels::cuda::gemm::{Matrix, transposed};
use qpeft_kernels::{Device, Dtype, Tensor};
use serde::Serialize;

use super::activations;
use crate::cli::args::{BenchTrainArgs, Recompute};
use crate::model::Decoder;

/// The rates of the two units that a step can be bound by, measured with a large product and a large copy.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Ceilings {
    /// bf16 matrix products, FLOP/s.
    pub flops_per_second: f64,
    /// Device memory, bytes read plus written per second.
    pub bytes_per_second: f64,
}

impl Ceilings {
    /// Measures both on random data, in some tenths of a second.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn measure(cuda: &std::sync::Arc<Cuda>) -> anyhow::Result<Ceilings> {
        const SIDE: usize = 8192;
        const REPEATS: usize = 10;
        let device = Device::Cuda(std::sync::Arc::clone(cuda));
        let operands: Vec<Tensor> =
            (0..3).map(|seed| activations(&device, SIDE, SIDE, seed)).collect::<anyhow::Result<_>>()?;
        let matrices: Vec<Matrix> =
            operands.iter().map(|t| t.view().matrix("ceiling")).collect::<Result<_, _>>()?;
        let timed = |work: &dyn Fn() -> Result<(), qpeft_kernels::Error>| -> anyhow::Result<f64> {
            work()?;
            cuda.synchronize()?;
            let began = std::time::Instant::now();
            for _ in 0..REPEATS {
                work()?;
            }
            cuda.synchronize()?;
            Ok(began.elapsed().as_secs_f64() / REPEATS as f64)
        };
        let product = timed(&|| cuda.gemm(matrices[2], matrices[0], transposed(matrices[1]), 1.0, 0.0))?;
        let bytes = SIDE * SIDE * Dtype::Bf16.size();
        let copy = timed(&|| cuda.copy(matrices[2].ptr, matrices[0].ptr, bytes))?;
        Ok(Ceilings {
            flops_per_second: 2.0 * (SIDE as f64).powi(3) / product,
            bytes_per_second: 2.0 * bytes as f64 / copy,
        })
    }
}

/// The least that a step has to do.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Floor {
    /// What the rates are.
    pub ceilings: Ceilings,
    /// Forward and input gradients of the frozen linears and of the head, causal attention; a second forward
    /// where layers are recomputed.
    pub flops: f64,
    /// Packed weights read and their bf16 tiles written once per product pass.
    pub bytes: f64,
    /// Operations and bytes over their ceilings, the larger: neither can be hidden behind less than itself.
    pub seconds: f64,
}

impl Floor {
    /// Of one step of `args` on `decoder`.
    pub fn of(decoder: &Decoder, args: &BenchTrainArgs, ceilings: Ceilings) -> Floor {
        let c = &decoder.config;
        let (tokens, length) = ((args.batch_size * args.max_seq_length) as f64, args.max_seq_length as f64);
        let linears: f64 = decoder.linears().map(|l| (l.weight.rows() * l.weight.cols()) as f64).sum();
        let head = (c.vocab_size * c.hidden_size) as f64;
        let forwards = if args.recompute == Recompute::All { 2.0 } else { 1.0 };
        // Half of the length x length products are masked; the backward pass does five products for two.
        let attention = 2.0 * length * (c.n_heads * c.head_dim * c.n_layers) as f64;
        let flops = tokens * (2.0 * linears * (forwards + 1.0) + 4.0 * head + attention * (forwards + 2.5));
        let packed: f64 = decoder.linears().map(|l| l.weight.size_bytes() as f64).sum();
        let bytes = packed * (forwards + 1.0);
        let seconds = (flops / ceilings.flops_per_second).max(bytes / ceilings.bytes_per_second);
        Floor { ceilings, flops, bytes, seconds }
    }
}
