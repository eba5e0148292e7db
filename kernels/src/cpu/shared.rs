//! A matrix that parallel tasks write to, each to its own blocks: heads are blocks of columns, which safe
//! slices cannot hand out.

use std::marker::PhantomData;

use crate::error::Result;
use crate::tensor::ViewMut;

/// A mutably borrowed matrix that can be shared by tasks.
pub(crate) struct SharedMut<'a> {
    data: *mut f32,
    len: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `&mut [f32]` may be sent to another thread; the only access, `row`, leaves it to its caller
// that no two threads use the same elements.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    /// Takes over a view in host memory.
    pub(crate) fn new(view: ViewMut<'a>, op: &'static str) -> Result<SharedMut<'a>> {
        let stride = view.stride;
        let data = view.cpu(op)?;
        Ok(SharedMut { data: data.as_mut_ptr(), len: data.len(), stride, borrow: PhantomData })
    }

    /// Elements `col..col + len` of a row.
    ///
    /// # Safety
    /// While the slice lives, nobody else uses these elements.
    #[expect(clippy::mut_from_ref, reason = "that is the purpose; the caller keeps the blocks apart")]
    pub(crate) unsafe fn row(&self, row: usize, col: usize, len: usize) -> &mut [f32] {
        let start = row * self.stride + col;
        assert!(start + len <= self.len, "elements {start}..{} of {}", start + len, self.len);
        // SAFETY: within the borrowed slice by the assertion, and exclusive by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}
