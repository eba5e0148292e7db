//! The YAML file of `--config`: its keys are the command's flags in snake_case.
//!
//! Every entry becomes the flag that it names and is checked by that flag's own parser, so there is
//! no second list of settings. A flag that was typed wins over the file, the file over the default.
//! The names of the flags in kebab-case and the aliases of the flags work as well.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::report::Usage;

/// One setting of the file, as the flag that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// clap's id of the flag.
    pub id: String,
    /// The key as it was written.
    pub key: String,
    /// Line in the file, from 1.
    pub line: u64,
    /// `--flag=value`.
    pub argument: String,
    /// The value as text.
    pub value: String,
}

/// A parsed file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFile {
    /// The file.
    pub path: PathBuf,
    /// Its settings in order; keys with the value `null` are left out.
    pub settings: Vec<Setting>,
}

impl ConfigFile {
    /// Reads `path` as settings of `command`.
    ///
    /// # Errors
    /// The file cannot be read, is not a YAML mapping, or has an unknown or repeated key or a value of
    /// the wrong type.
    pub fn read(path: &Path, command: &Command) -> Result<ConfigFile, Usage> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Usage::new(format!("cannot read `--config {}`: {e}", path.display())))?;
        ConfigFile::parse(path, &text, command)
    }

    fn parse(path: &Path, text: &str, command: &Command) -> Result<ConfigFile, Usage> {
        let shown = path.display();
        // An empty file, or one of comments, is not a mapping but says nothing wrong.
        let is_blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
        if text.lines().all(is_blank) {
            return Ok(ConfigFile { path: path.to_owned(), settings: Vec::new() });
        }
        // Only `true` and `false` are booleans: a file may well be called `y` or `no`.
        let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
        let Entries(entries) = serde_saphyr::from_str_with_options(text, options)
            .map_err(|e| Usage::new(format!("`{shown}`: not a YAML mapping of settings: {e}")))?;

        let mut settings: Vec<Setting> = Vec::new();
        for (key, value) in entries {
            let line = key.referenced.line();
            let key = key.value;
            let at = |what: String| Usage::new(format!("`{shown}` line {line}: {what}"));
            let Some(arg) = find(command, &key) else {
                return Err(at(format!("unknown key `{key}`")).hint(suggest(command, &key)));
            };
            let flag = arg.get_long().expect("`find` returns flags with a long name");
            let value = match text_of(arg, value) {
                Ok(Some(value)) => value,
                Ok(None) => continue,
                Err(what) => return Err(at(format!("key `{key}`: {what}"))),
            };
            let id = arg.get_id().to_string();
            if let Some(first) = settings.iter().find(|s| s.id == id) {
                let name = &first.key;
                return Err(at(format!("key `{key}` sets what `{name}` in line {} has set", first.line)));
            }
            // Switches that all commands share take no value on the command line.
            let argument = match (arg.get_action(), value.as_str()) {
                (ArgAction::SetTrue, "false") => continue,
                (ArgAction::SetTrue, _) => format!("--{flag}"),
                _ => format!("--{flag}={value}"),
            };
            settings.push(Setting { id, key, line, argument, value });
        }
        Ok(ConfigFile { path: path.to_owned(), settings })
    }
}

/// Keys that ask for something about the command line itself, not for a setting of the command.
const NOT_SETTINGS: [&str; 3] = ["config", "help", "version"];

fn flags(command: &Command) -> impl Iterator<Item = &Arg> {
    command
        .get_arguments()
        .filter(|arg| arg.get_long().is_some() && !NOT_SETTINGS.contains(&arg.get_id().as_str()))
}

fn find<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let name = key.replace('_', "-");
    flags(command).find(|arg| {
        arg.get_long() == Some(name.as_str())
            || arg.get_all_aliases().is_some_and(|all| all.contains(&name.as_str()))
    })
}

