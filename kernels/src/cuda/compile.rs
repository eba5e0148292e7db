//! Kernel files to machine code: NVRTC compiles them for the GPU at hand, and a folder of the user's cache keeps what it made,
//! so that only the first run on a machine waits for it.
//!
//! A kernel file includes nothing; it is compiled behind `prelude.cuh`. An entry of the cache is found by a hash of all that
//! the code depends on and carries a hash of itself: one that is damaged, or that an interrupted copy cut
//! short, is compiled anew.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::Mutex;

use cudarc::nvrtc::sys as nvrtc;

use super::library;
use crate::error::{Error, Result};

/// What every kernel file starts with.
const PRELUDE: &str = include_str!("prelude.cuh");

/// Beside the architecture: what NVRTC is told. Division, square roots and denormals stay IEEE's; a kernel that wants a
/// fast approximation says so by name (`__expf`).
const OPTIONS: [&str; 3] = ["--std=c++17", "--device-as-default-execution-space", "--generate-line-info"];

/// How an entry of the cache starts; the number changes with its layout.
const MAGIC: &[u8; 16] = b"qpeft cubin  1\r\n";

/// Larger entries are not of our making: the largest kernel file makes some 2 MB.
const LARGEST_ENTRY: u64 = 256 << 20;

/// One kernel file.
#[derive(Debug)]
pub struct Source {
    /// Its name, `rms_norm.cu`.
    pub name: &'static str,
    /// Its text, without the prelude.
    pub text: &'static str,
    /// Whether it uses instructions that compute capability 9.0 alone has.
    pub hopper: bool,
}

impl Source {
    /// A file for every architecture.
    pub const fn new(name: &'static str, text: &'static str) -> Source {
        Source { name, text, hopper: false }
    }

    /// A file for Hopper only.
    pub const fn hopper(name: &'static str, text: &'static str) -> Source {
        Source { name, text, hopper: true }
    }

    /// Whether it is made for this architecture.
    pub fn runs_on(&self, arch: Arch) -> bool {
        !self.hopper || arch == Arch::HOPPER
    }

    fn whole(&self) -> String {
        format!("#line 1 \"prelude.cuh\"\n{PRELUDE}\n#line 1 \"{}\"\n{}", self.name, self.text)
    }
}

/// The architecture of a GPU: its compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Arch {
    /// 9 of 9.0.
    pub major: u32,
    /// 0 of 9.0.
    pub minor: u32,
}

impl Arch {
    /// The oldest with bf16 arithmetic and asynchronous copies, which the kernels use.
    pub const OLDEST: Arch = Arch { major: 8, minor: 0 };
    /// The one that Hopper files are for.
    pub const HOPPER: Arch = Arch { major: 9, minor: 0 };

    /// `sm_90`, or `sm_90a` for a file that only Hopper runs.
    pub fn flag(self, source: &Source) -> String {
        format!("{self}{}", if source.hopper { "a" } else { "" })
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

/// The machine code of a file (a CUBIN), from the cache or compiled.
///
/// # Errors
/// NVRTC is missing, or does not compile the file. A cache that cannot be read or written is none.
pub fn cubin(source: &Source, arch: Arch) -> Result<Vec<u8>> {
    cubin_in(cache_folder().as_deref(), source, arch)
}

/// Compiles a file; see [`cubin`].
///
/// # Errors
/// NVRTC is missing, does not know the architecture, or refuses the file: the error holds its log.
pub fn compile(source: &Source, arch: Arch) -> Result<Vec<u8>> {
    compile_with_log(source, arch).map(|(code, _)| code)
}

fn cubin_in(cache: Option<&Path>, source: &Source, arch: Arch) -> Result<Vec<u8>> {
    let Some(cache) = cache else { return compile(source, arch) };
    let key = key(source, arch, library::version_of_nvrtc()?);
    let stem = source.name.trim_end_matches(".cu");
    let path = cache.join(format!("{stem}-{}-{}.cubin", arch.flag(source), &key.to_hex()[..16]));
    if let Some(code) = read_entry(&path, &key) {
        return Ok(code);
    }
    let code = compile(source, arch)?;
    write_entry(&path, &key, &code);
    Ok(code)
}

/// A hash of all that the machine code depends on.
fn key(source: &Source, arch: Arch, version: (u32, u32)) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let version = format!("{}.{}", version.0, version.1);
    for part in [&source.whole(), &arch.flag(source), &version, &OPTIONS.join(" ")] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize()
}

/// `$XDG_CACHE_HOME/qpeft/kernels`, or the same in `~/.cache`.
fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(root.join("qpeft").join("kernels"))
}

