//! The staged PiSSA init on disk: `init/` of a run.
//!
//! ```text
//! init/
//!   manifest.json                                     what was split, from which base, with which error
//!   residual.gguf | residual/                         the base with Q(W_res) in the place of every target
//!   adapter_config.json  adapter_model.safetensors    A0 and B0, as a PEFT folder
//! ```
//!
//! It is written once, before training, and never recomputed: later commands find the residual through
//! the manifest and check it by its fingerprint.

use std::path::{Path, PathBuf};

use qpeft_formats::file::{AtomicDir, write_atomic};
use qpeft_formats::peft::{InitLoraWeights, PeftAdapter};
use qpeft_kernels::weight::WeightType;
use serde::{Deserialize, Serialize};

use super::pissa::SplitError;
use crate::error::{Error, Result};
use crate::model::{Base, Decoder, residual, weight_name};

/// Folder of the staged init within a run.
pub const INIT: &str = "init";
/// The file that makes a folder a staged init.
pub const MANIFEST: &str = "manifest.json";
/// Layout of the manifest that this version writes.
const VERSION: u32 = 1;

/// A model file and the hash of its weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Name of the file or folder.
    pub name: String,
    /// `blake3:` and the hash.
    pub fingerprint: String,
}

impl FileId {
    /// The identity of an opened base.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of(base: &Base) -> Result<FileId> {
        Ok(FileId { name: base.name(), fingerprint: base.fingerprint()? })
    }
}

/// What decides the split; two equal ones on the same base give the same files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Rank r.
    pub rank: usize,
    /// s: the pair counts s times.
    pub scaling: f64,
    /// Power iterations of the randomized SVD; `None` when the factors were given.
    pub iterations: Option<usize>,
    /// Rounds of refinement after the first split.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub refinements: usize,
    /// Seed of the randomized SVD.
    pub seed: u64,
    /// Hash of given factors (`--init-adapter`).
    pub factors: Option<String>,
    /// The kind of device that computed, where it is not the CPU: its results differ in the last bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The type of all residuals, where it is not each target's own.
    #[serde(default, with = "weight_name", skip_serializing_if = "Option::is_none")]
    pub residual_type: Option<WeightType>,
    /// The split modules, in model order.
    pub targets: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// One split tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorReport {
    /// Module path.
    pub module: String,
    /// Type of the stored residual.
    pub residual_type: String,
    /// Share of the squared weight norm that the pair holds.
    pub captured: f64,
    /// ‖W_res - Q(W_res)‖ / ‖W‖.
    pub quantization_error: f64,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of this file.
    pub version: u32,
    /// The original base.
    pub base: FileId,
    /// The residual base, a sibling of the manifest.
    pub residual: FileId,
    /// What decided the split.
    pub settings: Settings,
    /// ‖W_res - Q(W_res)‖ / ‖W‖ over all targets.
    pub quantization_error: f64,
    /// Share of the squared weight norm that the pairs hold, over all targets.
    pub captured: f64,
    /// Per tensor.
    pub tensors: Vec<TensorReport>,
}

impl Manifest {
    /// Reads the manifest of a run; `None` if the run has no staged init.
    ///
    /// # Errors
    /// The file cannot be read or is not a manifest of this version.
    pub fn read(run: &Path) -> Result<Option<Manifest>> {
        let path = run.join(INIT).join(MANIFEST);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::refused(format!("`{}`: {e}", path.display()))),
        };
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| {
            Error::refused(format!("`{}`: not a manifest of a staged init: {e}", path.display()))
        })?;
        if manifest.version != VERSION {
            return Err(Error::refused(format!(
                "`{}`: manifest version {}, this version of qpeft reads {VERSION}",
                path.display(),
                manifest.version
            )));
        }
        Ok(Some(manifest))
    }

    /// Opens the residual base of the run and checks that it is the one that was written.
    ///
    /// # Errors
    /// It is missing, damaged, or another file.
    pub fn open_residual(&self, run: &Path) -> Result<Base> {
        let path = run.join(INIT).join(&self.residual.name);
        let base = Base::open(&path)?;
        let found = base.fingerprint()?;
        if found != self.residual.fingerprint {
            return Err(Error::refused(format!(
                "`{}` is not the residual base that this adapter was trained on: fingerprint {found}, expected {}",
                path.display(),
                self.residual.fingerprint
            ))
            .with_hint("restore the run's `init` folder; the residual cannot be recomputed"));
        }
        Ok(base)
    }
}

/// Path of the initial adapter (a PEFT folder) of a run.
pub fn initial_adapter(run: &Path) -> PathBuf {
    run.join(INIT)
}

/// Hash of factors that were given.
pub fn hash_of(factors: &PeftAdapter) -> String {
    let mut hasher = blake3::Hasher::new();
    for (key, tensor) in &factors.tensors {
        hasher.update(key.as_bytes());
        tensor.data.iter().for_each(|x| {
            hasher.update(&x.to_le_bytes());
        });
    }
    format!("blake3:{}", hasher.finalize().to_hex())
}

/// Copies the `init/` of one run into another that continues it.
///
/// # Errors
/// A file cannot be read or written; nothing is left of the copy then.
pub fn copy(from: &Path, run: &Path) -> Result<()> {
    let staged = AtomicDir::create(&run.join(INIT))?;
    copy_tree(&from.join(INIT), staged.staging())
        .map_err(|e| Error::refused(format!("cannot copy `{}`: {e}", from.join(INIT).display())))?;
    Ok(staged.commit()?)
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            std::fs::create_dir_all(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Writes `init/` of a run: `decoder` already holds the residual weights, `adapter` A0 and B0.
///
/// # Errors
/// The folder cannot be written; nothing is left of it then.
pub fn write(
    run: &Path,
    base: &Base,
    decoder: &Decoder,
    adapter: &PeftAdapter,
    settings: Settings,
    errors: &[(String, SplitError)],
) -> Result<Manifest> {
    let staged = AtomicDir::create(&run.join(INIT))?;
    let name = residual::file_name(base);
    let path = staged.staging().join(name);
    residual::write(base, decoder, &settings.targets, settings.residual_type, &path)?;
    // As PEFT keeps initial factors: labelled a plain pair, or loading them would split the base again.
    let mut factors = adapter.clone();
    factors.config.init_lora_weights = InitLoraWeights::Bool(true);
    factors.write(staged.staging())?;

    let mut total = SplitError::default();
    for (_, e) in errors {
        total += *e;
    }
    let manifest = Manifest {
        version: VERSION,
        base: FileId::of(base)?,
        residual: FileId { name: name.to_owned(), fingerprint: Base::open(&path)?.fingerprint()? },
        settings,
        quantization_error: total.relative_quantization(),
        captured: total.captured(),
        tensors: errors
            .iter()
            .map(|(module, e)| TensorReport {
                module: module.clone(),
                residual_type: decoder
                    .linears()
                    .find(|l| l.module == *module)
                    .map_or_else(String::new, |l| l.weight.type_name().to_owned()),
                captured: e.captured(),
                quantization_error: e.relative_quantization(),
            })
            .collect(),
    };
    let json = serde_json::to_string_pretty(&manifest).expect("a manifest is plain data");
    write_atomic(&staged.staging().join(MANIFEST), json.as_bytes())?;
    staged.commit()?;
    Ok(manifest)
}
