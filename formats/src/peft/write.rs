//! Configuration and tensors to an adapter folder that PEFT loads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::{CONFIG_FILE, PeftAdapter, TENSORS_FILE, check};
use crate::error::{Error, Result};
use crate::safetensors::write_safetensors_f32;

impl PeftAdapter {
    /// Writes the two files of the folder, creating it if needed, each atomically and the configuration
    /// last; for a folder that appears as a whole, write into a [`crate::file::AtomicDir`].
    ///
    /// # Errors
    /// The reader would refuse the adapter, or the folder cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(TENSORS_FILE);
        check::config(&self.config).map_err(|e| e.in_file(&dir.join(CONFIG_FILE)))?;
        check::tensors(&self.config, &self.tensors).map_err(|e| e.in_file(&path))?;
        fs::create_dir_all(dir).map_err(|e| Error::from(e).in_file(dir))?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors =
            self.tensors.iter().map(|(key, t)| (key.as_str(), t.shape.as_slice(), t.data.as_slice()));
        write_safetensors_f32(&path, tensors, &metadata)?;
        self.config.write(&dir.join(CONFIG_FILE))
    }
}
