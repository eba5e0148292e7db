//! The command line: what was typed becomes a command, the command runs, its outcome is reported.
//!
//! `args` says what can be typed, `config` reads it from a file, `printer` and `progress` own the
//! terminal, `report` owns failures. Each command has its own file with `run(args, printer)`.

pub mod args;
pub mod bench;
pub mod config;
pub mod convert;
pub mod convert_model;
pub mod demo;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod merge;
mod plan;
pub mod printer;
mod problems;
pub mod progress;
pub mod quantize;
mod quantize_folder;
pub mod report;
pub mod session;
pub mod train;
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
///
/// # Errors
/// Whatever the command refuses; see its file.
pub fn run(command: &Command, printer: &Printer) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => train::run(args, printer),
        Command::Convert(ConvertCommand::PissaToLora(args)) => convert::pissa(args, printer),
        Command::Convert(ConvertCommand::HfToGguf(args)) => convert_model::hf_to_gguf(args, printer),
        Command::Convert(ConvertCommand::GgufToHf(args)) => convert_model::gguf_to_hf(args, printer),
        Command::Merge(args) => merge::run(args, printer),
        Command::Quantize(args) => quantize::run(args, printer),
        Command::Eval(args) => eval::run(args, printer),
        Command::Generate(args) => generate::run(args, printer),
        Command::Inspect(args) => inspect::run(args, printer),
        Command::Bench(BenchCommand::Train(args)) => bench::train::run(args, printer),
        Command::Bench(BenchCommand::Quantize(args)) => bench::quantize::run(args, printer),
        Command::Bench(BenchCommand::Dequantize(args)) => bench::dequantize::run(args, printer),
        Command::Bench(BenchCommand::Attention(args)) => bench::attention::run(args, printer),
        Command::Bench(BenchCommand::Linear(args)) => bench::linear::run(args, printer),
        Command::Bench(BenchCommand::Svd(args)) => bench::svd::run(args, printer),
        Command::Plan(args) => plan::run(args, printer),
        Command::Demo(args) => demo::run(args, printer),
    }
}

/// Reads the arguments of the process and the file of `--config`: flag > file > default.
///
/// # Errors
/// [`Usage`]: an unknown flag or key, a value out of range, a required flag that is in neither place.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Parsed, Usage> {
    let mut argv = argv.into_iter().map(kebab).collect::<Vec<_>>();
    // What is recorded of a run and what is reported is text.
    if let Some(argument) = argv.iter().skip(1).find(|argument| argument.to_str().is_none()) {
        return Err(Usage::new(format!("the argument `{}` is not UTF-8", argument.to_string_lossy()))
            .hint("give the file or folder another name"));
    }
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

