//! `checkpoints/step-N/`: everything a run needs to continue bit for bit.
//!
//! ```text
//! tensors.safetensors   adapter parameters and AdamW moments, f32, under the names the loop gives
//! state.json            counters, data cursor, random streams, and what the run was made of
//! ```
//!
//! A checkpoint is written into a temporary folder beside it, synced and renamed, so `step-N` is either
//! complete or not there. A kill leaves at most a temporary folder, which [`clean`] removes and nothing
//! reads.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use qpeft_formats::file::{AtomicDir, fingerprint, write_atomic};
use qpeft_formats::peft::HostTensor;
use qpeft_formats::safetensors::{Dtype, SafetensorsFile, write_safetensors_f32};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::TrainConfig;
use super::data::Dataset;
use super::error::{Error, Result};
use super::run_files::read_layout;

const FOLDER: &str = "checkpoints";
const STATE: &str = "state.json";
const TENSORS: &str = "tensors.safetensors";
const PREFIX: &str = "step-";

/// The layout that this version writes.
const LAYOUT: u32 = 1;

/// Where a run stands, next to its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Whole passes over the data done.
    pub epoch: u64,
    /// Examples drawn in the current pass.
    pub sampler_position: u64,
    /// The run's seed.
    pub seed: u64,
    /// The words of the random streams, in the order of the loop.
    pub rng: Vec<u64>,
    /// Updates that the optimizer has counted (its bias correction).
    pub optimizer_step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Loss of the last step; `None` if it was not finite.
    pub last_loss: Option<f64>,
    /// Lowest evaluation loss so far.
    pub best_loss: Option<f64>,
    /// [`TrainConfig::binding`] of the run.
    pub config: Map<String, Value>,
    /// Hash of the training data.
    pub data_hash: String,
    /// [`Dataset::examples_hash`](super::data::Dataset::examples_hash): what the tokenizer and the chat
    /// template made of the data.
    pub examples_hash: String,
    /// The clock of the chat template, in seconds since 1970: templates that print the date see that of
    /// the run's start.
    pub template_time: i64,
    /// Fingerprint of the base model.
    pub base_fingerprint: String,
}

/// `state.json`: the state, the layout, and the hash of the file beside it.
#[derive(Serialize, Deserialize)]
struct StateFile {
    layout: u32,
    tensors_fingerprint: String,
    #[serde(flatten)]
    state: State,
}

/// A checkpoint in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Where the run stood.
    pub state: State,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, HostTensor>,
}

impl State {
    /// Refuses to continue a run that was made of something else.
    ///
    /// # Errors
    /// [`Error::OtherBase`], [`Error::OtherData`], [`Error::OtherExamples`] or [`Error::OtherConfig`] with every setting that differs.
    pub fn check(&self, config: &TrainConfig, data: &Dataset, base_fingerprint: &str) -> Result<()> {
        let both = |expected: &str, found: &str| (expected.to_owned(), found.to_owned());
        if self.base_fingerprint != base_fingerprint {
            let (expected, found) = both(&self.base_fingerprint, base_fingerprint);
            return Err(Error::OtherBase { expected, found });
        }
        if self.data_hash != data.hash {
            let (expected, found) = both(&self.data_hash, &data.hash);
            return Err(Error::OtherData { expected, found });
        }
        let examples_hash = data.examples_hash();
        if self.examples_hash != examples_hash {
            let (expected, found) = (self.examples_hash.clone(), examples_hash);
            return Err(Error::OtherExamples { expected, found });
        }
        // Through text, as the stored settings went: reading a float may round its last bit.
        let now = serde_json::to_string(&config.binding()).expect("settings have a JSON form");
        let now: Map<String, Value> = serde_json::from_str(&now).expect("what was just written is JSON");
        let show = |value: Option<&Value>| value.map_or("(not there)".to_owned(), Value::to_string);
        let mut keys = now.keys().chain(self.config.keys()).collect::<Vec<_>>();
        keys.sort();
        keys.dedup();
        let settings = keys
            .into_iter()
            .filter(|key| now.get(*key) != self.config.get(*key))
            .map(|key| (key.clone(), show(self.config.get(key)), show(now.get(key))))
            .collect::<Vec<_>>();
        if settings.is_empty() { Ok(()) } else { Err(Error::OtherConfig { settings }) }
    }
}

