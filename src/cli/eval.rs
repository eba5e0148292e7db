//! `qpeft eval`: loss and perplexity of a model, with or without an adapter, and its logits on request.

use std::collections::BTreeMap;
use std::path::Path;

use qpeft_formats::safetensors::{Dtype, SafetensorsFile, TensorRef, write_safetensors};
use serde_json::json;

use super::args::EvalArgs;
use super::printer::Printer;
use super::progress::Progress;
use super::report::Usage;
use super::session::{Session, open_device};
use crate::model::{Buffers, Keep, Loss};
use crate::train::data::{self, Dataset};

/// Runs the command.
///
/// # Errors
/// A file is refused, the adapter belongs to other weights, or the logits cannot be written.
pub fn run(args: &EvalArgs, printer: &Printer) -> anyhow::Result<()> {
    if let Some(path) = &args.dump_logits {
        refuse_dump(path)?;
    }
    let device = open_device(&args.compute, printer)?;
    let session = Session::open(&args.model, &device)?;
    let template = session.tokenizer.template()?;
    let data = data::load(
        &args.data,
        &session.tokenizer,
        template.as_ref(),
        &(&args.data_args).into(),
        &mut |_, _| {},
    )?;
    if let Some(warning) = data.warning() {
        printer.warn(&warning);
    }
    if data.truncated > 0 {
        printer.warn(&format!(
            "{} of {} examples were cut to `--max-seq-length` {}",
            data.truncated,
            data.examples.len(),
            args.data_args.max_seq_length
        ));
    }
    session.decoder.config.check_tokens(data.examples.iter().flat_map(|example| &example.input_ids))?;
    let loss = mean_loss(&session, &data, args.batch_size, printer)?;
    if let Some(path) = &args.dump_logits {
        dump_logits(&session, &data, path)?;
        printer.note(&format!("wrote {}", path.display()));
    }
    if !loss.mean().is_finite() {
        return Err(crate::Error::refused(format!(
            "the loss is {} over {} tokens",
            loss.mean(),
            loss.tokens
        ))
        .with_hint("the weights or the adapter hold values that are not finite, or far too large ones")
        .into());
    }
    if args.json {
        return Ok(printer.json(&json!({
            "loss": loss.mean(),
            "perplexity": loss.mean().exp(),
            "tokens": loss.tokens,
            "examples": data.examples.len(),
        }))?);
    }
    Ok(printer.data(&format!(
        "loss {:.6}\nperplexity {:.4}\ntokens {}\n",
        loss.mean(),
        loss.mean().exp(),
        loss.tokens
    ))?)
}

/// Loss over all supervised tokens of `data`.
///
/// # Errors
/// An example does not fit the model.
pub fn mean_loss(
    session: &Session,
    data: &Dataset,
    batch_size: usize,
    printer: &Printer,
) -> anyhow::Result<Loss> {
    let longest = data.examples.iter().map(|e| e.input_ids.len()).max().unwrap_or(0);
    let mut buffers = Buffers::new(&session.decoder, longest * batch_size, Keep::Nothing)?;
    let pass = session.params.pass(None);
    let indices: Vec<usize> = (0..data.examples.len()).collect();
    let mut bar = Progress::start(printer, "example", 0, indices.len() as u64);
    let mut loss = Loss::default();
    for indices in indices.chunks(batch_size) {
        loss += session.decoder.loss(&mut buffers, &data.batch(indices), &pass)?;
        bar.update(indices.last().map_or(0, |&i| i as u64 + 1), &format!("loss {:.4}", loss.mean()));
    }
    bar.finish();
    Ok(loss)
}

/// Only an earlier dump is replaced.
fn refuse_dump(path: &Path) -> anyhow::Result<()> {
    let is_dump = || SafetensorsFile::open(path).is_ok_and(|file| file.tensor("logits.0").is_some());
    if path.exists() && !is_dump() {
        return Err(Usage::new(format!(
            "`--dump-logits {}` exists and is no dump of logits",
            path.display()
        ))
        .hint("give another path")
        .into());
    }
    Ok(())
}

/// Writes `input_ids.N` (T) and `logits.N` (T, V) of every example N.
fn dump_logits(session: &Session, data: &Dataset, path: &Path) -> anyhow::Result<()> {
    let vocab = session.decoder.config.vocab_size;
    let longest = data.examples.iter().map(|e| e.input_ids.len()).max().unwrap_or(0);
    let mut buffers = Buffers::new(&session.decoder, longest, Keep::Nothing)?;
    let pass = session.params.pass(None);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (index, example) in data.examples.iter().enumerate() {
        let t = example.input_ids.len();
        let mut logits = Vec::with_capacity(t * vocab * size_of::<f32>());
        session.decoder.logits(&mut buffers, &data.batch(&[index]), &pass, |_, chunk| {
            logits.extend(chunk.cpu("eval")?.iter().flat_map(|x| x.to_le_bytes()));
            Ok(())
        })?;
        let ids = example.input_ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
        tensors.push((format!("input_ids.{index}"), Dtype::I64, vec![t], ids));
        tensors.push((format!("logits.{index}"), Dtype::F32, vec![t, vocab], logits));
    }
    let refs: Vec<TensorRef<'_>> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, &shape[..], &bytes[..]))
        .collect();
    Ok(write_safetensors(path, &refs, &BTreeMap::new())?)
}
