//! A Hugging Face checkpoint folder: `config.json` and either `model.safetensors` or the shards that
//! `model.safetensors.index.json` lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{SafetensorsFile, TensorView};
use crate::error::{Error, Kind, Place, Result};
use crate::file;
use crate::json::{UniqueEntries, read_json};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueEntries<String>,
}

/// An open checkpoint folder: every weight file mapped and checked, every tensor found exactly once.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    config: serde_json::Value,
    files: Vec<SafetensorsFile>,
    /// Tensor to position in `files`.
    index: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens a folder.
    ///
    /// # Errors
    /// There is no `config.json` or no weight file; a shard is missing, lacks a tensor that the index
    /// promises, or shares a tensor with another shard; or a file is damaged.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let config = read_json(&dir.join(CONFIG))?;
        let (files, promised) = if dir.join(SINGLE).exists() {
            (vec![SafetensorsFile::open(&dir.join(SINGLE))?], Vec::new())
        } else if dir.join(INDEX).exists() {
            open_shards(dir)?
        } else {
            return Err(Error::new(Kind::NoWeights).in_file(dir));
        };
        let mut index: BTreeMap<String, usize> = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(first) = index.insert(name.to_owned(), i) {
                    let first = file_name(&files[first]);
                    let kind = Kind::TensorInTwoShards { first, second: file_name(file) };
                    return Err(Error::new(kind).at(Place::Tensor(name.to_owned())).in_file(dir));
                }
            }
        }
        for (name, shard) in promised {
            if index.get(&name).is_none_or(|&i| *file_name(&files[i]) != *shard) {
                let kind = Kind::NotInShard { shard: shard.into() };
                return Err(Error::new(kind).at(Place::Tensor(name)).in_file(&dir.join(INDEX)));
            }
        }
        Ok(Checkpoint { dir: dir.to_owned(), config, files, index })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The content of `config.json`.
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// The file that [`Checkpoint::config`] comes from, for messages.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join(CONFIG)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The names of all tensors, shard by shard, sorted inside each: the order in which converters go.
    pub fn names_by_file(&self) -> impl Iterator<Item = &str> {
        self.files.iter().flat_map(SafetensorsFile::names)
    }

    /// The tensor with this name, from whichever shard has it.
    pub fn tensor(&self, name: &str) -> Option<TensorView> {
        self.index.get(name).and_then(|&i| self.files[i].tensor(name))
    }

    /// The tensor with this name, which must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn require(&self, name: &str) -> Result<TensorView> {
        self.tensor(name).ok_or_else(|| {
            Error::new(Kind::MissingTensor).at(Place::Tensor(name.to_owned())).in_file(&self.dir)
        })
    }

    /// The identity of configuration and weights: `blake3:` and 64 hexadecimal digits. It covers the name
    /// and the content of `config.json` and of every weight file, in the order of their names.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let mut paths: Vec<PathBuf> = self.files.iter().map(|f| f.path().to_owned()).collect();
        paths.sort();
        paths.insert(0, self.config_path());
        let mut hasher = blake3::Hasher::new();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(file::fingerprint(&path)?.as_bytes());
        }
        Ok(format!("blake3:{}", hasher.finalize()))
    }
}

type Shards = (Vec<SafetensorsFile>, Vec<(String, String)>);

/// All shards of the index, and which tensor it promises in which shard.
fn open_shards(dir: &Path) -> Result<Shards> {
    let path = dir.join(INDEX);
    let index: Index = read_json(&path)?;
    let promised = index.weight_map.0;
    let names: BTreeSet<&str> = promised.iter().map(|(_, shard)| shard.as_str()).collect();
    let mut files = Vec::with_capacity(names.len());
    for name in names {
        let refuse = |kind| Err(Error::new(kind).in_file(&path));
        // An index must not reach outside of its folder.
        if Path::new(name).file_name().is_none_or(|file| file != name) {
            return refuse(Kind::BadShardName { shard: name.into() });
        }
        if !dir.join(name).exists() {
            return refuse(Kind::MissingShard { shard: name.into() });
        }
        files.push(SafetensorsFile::open(&dir.join(name))?);
    }
    Ok((files, promised))
}

fn file_name(file: &SafetensorsFile) -> Box<str> {
    file.path().file_name().unwrap_or_default().to_string_lossy().into()
}
