//! `qpeft train`: the run, as the terminal sees it.

use std::path::Path;

use serde_json::json;

use super::args::TrainArgs;
use super::printer::Printer;
use super::progress::{Progress, duration};
use super::report::Usage;
use super::session::open_device;
use crate::train::checkpoint;
use crate::train::log::{EvalRecord, StepRecord};
use crate::train::trainer::{Observer, Plan, train};

/// Runs the command.
///
/// # Errors
/// The base, the data, the adapter or the output folder is refused, or the loss stops being finite.
pub fn run(args: &TrainArgs, printer: &Printer) -> anyhow::Result<()> {
    let config = args.resolve()?;
    refuse_mixing(args)?;
    let device = open_device(&args.compute, printer)?;
    let mut terminal = Terminal::new(printer);
    let outcome = train(&config, &device, args.resume, &mut terminal)?;
    drop(terminal);

    if args.json {
        return Ok(printer.json(&json!({
            "output": config.output,
            "steps": outcome.steps,
            "loss": outcome.last_loss,
            "eval_loss_before": outcome.eval.map(|(before, _)| before),
            "eval_loss": outcome.eval.map(|(_, after)| after),
            "seconds": outcome.seconds,
        }))?);
    }
    if let Some((before, after)) = outcome.eval {
        printer.note(&format!("held-out loss {before:.4} -> {after:.4}"));
    }
    printer.note(&format!(
        "trained {} steps in {}; adapter in {}",
        outcome.steps,
        duration(outcome.seconds as u64),
        config.output.display()
    ));
    Ok(())
}

/// A folder that holds a run is continued or replaced, never mixed.
fn refuse_mixing(args: &TrainArgs) -> anyhow::Result<()> {
    if !args.resume && !args.overwrite_output && checkpoint::holds_run(&args.output) {
        return Err(Usage::new(format!("`--output {}` holds a run", args.output.display()))
            .hint("`--resume` continues it, `--overwrite-output` replaces it")
            .into());
    }
    Ok(())
}

/// Prints what a run does.
pub struct Terminal<'a> {
    printer: &'a Printer,
    /// What goes on beside the steps, of how many, and how far it is.
    phase: Option<(String, usize, Progress)>,
    steps: Option<Progress>,
}

impl<'a> Terminal<'a> {
    /// Nothing printed yet.
    pub fn new(printer: &'a Printer) -> Terminal<'a> {
        Terminal { printer, phase: None, steps: None }
    }
}

impl Observer for Terminal<'_> {
    fn phase(&mut self, what: &str, done: usize, total: usize) {
        if total == 0 {
            return;
        }
        if self.phase.as_ref().is_none_or(|(name, of, _)| name != what || *of != total) {
            self.phase = None;
            self.phase = Some((what.to_owned(), total, Progress::start(self.printer, what, 0, total as u64)));
        }
        let (_, _, progress) = self.phase.as_mut().expect("set above");
        progress.update(done as u64, "");
    }

    fn warn(&mut self, text: &str) {
        self.printer.warn(text);
    }

    fn plan(&mut self, plan: &Plan) {
        self.phase = None;
        for (name, value) in banner(plan) {
            self.printer.note(&format!("{} {value}", self.printer.bold(&format!("{name:>10}"))));
        }
        let done = plan.resumed_at.map_or(0, |first| first - 1);
        self.steps = Some(Progress::start(self.printer, "step", done, plan.total_steps));
    }

    fn step(&mut self, record: &StepRecord, logged: bool) {
        let Some(steps) = &mut self.steps else { return };
        if !logged {
            return steps.advance(record.step);
        }
        let message = format!(
            "loss {:.4}  lr {:.2e}  norm {:.3}  {:.0} tok/s",
            record.loss, record.learning_rate, record.grad_norm, record.tokens_per_second
        );
        steps.update(record.step, &message);
    }

    fn eval(&mut self, record: &EvalRecord) {
        self.phase = None;
        self.printer.note(&format!(
            "step {}  held-out loss {:.4}  perplexity {:.3}  ({} tokens)",
            record.step, record.loss, record.perplexity, record.tokens
        ));
        // The evaluation before the first step is over.
        if let Some(steps) = self.steps.as_mut().filter(|steps| steps.done() == 0) {
            steps.restart();
        }
    }

    fn saved(&mut self, path: &Path) {
        self.printer.note(&format!("saved {}", path.display()));
    }
}

/// The lines before the first step: what is active, and what it costs.
fn banner(plan: &Plan) -> Vec<(&'static str, String)> {
    let mib = |bytes: usize| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
    let memory: Vec<String> =
        plan.memory.iter().map(|(what, bytes)| format!("{what} {}", mib(*bytes))).collect();
    let total = plan.memory.iter().map(|(_, bytes)| bytes).sum();
    let mut lines = vec![
        (
            "base",
            format!(
                "{} ({}), {} parameters",
                plan.base,
                plan.base_type,
                grouped(plan.total - plan.trainable)
            ),
        ),
        ("method", plan.method.clone()),
        ("targets", format!("{} linears: {}", plan.targets, plan.target_names.join(", "))),
        (
            "trainable",
            format!(
                "{} of {} parameters ({:.3} %)",
                grouped(plan.trainable),
                grouped(plan.total),
                100.0 * plan.trainable as f64 / plan.total as f64
            ),
        ),
        ("memory", format!("{} = {}", memory.join(" + "), mib(total))),
        (
            "data",
            format!(
                "{} examples, {} held out; {} cut to the maximum length, {} without a trained token left out",
                plan.examples.0, plan.examples.1, plan.cut.0, plan.cut.1
            ),
        ),
        (
            "masked",
            format!(
                "{:.0} % of the first example's {} tokens carry no loss",
                100.0 * plan.masked_share,
                plan.first_tokens
            ),
        ),
        (
            "steps",
            format!("{} of {} examples each, on {}", plan.total_steps, plan.examples_per_step, plan.device),
        ),
    ];
    if let Some(fit) = &plan.fit {
        lines.push(("device memory", fit.settings.to_string()));
    }
    if let Some(manifest) = &plan.staged {
        let residual_type = manifest.settings.residual_type;
        let text = format!(
            "rank {} holds {:.1} % of the squared norm; {}residual quantization error {:.3} % of the norm",
            manifest.settings.rank,
            100.0 * manifest.captured,
            residual_type.map_or_else(String::new, |to| format!("residual in {to}; ")),
            100.0 * manifest.quantization_error
        );
        lines.insert(2, ("split", text));
    }
    if let Some(step) = plan.resumed_at {
        lines.push(("resumed", format!("at step {step}")));
    }
    lines
}

/// `4,884,480`
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!([0, 999, 1000, 4_884_480].map(grouped), ["0", "999", "1,000", "4,884,480"]);
    }
}
