//! Finds the three libraries that the engine calls: NVIDIA's driver, NVRTC and cuBLASLt. Nothing of CUDA is needed to build
//! this crate; what runs is what a toolkit or the PyPI `nvidia-*` wheels brought to the machine.
//!
//! `cudarc` opens each library by name and panics if that fails or a function is missing. So every library is asked for here
//! first: one outside of the loader's path is opened by its full path and kept for ever, after which the loader
//! answers every later request for the same name with it.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::{cublaslt, driver as cuda, nvrtc};
use libloading::Library;

use crate::error::{Error, Result};

/// Folders to look in before all others: they, or the `lib64`, `lib` and `nvidia/*/lib` in them.
pub const FOLDERS: &str = "QPEFT_CUDA_LIBRARIES";

/// The oldest driver whose functions the engine calls, as major and minor version of CUDA.
const OLDEST_DRIVER: (u32, u32) = (12, 0);

/// The major versions of the libraries, the best first. Their functions that are called here are the same in both.
const MAJORS: [u32; 2] = [13, 12];

/// One of the libraries.
struct Wanted {
    /// What errors call it.
    name: &'static str,
    /// `libnvrtc.so`, to which the loader's name adds the major version.
    stem: &'static str,
    /// Files beside it that it opens itself, by a name that is not on the loader's path.
    companions: &'static str,
    /// Some of the functions called, to tell it from another library of that name.
    symbols: &'static [&'static str],
    hint: &'static str,
}

const NVRTC: Wanted = Wanted {
    name: "NVRTC, which compiles the kernels",
    stem: "libnvrtc.so",
    companions: "libnvrtc-builtins.so.",
    symbols: &["nvrtcVersion", "nvrtcCompileProgram", "nvrtcGetCUBIN", "nvrtcGetSupportedArchs"],
    hint: "install it with `pip install nvidia-cuda-nvrtc` (driver 580 or newer) or `pip install nvidia-cuda-nvrtc-cu12`, or name the \
           folder of a CUDA toolkit's libraries in `QPEFT_CUDA_LIBRARIES`",
};

const CUBLASLT: Wanted = Wanted {
    name: "cuBLASLt, which multiplies the matrices",
    stem: "libcublasLt.so",
    companions: "",
    symbols: &["cublasLtGetVersion", "cublasLtMatmul", "cublasLtMatmulAlgoGetHeuristic"],
    hint: "install it with `pip install nvidia-cublas` (driver 580 or newer) or `pip install nvidia-cublas-cu12`, or name the folder \
           of a CUDA toolkit's libraries in `QPEFT_CUDA_LIBRARIES`",
};

const DRIVER: &str = "the NVIDIA driver (libcuda.so.1)";
const DRIVER_HINT: &str =
    "install the NVIDIA driver of the GPU (in a container: start it with the GPU passed through)";

/// Where a library may be, in the order of looking.
#[derive(Debug, Default)]
struct Search {
    /// Folders that the user named.
    named: Vec<PathBuf>,
    /// Whether the loader is asked, which knows `LD_LIBRARY_PATH` and the system's folders.
    loader: bool,
    /// Toolkits and wheels.
    known: Vec<PathBuf>,
}

impl Search {
    /// The places that the environment variables behind `get` lead to.
    fn from_environment(get: &dyn Fn(&str) -> Option<OsString>) -> Search {
        let folder = |name: &str| get(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let named = get(FOLDERS).map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
        let mut roots = Vec::new();
        for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| folder(name)) {
            roots.extend(site_packages(&prefix));
            roots.push(prefix);
        }
        roots.extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| folder(name)));
        roots.extend(matching(Path::new("/usr/local"), "cuda"));
        roots.push(PathBuf::from("/usr/lib/x86_64-linux-gnu"));
        roots.push(PathBuf::from("/usr/lib/aarch64-linux-gnu"));
        if let Some(home) = folder("HOME") {
            roots.extend(site_packages(&home.join(".local")));
        }
        for bin in get("PATH").map(|list| split(&list)).unwrap_or_default() {
            let python = bin.join("python3");
            // The link names the virtual environment, its target the interpreter it was made from.
            let target = python.canonicalize().ok();
            for python in target.is_some().then_some(python).into_iter().chain(target) {
                if let Some(prefix) = python.parent().and_then(Path::parent) {
                    roots.extend(site_packages(prefix));
                }
            }
        }
        let mut seen = BTreeSet::new();
        let mut below = |root: &PathBuf| {
            let mut folders = libraries_below(root);
            folders.retain(|folder| folder.is_dir() && seen.insert(folder.clone()));
            folders
        };
        let named: Vec<PathBuf> = named;
        let named = named.iter().filter(|root| !root.as_os_str().is_empty()).flat_map(|root| {
            // The loader takes a path without a slash for a name. A folder that is not there is named by the error.
            let root = std::path::absolute(root).unwrap_or_else(|_| root.clone());
            if root.is_dir() { below(&root) } else { vec![root] }
        });
        let named = named.collect();
        Search { named, loader: true, known: roots.iter().flat_map(below).collect() }
    }
}