/// The flag's value for a YAML value; `None` for `null`, which is as good as not there.
fn text_of(arg: &Arg, value: Value) -> Result<Option<String>, String> {
    let is_switch = matches!(arg.get_action(), ArgAction::SetTrue)
        || arg.get_num_args().is_some_and(|n| n.min_values() == 0);
    match value {
        Value::Null => Ok(None),
        Value::Bool(b) if is_switch => Ok(Some(b.to_string())),
        value if is_switch => Err(format!("expected `true` or `false`, found {value}")),
        Value::Number(text) | Value::Text(text) => Ok(Some(text)),
        Value::List(items) if arg.get_value_delimiter() == Some(',') => items
            .into_iter()
            .map(|item| match item {
                Value::Text(text) => Ok(text),
                other => Err(format!("expected a list of names, found {other} in it")),
            })
            .collect::<Result<Vec<_>, _>>()
            .map(|items| Some(items.join(","))),
        other => Err(format!("expected a single value, found {other}")),
    }
}

/// The nearest names, or where all of them are.
fn suggest(command: &Command, key: &str) -> String {
    let key = key.replace('-', "_").to_lowercase();
    let mut near = flags(command)
        .map(|arg| {
            let own = arg.get_long().expect("`flags` yields long names").replace('-', "_");
            let aliases = arg.get_all_aliases().unwrap_or_default();
            let aliases = aliases.into_iter().map(|alias| alias.replace('-', "_"));
            let distance =
                aliases.chain([own.clone()]).map(|name| edit_distance(&key, &name)).min().unwrap_or(0);
            (distance, own)
        })
        .filter(|(distance, _)| *distance <= 1 + key.len() / 4)
        .collect::<Vec<_>>();
    near.sort();
    let names = near.iter().take(3).map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>();
    if names.is_empty() {
        let name = command.get_bin_name().unwrap_or(command.get_name());
        return format!("the keys are the flags of `{name} --help` in snake_case");
    }
    format!("did you mean {}?", names.join(" or "))
}

/// Levenshtein distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row = (0..=b.len()).collect::<Vec<_>>();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// A YAML value of a kind that a flag can have, numbers in their written or shortest form.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Value>),
    Map,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(b) => write!(f, "the boolean `{b}`"),
            Value::Number(text) => write!(f, "the number `{text}`"),
            Value::Text(text) => write!(f, "the text `{text}`"),
            Value::List(_) => f.write_str("a list"),
            Value::Map => f.write_str("a mapping"),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        struct ValueVisitor;
        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<Value, D::Error> {
                Value::deserialize(inner)
            }
            fn visit_bool<E>(self, b: bool) -> Result<Value, E> {
                Ok(Value::Bool(b))
            }
            fn visit_i64<E>(self, x: i64) -> Result<Value, E> {
                Ok(Value::Number(x.to_string()))
            }
            fn visit_u64<E>(self, x: u64) -> Result<Value, E> {
                Ok(Value::Number(x.to_string()))
            }
            fn visit_f64<E>(self, x: f64) -> Result<Value, E> {
                Ok(Value::Number(format!("{x:?}")))
            }
            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Value::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                while map.next_entry::<Value, Value>()?.is_some() {}
                Ok(Value::Map)
            }
        }
        deserializer.deserialize_any(ValueVisitor)
    }
}

