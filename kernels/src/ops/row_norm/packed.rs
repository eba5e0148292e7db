//! The norms of a packed weight that has no copy: one kernel decodes its rows and multiplies them, so that nothing of it is
//! written to memory and read again.

use qpeft_formats::safetensors::Dtype as Element;

use super::{FORWARD, Fold, GROUP, Operands, aligned, fold_args};
use crate::cuda::{Arg, Grid, Source};
use crate::error::Result;
use crate::ops::dequantize::{kernels, packed_args, same_device};
use crate::tensor::{View, ViewMut};
use crate::weight::{BaseWeight, DeviceWeight};

/// The kernels of a type, in a file of their own, so that no run compiles those of types that it does not have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowNorms {
    pub(crate) source: &'static Source,
    /// Of 32 rows a block, and of 16.
    pub(crate) names: [&'static str; 2],
}

/// [`RowNorms`] of a type by the name of its kernels, which `$decoders` has.
macro_rules! row_norms {
    ($decoders:literal, $name:literal) => {{
        static SOURCE: crate::cuda::Source = crate::cuda::Source::new(
            concat!("row_norm_packed_", $name, ".cu"),
            concat!(
                "#line 1 \"frame.cuh\"\n",
                include_str!("dequantize/frame.cuh"),
                "\n#line 1 \"products.cuh\"\n",
                include_str!("row_norm/products.cuh"),
                "\n#line 1 \"packed.cuh\"\n",
                include_str!("row_norm/packed.cuh"),
                "\n#line 1 \"",
                $decoders,
                "\"\n",
                include_str!(concat!("dequantize/", $decoders)),
                "\nROW_NORMS(",
                $name,
                ")\n"
            ),
        );
        crate::ops::row_norm::packed::RowNorms {
            source: &SOURCE,
            names: [concat!("row_norm_packed_32_", $name), concat!("row_norm_packed_16_", $name)],
        }
    }};
}
pub(crate) use row_norms;

/// Threads of a block, as `frame.cuh` has it.
const THREADS: usize = 256;

/// Columns that the kernel takes at once.
const COLUMNS: usize = 32;

/// The packed weight, if the kernel takes it with these rows of A: it does not round elements to f16 first, as some 4-bit
/// weights ask for.
pub(super) fn served<'w>(weight: &'w BaseWeight, a: View<'_>) -> Option<&'w DeviceWeight> {
    let whole = weight.cols().is_multiple_of(COLUMNS) && weight.rows() > 0 && weight.cols() > 0;
    let takes = whole && (1..=GROUP).contains(&a.rows) && aligned(a).is_ok_and(|aligned| aligned);
    weight.device().filter(|weight| takes && weight.layout().rounding != Element::F16)
}

/// [`row_norm_packed`](super::row_norm_packed) of a weight that is [`served`].
///
/// # Errors
/// Operands of another type or in another place, or the device refuses.
pub(super) fn forward(
    norm: &ViewMut,
    operands: Operands,
    weight: &DeviceWeight,
    fold: Option<Fold>,
) -> Result<()> {
    same_device(FORWARD, weight, &norm.as_view())?;
    let mut args = operands.args(norm)?.to_vec();
    args.extend(packed_args(weight));
    args.push(Arg::F32(weight.factor()));
    args.extend(fold_args(fold)?);
    args.extend([Arg::F32(operands.scaling), Arg::size(weight.rows()), Arg::size(operands.a.rows)]);
    let RowNorms { source, names: [by_32, by_16] } = kernels(weight).row_norms;
    // More rows of a block are fewer readings of A; but every multiprocessor should have a block.
    let fills = weight.rows().div_ceil(32) >= weight.cuda().sms();
    let (kernel, rows) = if fills { (by_32, 32) } else { (by_16, 16) };
    // A warp stores 512 bytes for every 8 rows of W and of A.
    let shared = THREADS / 32 * (rows / 8 + 2) * 512;
    weight.cuda().launch(
        source,
        kernel,
        Grid { shared, ..Grid::of(weight.rows().div_ceil(rows), THREADS) },
        &args,
    )
}
