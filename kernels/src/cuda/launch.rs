//! The one place where a kernel is started.

use std::ffi::{CString, c_void};
use std::sync::PoisonError;

use cudarc::driver::{result, sys};

use super::compile::{self, Source};
use super::{Cuda, Function, TensorMap};
use crate::error::Result;

/// How many blocks of how many threads, and the dynamic shared memory of each.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks in x, y and z; a zero starts nothing.
    pub blocks: (usize, usize, usize),
    /// Threads of a block, in x.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

impl Grid {
    /// `blocks` blocks of `threads` threads in one dimension.
    pub fn of(blocks: usize, threads: usize) -> Grid {
        Grid { blocks: (blocks, 1, 1), threads, shared: 0 }
    }

    /// Enough blocks of `threads` threads for one thread per item.
    pub fn over(items: usize, threads: usize) -> Grid {
        Grid::of(items.div_ceil(threads), threads)
    }
}

/// An argument of a kernel, of the type that its parameter has.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum Arg {
    Ptr(u64),
    I32(i32),
    I64(i64),
    U32(u32),
    U64(u64),
    F32(f32),
    Map(TensorMap),
    /// A structure that a kernel takes by value.
    Words([u64; WORDS]),
}

/// Words of the largest structure that a kernel takes.
pub const WORDS: usize = 11;

impl Arg {
    /// A size or stride as a kernel's `int`.
    pub fn size(n: usize) -> Arg {
        Arg::I32(i32::try_from(n).expect("sizes of matrices are checked to fit 31 bits"))
    }

    /// A structure of addresses and, behind them, 32-bit values.
    ///
    /// # Panics
    /// It has more words than [`WORDS`].
    pub fn words(addresses: &[u64], values: &[u32]) -> Arg {
        let mut words = [0; WORDS];
        words[..addresses.len()].copy_from_slice(addresses);
        for (word, pair) in words[addresses.len()..].iter_mut().zip(values.chunks(2)) {
            *word = u64::from(pair[0]) | u64::from(pair.get(1).copied().unwrap_or(0)) << 32;
        }
        assert!(addresses.len() + values.len().div_ceil(2) <= WORDS, "a structure of too many words");
        Arg::Words(words)
    }

    /// The value in the first bytes of a little-endian word; what is longer is passed from where it is.
    fn word(&self) -> u64 {
        match *self {
            Arg::Map(_) | Arg::Words(_) => 0,
            Arg::Ptr(x) | Arg::U64(x) => x,
            Arg::I32(x) => u64::from(x as u32),
            Arg::I64(x) => x as u64,
            Arg::U32(x) => u64::from(x),
            Arg::F32(x) => u64::from(x.to_bits()),
        }
    }
}

/// Dynamic shared memory that every kernel has without asking.
const PLAIN_SHARED: usize = 48 << 10;

impl Cuda {
    /// Enqueues `kernel` of `source` with these arguments.
    ///
    /// # Errors
    /// The source does not compile, has no such kernel, or the device refuses.
    pub fn launch(
        &self,
        source: &'static Source,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<()> {
        let (x, y, z) = grid.blocks;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let function = self.function(source, kernel, grid.shared)?;
        let words: Vec<u64> = args.iter().map(Arg::word).collect();
        let mut params: Vec<*mut c_void> = args
            .iter()
            .zip(&words)
            .map(|(arg, word)| match arg {
                Arg::Map(map) => std::ptr::from_ref(map).cast_mut().cast(),
                Arg::Words(words) => words.as_ptr().cast_mut().cast(),
                _ => std::ptr::from_ref(word).cast_mut().cast(),
            })
            .collect();
        let began = self.profile_begin()?;
        // SAFETY: the argument types are those that the kernel declares: each op passes them next to its kernel,
        // and the tests run every launch. The driver copies the arguments before it returns; kernels write
        // through the pointers only in stream order, where the tensors that own them are alive or freed later
        // by a call that waits for the device.
        unsafe {
            result::launch_kernel(
                function,
                (x as u32, y as u32, z as u32),
                (grid.threads as u32, 1, 1),
                grid.shared as u32,
                self.stream(),
                &mut params,
            )
        }
        .map_err(|e| self.error(kernel, e))?;
        self.profile_end(source.name, began)
    }

    /// The kernel, compiled and loaded when it is first asked for.
    fn function(
        &self,
        source: &'static Source,
        kernel: &'static str,
        shared: usize,
    ) -> Result<sys::CUfunction> {
        self.bind()?;
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.name, kernel);
        if !modules.functions.contains_key(&key) {
            let loaded = modules.loaded.get(source.name).copied();
            let module = if let Some(module) = loaded {
                module
            } else {
                let cubin = compile::cubin(source, self.arch())?;
                // SAFETY: the image is a whole cubin that NVRTC made, checked against its hash by the cache.
                let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }
                    .map_err(|e| self.error(source.name, e))?;
                modules.loaded.insert(source.name, module);
                module
            };
            let name = CString::new(kernel).expect("kernel names have no NUL");
            // SAFETY: the module stays loaded as long as the device is open.
            let handle =
                unsafe { result::module::get_function(module, name) }.map_err(|e| self.error(kernel, e))?;
            modules.functions.insert(key, Function { handle, shared: PLAIN_SHARED });
        }
        let function = modules.functions.get_mut(&key).expect("inserted above");
        if shared > function.shared {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the handle belongs to a loaded module.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared as i32) }
                .map_err(|e| self.error(kernel, e))?;
            function.shared = shared;
        }
        Ok(function.handle)
    }
}
