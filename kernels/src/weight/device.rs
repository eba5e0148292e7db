//! The packed weight in the memory of a CUDA device, for the kernels of `ops/dequantize`.
//!
//! Its bytes lie in planes of aligned words (`planes`), then the code book of its type, all in one buffer: a weight needs nothing
//! else there. Nothing is lost or rounded on the way, only moved. Rows of dense elements and of 8-bit and
//! 4-bit codes are filled up to whole groups of eight elements, which the kernels read at once.

mod planes;

use std::sync::Arc;

use qpeft_formats::bitsandbytes::{Int8, StoredScales};
use qpeft_formats::safetensors::Dtype;
use qpeft_formats::{GgmlType, blocks};

pub(crate) use self::planes::PLANES;
use self::planes::planes;
use super::{BaseWeight, Storage, WeightType};
use crate::cuda::{Buffer, Cuda};
use crate::error::{Error, Result};

/// Elements that a kernel reads at once.
pub(crate) const GROUP: usize = 8;

/// Bytes of a weight that are in host memory at once while it is copied.
const PIECE: usize = 16 << 20;

/// Starts of planes: what the widest load wants, and a line of the cache.
const ALIGNMENT: usize = 256;

/// Groups of a weight: kernels count them in 31 bits.
const GROUPS_MAX: usize = 1 << 31;

/// A frozen (N, K) matrix on a CUDA device, packed.
#[derive(Debug)]
pub struct DeviceWeight {
    cuda: Arc<Cuda>,
    rows: usize,
    cols: usize,
    weight_type: WeightType,
    factor: f32,
    buffer: Buffer,
    layout: Layout,
}

/// Where the parts of a weight lie in its buffer, and the numbers that belong to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Layout {
    /// Bytes from the start of the buffer, of as many planes as there are.
    pub planes: [usize; PLANES],
    /// The code book.
    pub table: usize,
    /// Of everything together.
    pub bytes: usize,
    /// 4-bit with double quantization: mean of the scales. LLM.int8: 1/127.
    pub offset: f32,
    /// 4-bit: log2 of the elements of a block.
    pub block_shift: u32,
    /// 4-bit with double quantization: log2 of the blocks that share a scale.
    pub nested_shift: u32,
    /// 4-bit: what elements are rounded to before anything else.
    pub rounding: Dtype,
}

impl DeviceWeight {
    /// Copies a weight to a device, a piece at a time.
    ///
    /// # Errors
    /// The device has too little memory left, or the weight has 2^34 elements or more.
    pub fn upload(cuda: &Arc<Cuda>, weight: &BaseWeight) -> Result<DeviceWeight> {
        DeviceWeight::place(cuda, weight, false)
    }

    fn place(cuda: &Arc<Cuda>, weight: &BaseWeight, on_host: bool) -> Result<DeviceWeight> {
        let groups = weight.rows.saturating_mul(weight.cols.div_ceil(GROUP));
        if groups >= GROUPS_MAX {
            let what = "groups of eight elements";
            return Err(Error::IndexOutOfRange { op: "upload", what, index: groups, limit: GROUPS_MAX });
        }
        let layout = Layout::of(weight);
        let mut buffer = if on_host { cuda.alloc_host(layout.bytes)? } else { cuda.alloc(layout.bytes)? };
        layout.write(weight, |at, bytes| {
            if on_host {
                buffer.write_host(at, bytes);
                return Ok(());
            }
            cuda.write(buffer.ptr() + at as u64, bytes)
        })?;
        Ok(DeviceWeight {
            cuda: Arc::clone(cuda),
            rows: weight.rows,
            cols: weight.cols,
            weight_type: weight.weight_type(),
            factor: weight.factor(),
            buffer,
            layout,
        })
    }

    /// As [`DeviceWeight::upload`], into pinned host memory that kernels read over the bus.
    ///
    /// # Errors
    /// The host has not so much memory to pin.
    pub fn pin(cuda: &Arc<Cuda>, weight: &BaseWeight) -> Result<DeviceWeight> {
        DeviceWeight::place(cuda, weight, true)
    }

    /// Where it is.
    pub fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features, K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the rows are stored.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// What every element of the blocks is multiplied by; see [`BaseWeight::factor`].
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// Bytes of device memory.
    pub fn size_bytes(&self) -> usize {
        self.layout.bytes
    }