/// The flags as clap wants them, complete: bin names set, and switches of commands that read a file
/// able to say `=false`, so that a typed flag can also undo one of the file.
fn command() -> clap::Command {
    fn switches(command: clap::Command) -> clap::Command {
        let has_file = command.get_arguments().any(|arg| arg.get_id() == "config");
        command.mut_subcommands(switches).mut_args(|arg| {
            let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
            if !is_switch && arg.get_action().takes_values() {
                // For the message of the flag's own range.
                return arg.allow_negative_numbers(true);
            }
            if !has_file || !is_switch {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::TrainConfig;
    use crate::train::config::{Method, TargetModules};
    use crate::train::schedule::SchedulerType;

    const REQUIRED: [&str; 3] = ["--model=m", "--data=d", "--output=o"];

    fn refused(argv: &[&str]) -> String {
        parse(argv.iter().map(OsString::from)).expect_err("the arguments are wrong").what
    }

    fn train(flags: &[&str]) -> Result<TrainConfig, String> {
        let argv = ["qpeft", "train"].iter().chain(flags).map(OsString::from);
        match parse(argv) {
            Ok(Parsed::Run(cli)) => match cli.command {
                Command::Train(args) => args.resolve().map_err(|e| e.what),
                other => panic!("{other:?}"),
            },
            Ok(Parsed::Text(text)) => panic!("{text}"),
            Err(e) => Err(e.what),
        }
    }

    fn with(flags: &[&str]) -> Result<TrainConfig, String> {
        train(&[&REQUIRED, flags].concat())
    }

    fn yaml(text: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.yaml");
        std::fs::write(&path, text).unwrap();
        let flag = format!("--config={}", path.display());
        (dir, flag)
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let config = with(&[]).unwrap();
        let expected = TrainConfig {
            model: "m".into(),
            data: "d".into(),
            output: "o".into(),
            method: Method::Lora,
            use_dora: false,
            max_steps: None,
            ..crate::train::config::tests::example()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn defaults_follow_the_method() {
        let pissa = with(&["--method=pissa", "--lora-r=8", "--use-dora"]).unwrap();
        assert_eq!((pissa.lora_alpha, pissa.use_dora), (8.0, true));
        let dora = with(&["--method=dora", "--lora-r=8"]).unwrap();
        assert_eq!((dora.lora_alpha, dora.use_dora), (32.0, true));
        assert_eq!(with(&["--method=pissa", "--lora-alpha=4"]).unwrap().lora_alpha, 4.0);
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let (_dir, config) =
            yaml("model: y\nlora_r: 8\nlearning_rate: 1e-5\nno_shuffle: true\nuse_dora: true\n");
        let found =
            train(&["--data=d", "--output=o", &config, "--lora-rank", "4", "--no-shuffle=false"]).unwrap();
        assert_eq!(found.model, PathBuf::from("y"));
        assert_eq!((found.lora_r, found.learning_rate), (4, 1e-5));
        assert_eq!((found.no_shuffle, found.use_dora), (false, true));
        assert_eq!(found.lr_scheduler_type, SchedulerType::Cosine);
    }

    #[test]
    fn targets_are_all_linear_a_comma_list_or_a_yaml_list() {
        let names = TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]);
        assert_eq!(with(&[]).unwrap().target_modules, TargetModules::AllLinear);
        assert_eq!(with(&["--target-modules", "q_proj, v_proj"]).unwrap().target_modules, names);
        for text in ["[q_proj, v_proj]", "q_proj,v_proj", "\n  - q_proj\n  - v_proj"] {
            let (_dir, config) = yaml(&format!("target_modules: {text}\n"));
            assert_eq!(with(&[&config]).unwrap().target_modules, names, "{text}");
        }
        assert_eq!(
            with(&["--target-modules=q_proj,"]),
            Err("`--target-modules`: `` is not the name of a layer".to_owned())
        );
        assert_eq!(
            with(&["--target-modules=all-linear,q_proj"]),
            Err("`--target-modules`: `all-linear` stands alone".to_owned())
        );
    }

    #[test]
    fn every_range_is_checked_and_the_flag_is_named() {
        for (flag, expected) in [
            ("--lora-r=0", "`--lora-r`: expected an integer of at least 1, found `0`"),
            ("--lora-rank=0", "`--lora-r`: expected an integer of at least 1, found `0`"),
            ("--lora-alpha=0", "`--lora-alpha`: expected a number above 0, found `0`"),
            ("--lora-dropout=1", "`--lora-dropout`: expected a number of at least 0 and below 1, found `1`"),
            ("--learning-rate=-1", "`--learning-rate`: expected a number above 0, found `-1`"),
            ("--warmup-ratio=1.5", "`--warmup-ratio`: expected a number from 0 to 1, found `1.5`"),
            ("--batch-size=0", "`--batch-size`: expected an integer of at least 1, found `0`"),
            ("--max-steps=0", "`--max-steps`: expected an integer of at least 1, found `0`"),
            ("--max-grad-norm=-1", "`--max-grad-norm`: expected a number of at least 0, found `-1`"),
            ("--adam-beta2=1", "`--adam-beta2`: expected a number of at least 0 and below 1, found `1`"),
            ("--eval-split=1", "`--eval-split`: expected a number of at least 0 and below 1, found `1`"),
            ("--method=qlora", "`--method`: expected one of `lora`, `dora`, `pissa`, found `qlora`"),
            (
                "--lr-scheduler-type=x",
                "`--lr-scheduler-type`: expected `cosine`, `linear` or `constant`, found `x`",
            ),
            ("--seed=-1", "`--seed`: expected an integer of at least 0, found `-1`"),
            ("--use-dora=maybe", "`--use-dora`: expected `true` or `false`, found `maybe`"),
        ] {
            assert_eq!(with(&[flag]), Err(expected.to_owned()));
        }
    }

    #[test]
    fn a_range_of_the_file_is_checked_and_the_line_is_named() {
        let (dir, config) = yaml("seed: 1\nlora_rank: 0\n");
        let path = dir.path().join("run.yaml");
        assert_eq!(
            with(&[&config]),
            Err(format!(
                "`{}` line 2: key `lora_rank`: expected an integer of at least 1, found `0`",
                path.display()
            ))
        );
    }

    #[test]
    fn combinations_that_mean_nothing_are_refused() {
        for (flags, expected) in [
            (
                &["--resume", "--overwrite-output"][..],
                "`--resume` and `--overwrite-output` exclude each other",
            ),
            (&["--eval-data=e", "--eval-split=0.1"], "`--eval-data` and `--eval-split` exclude each other"),
            (&["--prompt-field=q"], "`--prompt-field` and `--completion-field` need each other"),
            (&["--lora-r=1", "--lora-r=2"], "`--lora-r` is given twice"),
        ] {
            assert_eq!(with(flags), Err(expected.to_owned()));
        }
    }

    #[test]
    fn underscores_in_flags_are_hyphens_and_values_are_left_alone() {
        assert_eq!(with(&["--lora_r", "3", "--target_modules=q_proj"]).unwrap().lora_r, 3);
        assert_eq!(kebab("--prompt_field=my_key".into()), OsString::from("--prompt-field=my_key"));
        assert_eq!(kebab("my_file".into()), OsString::from("my_file"));
    }

    #[test]
    fn what_is_missing_is_listed() {
        assert_eq!(refused(&["qpeft", "train"]), "`qpeft train` needs `--model`, `--data`, `--output`");
        assert_eq!(refused(&["qpeft", "merge", "--model=m"]), "`qpeft merge` needs `--adapter`, `--output`");
        assert_eq!(refused(&["qpeft", "bench"]), "`qpeft bench` needs a command");
        assert_eq!(refused(&["qpeft"]), "`qpeft` needs a command");
    }
}
