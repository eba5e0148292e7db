//! The CUDA twin of both gradients of a branch: one pass over dy, in blocks whose sums a second kernel adds up.
//!
//! `low_rank.cu` says how the kernels work. A library product reads all of dy, which is hundreds of times as large as
//! all else, and there would be two of them.

use std::sync::Arc;

use super::{BRANCH, Branch, OutScale, SOURCE};
use crate::cuda::gemm::{Matrix, transposed};
use crate::cuda::{Arg, Cuda, Grid, Scratch, WORDS};
use crate::error::Result;
use crate::ops::convert::convert;
use crate::tensor::{Dtype, View, ViewMut};

/// Tokens of a stage of shared memory.
const TOKENS: usize = 16;

/// Tokens that a block has at least, unless there are fewer: its sums of dB are written once for all of them.
const LEAST_TOKENS: usize = 64;

/// Multiprocessors that are made use of; no device has more.
const LARGEST_DEVICE: usize = 192;

/// Branches that a kernel takes at most.
const TOGETHER: usize = 3;

/// Threads of a block that adds up, and partial sums that each has in flight.
const FINISHERS: usize = 256;
const IN_FLIGHT: usize = 8;

/// The kernel for ranks up to `rank`, in the numbers of the kernel file.
#[derive(Debug)]
struct Kernel {
    name: &'static str,
    rank: usize,
    warps: usize,
    columns: usize,
    stages: usize,
    /// Blocks that a multiprocessor has at once.
    blocks: usize,
}

static KERNELS: [Kernel; 3] = [
    Kernel { name: "low_rank_branch_gradients_r16", rank: 16, warps: 8, columns: 512, stages: 4, blocks: 2 },
    Kernel { name: "low_rank_branch_gradients_r32", rank: 32, warps: 16, columns: 512, stages: 3, blocks: 1 },
    Kernel { name: "low_rank_branch_gradients_r64", rank: 64, warps: 16, columns: 256, stages: 3, blocks: 1 },
];

impl Kernel {
    /// The one for a branch of this rank, if there is one.
    fn of(tokens: usize, outputs: usize, rank: usize) -> Option<&'static Kernel> {
        let whole =
            outputs.is_multiple_of(8) && rank.is_multiple_of(8) && tokens > 0 && outputs > 0 && rank > 0;
        // Kernels count elements in 31 bits.
        let countable = |kernel: &&Kernel| {
            tokens.max(outputs).checked_mul(kernel.rank).is_some_and(|n| i32::try_from(n).is_ok())
        };
        KERNELS.iter().find(|kernel| rank <= kernel.rank).filter(|_| whole).filter(countable)
    }

    fn column_blocks(&self, outputs: usize) -> usize {
        outputs.div_ceil(self.columns)
    }

    /// Blocks that the tokens are wanted to be shared out to, in so many blocks of columns: as many as a device has at once.
    fn token_blocks(&self, tokens: usize, column_blocks: usize, multiprocessors: usize) -> usize {
        let blocks = self.blocks * multiprocessors.min(LARGEST_DEVICE) / column_blocks;
        blocks.clamp(1, tokens.div_ceil(LEAST_TOKENS))
    }

    /// Tokens of a block, and how many blocks share the tokens.
    fn share(&self, tokens: usize, column_blocks: usize, multiprocessors: usize) -> (usize, usize) {
        let wanted = self.token_blocks(tokens, column_blocks, multiprocessors);
        let rows = tokens.div_ceil(wanted).next_multiple_of(TOKENS);
        (rows, tokens.div_ceil(rows))
    }

    /// Bytes of the sums of dh, and of those of dB by this many blocks.
    fn sums(&self, tokens: usize, outputs: usize, token_blocks: usize) -> [usize; 2] {
        [self.column_blocks(outputs) * tokens, token_blocks * outputs]
            .map(|rows| rows.saturating_mul(self.rank * Dtype::F32.size()))
    }

    fn shared(&self) -> usize {
        // Tiles of dy and h, and two buffers for the warps' sums of dh.
        self.stages * TOKENS * (self.columns + self.rank) * Dtype::Bf16.size()
            + 2 * self.warps * 8 * (self.rank + 4) * Dtype::F32.size()
    }
}