    /// Bytes of device memory that a weight will take.
    pub fn bytes_of(weight: &BaseWeight) -> usize {
        Layout::of(weight).bytes
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Address of the byte `at` of its buffer.
    pub(crate) fn address(&self, at: usize) -> u64 {
        self.buffer.ptr() + at as u64
    }
}

/// Bytes of a dense element.
fn element_bytes(dtype: GgmlType) -> usize {
    dtype.block_bytes()
}

impl Layout {
    /// Sizes only: no byte of the weight is read.
    pub(crate) fn of(weight: &BaseWeight) -> Layout {
        let (rows, padded) = (weight.rows, weight.cols.next_multiple_of(GROUP));
        let mut layout = Layout {
            planes: [0; PLANES],
            table: 0,
            bytes: 0,
            offset: 0.0,
            block_shift: 0,
            nested_shift: 0,
            rounding: Dtype::F32,
        };
        let sizes = match &weight.storage {
            Storage::Ggml { dtype, .. } if dtype.is_dense() => vec![rows * padded * element_bytes(*dtype)],
            Storage::Ggml { dtype, bytes, .. } => {
                let blocks = bytes.len() / dtype.block_bytes();
                planes(*dtype).iter().map(|plane| blocks * plane.bytes_per_block(*dtype)).collect()
            }
            Storage::Int8(_) => {
                layout.offset = Int8::INVERSE;
                vec![rows * padded, rows * size_of::<f32>()]
            }
            Storage::FourBit(weight) => {
                layout.block_shift = weight.state().blocksize.trailing_zeros();
                layout.rounding = weight.state().dtype;
                let codes = rows * padded / 2;
                match weight.scales() {
                    StoredScales::Plain(absmax) => vec![codes, absmax.len()],
                    StoredScales::Double { codes: scales, absmax, blocksize, offset, .. } => {
                        layout.offset = offset;
                        layout.nested_shift = blocksize.trailing_zeros();
                        vec![codes, scales.len(), size_of_val(absmax)]
                    }
                }
            }
        };
        for (plane, size) in layout.planes.iter_mut().zip(sizes) {
            *plane = layout.bytes;
            layout.bytes += size.next_multiple_of(ALIGNMENT);
        }
        layout.table = layout.bytes;
        layout.bytes += table(weight).len();
        layout
    }

