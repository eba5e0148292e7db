//! The command line: what was typed becomes a command, the command runs, its outcome is reported.
//!
//! `args` says what can be typed, `config` reads it from a file, `printer` and `progress` own the
//! terminal, `report` owns failures. Each command has its own file with `run(args, printer)`.

pub mod args;
pub mod config;
pub mod inspect;
pub mod printer;
pub mod progress;
pub mod report;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, ArgMatches, CommandFactory, FromArgMatches};

use args::{BenchCommand, Cli, Command, ConvertCommand};
use config::ConfigFile;
use printer::Printer;
use report::Usage;

/// What the arguments of the process ask for.
#[derive(Debug)]
pub enum Parsed {
    /// Run a command.
    Run(Box<Cli>),
    /// Print the help or the version.
    Text(String),
}

/// Runs a command.
pub fn run(command: &Command, printer: &Printer) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => {
            args.resolve()?;
            absent("train")
        }
        Command::Convert(ConvertCommand::PissaToLora(_)) => absent("convert pissa-to-lora"),
        Command::Merge(_) => absent("merge"),
        Command::Eval(_) => absent("eval"),
        Command::Generate(_) => absent("generate"),
        Command::Inspect(args) => inspect::run(args, printer),
        Command::Bench(BenchCommand::Train(_)) => absent("bench train"),
        Command::Demo(_) => absent("demo"),
    }
}

fn absent(command: &str) -> anyhow::Result<()> {
    anyhow::bail!("`qpeft {command}` is not part of this build")
}

/// Reads the arguments of the process and the file of `--config`: flag > file > default.
///
/// # Errors
/// [`Usage`]: an unknown flag or key, a value out of range, a required flag that is in neither place.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Parsed, Usage> {
    let mut argv = argv.into_iter().map(kebab).collect::<Vec<_>>();
    // First without the required flags: they may be in the file that one of the flags names.
    let typed = match relaxed(command()).try_get_matches_from(&argv) {
        Ok(typed) => typed,
        Err(e) if !e.use_stderr() => return Ok(Parsed::Text(e.to_string())),
        Err(e) => return Err(Usage::from_clap(&e, &name_of(&argv), None)),
    };
    let (command_line, matches) = leaf(command(), &typed);
    let bin = command_line.get_bin_name().unwrap_or("qpeft").to_owned();
    let file = match matches.try_get_one::<PathBuf>("config").ok().flatten() {
        Some(path) => Some(ConfigFile::read(path, &command_line)?),
        None => None,
    };
    if let Some(file) = &file {
        let is_typed = |id: &str| {
            matches.value_source(id).is_some_and(|source| source == clap::parser::ValueSource::CommandLine)
        };
        let from_file = file.settings.iter().filter(|s| !is_typed(&s.id)).map(|s| s.argument.clone().into());
        let end = argv.iter().position(|a| a == "--").unwrap_or(argv.len());
        argv.splice(end..end, from_file);
    }
    command()
        .try_get_matches_from(&argv)
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map(|cli| Parsed::Run(Box::new(cli)))
        .map_err(|e| Usage::from_clap(&e, &bin, file.as_ref()))
}

/// The flags as clap wants them, complete: bin names set, switches able to say `=false`, so that a
/// typed flag can also undo one of the file.
fn command() -> clap::Command {
    fn switches(command: clap::Command) -> clap::Command {
        command.mut_subcommands(switches).mut_args(|arg| {
            let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
            if !is_switch {
                return arg;
            }
            arg.action(ArgAction::Set)
                .num_args(0..=1)
                .require_equals(true)
                .value_name("BOOL")
                .default_value("false")
                .default_missing_value("true")
                .hide_default_value(true)
                .hide_possible_values(true)
        })
    }
    let mut command = Cli::command().mut_subcommands(switches);
    command.build();
    command
}

fn relaxed(command: clap::Command) -> clap::Command {
    command.mut_subcommands(relaxed).mut_args(|arg| arg.required(false))
}

/// The innermost command that was named, with its matches.
fn leaf(mut command: clap::Command, matches: &ArgMatches) -> (clap::Command, ArgMatches) {
    let mut matches = matches;
    while let Some((name, inner)) = matches.subcommand() {
        let found = command.find_subcommand(name).expect("clap matched a command that exists").clone();
        (command, matches) = (found, inner);
    }
    (command, matches.clone())
}

/// `qpeft bench train`: the commands at the start of the arguments, for arguments that do not parse.
fn name_of(argv: &[OsString]) -> String {
    let mut command = command();
    for word in argv.iter().skip(1).filter_map(|a| a.to_str()).filter(|a| !a.starts_with('-')) {
        match command.find_subcommand(word) {
            Some(found) => command = found.clone(),
            None => break,
        }
    }
    command.get_bin_name().unwrap_or("qpeft").to_owned()
}

/// `--lora_r=8` is what users of Python trainers type: underscores in the name of a flag are hyphens.
fn kebab(argument: OsString) -> OsString {
    let Some(text) = argument.to_str().filter(|text| text.starts_with("--") && text.contains('_')) else {
        return argument;
    };
    match text.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")).into(),
        None => text.replace('_', "-").into(),
    }
}

#[cfg(test)]
fn parse_for_test(argv: &[String]) -> Cli {
    match parse(argv.iter().map(OsString::from)).expect("the arguments are right") {
        Parsed::Run(cli) => *cli,
        Parsed::Text(text) => panic!("{text}"),
    }
}
