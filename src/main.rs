//! The `qpeft` binary: parse, run, report.

use std::process::ExitCode;

use qpeft::cli::printer::Printer;
use qpeft::cli::{Parsed, parse, report, run};

fn main() -> ExitCode {
    let (printer, outcome) = match parse(std::env::args_os()) {
        Ok(Parsed::Run(cli)) => {
            let printer = Printer::new(cli.quiet, cli.no_progress);
            let outcome = run(&cli.command, &printer);
            (printer, outcome)
        }
        Ok(Parsed::Text(text)) => {
            let printer = Printer::plain();
            let outcome = printer.data(&text).map_err(Into::into);
            (printer, outcome)
        }
        Err(usage) => (Printer::new(false, true), Err(usage.into())),
    };
    report::finish(&outcome, &printer)
}