/// The code of an entry, if it is whole and of this key: magic, key, hash of the code, code.
fn read_entry(path: &Path, key: &blake3::Hash) -> Option<Vec<u8>> {
    if fs::metadata(path).ok()?.len() > LARGEST_ENTRY {
        return None;
    }
    let mut bytes = fs::read(path).ok()?;
    let rest = bytes.strip_prefix(MAGIC)?.strip_prefix(key.as_bytes())?;
    let (hash, code) = rest.split_at_checked(blake3::OUT_LEN)?;
    if code.is_empty() || blake3::hash(code).as_bytes() != hash {
        return None;
    }
    bytes.drain(..bytes.len() - code.len());
    Some(bytes)
}

/// Keeps code for the next run. What cannot be written is compiled again then.
fn write_entry(path: &Path, key: &blake3::Hash, code: &[u8]) {
    // Two threads of one process would share the temporary name.
    static WRITING: Mutex<()> = Mutex::new(());
    let _guard = WRITING.lock();
    let Some(folder) = path.parent() else { return };
    if fs::create_dir_all(folder).is_err() {
        return;
    }
    let bytes = [&MAGIC[..], key.as_bytes(), blake3::hash(code).as_bytes(), code].concat();
    let _ = qpeft_formats::file::write_atomic(path, &bytes);
}