/// The top of the file, in order, with the place of every key.
struct Entries(Vec<(Spanned<String>, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("keys with values")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::TrainConfig;

    fn train() -> Command {
        super::super::command().find_subcommand("train").unwrap().clone()
    }

    fn parse(text: &str) -> Result<Vec<String>, String> {
        ConfigFile::parse(Path::new("run.yaml"), text, &train())
            .map(|file| file.settings.into_iter().map(|s| s.argument).collect())
            .map_err(|e| match e.hint {
                Some(hint) => format!("{} ({hint})", e.what),
                None => e.what,
            })
    }

    #[test]
    fn keys_become_the_flags_that_they_name() {
        let text = "# a run\nlora_r: 8\nlearning_rate: 1e-5\nweight_decay: 0.1\nmodel: base.gguf\n\
                    use_dora: true\nno-shuffle: false\ntarget_modules: [q_proj, v_proj]\nseed: null\n";
        let expected = [
            "--lora-r=8",
            "--learning-rate=1e-5",
            "--weight-decay=0.1",
            "--model=base.gguf",
            "--use-dora=true",
            "--no-shuffle=false",
            "--target-modules=q_proj,v_proj",
        ];
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse("").unwrap(), [""; 0]);
        assert_eq!(parse("# nothing\n\n").unwrap(), [""; 0]);
    }

    #[test]
    fn the_names_of_other_trainers_are_aliases() {
        let text = "lora_rank: 8\nsequence_len: 256\nmicro_batch_size: 2\noutput_dir: run\n\
                    model_name_or_path: m\nlr_scheduler: linear\nnum_epochs: 2\n";
        let expected = [
            "--lora-r=8",
            "--max-seq-length=256",
            "--batch-size=2",
            "--output=run",
            "--model=m",
            "--lr-scheduler-type=linear",
            "--num-train-epochs=2",
        ];
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_nearest_names() {
        let refused = |text: &str| parse(text).unwrap_err();
        assert_eq!(
            refused("lora_r: 8\n\nlearning_rat: 1\n"),
            "`run.yaml` line 3: unknown key `learning_rat` (did you mean `learning_rate`?)"
        );
        assert_eq!(
            refused("wandb_project: x\n"),
            "`run.yaml` line 1: unknown key `wandb_project` (the keys are the flags of `qpeft train --help` in snake_case)"
        );
        assert_eq!(
            refused("config: x\n").split(" (").next().unwrap(),
            "`run.yaml` line 1: unknown key `config`"
        );
    }

    #[test]
    fn a_value_of_the_wrong_type_is_refused_with_its_line() {
        let refused = |text: &str| parse(text).unwrap_err();
        assert_eq!(
            refused("lora_r: [8]\n"),
            "`run.yaml` line 1: key `lora_r`: expected a single value, found a list"
        );
        assert_eq!(
            refused("seed: 1\nmodel: {a: 1}\n"),
            "`run.yaml` line 2: key `model`: expected a single value, found a mapping"
        );
        assert_eq!(
            refused("model: true\n"),
            "`run.yaml` line 1: key `model`: expected a single value, found the boolean `true`"
        );
        assert_eq!(
            refused("use_dora: 1\n"),
            "`run.yaml` line 1: key `use_dora`: expected `true` or `false`, found the number `1`"
        );
        assert_eq!(
            refused("target_modules: [1]\n"),
            "`run.yaml` line 1: key `target_modules`: expected a list of names, found the number `1` in it"
        );
    }

    #[test]
    fn a_setting_that_is_given_twice_is_refused() {
        assert_eq!(
            parse("lora_r: 8\nlora_rank: 16\n").unwrap_err(),
            "`run.yaml` line 2: key `lora_rank` sets what `lora_r` in line 1 has set"
        );
        assert!(parse("lora_r: 8\nlora_r: 16\n").is_err());
    }

    #[test]
    fn what_is_not_a_mapping_is_refused() {
        for text in ["- a\n- b\n", "just text\n", "a: [1\n", "a: 1\n b: 2\n"] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with("`run.yaml`: not a YAML mapping of settings: "), "{error}");
        }
    }

    #[test]
    fn every_name_of_a_flag_stands_for_one_flag_only() {
        for command in super::super::command().get_subcommands() {
            for command in std::iter::once(command).chain(command.get_subcommands()) {
                let mut seen = std::collections::BTreeSet::new();
                for arg in command.get_arguments() {
                    let aliases = arg.get_all_aliases().unwrap_or_default();
                    for name in aliases.into_iter().chain(arg.get_long()) {
                        assert!(seen.insert(name.to_owned()), "{}: `--{name}` twice", command.get_name());
                        assert!(!name.contains('_'), "`--{name}`");
                    }
                }
                let mut shorts = std::collections::BTreeSet::new();
                for short in command.get_arguments().filter_map(Arg::get_short) {
                    assert!(shorts.insert(short), "{}: `-{short}` twice", command.get_name());
                }
            }
        }
    }

    #[test]
    fn every_setting_of_a_run_is_a_flag() {
        let config = serde_json::to_value(crate::train::config::tests::example()).unwrap();
        for key in config.as_object().unwrap().keys() {
            assert_eq!(find(&train(), key).map(|arg| arg.get_id().as_str()), Some(key.as_str()));
        }
    }

    #[test]
    fn the_config_of_a_run_can_be_given_back() {
        let config = crate::train::config::tests::example();
        let text = serde_json::to_string_pretty(&config).unwrap();
        let mut argv = vec!["qpeft".to_owned(), "train".to_owned()];
        argv.extend(parse(&text).unwrap());
        let super::super::args::Command::Train(args) = super::super::parse_for_test(&argv).command else {
            panic!("not `train`");
        };
        let again: TrainConfig = args.resolve().unwrap();
        assert_eq!(again, config);
    }
}