/// Writes `checkpoints/step-N` of the folder `run`, N being the state's step, and returns its path.
/// `also` may put more files (the adapter as a PEFT folder) into the folder before it appears.
///
/// # Errors
/// The folder is read-only, the disk is full, or two tensors share a name.
pub fn save<'a>(
    run: &Path,
    state: &State,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
    also: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let folder = run.join(FOLDER);
    fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
    let path = folder.join(format!("{PREFIX}{}", state.step));
    let staging = AtomicDir::create(&path)?;
    let tensor_file = staging.staging().join(TENSORS);
    write_safetensors_f32(&tensor_file, tensors, &BTreeMap::new())?;
    let file =
        StateFile { layout: LAYOUT, tensors_fingerprint: fingerprint(&tensor_file)?, state: state.clone() };
    let mut text =
        serde_json::to_vec_pretty(&file).map_err(|source| Error::Json { path: path.join(STATE), source })?;
    text.push(b'\n');
    write_atomic(&staging.staging().join(STATE), &text)?;
    also(staging.staging())?;
    staging.commit()?;
    Ok(path)
}

/// Reads a checkpoint folder.
///
/// # Errors
/// A file is missing, has another layout, is not what was written, or holds tensors that are not f32.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let state_path = path.join(STATE);
    let text = fs::read(&state_path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::Missing { path: state_path.clone() },
        _ => Error::io("read", &state_path, e),
    })?;
    read_layout(&state_path, &text, LAYOUT)?;
    let file: StateFile =
        serde_json::from_slice(&text).map_err(|source| Error::Json { path: state_path, source })?;

    let tensor_path = path.join(TENSORS);
    if !tensor_path.is_file() {
        return Err(Error::Missing { path: tensor_path });
    }
    let found = fingerprint(&tensor_path)?;
    if found != file.tensors_fingerprint {
        return Err(Error::Corrupt { path: tensor_path, expected: file.tensors_fingerprint, found });
    }
    let container = SafetensorsFile::open(&tensor_path)?;
    let mut tensors = BTreeMap::new();
    for name in container.names() {
        let view = container.require(name)?;
        if view.dtype != Dtype::F32 {
            let (name, found) = (name.to_owned(), view.dtype.to_string());
            return Err(Error::NotF32 { path: tensor_path, name, found });
        }
        tensors.insert(name.to_owned(), HostTensor { data: view.to_f32()?, shape: view.shape });
    }
    Ok(Checkpoint { state: file.state, tensors })
}