/// The folders of a list like that of `PATH`; relative ones depend on where the process was started, and are left out.
fn split(list: &OsStr) -> Vec<PathBuf> {
    std::env::split_paths(list).filter(|folder| folder.is_absolute()).collect()
}

/// The entries of a folder whose names start with `start`, the last by name first: the newest version.
fn matching(folder: &Path, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(start.as_bytes()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.reverse();
    found
}

/// Where a Python of this prefix keeps packages.
fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let libs = ["lib", "lib64"].map(|lib| prefix.join(lib));
    let pythons = libs.iter().flat_map(|lib| matching(lib, "python3"));
    pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|name| python.join(name))).collect()
}

/// A folder itself, and those in it where a toolkit, conda and the wheels put libraries.
fn libraries_below(folder: &Path) -> Vec<PathBuf> {
    let mut folders = vec![
        folder.to_owned(),
        folder.join("lib64"),
        folder.join("lib"),
        folder.join("targets/x86_64-linux/lib"),
        folder.join("targets/sbsa-linux/lib"),
    ];
    folders.extend(matching(&folder.join("nvidia"), "").into_iter().map(|package| package.join("lib")));
    folders
}

/// Opens a library for the rest of the process and says where it was.
fn open(wanted: &Wanted, search: &Search, newest: u32) -> Result<String> {
    let names: Vec<String> = MAJORS
        .iter()
        .filter(|&&major| major <= newest)
        .map(|major| format!("{}.{major}", wanted.stem))
        .collect();
    let mut broken = Vec::new();
    if let Some(path) = open_in(&search.named, &names, wanted, &mut broken) {
        return Ok(path);
    }
    if search.loader {
        for name in &names {
            // SAFETY: NVIDIA's libraries have initializers without preconditions.
            if let Ok(library) = unsafe { Library::new(name) } {
                std::mem::forget(library);
                return Ok(name.clone());
            }
        }
    }
    if let Some(path) = open_in(&search.known, &names, wanted, &mut broken) {
        return Ok(path);
    }
    let mut reason = format!("no {} on the loader's path", names.join(" or "));
    let describe = |folder: &PathBuf| {
        let note = if folder.is_dir() { "" } else { " (no such folder)" };
        format!("`{}`{note}", folder.display())
    };
    let folders: Vec<String> = search.named.iter().chain(&search.known).map(describe).collect();
    if !folders.is_empty() {
        reason = format!("{reason}, nor in {}", folders.join(", "));
    }
    if !broken.is_empty() {
        reason = format!("{reason}; not usable: {}", broken.join(", "));
    }
    Err(Error::CudaLibrary { library: wanted.name, reason, hint: wanted.hint })
}

fn open_in(
    folders: &[PathBuf],
    names: &[String],
    wanted: &Wanted,
    broken: &mut Vec<String>,
) -> Option<String> {
    for folder in folders {
        for path in names.iter().map(|name| folder.join(name)).filter(|path| path.is_file()) {
            // SAFETY: NVIDIA's libraries have initializers without preconditions; that the file is one of them is
            // what its name says, in a folder where libraries are installed or that the user named.
            match unsafe { Library::new(&path) } {
                Ok(library) => {
                    if let Some(symbol) = missing(&library, wanted.symbols) {
                        broken.push(format!("`{}` has no function `{symbol}`", path.display()));
                        continue;
                    }
                    if !wanted.companions.is_empty() {
                        for companion in matching(folder, wanted.companions) {
                            // SAFETY: as above. One that does not open is reported by NVRTC itself.
                            unsafe { Library::new(&companion) }.map(std::mem::forget).ok();
                        }
                    }
                    std::mem::forget(library);
                    return Some(path.display().to_string());
                }
                Err(e) => broken.push(format!("`{}`: {e}", path.display())),
            }
        }
    }
    None
}