    /// Hands all parts of the weight to `sink`, each with its place, in pieces of bounded size.
    pub(crate) fn write(
        &self,
        weight: &BaseWeight,
        mut sink: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let cols = weight.cols;
        let [first, second, third, _] = self.planes;
        match &weight.storage {
            Storage::Ggml { dtype, bytes, .. } if dtype.is_dense() => {
                write_rows(bytes, cols, element_bytes(*dtype), first, &mut sink)?;
            }
            Storage::Ggml { dtype, bytes, .. } => {
                let blocks = PIECE / dtype.block_bytes();
                for (i, piece) in bytes.chunks(blocks * dtype.block_bytes()).enumerate() {
                    for (plane, start) in planes(*dtype).iter().zip(self.planes) {
                        let at = start + i * blocks * plane.bytes_per_block(*dtype);
                        sink(at, &plane.pack(*dtype, piece))?;
                    }
                }
            }
            Storage::Int8(weight) => {
                write_rows(weight.codes(), cols, 1, first, &mut sink)?;
                sink(second, &le_bytes(weight.scales()))?;
            }
            Storage::FourBit(weight) => {
                write_nibbles(weight.codes(), cols, weight.state().rows, first, &mut sink)?;
                match weight.scales() {
                    StoredScales::Plain(absmax) => write_all(absmax, second, &mut sink)?,
                    StoredScales::Double { codes, absmax, .. } => {
                        write_all(codes, second, &mut sink)?;
                        sink(third, &le_bytes(absmax))?;
                    }
                }
            }
        }
        sink(self.table, &table(weight))
    }
}

/// What the codes of a weight stand for: f32 for 4-bit codes, then for those of the scales; signed bytes for points.
fn table(weight: &BaseWeight) -> Vec<u8> {
    match &weight.storage {
        Storage::Ggml { dtype, .. } => match blocks::code_book(*dtype) {
            None => vec![],
            Some(values) if values.len() == 16 => {
                le_bytes(&values.iter().map(|&x| x.into()).collect::<Vec<f32>>())
            }
            Some(values) => values.iter().map(|&x| x as u8).collect(),
        },
        Storage::Int8(_) => vec![],
        Storage::FourBit(weight) => {
            let mut bytes = le_bytes(weight.state().quant_type.table());
            if let StoredScales::Double { map, .. } = weight.scales() {
                bytes.extend(le_bytes(map));
            }
            bytes
        }
    }
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

type Sink<'a> = dyn FnMut(usize, &[u8]) -> Result<()> + 'a;

fn write_all(bytes: &[u8], start: usize, sink: &mut Sink<'_>) -> Result<()> {
    for (i, piece) in bytes.chunks(PIECE).enumerate() {
        sink(start + i * PIECE, piece)?;
    }
    Ok(())
}

/// Rows of `cols` elements of `size` bytes, with zeros up to whole groups behind each.
fn write_rows(bytes: &[u8], cols: usize, size: usize, start: usize, sink: &mut Sink<'_>) -> Result<()> {
    let (row, padded) = (cols * size, cols.next_multiple_of(GROUP) * size);
    if row == padded {
        return write_all(bytes, start, sink);
    }
    let rows = (PIECE / padded).max(1);
    let mut piece = Vec::new();
    for (i, bytes) in bytes.chunks(rows * row).enumerate() {
        piece.clear();
        for row in bytes.chunks_exact(row) {
            piece.extend_from_slice(row);
            piece.resize(piece.len().next_multiple_of(padded), 0);
        }
        sink(start + i * rows * padded, &piece)?;
    }
    Ok(())
}

/// Rows of `cols` 4-bit codes that follow each other without a gap, the first of a byte in its high nibble; with zeros up to
/// whole groups behind each.
fn write_nibbles(codes: &[u8], cols: usize, rows: usize, start: usize, sink: &mut Sink<'_>) -> Result<()> {
    let padded = cols.next_multiple_of(GROUP);
    if cols == padded {
        return write_all(codes, start, sink);
    }
    let nibble = |i: usize| if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
    let rows_per_piece = (2 * PIECE / padded).max(1);
    for first in (0..rows).step_by(rows_per_piece) {
        let mut piece = Vec::new();
        for row in first..rows.min(first + rows_per_piece) {
            let code = |col: usize| if col < cols { nibble(row * cols + col) } else { 0 };
            piece.extend((0..padded).step_by(2).map(|col| code(col) << 4 | code(col + 1)));
        }
        sink(start + first * padded / 2, &piece)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Mat;

    /// The bytes that an upload would leave on the device.
    fn packed(weight: &BaseWeight) -> (Layout, Vec<u8>) {
        let layout = Layout::of(weight);
        let mut bytes = vec![0xcd; layout.bytes];
        layout
            .write(weight, |at, piece| {
                bytes[at..at + piece.len()].copy_from_slice(piece);
                Ok(())
            })
            .unwrap();
        (layout, bytes)
    }

    #[test]
    fn rows_are_filled_up_to_whole_groups() {
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let weight = BaseWeight::from_f32(2, 3, &values).unwrap();
        let (layout, bytes) = packed(&weight);
        assert_eq!((layout.planes[0], layout.table, layout.bytes), (0, 256, 256));
        let read: Vec<f32> = bytes[..64].as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        assert_eq!(read[..8], [0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(read[8..], [3.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn four_bit_rows_start_at_whole_words_and_keep_their_codes() {
        let to = "nf4-dq".parse::<WeightType>().unwrap();
        for cols in [131, 136] {
            let weight = BaseWeight::from_f32(5, cols, &Mat::random(1, 5, cols, 1.0).values()).unwrap();
            let weight = weight.quantized(to).unwrap();
            let (layout, bytes) = packed(&weight);
            let Storage::FourBit(four_bit) = &weight.storage else { unreachable!("it was quantized to nf4") };
            let nibble = |bytes: &[u8], i: usize| bytes[i / 2] >> (4 * (1 - i % 2)) & 15;
            for (row, col) in [(0, 0), (1, 0), (2, 17), (4, cols - 1)] {
                let at = row * cols.next_multiple_of(8) + col;
                assert_eq!(nibble(&bytes, at), nibble(four_bit.codes(), row * cols + col), "{row} {col}");
            }
            let StoredScales::Double { codes, .. } = four_bit.scales() else { unreachable!("double") };
            assert_eq!(bytes[layout.planes[1]..][..codes.len()], codes[..]);
            assert_eq!(bytes.len() - layout.table, 4 * (16 + 256));
        }
    }

    #[test]
    fn pieces_are_bounded_and_join_without_a_gap() {
        let (rows, cols) = (300, 32 * 4096);
        let bytes: Vec<u8> = (0..rows * GgmlType::Q4_0.row_bytes(cols).unwrap()).map(|i| i as u8).collect();
        let weight = BaseWeight::from_ggml(GgmlType::Q4_0, rows, cols, bytes.into()).unwrap();
        let layout = Layout::of(&weight);
        let mut written = vec![];
        layout
            .write(&weight, |at, piece| {
                assert!(piece.len() <= PIECE);
                written.push((at, piece.len()));
                Ok(())
            })
            .unwrap();
        written.sort_unstable();
        let codes: Vec<_> = written.iter().filter(|(at, _)| *at < layout.planes[1]).collect();
        assert!(codes.len() > 1);
        assert_eq!(codes.iter().map(|(_, len)| len).sum::<usize>(), rows * cols / 2);
        assert!(codes.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0));
    }
}
