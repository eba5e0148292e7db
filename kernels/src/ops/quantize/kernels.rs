//! What starts the kernels that pack, by type.
//!
//! A thread or a few lanes have a block, and sums run in the codec's order, uncontracted.

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;

use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::Result;

macro_rules! source {
    ($name:ident, $file:literal) => {
        #[doc = concat!("The quantizers of `", $file, "`.")]
        pub(crate) static $name: Source = Source::new(
            $file,
            concat!(
                "#line 1 \"rounding.cuh\"\n",
                include_str!("rounding.cuh"),
                "\n#line 1 \"",
                $file,
                "\"\n",
                include_str!($file)
            ),
        );
    };
}
source!(BLOCKS, "quantize_blocks.cu");
source!(K, "quantize_k.cu");

/// Threads of a block, as `rounding.cuh` has it.
pub(super) const THREADS: usize = 256;

/// Blocks of threads that are started for a multiprocessor at most, where they go on until all is done.
const BLOCKS_PER_SM: usize = 16;

/// The kernel of a type whose blocks lie one after another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    source: &'static Source,
    name: &'static str,
    /// Elements of a thread.
    per_thread: usize,
    over_bus: bool,
}

impl Blocks {
    /// The table of what devices pack. Last: whether rows in host memory are taken there and back, too, which pays where
    /// packing is slow: by measurement on 16 cores Q8_0 and Q4_0 lost by it, and Q5_1 gained a sixth.
    #[rustfmt::skip]
    pub(super) fn of(dtype: GgmlType) -> Option<Blocks> {
        let (source, name, per_thread, over_bus) = match dtype {
            GgmlType::F16 => (&BLOCKS, "quantize_f16", 4, false),
            GgmlType::BF16 => (&BLOCKS, "quantize_bf16", 4, false),
            GgmlType::Q8_0 => (&BLOCKS, "quantize_q8_0", 4, false),
            GgmlType::Q4_0 => (&BLOCKS, "quantize_q4_0", 4, false),
            GgmlType::Q4_1 => (&BLOCKS, "quantize_q4_1", 4, false),
            GgmlType::Q5_0 => (&BLOCKS, "quantize_q5_0", 4, false),
            GgmlType::Q5_1 => (&BLOCKS, "quantize_q5_1", 4, false),
            GgmlType::Q4_K => (&K, "quantize_q4_k", 32, true),
            GgmlType::Q5_K => (&K, "quantize_q5_k", 32, true),
            GgmlType::Q6_K => (&K, "quantize_q6_k", 16, true),
            _ => return None,
        };
        Some(Blocks { source, name, per_thread, over_bus })
    }

    /// The kernel of a type that [`Packers`](super::Packers) take to a device.
    pub(super) fn over_bus(dtype: GgmlType) -> Option<Blocks> {
        Blocks::of(dtype).filter(|kernel| kernel.over_bus)
    }

    /// Packs `elements` f32 at `x`, and writes what that stands for to `stored` unless it is 0.
    ///
    /// # Errors
    /// The device refuses.
    pub(super) fn launch(self, cuda: &Cuda, packed: u64, stored: u64, x: u64, elements: usize) -> Result<()> {
        let args = [Arg::Ptr(packed), Arg::Ptr(stored), Arg::Ptr(x), Arg::I64(elements as i64)];
        let grid = Grid::over(elements.div_ceil(self.per_thread), THREADS);
        cuda.launch(self.source, self.name, grid, &args)
    }
}

/// Where NF4 and FP4 go.
#[derive(Debug, Clone, Copy)]
pub(super) struct FourBitTo {
    pub codes: u64,
    /// An f32 per block.
    pub absmax: u64,
    /// [`table_bytes`] of the type.
    pub table: u64,
}

impl FourBitTo {
    /// Packs whole blocks of f32 at `x`.
    ///
    /// # Errors
    /// The device refuses.
    pub(super) fn launch(
        self,
        cuda: &Cuda,
        quant_type: QuantType,
        blocksize: usize,
        x: u64,
        blocks: usize,
    ) -> Result<()> {
        let places = quant_type.order().iter().rev();
        let args = [
            Arg::Ptr(self.codes),
            Arg::Ptr(self.absmax),
            Arg::Ptr(x),
            Arg::Ptr(self.table),
            Arg::U64(places.fold(0, |order, &code| order << 4 | u64::from(code))),
            Arg::size(blocksize),
            Arg::I64(blocks as i64),
        ];
        let grid = Grid::of(blocks.div_ceil(THREADS / 32).min(cuda.sms() * BLOCKS_PER_SM), THREADS);
        cuda.launch(&BLOCKS, "quantize_four_bit", grid, &args)
    }
}

/// Size of [`table_bytes`].
pub(super) const TABLE_BYTES: usize = 16 * size_of::<f32>();

/// The values of the codes, as the kernels of 4-bit types read them.
pub(super) fn table_bytes(quant_type: QuantType) -> Vec<u8> {
    quant_type.table().iter().flat_map(|x| x.to_le_bytes()).collect()
}
