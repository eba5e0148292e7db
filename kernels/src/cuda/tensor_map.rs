//! How the copy engine of compute capability 9.0 sees a matrix, so that one thread can fetch a box of it.

use cudarc::driver::sys;

use super::Cuda;
use crate::error::Result;

/// A matrix of bf16 in device memory, fetched as boxes of 64 rows and 64 columns.
///
/// A box lies in shared memory as 64 lines of 128 bytes; their 16-byte chunks are swizzled (chunk XOR line modulo 8),
/// as the tensor cores read them. What lies outside of the matrix arrives as zeros.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// Rows and columns of a box.
    pub const BOX: usize = 64;

    /// Whether rows from `ptr` on, `stride` elements apart, can be fetched.
    pub fn fits(ptr: u64, stride: usize) -> bool {
        ptr.is_multiple_of(16) && stride.is_multiple_of(8)
    }
}

impl Cuda {
    /// Describes `rows` rows of `cols` elements at `ptr`, `stride` elements apart; see [`TensorMap::fits`].
    ///
    /// # Errors
    /// The driver refuses.
    pub fn tensor_map(&self, ptr: u64, rows: usize, cols: usize, stride: usize) -> Result<TensorMap> {
        self.bind()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let sizes = [cols as u64, rows as u64];
        let pitches = [2 * stride as u64];
        let boxes = [TensorMap::BOX as u32; 2];
        let steps = [1; 2];
        // SAFETY: the arrays have the rank's two elements, the strides one less; the driver only writes the map.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                ptr as *mut _,
                sizes.as_ptr(),
                pitches.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|e| self.error("describing a matrix to the copy engine", e))?;
        Ok(TensorMap(map.opaque))
    }
}
