//! An adapter folder to configuration and tensors.

use std::path::Path;

use super::{CONFIG_FILE, HostTensor, PeftAdapter, PeftConfig, TENSORS_FILE, check};
use crate::error::Result;
use crate::safetensors::SafetensorsFile;

impl PeftAdapter {
    /// Reads and checks an adapter folder. F16, BF16 and F64 tensors become f32.
    ///
    /// # Errors
    /// A file is missing or damaged, a setting is not supported, or tensors and configuration disagree.
    pub fn read(dir: &Path) -> Result<PeftAdapter> {
        let config = PeftConfig::read(&dir.join(CONFIG_FILE))?;
        let path = dir.join(TENSORS_FILE);
        let file = SafetensorsFile::open(&path)?;
        let tensors = file
            .names()
            .map(|name| {
                let view = file.require(name)?;
                Ok((name.to_owned(), HostTensor { data: view.to_f32()?, shape: view.shape }))
            })
            .collect::<Result<_>>()
            .map_err(|e| e.in_file(&path))?;
        check::tensors(&config, &tensors).map_err(|e| e.in_file(&path))?;
        Ok(PeftAdapter { config, tensors })
    }
}