/// The steps of the complete checkpoints of the folder `run`, oldest first.
///
/// # Errors
/// The folder exists but cannot be read.
pub fn steps(run: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    for name in entries(run)? {
        // `step-007` or `step-7-old` are not names that `save` gives.
        let step = name.strip_prefix(PREFIX).and_then(|n| n.parse::<u64>().ok());
        steps.extend(step.filter(|step| name == format!("{PREFIX}{step}")));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// The newest checkpoint of the folder `run`.
///
/// # Errors
/// There is none, or the folder cannot be read.
pub fn latest(run: &Path) -> Result<PathBuf> {
    match steps(run)?.last() {
        Some(step) => Ok(run.join(FOLDER).join(format!("{PREFIX}{step}"))),
        None => Err(Error::NoCheckpoint { path: run.to_owned() }),
    }
}

/// The newest checkpoint of the folder `run` that is older than `step`: the last good one when the
/// parameters of `step` turn out to give no finite loss.
///
/// # Errors
/// The folder cannot be read.
pub fn before(run: &Path, step: u64) -> Result<Option<PathBuf>> {
    let last = steps(run)?.into_iter().rfind(|&s| s < step);
    Ok(last.map(|s| run.join(FOLDER).join(format!("{PREFIX}{s}"))))
}

/// Removes all but the newest `keep` checkpoints of the folder `run`.
///
/// # Errors
/// One cannot be removed.
pub fn prune(run: &Path, keep: usize) -> Result<()> {
    let steps = steps(run)?;
    for step in &steps[..steps.len().saturating_sub(keep)] {
        remove(&run.join(FOLDER).join(format!("{PREFIX}{step}")))?;
    }
    Ok(())
}

/// Removes the temporary folders that a killed run left in the folder `run`.
///
/// # Errors
/// One cannot be removed.
pub fn clean(run: &Path) -> Result<()> {
    for name in entries(run)? {
        let is_temporary = [".tmp", ".old"].iter().any(|end| name.ends_with(end));
        if is_temporary && name.starts_with(&format!(".{PREFIX}")) {
            remove(&run.join(FOLDER).join(name))?;
        }
    }
    Ok(())
}

/// Files and folders that a run leaves besides its checkpoints. `init/` is not among them: it is found
/// again by what it was made of, and written anew if it does not fit.
const RUN_FILES: [&str; 4] = ["qpeft.json", "adapter_config.json", "adapter_model.safetensors", "log.jsonl"];

/// Whether the folder holds a run, finished or not.
pub fn holds_run(run: &Path) -> bool {
    run.join(FOLDER).exists() || RUN_FILES.iter().any(|name| run.join(name).exists())
}

/// Removes the run in a folder; other files stay.
///
/// # Errors
/// A file cannot be removed.
pub fn clear_run(run: &Path) -> Result<()> {
    for name in RUN_FILES {
        let path = run.join(name);
        if path.exists() {
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    let folder = run.join(FOLDER);
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|e| Error::io("remove", &folder, e))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    // Out of the list first: a kill while the files go away must not leave half a `step-N`.
    let name = path.file_name().expect("a checkpoint has a name").to_string_lossy();
    let doomed =
        if name.starts_with('.') { path.to_owned() } else { path.with_file_name(format!(".{name}.old")) };
    let remove = || {
        if doomed != path {
            fs::rename(path, &doomed)?;
        }
        fs::remove_dir_all(&doomed)
    };
    remove().map_err(|e| Error::io("remove", path, e))
}

fn entries(run: &Path) -> Result<Vec<String>> {
    let folder = run.join(FOLDER);
    let io = |e| Error::io("list", &folder, e);
    let listing = match fs::read_dir(&folder) {
        Ok(listing) => listing,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io(e)),
    };
    let mut names = Vec::new();
    for entry in listing {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::config::tests::example;
    use crate::train::data::Example;

    /// Data of which `token` is the only thing that matters here.
    fn dataset(hash: &str, token: u32) -> Dataset {
        let examples = vec![Example { input_ids: vec![token; 2], labels: vec![token as i32; 2] }];
        Dataset { examples, source: "d".into(), hash: hash.into(), skipped: Vec::new(), truncated: 0 }
    }

    fn state(step: u64) -> State {
        State {
            step,
            epoch: 1,
            sampler_position: 7,
            seed: u64::MAX,
            rng: vec![u64::MAX, 0, 3],
            optimizer_step: step,
            tokens: 1000,
            last_loss: Some(1.5),
            best_loss: None,
            config: example().binding(),
            data_hash: "blake3:data".into(),
            examples_hash: dataset("", 3).examples_hash(),
            template_time: 1_700_000_000,
            base_fingerprint: "blake3:base".into(),
        }
    }

    /// Bit patterns that a detour through text or arithmetic would change.
    fn awkward() -> Vec<f32> {
        [0x8000_0000, 0x0000_0001, 0x7f80_0000, 0x7fc0_1234, 0xffbf_ffff, 0x3dcc_cccd]
            .map(f32::from_bits)
            .to_vec()
    }

    fn save_step(run: &Path, step: u64) -> PathBuf {
        let (a, m) = (awkward(), vec![step as f32; 2]);
        save(run, &state(step), [("a", &[2, 3][..], &a[..]), ("a.m", &[2], &m)], |_| Ok(())).unwrap()
    }

    #[test]
    fn a_checkpoint_is_read_back_bit_for_bit() {
        let run = tempfile::tempdir().unwrap();
        let path = save_step(run.path(), 20);
        assert_eq!(path, run.path().join("checkpoints/step-20"));
        let Checkpoint { state: found, tensors } = load(&path).unwrap();
        assert_eq!(found, state(20));
        let bits = |data: &[f32]| data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(tensors["a"].shape, [2, 3]);
        assert_eq!(bits(&tensors["a"].data), bits(&awkward()));
        assert_eq!(tensors["a.m"].data, [20.0; 2]);
        assert_eq!(tensors.len(), 2);
    }

    #[test]
    fn the_same_checkpoint_has_the_same_bytes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (one, two) = (save_step(one.path(), 3), save_step(two.path(), 3));
        for name in [STATE, TENSORS] {
            assert_eq!(fs::read(one.join(name)).unwrap(), fs::read(two.join(name)).unwrap());
        }
    }

    #[test]
    fn the_newest_step_is_found_by_number_and_other_names_do_not_count() {
        let run = tempfile::tempdir().unwrap();
        assert!(matches!(latest(run.path()), Err(Error::NoCheckpoint { .. })));
        for step in [9, 100, 20] {
            save_step(run.path(), step);
        }
        for name in ["step-0200", "step-x", "step-300-copy", ".step-400.77.tmp"] {
            fs::create_dir(run.path().join(FOLDER).join(name)).unwrap();
        }
        assert_eq!(steps(run.path()).unwrap(), [9, 20, 100]);
        assert!(latest(run.path()).unwrap().ends_with("step-100"));
    }

    #[test]
    fn what_a_kill_left_is_neither_read_nor_kept() {
        let run = tempfile::tempdir().unwrap();
        save_step(run.path(), 2);
        let half = run.path().join(FOLDER).join(".step-3.123.tmp");
        fs::create_dir(&half).unwrap();
        fs::write(half.join(TENSORS), b"\x10\0\0").unwrap();
        let moved = run.path().join(FOLDER).join(".step-1.old");
        fs::create_dir(&moved).unwrap();
        assert!(load(&latest(run.path()).unwrap()).is_ok());
        clean(run.path()).unwrap();
        assert_eq!(entries(run.path()).unwrap(), ["step-2"]);
        clean(tempfile::tempdir().unwrap().path()).unwrap();
    }

    #[test]
    fn saving_a_step_again_replaces_it() {
        let run = tempfile::tempdir().unwrap();
        save_step(run.path(), 2);
        save(run.path(), &state(2), [("b", &[1][..], &[4.0][..])], |_| Ok(())).unwrap();
        let again = load(&latest(run.path()).unwrap()).unwrap();
        assert_eq!(again.tensors.keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!(entries(run.path()).unwrap(), ["step-2"]);
    }

    #[test]
    fn pruning_keeps_the_newest() {
        let run = tempfile::tempdir().unwrap();
        for step in 1..=4 {
            save_step(run.path(), step);
        }
        prune(run.path(), 2).unwrap();
        assert_eq!(steps(run.path()).unwrap(), [3, 4]);
        prune(run.path(), 9).unwrap();
        assert_eq!(entries(run.path()).unwrap().len(), 2);
    }

    #[test]
    fn a_missing_file_is_named() {
        for name in [STATE, TENSORS] {
            let run = tempfile::tempdir().unwrap();
            let path = save_step(run.path(), 1);
            fs::remove_file(path.join(name)).unwrap();
            let error = load(&path).unwrap_err();
            assert!(matches!(&error, Error::Missing { path: p } if p.ends_with(name)), "{error}");
            assert!(error.hint().unwrap().contains("step-1"));
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        let run = tempfile::tempdir().unwrap();
        let path = save_step(run.path(), 1);
        let file = path.join(TENSORS);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(matches!(load(&path), Err(Error::Corrupt { .. })));
        fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(load(&path), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_state_of_another_layout_or_without_a_field_is_refused() {
        let run = tempfile::tempdir().unwrap();
        let path = save_step(run.path(), 1);
        fs::write(path.join(STATE), r#"{"layout": 9}"#).unwrap();
        assert!(matches!(load(&path), Err(Error::Version { expected: 1, found: 9, .. })));
        fs::write(path.join(STATE), r#"{"layout": 1, "step": 4}"#).unwrap();
        assert!(matches!(load(&path), Err(Error::Json { .. })));
    }

    #[test]
    fn another_base_other_data_and_other_settings_are_refused_with_both_values() {
        let (config, state) = (example(), state(1));
        let with_token = |data: &str, token, base: &str, config: &TrainConfig| {
            state
                .check(config, &dataset(data, token), base)
                .map_or_else(|e| e.to_string(), |()| "ok".to_owned())
        };
        let text = |data, base, config| with_token(data, 3, base, config);
        assert_eq!(text("blake3:data", "blake3:base", &config), "ok");
        assert_eq!(
            text("blake3:data", "blake3:other", &config),
            "the checkpoint was made with another base model: fingerprint is `blake3:other`, expected `blake3:base`"
        );
        assert_eq!(
            text("blake3:other", "blake3:base", &config),
            "the checkpoint was made with other data: blake3 is `blake3:other`, expected `blake3:data`"
        );
        let other_tokens = with_token("blake3:data", 4, "blake3:base", &config);
        assert!(other_tokens.starts_with("the tokenizer or the chat template makes other examples"));
        let mut other = config.clone();
        other.lora_r = 8;
        other.learning_rate = 1e-5;
        other.output = "moved".into();
        assert_eq!(
            text("blake3:data", "blake3:base", &other),
            "the checkpoint was made with other settings: `learning_rate` is `0.00001`, expected `0.0002`; \
             `lora_r` is `8`, expected `16`"
        );
    }

    #[test]
    fn settings_that_went_through_the_file_are_still_the_same() {
        let run = tempfile::tempdir().unwrap();
        let mut config = example();
        // Floats whose shortest text a fast parser may round differently.
        config.learning_rate = 1.2345678901234567e-5;
        config.adam_epsilon = 9.999999999999999e-9;
        let state = State { config: config.binding(), ..state(5) };
        let path = save(run.path(), &state, [("a", &[1][..], &[1.0][..])], |_| Ok(())).unwrap();
        load(&path).unwrap().state.check(&config, &dataset("blake3:data", 3), "blake3:base").unwrap();
    }
}
