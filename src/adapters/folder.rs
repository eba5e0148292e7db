//! An adapter folder and the base it belongs to.
//!
//! An adapter is only right on the weights it was trained on. The run says which those are, by
//! fingerprint; a PiSSA adapter belongs to the residual base in its own `init/`, and is refused on
//! anything else.

use std::path::{Path, PathBuf};

use qpeft_formats::peft::{InitLoraWeights, PeftAdapter, PeftConfig};
use serde::Deserialize;

use super::staged::{FileId, Manifest};
use crate::error::{Error, Result};
use crate::model::{Base, Decoder, Parameters};

/// What made the run: `qpeft.json`.
pub const RUN_FILE: &str = "qpeft.json";

/// An opened adapter folder.
#[derive(Debug)]
pub struct AdapterFolder {
    /// The folder.
    pub dir: PathBuf,
    /// Its PEFT files.
    pub adapter: PeftAdapter,
    /// The base that its run names, if it was made by this project.
    pub base: Option<FileId>,
    /// The staged init of its run: PiSSA only.
    pub manifest: Option<Manifest>,
    /// The folder of the run: the adapter's own, or the one above `checkpoints/step-N`.
    pub run: PathBuf,
}

/// The part of `qpeft.json` that ties an adapter to its base.
#[derive(Deserialize)]
struct Provenance {
    base: FileId,
}

/// Whether this adapter's factors were taken out of its base.
pub fn is_pissa(config: &PeftConfig) -> bool {
    matches!(&config.init_lora_weights, InitLoraWeights::Named(name) if name.starts_with("pissa"))
}

impl AdapterFolder {
    /// Opens a PEFT folder, a run, or a checkpoint of a run.
    ///
    /// # Errors
    /// A file is missing or wrong, or the method is not supported.
    pub fn open(dir: &Path) -> Result<AdapterFolder> {
        let adapter = PeftAdapter::read(dir)?;
        // Through the real path: `step-4` in the folder of checkpoints has a run above it too.
        let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let is_init = real.join(super::staged::MANIFEST).exists();
        let above = |levels: usize| real.ancestors().nth(levels).map_or_else(|| real.clone(), Path::to_owned);
        let run = if is_init {
            above(1)
        } else if !real.join(RUN_FILE).exists() && above(2).join(RUN_FILE).exists() {
            above(2)
        } else {
            real.clone()
        };
        // A staged init may be left of a former run: it belongs to PiSSA adapters only.
        let staged = is_init || is_pissa(&adapter.config);
        Ok(AdapterFolder {
            base: read_base(&run.join(RUN_FILE))?,
            manifest: if staged { Manifest::read(&run)? } else { None },
            dir: dir.to_owned(),
            adapter,
            run,
        })
    }

    /// The base that this adapter goes on, when the user names `model`: the same, or the run's residual.
    ///
    /// # Errors
    /// The adapter was trained on other weights.
    pub fn resolve(&self, model: Base) -> Result<Base> {
        let expected = match (&self.manifest, &self.base) {
            (Some(manifest), _) => &manifest.base,
            (None, _) if is_pissa(&self.adapter.config) => return Err(self.raw_pissa()),
            (None, Some(base)) => base,
            (None, None) => return Ok(model),
        };
        let found = FileId::of(&model)?;
        if found.fingerprint == expected.fingerprint {
            return self.manifest.as_ref().map_or(Ok(model), |manifest| manifest.open_residual(&self.run));
        }
        let residual = self.manifest.as_ref().map(|manifest| &manifest.residual);
        let mut known = vec![expected];
        known.extend(residual);
        self.check_base(model.path(), &found, &known)?;
        Ok(model)
    }

    /// Refuses a base that is none of the `known` ones; the first is the one to name.
    ///
    /// # Errors
    /// The fingerprints differ.
    pub fn check_base(&self, path: &Path, found: &FileId, known: &[&FileId]) -> Result<()> {
        if known.iter().any(|id| id.fingerprint == found.fingerprint) {
            return Ok(());
        }
        let expected = known[0];
        Err(Error::refused(format!(
            "the adapter `{}` was trained on another base: `{}` has fingerprint {}, expected {} (`{}`)",
            self.dir.display(),
            path.display(),
            found.fingerprint,
            expected.fingerprint,
            expected.name
        ))
        .with_hint(base_hint(expected, found)))
    }

    fn raw_pissa(&self) -> Error {
        Error::refused(format!(
            "the adapter `{}` is a raw PiSSA adapter: it fits only the residual base that was split off with it, and there is no `init` folder beside it",
            self.dir.display()
        ))
        .with_hint("give the whole run folder, or convert it with `qpeft convert pissa-to-lora`")
    }

    /// The initial factors A0 and B0 of a PiSSA run.
    ///
    /// # Errors
    /// The run is not a PiSSA run, or its `init` folder is damaged.
    pub fn initial(&self) -> Result<PeftAdapter> {
        if self.manifest.is_none() {
            return Err(Error::refused(format!(
                "`{}` has no staged init (`init/manifest.json`): it is not a PiSSA run of this project",
                self.dir.display()
            )));
        }
        Ok(PeftAdapter::read(&super::staged::initial_adapter(&self.run))?)
    }

    /// Puts the adapter on a decoder of its base, ready to run.
    ///
    /// # Errors
    /// The tensors do not fit the decoder; all mismatches are listed.
    pub fn mount(&self, decoder: &mut Decoder) -> Result<Parameters> {
        let params = self.attach(decoder)?;
        decoder.refresh(&params)?;
        Ok(params)
    }

    /// As [`AdapterFolder::mount`], without what a pass needs beside the values: for a merge.
    ///
    /// # Errors
    /// See [`AdapterFolder::mount`].
    pub fn attach(&self, decoder: &mut Decoder) -> Result<Parameters> {
        let mut params = super::attach(decoder, &self.adapter.config)?;
        super::load(&mut params, &self.adapter)?;
        Ok(params)
    }
}

/// What to do about another base: the same file may only be quantized in another way at load.
fn base_hint(expected: &FileId, found: &FileId) -> String {
    let parts = |id: &FileId| -> (String, Option<String>) {
        match id.fingerprint.split_once('+') {
            Some((hash, quant)) => (hash.to_owned(), Some(quant.to_owned())),
            None => (id.fingerprint.clone(), None),
        }
    };
    match (parts(expected), parts(found)) {
        ((a, Some(quant)), (b, _)) if a == b => format!("give `--base-quant {quant}`, as the run did"),
        ((a, None), (b, Some(_))) if a == b => "leave out `--base-quant`, as the run did".to_owned(),
        _ => format!("give `--model` the file `{}` that the run was started with", expected.name),
    }
}

fn read_base(path: &Path) -> Result<Option<FileId>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::refused(format!("`{}`: {e}", path.display()))),
    };
    let provenance: Provenance = serde_json::from_str(&text)
        .map_err(|e| Error::refused(format!("`{}`: not the description of a run: {e}", path.display())))?;
    Ok(Some(provenance.base))
}