/// Bytes of [`Scratch::Partials`] that the gradients of branches with these numbers of outputs take together at most for up
/// to so many tokens, on any device.
pub fn branch_gradients_scratch(tokens: usize, outputs: &[usize], rank: usize) -> usize {
    let product = outputs.iter().map(|n| n * rank * Dtype::F32.size()).max().unwrap_or(0);
    let kernels = outputs.iter().map(|&n| Kernel::of(tokens, n, rank)).collect::<Option<Vec<_>>>();
    let sums = kernels.and_then(|kernels| {
        let kernel = *kernels.first()?;
        let column_blocks = outputs.iter().map(|&n| kernel.column_blocks(n)).sum();
        let blocks = kernel.token_blocks(tokens, column_blocks, LARGEST_DEVICE);
        let sums = outputs.iter().flat_map(|&n| kernel.sums(tokens, n, blocks));
        Some(sums.fold(0, usize::saturating_add))
    });
    sums.unwrap_or(0).max(product)
}

/// Whether the kernels read these rows, sixteen bytes at a time.
fn aligned(view: View) -> Result<bool> {
    let bits = view.bf16(BRANCH)? | (view.stride * Dtype::Bf16.size()) as u64;
    Ok(bits.is_multiple_of(16))
}

/// Threads that share `count` partial sums, so that each has all of its own in flight at once, if they are few enough.
fn lanes(count: usize) -> usize {
    count.div_ceil(IN_FLIGHT).next_power_of_two().min(8)
}

/// Enqueues both gradients of every branch: in one pass over dy if there is a kernel for the operands, of as many branches
/// at once as it serves alike, otherwise by library products.
pub(super) fn branch_gradients(cuda: &Arc<Cuda>, branches: &mut [(View<'_>, Branch<'_>)]) -> Result<()> {
    for branches in branches.chunks_mut(TOGETHER) {
        if let Some(kernel) = kernel_of(branches)? {
            in_one_pass(cuda, kernel, branches)?;
            continue;
        }
        for one in branches {
            match kernel_of(std::slice::from_ref(one))? {
                Some(kernel) => in_one_pass(cuda, kernel, std::slice::from_ref(one))?,
                None => by_library(cuda, one)?,
            }
        }
    }
    Ok(())
}

fn by_library(cuda: &Arc<Cuda>, (dy, branch): &mut (View<'_>, Branch<'_>)) -> Result<()> {
    dh_by_library(cuda, &branch.dh, *dy, branch.b)?;
    if let Some(twin) = &mut branch.twin {
        convert(twin.reborrow(), branch.dh.as_view())?;
    }
    db_by_library(cuda, &branch.db, *dy, branch.h, branch.out_scale)
}

/// dh = dy b
pub(super) fn dh_by_library(cuda: &Cuda, dh: &ViewMut<'_>, dy: View<'_>, b: View<'_>) -> Result<()> {
    cuda.gemm(dh.matrix(BRANCH)?, dy.matrix(BRANCH)?, b.matrix(BRANCH)?, 1.0, 0.0)
}

/// dB += s diag(g) dy^T h, summed and added in f32.
pub(super) fn db_by_library(
    cuda: &Cuda,
    db: &ViewMut<'_>,
    dy: View<'_>,
    h: View<'_>,
    out_scale: OutScale<'_>,
) -> Result<()> {
    let (dy, h, to) = (transposed(dy.matrix(BRANCH)?), h.matrix(BRANCH)?, db.matrix(BRANCH)?);
    let Some(rows) = out_scale.rows else { return cuda.gemm(to, dy, h, out_scale.scaling, 1.0) };
    let ptr = cuda.scratch(Scratch::Partials, db.rows * db.cols * Dtype::F32.size())?;
    cuda.gemm(Matrix { ptr, stride: db.cols, ..to }, dy, h, 1.0, 0.0)?;
    let args = [
        Arg::Ptr(db.f32(BRANCH)?),
        Arg::Ptr(ptr),
        Arg::Ptr(rows.f32(BRANCH)?),
        Arg::F32(out_scale.scaling),
        Arg::size(db.rows),
        Arg::size(db.cols),
        Arg::size(db.stride),
    ];
    cuda.launch(&SOURCE, "low_rank_add_scaled", Grid::over(db.rows * db.cols, 256), &args)
}

