//! How the kernels that see a matrix as spans of neighbouring columns are started (`Span` in the prelude).

use super::Grid;
use crate::error::{Error, Result};

/// Threads of a block of such a kernel.
pub(crate) const THREADS: usize = 256;

/// Columns of a span.
const SPAN: usize = 8;

/// The grid of a kernel whose threads handle `spans` spans of a (rows, cols) matrix each.
///
/// # Errors
/// The matrix has more elements than a kernel counts.
pub(crate) fn grid(op: &'static str, rows: usize, cols: usize, spans: usize) -> Result<Grid> {
    let elements = rows.saturating_mul(cols);
    let (block, limit) = (THREADS * spans * SPAN, i32::MAX as usize);
    // The last block may reach behind the end, in 32 bits.
    if elements > u32::MAX as usize - block || rows > limit || cols > limit {
        let (what, index) = ("number of elements", elements);
        return Err(Error::IndexOutOfRange { op, what, index, limit: u32::MAX as usize - block });
    }
    Ok(Grid::of(elements.div_ceil(block), THREADS))
}

/// The shape and strides to give to a kernel that treats all elements alike: one long row if there are no gaps.
///
/// One row has stride 0, which is aligned.
pub(crate) fn flat<const M: usize>(
    rows: usize,
    cols: usize,
    strides: [usize; M],
) -> (usize, usize, [usize; M]) {
    let without_gaps = strides.iter().all(|&stride| stride == cols);
    match rows.checked_mul(cols) {
        Some(all) if without_gaps && i32::try_from(all).is_ok() => (1, all, [0; M]),
        _ if rows == 1 => (1, cols, [0; M]),
        _ => (rows, cols, strides),
    }
}

/// Columns that a block of a kernel that adds up the rows of columns reads.
const STRIP: usize = 256;

/// Blocks that keep any device busy; fixed, so that sums have the same bits on every device.
const BLOCKS: usize = 1024;

/// Threads, at eight columns each, of all blocks that keep whole rows; fixed for the same reason.
const ROW_THREADS: usize = 1 << 17;

/// Bytes of scratch that the sums of the columns of two (rows, cols) matrices take.
pub fn column_sums(rows: usize, cols: usize) -> usize {
    2 * Chunks::of(rows, cols).count * cols * size_of::<f32>()
}

/// The same of one matrix that blocks read by whole rows.
pub fn column_sums_by_rows(rows: usize, cols: usize) -> usize {
    Chunks::of_rows(rows, cols).count * cols * size_of::<f32>()
}

/// How the rows of a (rows, cols) matrix are shared out where every column is added up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunks {
    /// Rows of a chunk.
    pub rows: usize,
    /// Chunks.
    pub count: usize,
    /// Blocks side by side.
    pub strips: usize,
}

impl Chunks {
    /// Chunks of at least two rows per warp of a block: each leaves sums that are added up later.
    pub(crate) fn of(rows: usize, cols: usize) -> Chunks {
        let strips = cols.div_ceil(STRIP);
        let wanted = (BLOCKS / strips.max(1)).clamp(1, rows.div_ceil(16).max(1));
        let rows_each = rows.div_ceil(wanted).max(1);
        Chunks { rows: rows_each, count: rows.div_ceil(rows_each), strips }
    }

    /// Chunks for blocks that keep whole rows, a span per thread.
    pub(crate) fn of_rows(rows: usize, cols: usize) -> Chunks {
        let wanted = (ROW_THREADS / cols.div_ceil(8).next_power_of_two().max(128)).max(1);
        let rows_each = rows.div_ceil(wanted).max(1);
        Chunks { rows: rows_each, count: rows.div_ceil(rows_each), strips: cols.div_ceil(8 * THREADS) }
    }

    /// One block per strip and chunk.
    pub(crate) fn grid(self) -> Grid {
        Grid { blocks: (self.strips, self.count, 1), threads: THREADS, shared: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_without_gaps_are_one_row() {
        assert_eq!(flat(3, 5, [5, 5]), (1, 15, [0, 0]));
        assert_eq!(flat(3, 5, [5, 8]), (3, 5, [5, 8]));
        assert_eq!(flat(1, 5, [5, 8]), (1, 5, [0, 0]));
        assert_eq!(flat(1 << 16, 1 << 16, [1 << 16]), (1 << 16, 1 << 16, [1 << 16]));
    }

    #[test]
    fn grids_cover_every_element_and_refuse_what_kernels_cannot_count() {
        assert_eq!(grid("test", 3, 2048, 1).unwrap().blocks.0, 3);
        assert_eq!(grid("test", 3, 2049, 1).unwrap().blocks.0, 4);
        assert_eq!(grid("test", 0, 8, 2).unwrap().blocks.0, 0);
        assert!(grid("test", 1 << 16, 1 << 16, 1).is_err());
        assert!(grid("test", usize::MAX, 2, 1).is_err());
    }

    #[test]
    fn chunks_cover_all_rows_and_fill_a_device() {
        for (rows, cols) in [(1, 1), (7, 129), (512, 4096), (8192, 14336), (8192, 576), (3, 1 << 20), (0, 8)]
        {
            let chunks = Chunks::of(rows, cols);
            assert!(chunks.rows * chunks.count >= rows && chunks.rows * chunks.count < rows + chunks.rows);
            assert!(chunks.strips * chunks.count <= BLOCKS.max(chunks.strips));
        }
        assert!(Chunks::of(8192, 4096).strips * Chunks::of(8192, 4096).count >= 512);
    }
}
