//! What a fuzz target is: a name, a function that must neither panic nor hang, and what it may allocate.
//!
//! The same targets run under `cargo fuzz` (see `formats/fuzz`) and in the ordinary tests.

use super::alloc;

/// Reads any bytes as one kind of input and checks what must hold whatever they are.
#[derive(Clone, Copy)]
pub struct Target {
    /// Name of the target, of its corpus and of its regressions.
    pub name: &'static str,
    /// Must return for every input.
    pub run: fn(&[u8]),
    /// Bytes that may be held at a time per byte of input. A count in a file says nothing: only
    /// bytes that are really there may be paid for.
    pub bytes_per_byte: usize,
    /// Bytes that may be held whatever the input: buffers, tables, compiled patterns.
    pub bytes_at_least: usize,
}

impl Target {
    /// Runs the target on an input.
    ///
    /// # Panics
    /// The target does, or more memory was held than the input can justify.
    pub fn check(&self, data: &[u8]) {
        let peak = alloc::peak_during(|| (self.run)(data));
        let limit = self.bytes_at_least + self.bytes_per_byte * data.len();
        assert!(
            peak <= limit,
            "`{}` held {peak} bytes for an input of {} bytes, at most {limit} are justified",
            self.name,
            data.len()
        );
    }
}

/// Parts that are packed into one input with a zero byte between; the last may hold zeros itself.
pub fn unpack<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut rest = data.splitn(N, |&byte| byte == 0);
    std::array::from_fn(|_| rest.next().unwrap_or_default())
}

/// The inverse of [`unpack`].
pub fn pack(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&0)
}

/// A folder for the files of one input, in memory where the system has such a place.
pub fn scratch() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir()
        && let Ok(folder) = tempfile::tempdir_in(memory)
    {
        return folder;
    }
    tempfile::tempdir().expect("a temporary folder")
}