/// The kernel that serves all of these branches, if there is one.
fn kernel_of(branches: &[(View<'_>, Branch<'_>)]) -> Result<Option<&'static Kernel>> {
    let mut common: Option<&'static Kernel> = None;
    for (dy, branch) in branches {
        let Some(kernel) = Kernel::of(dy.rows, dy.cols, branch.h.cols) else { return Ok(None) };
        let alike = common.is_none_or(|common| common.rank == kernel.rank) && dy.rows == branches[0].0.rows;
        if !(alike && aligned(*dy)? && aligned(branch.b)? && aligned(branch.h)?) {
            return Ok(None);
        }
        common = Some(kernel);
    }
    Ok(common)
}

/// A structure for each branch, and for those that are not there one that begins behind all blocks.
fn operands(branches: Vec<Arg>) -> impl Iterator<Item = Arg> {
    let none = Arg::words(&[], &[i32::MAX as u32; 2 * WORDS]);
    branches.into_iter().chain(std::iter::repeat(none)).take(TOGETHER)
}

/// Enqueues both gradients of up to [`TOGETHER`] branches.
fn in_one_pass(cuda: &Arc<Cuda>, kernel: &Kernel, branches: &[(View<'_>, Branch<'_>)]) -> Result<()> {
    let tokens = branches[0].0.rows;
    let column_blocks = branches.iter().map(|(dy, _)| kernel.column_blocks(dy.cols)).sum();
    let (rows, token_blocks) = kernel.share(tokens, column_blocks, cuda.sms());
    let sums = branches.iter().map(|(dy, _)| kernel.sums(tokens, dy.cols, token_blocks));
    let bytes: Vec<[usize; 2]> = sums.collect();
    let mut sums_at = cuda.scratch(Scratch::Partials, bytes.iter().flatten().sum())?;

    let db_lanes = lanes(token_blocks);
    // Four elements a thread.
    let blocks = |rows: usize, lanes: usize| (rows * kernel.rank / 4).div_ceil(FINISHERS / lanes);
    let (mut passes, mut finishes, mut columns, mut finishers) = (Vec::new(), Vec::new(), 0, 0);
    for ((dy, branch), [dh_bytes, db_bytes]) in branches.iter().zip(bytes) {
        let Branch { dh, twin, db, b, h, out_scale } = branch;
        let (outputs, rank, column_blocks) = (dy.cols, h.cols, kernel.column_blocks(dy.cols));
        let (dh_sums, db_sums) = (sums_at, sums_at + dh_bytes as u64);
        sums_at = db_sums + db_bytes as u64;
        passes.push(Arg::words(
            &[dy.bf16(BRANCH)?, b.bf16(BRANCH)?, h.bf16(BRANCH)?, dh_sums, db_sums],
            &[outputs, rank, dy.stride, b.stride, h.stride, columns].map(size),
        ));
        let dh_lanes = lanes(column_blocks);
        let dh_blocks = blocks(tokens, dh_lanes);
        let (twin, twin_stride) = match twin {
            Some(twin) => (twin.bf16(BRANCH)?, twin.stride),
            None => (0, 0),
        };
        let g = out_scale.rows.map_or(Ok(0), |rows| rows.f32(BRANCH))?;
        let sizes = [outputs, rank, dh.stride, twin_stride, db.stride, column_blocks, dh_lanes, dh_blocks];
        let mut values = vec![out_scale.scaling.to_bits()];
        values.extend(sizes.into_iter().chain([finishers]).map(size));
        finishes.push(Arg::words(&[dh.bf16(BRANCH)?, twin, db.f32(BRANCH)?, dh_sums, db_sums, g], &values));
        columns += column_blocks;
        finishers += dh_blocks + blocks(outputs, db_lanes);
    }
    let mut args: Vec<Arg> = operands(passes).collect();
    args.extend([tokens, rows].map(Arg::size));
    let blocks = (columns, token_blocks, 1);
    let grid = Grid { blocks, threads: kernel.warps * 32, shared: kernel.shared() };
    cuda.launch(&SOURCE, kernel.name, grid, &args)?;

    let mut args: Vec<Arg> = operands(finishes).collect();
    args.extend([tokens, kernel.rank, token_blocks, db_lanes].map(Arg::size));
    cuda.launch(&SOURCE, "low_rank_branch_gradients_finish", Grid::of(finishers, FINISHERS), &args)
}

