//! What several commands start with: threads, a device, a model with or without its adapter.

use std::path::Path;

use anyhow::Context;
use qpeft_formats::gguf::split::part_paths;
use qpeft_kernels::Device;
use qpeft_kernels::ops::quantize::Packers;

use super::args::{ComputeArgs, DataArgs, ModelArgs};
use super::printer::Printer;
use super::report::Usage;
use crate::adapters::AdapterFolder;
use crate::model::tokenizer::Tokenizer;
use crate::model::{Base, Decoder, Parameters};
use crate::train::data::DataOptions;

/// Sets the number of threads and opens the device. A GPU that `auto` has to leave idle is warned of.
///
/// # Errors
/// The device is not there, or cannot be used.
pub fn open_device(args: &ComputeArgs, printer: &Printer) -> anyhow::Result<Device> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .with_context(|| format!("cannot start {threads} threads"))?;
    }
    if args.device != "auto" {
        return Device::open(&args.device)
            .with_context(|| format!("cannot use the device `{}`", args.device));
    }
    let (device, obstacle) = Device::auto();
    if let Some(e) = obstacle {
        printer.warn(&format!("the GPU stays idle: {e}"));
        if let Some(hint) = e.hint() {
            printer.note(&format!("hint: {hint}"));
        }
    }
    Ok(device)
}

/// Elements that one core packs in a second or two, while a GPU takes half a second to open.
const PACKED_BY_A_CORE: u64 = 1 << 27;

/// The cores, and the device that is named, to pack so many elements; for few of them `auto` leaves a GPU alone, and for none
/// no device is opened.
///
/// # Errors
/// See [`open_device`].
pub fn open_packers(args: &ComputeArgs, elements: u64, printer: &Printer) -> anyhow::Result<Packers> {
    let mut args = args.clone();
    let few = args.device == "auto" && elements < PACKED_BY_A_CORE * threads_of(&args)? as u64;
    if elements == 0 || few {
        "cpu".clone_into(&mut args.device);
    }
    match Packers::of(&open_device(&args, printer)?) {
        Err(e) if args.device == "auto" => {
            printer.warn(&format!("the GPU stays idle: {e}"));
            Ok(Packers::default())
        }
        packers => Ok(packers?),
    }
}

/// Threads of the CPU that a command uses.
///
/// # Errors
/// The cores cannot be counted.
pub fn threads_of(args: &ComputeArgs) -> anyhow::Result<usize> {
    match args.threads {
        Some(threads) => Ok(threads),
        None => Ok(std::thread::available_parallelism().context("cannot count the cores")?.get()),
    }
}

/// A model in memory, ready to run.
#[derive(Debug)]
pub struct Session {
    /// The base that is loaded: the named one, or the residual of a PiSSA run.
    pub base: Base,
    /// The decoder with its adapters.
    pub decoder: Decoder,
    /// The adapters' values; none without an adapter.
    pub params: Parameters,
    /// The tokenizer of the model, or the one that was given.
    pub tokenizer: Tokenizer,
}

impl Session {
    /// Opens a model and, if given, an adapter on it.
    ///
    /// # Errors
    /// A file is refused, or the adapter belongs to other weights.
    pub fn open(args: &ModelArgs, device: &Device) -> anyhow::Result<Session> {
        let named = Base::open_as(&args.model, args.base_quant)?;
        let tokenizer = match &args.tokenizer {
            Some(path) => Tokenizer::from_file(path)?,
            None => named.tokenizer()?,
        };
        let (base, decoder, params) = open_adapted(named, args.adapter.as_deref(), device)?;
        Ok(Session { base, decoder, params, tokenizer })
    }
}

/// A decoder on `named` or on the base that the adapter asks for, with the adapter mounted.
///
/// # Errors
/// A file is refused, or the adapter belongs to other weights.
pub fn open_adapted(
    named: Base,
    adapter: Option<&Path>,
    device: &Device,
) -> anyhow::Result<(Base, Decoder, Parameters)> {
    let Some(dir) = adapter else {
        let decoder = Decoder::load(&named, device)?;
        let params = Parameters::none(device)?;
        return Ok((named, decoder, params));
    };
    let folder = AdapterFolder::open(dir)?;
    let base = folder.resolve(named)?;
    let mut decoder = Decoder::load(&base, device)?;
    let params = folder.mount(&mut decoder)?;
    Ok((base, decoder, params))
}

impl From<&DataArgs> for DataOptions {
    fn from(args: &DataArgs) -> DataOptions {
        DataOptions {
            max_seq_length: args.max_seq_length,
            prompt_field: args.prompt_field.clone(),
            completion_field: args.completion_field.clone(),
            train_on_prompt: args.train_on_prompt,
            use_chat_template: !args.no_chat_template,
        }
    }
}

/// Refuses an output that is one of the inputs, any file of a split model, or a folder around one.
///
/// # Errors
/// [`Usage`] naming both.
pub fn refuse_inputs(output: &Path, inputs: &[&Path]) -> Result<(), Usage> {
    let Ok(real) = output.canonicalize() else { return Ok(()) };
    let mut files = inputs.iter().flat_map(|input| part_paths(input));
    match files.find(|input| input.canonicalize().is_ok_and(|input| input.starts_with(&real))) {
        Some(input) => Err(Usage::new(format!(
            "`--output {}` would replace `{}`, which the command reads",
            output.display(),
            input.display()
        ))
        .hint("give another path")),
        None => Ok(()),
    }
}

/// Refuses to put a model folder in the place of a folder that holds anything else: it goes with all that is in it.
///
/// # Errors
/// [`Usage`] naming what else is there.
pub fn refuse_other_folder(output: &Path) -> Result<(), Usage> {
    let Ok(entries) = output.read_dir() else { return Ok(()) };
    let entries: Vec<_> = entries.flatten().collect();
    let folder = entries.iter().find(|entry| entry.path().is_dir());
    let why = match folder {
        _ if entries.is_empty() => return Ok(()),
        Some(folder) => format!("holds the folder `{}`", folder.file_name().to_string_lossy()),
        None if !output.join("config.json").exists() => "has no `config.json`".to_owned(),
        None => return Ok(()),
    };
    Err(Usage::new(format!("`--output {}` exists and is no model folder: it {why}", output.display()))
        .hint("only a model folder is replaced as a whole; give another path, or remove the folder yourself"))
}

/// Refuses to write where something is, unless it may be replaced.
///
/// # Errors
/// [`Usage`] naming the path.
pub fn refuse_existing(path: &Path, overwrite: bool) -> Result<(), Usage> {
    if overwrite || !path.exists() || path.read_dir().is_ok_and(|mut dir| dir.next().is_none()) {
        return Ok(());
    }
    Err(Usage::new(format!("`--output {}` exists", path.display()))
        .hint("give another path, or `--overwrite-output` to replace it"))
}
