//! How a failure looks and what it exits with.
//!
//! ```text
//! error: <what>
//!   caused by: <where, expected, found>
//!
//! hint: <what to do>
//! ```
//!
//! Exit codes: 0 done (a reader that closed the pipe counts as done), 1 the input is wrong, 2 the
//! usage or the environment is (a flag, the configuration file, the disk, the device). The hints come
//! from the error types; this file is the only one that asks an error for its type.

use std::fmt;
use std::io::ErrorKind as IoKind;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::config::ConfigFile;
use super::printer::Printer;

/// What was typed, or written in the configuration file, cannot be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Usage {
    /// A refusal without a hint.
    pub fn new(what: impl Into<String>) -> Usage {
        Usage { what: what.into(), hint: None }
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Usage {
        self.hint = Some(hint.into());
        self
    }

    /// clap's refusal in our words; the values of `file` are named by their line.
    pub fn from_clap(error: &clap::Error, bin: &str, file: Option<&ConfigFile>) -> Usage {
        let text = |kind| match error.get(kind) {
            Some(ContextValue::String(text)) => Some(text.clone()),
            Some(ContextValue::Strings(all)) => all.first().cloned(),
            _ => None,
        };
        let list = |kind| match error.get(kind) {
            Some(ContextValue::Strings(all)) => all.clone(),
            Some(ContextValue::String(one)) => vec![one.clone()],
            _ => Vec::new(),
        };
        // `--lora-r <N>` is how clap names a flag; the name alone is what one types.
        let flag = |shown: &str| shown.split([' ', '[']).next().unwrap_or(shown).to_owned();
        let arg = text(ContextKind::InvalidArg).map(|shown| flag(&shown)).unwrap_or_default();
        let see = format!("see `{bin} --help`");
        match error.kind() {
            ErrorKind::UnknownArgument => {
                let hint = match text(ContextKind::SuggestedArg) {
                    Some(near) => format!("did you mean `{}`?", flag(&near)),
                    None => see,
                };
                let what = if arg.starts_with('-') { "unknown flag" } else { "unexpected argument" };
                Usage::new(format!("{what} `{arg}`")).hint(hint)
            }
            ErrorKind::InvalidSubcommand => {
                let name = text(ContextKind::InvalidSubcommand).unwrap_or_default();
                let hint = match text(ContextKind::SuggestedSubcommand) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => see,
                };
                Usage::new(format!("unknown command `{name}`")).hint(hint)
            }
            ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                Usage::new(format!("`{bin}` needs a command")).hint(see)
            }
            ErrorKind::MissingRequiredArgument => {
                let missing = list(ContextKind::InvalidArg);
                let missing = missing.iter().map(|m| format!("`{}`", flag(m))).collect::<Vec<_>>();
                let usage = Usage::new(format!("`{bin}` needs {}", missing.join(", ")));
                usage.hint(if bin.ends_with("train") && !bin.ends_with("bench train") {
                    "give the flag, or its key in the file of `--config`".to_owned()
                } else {
                    see
                })
            }
            ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
                let value = text(ContextKind::InvalidValue).unwrap_or_default();
                let valid = list(ContextKind::ValidValue);
                let expected = match std::error::Error::source(error) {
                    Some(source) => source.to_string(),
                    None if value.is_empty() => "expected a value".to_owned(),
                    None => {
                        let valid = valid.iter().map(|v| format!("`{v}`")).collect::<Vec<_>>();
                        format!("expected {}", valid.join(" or "))
                    }
                };
                let found = if value.is_empty() { String::new() } else { format!(", found `{value}`") };
                let setting = file.and_then(|file| {
                    let is_it = |argument: &str| argument.split('=').next() == Some(arg.as_str());
                    file.settings.iter().find(|s| is_it(&s.argument)).map(|s| (file, s))
                });
                Usage::new(match setting {
                    Some((file, s)) => {
                        format!(
                            "`{}` line {}: key `{}`: {expected}{found}",
                            file.path.display(),
                            s.line,
                            s.key
                        )
                    }
                    None => format!("`{arg}`: {expected}{found}"),
                })
            }
            ErrorKind::ArgumentConflict => {
                let prior = text(ContextKind::PriorArg).map(|shown| flag(&shown)).unwrap_or_default();
                if prior == arg {
                    Usage::new(format!("`{arg}` is given twice"))
                } else {
                    Usage::new(format!("`{arg}` and `{prior}` exclude each other"))
                }
            }
            _ => {
                let text = error.to_string();
                let first = text.lines().next().unwrap_or_default();
                Usage::new(first.strip_prefix("error: ").unwrap_or(first)).hint(see)
            }
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Usage {}

/// Where the fault lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nobody reads what is printed.
    ClosedPipe,
    Input,
    Environment,
}