/// The first function that a library does not have.
fn missing(library: &Library, symbols: &[&'static str]) -> Option<&'static str> {
    // SAFETY: the addresses are only compared with null, never called.
    symbols.iter().copied().find(|name| unsafe { library.get::<*const ()>(name.as_bytes()) }.is_err())
}

/// Opens a library and holds what `cudarc` then finds against it.
fn load(
    wanted: &Wanted,
    is_present: unsafe fn() -> bool,
    opened: unsafe fn() -> &'static Library,
) -> Result<()> {
    let newest = match driver() {
        Ok(()) => driver_version()?.0,
        // Kernels can be compiled without a driver.
        Err(_) => MAJORS[0],
    };
    let path = open(wanted, &Search::from_environment(&|name| std::env::var_os(name)), newest)?;
    let refuse = |reason: String| Err(Error::CudaLibrary { library: wanted.name, reason, hint: wanted.hint });
    // SAFETY: opens the library by name, which is mapped already or on the loader's path.
    if !unsafe { is_present() } {
        return refuse(format!("`{path}` opens, but not under its own name `{}`", wanted.stem));
    }
    // SAFETY: `is_present` says that this does not panic.
    if let Some(symbol) = missing(unsafe { opened() }, wanted.symbols) {
        return refuse(format!("the `{}` on the loader's path has no function `{symbol}`", wanted.stem));
    }
    Ok(())
}

/// The first answer of a check, for ever; errors are made anew from their parts.
macro_rules! once {
    ($check:expr) => {{
        static DONE: OnceLock<Result<()>> = OnceLock::new();
        match DONE.get_or_init(|| $check) {
            Ok(()) => Ok(()),
            Err(Error::CudaLibrary { library, reason, hint }) => {
                Err(Error::CudaLibrary { library, reason: reason.clone(), hint })
            }
            Err(Error::DriverTooOld { found, expected }) => {
                Err(Error::DriverTooOld { found: found.clone(), expected: expected.clone() })
            }
            Err(other) => unreachable!("a library check answered {other}"),
        }
    }};
}

/// Opens NVIDIA's driver, or says what is missing.
///
/// # Errors
/// There is no driver on the loader's path, or it does not support CUDA 12.0.
pub fn driver() -> Result<()> {
    once!(load_driver())
}

fn load_driver() -> Result<()> {
    // SAFETY: opens the library by name; its initializers have no preconditions.
    if !unsafe { cuda::sys::is_culib_present() } {
        let reason = "it is not on the loader's path".to_owned();
        return Err(Error::CudaLibrary { library: DRIVER, reason, hint: DRIVER_HINT });
    }
    // SAFETY: the library is there.
    if let Some(symbol) = missing(unsafe { cuda::sys::culib() }, &["cuInit", "cuDriverGetVersion"]) {
        let reason = format!("it has no function `{symbol}`");
        return Err(Error::CudaLibrary { library: DRIVER, reason, hint: DRIVER_HINT });
    }
    check_driver(driver_version()?)
}

fn check_driver(found: (u32, u32)) -> Result<()> {
    if found >= OLDEST_DRIVER { Ok(()) } else { Err(too_old(found, OLDEST_DRIVER)) }
}

fn too_old(found: (u32, u32), expected: (u32, u32)) -> Error {
    let text = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    Error::DriverTooOld { found: text(found), expected: text(expected) }
}

/// The newest CUDA version that the driver supports; the driver is there.
fn driver_version() -> Result<(u32, u32)> {
    let mut version = 0;
    // SAFETY: writes one integer, and may be called before `cuInit`.
    let status = unsafe { cuda::sys::cuDriverGetVersion(&raw mut version) };
    if status != cuda::sys::CUresult::CUDA_SUCCESS {
        let reason = format!("it does not tell its version: {status:?}");
        return Err(Error::CudaLibrary { library: DRIVER, reason, hint: DRIVER_HINT });
    }
    Ok((version as u32 / 1000, version as u32 % 1000 / 10))
}

/// Refuses a driver that lacks a function which came with a later version than the engine asks for.
///
/// # Errors
/// As [`driver`], or the function is missing.
pub(crate) fn require_driver_function(name: &'static str, since: (u32, u32)) -> Result<()> {
    driver()?;
    // SAFETY: the library is there.
    if missing(unsafe { cuda::sys::culib() }, &[name]).is_none() {
        return Ok(());
    }
    Err(too_old(driver_version()?, since))
}

/// Opens NVRTC, or says what is missing. Needs no driver.
///
/// # Errors
/// It is in none of the places of the [module](self).
pub fn nvrtc() -> Result<()> {
    once!(
        load(&NVRTC, nvrtc::sys::is_culib_present, nvrtc::sys::culib)
            .and_then(|()| check_version(&NVRTC, nvrtc_version()?))
    )
}

/// The version of NVRTC.
///
/// # Errors
/// As [`nvrtc()`].
pub(crate) fn version_of_nvrtc() -> Result<(u32, u32)> {
    nvrtc()?;
    nvrtc_version()
}

fn nvrtc_version() -> Result<(u32, u32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers; the library is there.
    let status = unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    if status != nvrtc::sys::nvrtcResult::NVRTC_SUCCESS {
        let reason = format!("it does not tell its version: {status:?}");
        return Err(Error::CudaLibrary { library: NVRTC.name, reason, hint: NVRTC.hint });
    }
    Ok((major as u32, minor as u32))
}

/// Opens cuBLASLt, or says what is missing.
///
/// # Errors
/// It is in none of the places of the [module](self).
pub fn cublaslt() -> Result<()> {
    once!(
        load(&CUBLASLT, cublaslt::sys::is_culib_present, cublaslt::sys::culib)
            .and_then(|()| check_version(&CUBLASLT, cublaslt_version()))
    )
}

/// The version of cuBLASLt, which is there.
fn cublaslt_version() -> (u32, u32) {
    // SAFETY: returns a constant; the library is there.
    let version = unsafe { cublaslt::sys::cublasLtGetVersion() } as u32;
    (version / 10_000, version / 100 % 100)
}

/// Refuses a library that is too old, or that the driver is too old for.
fn check_version(wanted: &Wanted, (major, minor): (u32, u32)) -> Result<()> {
    let newest = match driver() {
        Ok(()) => driver_version()?.0,
        Err(_) => MAJORS[0],
    };
    let oldest = MAJORS[MAJORS.len() - 1];
    if (oldest..=newest).contains(&major) {
        return Ok(());
    }
    let reason = format!(
        "the `{}` on the loader's path is of CUDA {major}.{minor}, expected {oldest} to {newest}, the newest that the \
         driver supports",
        wanted.stem
    );
    Err(Error::CudaLibrary { library: wanted.name, reason, hint: wanted.hint })
}

/// The versions of what is there, and what is not: `driver CUDA 13.0, NVRTC 13.2, cuBLASLt 13.1`.
pub fn describe() -> String {
    let text = |name: &str, version: Result<(u32, u32)>| match version {
        Ok((major, minor)) => format!("{name} {major}.{minor}"),
        Err(Error::DriverTooOld { found, .. }) => format!("{name} {found} (too old)"),
        Err(_) => format!("no {name}"),
    };
    let parts = [
        text("driver for CUDA", driver().and_then(|()| driver_version())),
        text("NVRTC", version_of_nvrtc()),
        text("cuBLASLt", cublaslt().map(|()| cublaslt_version())),
    ];
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, String)]) -> impl Fn(&str) -> Option<OsString> {
        move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
    }

    #[test]
    fn wheels_toolkits_and_named_folders_are_searched() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let cuda_13 = make("venv/lib/python3.11/site-packages/nvidia/cu13/lib");
        let cuda_12 = make("venv/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib");
        let user = make("home/.local/lib/python3.12/site-packages/nvidia/cublas/lib");
        let system = make("py/lib/python3.10/dist-packages/nvidia/cu13/lib");
        fs::write(make("py/bin").join("python3"), "").unwrap();
        let toolkit = make("toolkit/lib64");
        let own = make("own");
        let at = |name: &str| root.path().join(name).display().to_string();
        let pairs = [
            ("VIRTUAL_ENV", at("venv")),
            ("HOME", at("home")),
            ("PATH", format!("{}:{}", at("no/bin"), at("py/bin"))),
            ("CUDA_HOME", at("toolkit")),
            (FOLDERS, format!("{}:{}", at("own"), at("missing"))),
        ];
        let search = Search::from_environment(&variables(&pairs));
        assert_eq!(search.named, [own, root.path().join("missing")]);
        for folder in [cuda_13, cuda_12, user, system, toolkit] {
            assert!(search.known.contains(&folder), "{} in {search:?}", folder.display());
        }
        assert!(search.known.iter().all(|folder| folder.is_dir()));
    }

    #[test]
    fn without_nvrtc_the_error_names_the_files_and_the_folders() {
        let root = tempfile::tempdir().unwrap();
        let search = Search { named: vec![root.path().to_owned()], loader: false, known: Vec::new() };
        let error = open(&NVRTC, &search, 13).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("libnvrtc.so.13 or libnvrtc.so.12"), "{text}");
        assert!(text.contains(&root.path().display().to_string()), "{text}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("pip install nvidia-cuda-nvrtc") && hint.contains(FOLDERS), "{hint}");
    }

    #[test]
    fn a_named_folder_that_is_not_there_is_said_to_be_missing() {
        let search =
            Search::from_environment(&variables(&[(FOLDERS, "/no/such/folder:relative/folder".to_owned())]));
        assert!(search.named.iter().all(|folder| folder.is_absolute()), "{search:?}");
        let search = Search { loader: false, known: Vec::new(), ..search };
        let text = open(&NVRTC, &search, 13).unwrap_err().to_string();
        assert!(text.contains("`/no/such/folder` (no such folder)"), "{text}");
        assert!(text.contains("relative/folder"), "{text}");
    }

    #[test]
    fn a_driver_of_cuda_12_gets_no_library_of_cuda_13() {
        let search = Search::default();
        let text = open(&CUBLASLT, &search, 12).unwrap_err().to_string();
        assert!(text.contains("libcublasLt.so.12") && !text.contains("libcublasLt.so.13"), "{text}");
    }

    #[test]
    fn a_file_that_is_no_library_is_named_with_the_loaders_words() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("libnvrtc.so.13");
        fs::write(&file, "not a library\n").unwrap();
        let search = Search { named: vec![root.path().to_owned()], loader: false, known: Vec::new() };
        let text = open(&NVRTC, &search, 13).unwrap_err().to_string();
        assert!(text.contains("not usable") && text.contains(&file.display().to_string()), "{text}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn another_library_of_that_name_is_refused_with_the_function_it_lacks() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let other = maps.lines().find_map(|line| {
            let path = line.split_whitespace().last()?;
            path.contains("/libm.so").then_some(path)
        });
        let Some(other) = other else {
            println!("skipped: libm is not mapped as a file");
            return;
        };
        let root = tempfile::tempdir().unwrap();
        fs::copy(other, root.path().join("libcublasLt.so.13")).unwrap();
        let search = Search { named: vec![root.path().to_owned()], loader: false, known: Vec::new() };
        let text = open(&CUBLASLT, &search, 13).unwrap_err().to_string();
        assert!(text.contains("has no function `cublasLtGetVersion`"), "{text}");
    }

    #[test]
    fn a_driver_older_than_cuda_12_is_refused_with_both_versions() {
        assert!(check_driver((12, 0)).is_ok() && check_driver((13, 1)).is_ok());
        let error = check_driver((11, 8)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("11.8") && text.contains("12.0"), "{text}");
        assert!(error.hint().is_some_and(|hint| hint.contains("driver")));
    }

    #[test]
    fn what_is_missing_is_an_error_and_never_a_panic() {
        for (name, found) in [("driver", driver()), ("NVRTC", nvrtc()), ("cuBLASLt", cublaslt())] {
            match found {
                Ok(()) => assert!(!describe().contains(&format!("no {name}")), "{}", describe()),
                Err(e) => assert!(e.hint().is_some(), "{name}: {e}"),
            }
        }
        println!("{}", describe());
    }
}