/// A size or stride as a 31-bit value of a structure.
fn size(n: usize) -> u32 {
    i32::try_from(n).expect("sizes of matrices are checked to fit 31 bits") as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_are_those_of_the_kernel_file() {
        for kernel in &KERNELS {
            let Kernel { name, rank, warps, columns, stages, blocks } = kernel;
            for line in [
                format!("constexpr int TOKENS = {TOKENS};\n"),
                format!("using Rank{rank} = Branch<{rank}, {warps}, {columns}, {stages}>;\n"),
                format!("__launch_bounds__(Rank{rank}::THREADS, {blocks})\n    {name}(Operands one,"),
                format!("constexpr int FINISHERS = {FINISHERS}, IN_FLIGHT = {IN_FLIGHT};\n"),
            ] {
                assert!(SOURCE.text.contains(&line), "{line}");
            }
        }
    }

    #[test]
    fn the_tiles_fit_the_shared_memory_of_every_architecture() {
        for kernel in &KERNELS {
            // What a block may have on 8.6, 8.9 and 12.0, and what its multiprocessor has on 8.0, with 1 KiB a block.
            assert!(kernel.shared() <= 99 << 10, "{kernel:?}: {}", kernel.shared());
            assert!(kernel.blocks * (kernel.shared() + 1024) <= 164 << 10, "{kernel:?}: {}", kernel.shared());
        }
    }

    #[test]
    fn blocks_share_all_tokens_and_their_sums_fit_what_is_predicted() {
        for outputs in [8, 512, 520, 1024, 4096, 14336, 1 << 20] {
            for rank in [8, 16, 24, 32, 64] {
                let most = branch_gradients_scratch(8192, &[outputs], rank);
                for tokens in [1, 15, 64, 65, 129, 511, 1000, 8191, 8192] {
                    let kernel = Kernel::of(tokens, outputs, rank).unwrap();
                    for multiprocessors in [1, 28, 108, 132, 192, 1000] {
                        let (rows, blocks) =
                            kernel.share(tokens, kernel.column_blocks(outputs), multiprocessors);
                        let what = format!("{tokens} {outputs} {rank} {multiprocessors}: {rows} x {blocks}");
                        assert!(rows % TOKENS == 0 && rows * blocks >= tokens, "{what}");
                        assert!(rows * (blocks - 1) < tokens, "a block has no tokens: {what}");
                        let [dh, db] = kernel.sums(tokens, outputs, blocks);
                        assert!(dh + db <= most, "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn other_shapes_are_left_to_the_library() {
        for shape in [(0, 8, 8), (8, 0, 8), (8, 12, 8), (8, 8, 0), (8, 8, 12), (8, 8, 72), (1 << 40, 8, 8)] {
            let (tokens, outputs, rank) = shape;
            assert!(Kernel::of(tokens, outputs, rank).is_none(), "{shape:?}");
            assert_eq!(branch_gradients_scratch(tokens, &[outputs], rank), 4 * outputs * rank, "{shape:?}");
        }
        assert_eq!([1, 8, 9, 28, 33, 128].map(lanes), [1, 1, 2, 4, 8, 8]);
    }
}
