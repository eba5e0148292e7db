//! llama.cpp's own quantizer, from a shared library that the user names: what `qpeft bench quantize`
//! measures itself against. Nothing else needs it, and nothing looks for it.

use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};

use libloading::Library;
use qpeft_formats::GgmlType;

use crate::error::{Error, Result};

/// `ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)`: bytes written.
type QuantizeChunk = unsafe extern "C" fn(c_int, *const f32, *mut u8, i64, i64, i64, *const f32) -> usize;
/// `ggml_blck_size(type)`.
type BlockLen = unsafe extern "C" fn(c_int) -> i64;
/// `ggml_type_size(type)`.
type BlockBytes = unsafe extern "C" fn(c_int) -> usize;

/// `ggml_version()`: `0.25.3`, a static string.
type Version = unsafe extern "C" fn() -> *const c_char;

/// The oldest version whose table of types is known to hold every type of ours.
const OLDEST: [u32; 3] = [0, 25, 3];

/// An opened `libggml-base`.
#[derive(Debug)]
pub struct GgmlLibrary {
    path: PathBuf,
    quantize_chunk: QuantizeChunk,
    block_len: BlockLen,
    block_bytes: BlockBytes,
    /// Keeps the code of the functions mapped.
    _library: Library,
}

impl GgmlLibrary {
    /// Opens a library, which runs its initializers: the path must be one that the user trusts.
    ///
    /// # Errors
    /// The file cannot be loaded, lacks a function, or is older than ggml 0.25.3.
    pub fn open(path: &Path) -> Result<GgmlLibrary> {
        let refused = |reason: String| Error::Library { path: path.display().to_string(), reason };
        if !path.is_file() {
            return Err(refused("there is no such file".to_owned()));
        }
        // A name without a slash would be looked up in the system's folders.
        let full = path.canonicalize().map_err(|e| refused(e.to_string()))?;
        // SAFETY: the user named the library to have its code run in this process; those of llama.cpp
        // have initializers without preconditions.
        let library = unsafe { Library::new(&full) }.map_err(|e| refused(e.to_string()))?;
        let missing = |e: libloading::Error| refused(format!("it is not llama.cpp's libggml-base: {e}"));
        // SAFETY: the signature is that of ggml.h, and the library is still mapped.
        let version = unsafe {
            let version = library.get::<Version>(c"ggml_version").map_err(missing)?;
            CStr::from_ptr(version()).to_string_lossy().into_owned()
        };
        let numbers: Vec<u32> = version.split('.').map_while(|part| part.parse().ok()).collect();
        if numbers[..] < OLDEST[..] {
            return Err(refused(format!("its version is `{version}`, expected 0.25.3 or newer")));
        }
        // SAFETY: the signatures are those of ggml.h; `_library` keeps the functions mapped.
        unsafe {
            Ok(GgmlLibrary {
                path: path.to_owned(),
                quantize_chunk: *library.get(c"ggml_quantize_chunk").map_err(missing)?,
                block_len: *library.get(c"ggml_blck_size").map_err(missing)?,
                block_bytes: *library.get(c"ggml_type_size").map_err(missing)?,
                _library: library,
            })
        }
    }

    /// Refuses a type that the library has with other blocks than this version.
    ///
    /// # Errors
    /// See above.
    pub fn check(&self, dtype: GgmlType) -> Result<()> {
        let id = dtype.id() as c_int;
        // SAFETY: both read a static table at `id`, and `open` refuses libraries whose table is too short.
        let (len, bytes) = unsafe { ((self.block_len)(id), (self.block_bytes)(id)) };
        if (len, bytes) == (dtype.block_len() as i64, dtype.block_bytes()) {
            return Ok(());
        }
        Err(Error::Library {
            path: self.path.display().to_string(),
            reason: format!(
                "its {dtype} has blocks of {len} elements in {bytes} bytes, expected {} in {}",
                dtype.block_len(),
                dtype.block_bytes()
            ),
        })
    }

    /// Quantizes rows of `row_len` like [`crate::cpu::quantize::quantize_rows`], on the calling thread.
    ///
    /// # Panics
    /// The lengths do not belong together, importance is missing where the type needs it, or the library
    /// does not have the type.
    pub fn quantize_rows(
        &self,
        dtype: GgmlType,
        rows: &[f32],
        row_len: usize,
        importance: Option<&[f32]>,
        bytes: &mut [u8],
    ) {
        assert!(self.check(dtype).is_ok(), "{dtype} is not in the library");
        assert!(dtype.require_quantizer(importance.is_some()).is_ok(), "{dtype} cannot be written");
        let row_bytes = dtype.row_bytes(row_len).expect("rows are whole blocks");
        let n_rows = rows.len() / row_len.max(1);
        assert!(rows.len() == n_rows * row_len && bytes.len() == n_rows * row_bytes, "rows of {row_len}");
        assert!(importance.is_none_or(|weights| weights.len() == row_len), "one importance per column");
        let weights = importance.map_or(std::ptr::null(), <[f32]>::as_ptr);
        // SAFETY: `rows` holds n_rows x row_len floats, `weights` row_len or null, and `bytes` as many
        // blocks as they become; both sides agree on the size of a block. The function may be called from
        // several threads, as llama-quantize does.
        let written = unsafe {
            (self.quantize_chunk)(
                dtype.id() as c_int,
                rows.as_ptr(),
                bytes.as_mut_ptr(),
                0,
                n_rows as i64,
                row_len as i64,
                weights,
            )
        };
        assert_eq!(written, bytes.len(), "ggml_quantize_chunk says how much it wrote");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_library_is_refused_by_path() {
        let error = GgmlLibrary::open(Path::new("nowhere/libggml-base.so")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot use `nowhere/libggml-base.so` as llama.cpp's library: there is no such file"
        );
        assert!(error.hint().unwrap().contains("libggml-base"));
        let text = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
        let error = GgmlLibrary::open(text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot use `{}`", text.display())), "{error}");
    }
}
