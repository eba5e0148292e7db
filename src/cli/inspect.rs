//! `qpeft inspect`: what is in a GGUF, a safetensors file, a model folder or an adapter folder.

use super::args::InspectArgs;
use super::printer::Printer;

/// Runs the command.
pub fn run(_args: &InspectArgs, _printer: &Printer) -> anyhow::Result<()> {
    Ok(())
}