/// A program of NVRTC, destroyed when dropped.
struct Program(nvrtc::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram`, and nobody uses it after this.
        unsafe { nvrtc::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

/// The CUBIN and NVRTC's warnings.
fn compile_with_log(source: &Source, arch: Arch) -> Result<(Vec<u8>, String)> {
    library::nvrtc()?;
    let flag = arch.flag(source);
    let refuse = |log: String| Error::Compile {
        file: source.name.to_owned(),
        arch: flag.clone(),
        log: log.trim().to_owned(),
    };
    if !source.runs_on(arch) {
        return Err(refuse(format!("it is for {} only", Arch::HOPPER)));
    }
    let known = known_archs().map_err(refuse)?;
    if !known.contains(&arch) {
        let (major, minor) = library::version_of_nvrtc()?;
        let known: Vec<String> = known.iter().map(Arch::to_string).collect();
        return Err(refuse(format!("NVRTC {major}.{minor} knows {}", known.join(", "))));
    }
    let c_string = |text: String| CString::new(text).map_err(|_| refuse("it holds a zero byte".to_owned()));
    let (text, name) = (c_string(source.whole())?, c_string(source.name.to_owned())?);
    let mut options = vec![c_string(format!("--gpu-architecture={flag}"))?];
    for option in OPTIONS {
        options.push(c_string(option.to_owned())?);
    }
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();

    let mut program = Program(null_mut());
    // SAFETY: both strings end with zero and outlive the call, which copies them; there are no headers.
    check(unsafe {
        nvrtc::nvrtcCreateProgram(&raw mut program.0, text.as_ptr(), name.as_ptr(), 0, null(), null())
    })
    .map_err(refuse)?;
    // SAFETY: the program lives, and `options` holds as many strings as are announced.
    let compiled =
        check(unsafe { nvrtc::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr()) });
    let log = read_log(&program).map_err(refuse)?;
    if let Err(status) = compiled {
        return Err(refuse(if log.is_empty() { status } else { log }));
    }
    let mut len = 0;
    // SAFETY: the program lives and was compiled for a real architecture; one integer is written.
    check(unsafe { nvrtc::nvrtcGetCUBINSize(program.0, &raw mut len) }).map_err(refuse)?;
    let mut code = vec![0_u8; len];
    // SAFETY: `code` holds the bytes that the program said it has.
    check(unsafe { nvrtc::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }).map_err(refuse)?;
    Ok((code, log))
}

/// The architectures that this NVRTC compiles for.
fn known_archs() -> Result<Vec<Arch>, String> {
    let mut len = 0;
    // SAFETY: writes one integer; the library is there.
    check(unsafe { nvrtc::nvrtcGetNumSupportedArchs(&raw mut len) })?;
    let mut numbers = vec![0; usize::try_from(len).map_err(|_| format!("NVRTC knows {len} architectures"))?];
    // SAFETY: `numbers` holds as many integers as NVRTC said it has.
    check(unsafe { nvrtc::nvrtcGetSupportedArchs(numbers.as_mut_ptr()) })?;
    Ok(numbers.iter().map(|&n| Arch { major: n as u32 / 10, minor: n as u32 % 10 }).collect())
}

fn read_log(program: &Program) -> Result<String, String> {
    let mut len = 0;
    // SAFETY: the program lives; one integer is written.
    check(unsafe { nvrtc::nvrtcGetProgramLogSize(program.0, &raw mut len) })?;
    let mut log = vec![0_u8; len];
    if len > 0 {
        // SAFETY: `log` holds the bytes that the program said it has.
        check(unsafe { nvrtc::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()) })?;
    }
    Ok(String::from_utf8_lossy(&log).trim_matches(['\0', '\n', ' ']).to_owned())
}

fn check(status: nvrtc::nvrtcResult) -> Result<(), String> {
    if status == nvrtc::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: the answer is a static string that ends with zero.
    Err(unsafe { CStr::from_ptr(nvrtc::nvrtcGetErrorString(status)) }.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use super::super::sources::SOURCES;
    use super::*;
    use crate::ops::dequantize::row_norm_sources;

    const ARCHS: [Arch; 6] = [
        Arch::OLDEST,
        Arch { major: 8, minor: 6 },
        Arch { major: 8, minor: 9 },
        Arch::HOPPER,
        Arch { major: 10, minor: 0 },
        Arch { major: 12, minor: 0 },
    ];

    static SMALL: Source = Source::new(
        "small.cu",
        "extern \"C\" __global__ void small(float* y) { y[threadIdx.x] = warp_sum(y[threadIdx.x]); }\n",
    );

    fn nvrtc_is_missing() -> bool {
        library::nvrtc().inspect_err(|e| println!("skipped: {e}")).is_err()
    }

    #[test]
    fn every_kernel_file_compiles_for_every_architecture_with_nvrtc() {
        if nvrtc_is_missing() {
            return;
        }
        let known = known_archs().unwrap();
        let (archs, too_new): (Vec<Arch>, Vec<Arch>) = ARCHS.iter().partition(|arch| known.contains(arch));
        for arch in too_new {
            println!("skipped {arch}: this NVRTC does not know it");
        }
        let jobs: Vec<(&Source, Arch)> = archs
            .iter()
            .flat_map(|&arch| {
                let sources = SOURCES.iter().copied().chain(row_norm_sources()).chain([&SMALL]);
                sources.map(move |source| (source, arch))
            })
            .filter(|(source, arch)| source.runs_on(*arch))
            .collect();
        let next = AtomicUsize::new(0);
        let failures = Mutex::new(Vec::new());
        let work = || {
            while let Some(&(source, arch)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let began = Instant::now();
                match compile_with_log(source, arch) {
                    Ok((code, log)) => println!(
                        "{} {}: {} bytes, {} ms{}{log}",
                        source.name,
                        arch.flag(source),
                        code.len(),
                        began.elapsed().as_millis(),
                        if log.is_empty() { "" } else { "\n" }
                    ),
                    Err(e) => failures.lock().unwrap().push(e.to_string()),
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
        });
        let failures = failures.into_inner().unwrap();
        assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    }

    #[test]
    fn every_kernel_file_of_the_package_is_in_the_table() {
        let mut folders = vec![PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src")];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() {
                    folders.push(entry);
                } else if entry.extension().is_some_and(|end| end == "cu") {
                    found.push(entry.file_name().unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        let mut listed: Vec<&str> = SOURCES.iter().map(|source| source.name).collect();
        found.sort();
        listed.sort_unstable();
        assert_eq!(found, listed, "`cuda/sources.rs` lists every kernel file once");
        for source in SOURCES {
            assert_eq!(source.hopper, source.name.ends_with("_hopper.cu"), "{}", source.name);
        }
    }

    #[test]
    fn a_refused_file_is_an_error_with_its_name_and_line_from_nvrtc() {
        if nvrtc_is_missing() {
            return;
        }
        static BROKEN: Source =
            Source::new("broken.cu", "// one\nextern \"C\" __global__ void f() { int x = y; }\n");
        let text = compile(&BROKEN, Arch::OLDEST).unwrap_err().to_string();
        assert!(text.starts_with("cannot compile `broken.cu` for sm_80: broken.cu(2): error"), "{text}");
    }

    #[test]
    fn an_architecture_that_nvrtc_does_not_know_is_refused_with_those_it_does() {
        if nvrtc_is_missing() {
            return;
        }
        let error = compile(&SMALL, Arch { major: 2, minor: 0 }).unwrap_err();
        assert!(error.to_string().contains("sm_20") && error.to_string().contains("sm_90"), "{error}");
        assert!(error.hint().is_some());
        static HOPPER: Source = Source::hopper("small_hopper.cu", "");
        assert_eq!(Arch::HOPPER.flag(&HOPPER), "sm_90a");
        let text = compile(&HOPPER, Arch { major: 10, minor: 0 }).unwrap_err().to_string();
        assert!(text.contains("sm_90 only"), "{text}");
    }

    #[test]
    fn what_nvrtc_made_is_kept_and_a_damaged_entry_is_made_anew() {
        if nvrtc_is_missing() {
            return;
        }
        let cache = tempfile::tempdir().unwrap();
        let made = cubin_in(Some(cache.path()), &SMALL, Arch::HOPPER).unwrap();
        let entries: Vec<PathBuf> =
            fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(entries.len(), 1, "{entries:?}");
        let whole = fs::read(&entries[0]).unwrap();
        let key = key(&SMALL, Arch::HOPPER, library::version_of_nvrtc().unwrap());
        assert_eq!(read_entry(&entries[0], &key).as_ref(), Some(&made));

        // What is in the cache is what comes back: the code is swapped for another with the right hash.
        let other = [&MAGIC[..], key.as_bytes(), blake3::hash(b"other").as_bytes(), b"other"].concat();
        fs::write(&entries[0], other).unwrap();
        assert_eq!(cubin_in(Some(cache.path()), &SMALL, Arch::HOPPER).unwrap(), b"other");

        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let mut foreign = whole.clone();
        foreign[20] ^= 1;
        for damaged in [&whole[..whole.len() / 2], &whole[..40], b"", &flipped, &foreign] {
            fs::write(&entries[0], damaged).unwrap();
            assert!(read_entry(&entries[0], &key).is_none());
            assert_eq!(cubin_in(Some(cache.path()), &SMALL, Arch::HOPPER).unwrap(), made);
            assert_eq!(fs::read(&entries[0]).unwrap(), whole);
        }
    }

    #[test]
    fn an_unwritable_cache_is_no_error_for_nvrtc() {
        if nvrtc_is_missing() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!cubin_in(Some(&file.path().join("kernels")), &SMALL, Arch::OLDEST).unwrap().is_empty());
        assert!(!cubin_in(None, &SMALL, Arch::OLDEST).unwrap().is_empty());
    }

    #[test]
    fn the_key_depends_on_text_architecture_and_version() {
        static OTHER: Source = Source::new("small.cu", "extern \"C\" __global__ void small(float* y) {}\n");
        let first = key(&SMALL, Arch::HOPPER, (13, 0));
        assert_eq!(first, key(&SMALL, Arch::HOPPER, (13, 0)));
        assert_ne!(first, key(&OTHER, Arch::HOPPER, (13, 0)));
        assert_ne!(first, key(&SMALL, Arch::OLDEST, (13, 0)));
        assert_ne!(first, key(&SMALL, Arch::HOPPER, (13, 1)));
    }
}