/// What one error of a chain knows: its hint, and where the fault lies.
///
/// Every error type of the project that has a hint is listed here and nowhere else.
fn ask(error: &(dyn std::error::Error + 'static)) -> (Option<String>, Option<Fault>) {
    if let Some(e) = error.downcast_ref::<Usage>() {
        return (e.hint.clone(), Some(Fault::Environment));
    }
    if let Some(e) = error.downcast_ref::<qpeft_kernels::Error>() {
        use qpeft_kernels::Error as Kernel;
        let environment = matches!(
            e,
            Kernel::Device { .. }
                | Kernel::NoKernel { .. }
                | Kernel::OutOfMemory { .. }
                | Kernel::CudaLibrary { .. }
                | Kernel::DriverTooOld { .. }
                | Kernel::Compile { .. }
                | Kernel::Library { .. }
        );
        return (e.hint(), environment.then_some(Fault::Environment));
    }
    if let Some(e) = error.downcast_ref::<qpeft_formats::Error>() {
        return (e.hint(), None);
    }
    if let Some(e) = error.downcast_ref::<crate::Error>() {
        let (_, fault) = if let crate::Error::Kernel(e) = e { ask(e) } else { (None, None) };
        return (e.hint(), fault);
    }
    if let Some(e) = error.downcast_ref::<crate::train::Error>() {
        let (_, fault) = if let crate::train::Error::Pipeline(e) = e { ask(e) } else { (None, None) };
        return (e.hint(), fault);
    }
    if let Some(e) = error.downcast_ref::<crate::train::data::DataError>() {
        return (e.hint(), None);
    }
    if let Some(e) = error.downcast_ref::<crate::model::tokenizer::TokenizerError>() {
        return (e.hint(), None);
    }
    if let Some(e) = error.downcast_ref::<crate::model::chat::ChatTemplateError>() {
        return (e.hint(), None);
    }
    if let Some(e) = error.downcast_ref::<std::io::Error>() {
        return match e.kind() {
            IoKind::BrokenPipe => (None, Some(Fault::ClosedPipe)),
            IoKind::InvalidData | IoKind::UnexpectedEof => (None, Some(Fault::Input)),
            _ => (None, Some(Fault::Environment)),
        };
    }
    (None, None)
}

fn fault(error: &anyhow::Error) -> Fault {
    error.chain().find_map(|e| ask(e).1).unwrap_or(Fault::Input)
}

/// The text of a failure, a line per element: what, each cause that says something new, the hint.
fn render(error: &anyhow::Error, printer: &Printer) -> String {
    let mut last = error.to_string();
    let mut lines = vec![format!("{} {last}", printer.red("error:"))];
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Many errors already quote their source.
        if !last.contains(&cause) {
            lines.push(format!("  caused by: {cause}"));
            last = cause;
        }
    }
    if let Some(hint) = error.chain().find_map(|e| ask(e).0) {
        lines.push(format!("\n{} {hint}", printer.cyan("hint:")));
    }
    lines.join("\n") + "\n"
}

/// Prints a failure, if there is one, and gives the exit code.
pub fn finish(outcome: &anyhow::Result<()>, printer: &Printer) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    let code = match fault(error) {
        Fault::ClosedPipe => return ExitCode::SUCCESS,
        Fault::Input => 1,
        Fault::Environment => 2,
    };
    printer.error(&render(error, printer));
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;
    use crate::train;

    fn rendered(error: &anyhow::Error) -> String {
        render(error, &Printer::plain())
    }

    #[test]
    fn a_chain_has_one_line_per_cause_and_ends_in_the_hint_of_its_type() {
        let error =
            anyhow::Error::new(train::Error::NoCheckpoint { path: "run".into() }).context("cannot resume");
        assert_eq!(
            rendered(&error),
            "error: cannot resume\n  caused by: `run` has no checkpoint\n\n\
             hint: start the run again with `--overwrite-output` in place of `--resume`\n"
        );
        assert_eq!(fault(&error), Fault::Input);
    }

    #[test]
    fn a_cause_that_is_already_quoted_is_not_repeated() {
        let io = std::io::Error::from(IoKind::PermissionDenied);
        let error = anyhow::Error::new(train::Error::io("create", "run".as_ref(), io));
        assert_eq!(rendered(&error), "error: cannot create `run`: permission denied\n");
        assert_eq!(fault(&error), Fault::Environment);
    }

    #[test]
    fn usage_and_devices_are_environment_and_bad_bytes_are_input() {
        let device = qpeft_kernels::Error::Device { device: "cuda".into(), reason: "no driver".into() };
        assert_eq!(fault(&anyhow::Error::new(device)), Fault::Environment);
        let driver = qpeft_kernels::Error::DriverTooOld { found: "11.8".into(), expected: "12.0".into() };
        let error = anyhow::Error::new(driver).context("cannot use the device `cuda`");
        assert_eq!(fault(&error), Fault::Environment);
        assert!(rendered(&error).contains("hint: install a newer NVIDIA driver"), "{}", rendered(&error));
        assert_eq!(fault(&anyhow::Error::new(Usage::new("no"))), Fault::Environment);
        assert_eq!(fault(&anyhow::anyhow!("line 3 is not JSON")), Fault::Input);
        let eof = Err::<(), _>(std::io::Error::from(IoKind::UnexpectedEof)).context("short").unwrap_err();
        assert_eq!(fault(&eof), Fault::Input);
    }

    #[test]
    fn out_of_memory_hints_at_what_the_command_can_do() {
        let full = || qpeft_kernels::Error::OutOfMemory {
            device: "cuda:0".into(),
            wanted: 300,
            free: 200,
            total: 1000,
            held: 700,
            cause: "out of memory".into(),
        };
        let merge = rendered(&anyhow::Error::new(crate::Error::from(full())));
        assert!(merge.contains("`--device cpu`") && !merge.contains("--batch-size"), "{merge}");
        let train = rendered(&anyhow::Error::new(train::Error::from(full())));
        assert!(train.contains("hint: lower `--batch-size`"), "{train}");
    }

    #[test]
    fn a_closed_pipe_is_success() {
        let closed = Err(anyhow::Error::new(std::io::Error::from(IoKind::BrokenPipe)).context("print"));
        assert_eq!(finish(&closed, &Printer::plain()), ExitCode::SUCCESS);
        assert_eq!(finish(&Ok(()), &Printer::plain()), ExitCode::SUCCESS);
    }
}
