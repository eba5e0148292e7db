//! The one owner of stdout and stderr.
//!
//! Data (what a pipe wants) goes to stdout, everything for people to stderr. Colour only on a
//! terminal without `NO_COLOR`; a progress bar steps aside while a line is printed.

use std::io::{self, IsTerminal, Write};

use indicatif::MultiProgress;
use serde::Serialize;

/// Where and how to print.
#[derive(Debug, Clone)]
pub struct Printer {
    colour: bool,
    quiet: bool,
    bars: Option<MultiProgress>,
}

impl Printer {
    /// For this process's terminal and environment, and the flags `--quiet` and `--no-progress`.
    pub fn new(quiet: bool, no_progress: bool) -> Printer {
        let terminal = io::stderr().is_terminal();
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Printer {
            colour: terminal && !dumb && !set("NO_COLOR"),
            quiet,
            bars: (terminal && !dumb && !quiet && !no_progress).then(MultiProgress::new),
        }
    }

    /// Without colour or bars.
    pub fn plain() -> Printer {
        Printer { colour: false, quiet: false, bars: None }
    }

    /// Whether notes are left out.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// The bars to draw on, if there is a terminal that wants them.
    pub(super) fn bars(&self) -> Option<&MultiProgress> {
        self.bars.as_ref()
    }

    /// Writes text to stdout, as it is.
    pub fn data(&self, text: &str) -> io::Result<()> {
        self.aside(|| {
            let mut out = io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()
        })
    }

    /// Writes a value to stdout as one line of JSON.
    pub fn json(&self, value: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_string(value).map_err(io::Error::from)?;
        text.push('\n');
        self.data(&text)
    }

    /// Writes a line for people to stderr; `--quiet` leaves it out.
    pub fn note(&self, line: &str) {
        if !self.quiet {
            self.to_stderr(&format!("{line}\n"));
        }
    }

    /// Writes `warning: ...` to stderr.
    pub fn warn(&self, line: &str) {
        self.to_stderr(&format!("{} {line}\n", self.paint("33", "warning:")));
    }

    /// Writes a rendered failure to stderr.
    pub(super) fn error(&self, text: &str) {
        self.to_stderr(text);
    }

    /// Nobody is left to tell that stderr is gone.
    fn to_stderr(&self, text: &str) {
        let _ = self.aside(|| io::stderr().lock().write_all(text.as_bytes()));
    }

    fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.bars {
            Some(bars) => bars.suspend(print),
            None => print(),
        }
    }

    /// Bold on a terminal.
    pub fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    /// Dim on a terminal.
    pub fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    pub(super) fn red(&self, text: &str) -> String {
        self.paint("1;31", text)
    }

    pub(super) fn cyan(&self, text: &str) -> String {
        self.paint("36", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
