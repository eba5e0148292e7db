//! One f32 buffer per thread, for the tile that a task works on.
//!
//! It grows to the largest tile asked for and then stays, so that the step loop does not allocate.

use std::cell::Cell;

thread_local! {
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with `len` f32 of unspecified content.
///
/// A nested call gets a buffer of its own, which is dropped again.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = BUFFER.take();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = work(&mut buffer[..len]);
    BUFFER.set(buffer);
    result
}

#[cfg(test)]
mod tests {
    use super::with_scratch;

    #[test]
    fn nested_calls_do_not_share_memory() {
        with_scratch(4, |outer| {
            outer.fill(1.0);
            with_scratch(8, |inner| inner.fill(2.0));
            assert_eq!(outer, [1.0; 4]);
        });
        with_scratch(3, |again| assert_eq!(again.len(), 3));
    }
}
