//! What the tests of the binary share: a scratch folder, running `qpeft`, made-up training data, and
//! reading what a run leaves behind.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use qpeft_formats::peft::PeftAdapter;
use serde_json::Value;

/// A quantized base of mixed types (Q4_K, Q6_K, Q8_0): one layer, 352 tokens, 256 positions.
pub const QUANTIZED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/models/tiny-llama-256.Q4_K.gguf");
/// A full-precision Hugging Face folder: two layers, 512 tokens, 256 positions.
pub const DENSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/models/tiny-llama");

/// A scratch folder that goes away with the test.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    /// The path of `name` in the folder, as an argument.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("temporary paths are UTF-8").to_owned()
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Copies a folder into this one and returns the path of the copy.
    pub fn copy(&self, from: &str, name: &str) -> String {
        fn tree(from: &Path, to: &Path) {
            std::fs::create_dir_all(to).unwrap();
            for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
                let target = to.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    tree(&entry.path(), &target);
                } else {
                    std::fs::copy(entry.path(), target).unwrap();
                }
            }
        }
        let path = self.path(name);
        tree(Path::new(from), Path::new(&path));
        path
    }
}

/// A command line of the binary under test.
pub fn command<S: AsRef<str>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qpeft"));
    command.args(args.iter().map(AsRef::as_ref));
    command
}

/// Runs to the end.
pub fn qpeft<S: AsRef<str>>(args: &[S]) -> Output {
    command(args).output().expect("the binary runs")
}

/// Runs what must succeed: stdout and stderr.
pub fn succeed<S: AsRef<str>>(args: &[S]) -> (String, String) {
    let out = qpeft(args);
    let (stdout, stderr) = (utf8(out.stdout), utf8(out.stderr));
    let line = args.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ");
    assert_eq!(out.status.code(), Some(0), "qpeft {line}\n{stderr}");
    (stdout, stderr)
}

/// Runs what must succeed and prints one JSON object.
pub fn json<S: AsRef<str>>(args: &[S]) -> Value {
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).chain(["--json"]).collect();
    let (stdout, _) = succeed(&args);
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).expect("one JSON object")
}

/// How the binary refused.
#[derive(Debug, PartialEq)]
pub struct Refusal {
    /// Exit code.
    pub code: i32,
    /// Everything before the hint.
    pub error: String,
    /// What follows `hint: `, or nothing.
    pub hint: String,
}

impl Refusal {
    /// Asserts the exit code and that the text holds all `parts`.
    #[track_caller]
    pub fn says(&self, code: i32, parts: &[&str]) -> &Refusal {
        assert_eq!(self.code, code, "{self:?}");
        for part in parts {
            assert!(self.error.contains(part), "no `{part}` in {self:?}");
        }
        self
    }

    /// Asserts that the hint holds all `parts`.
    #[track_caller]
    pub fn hints(&self, parts: &[&str]) {
        for part in parts {
            assert!(self.hint.contains(part), "no `{part}` in the hint of {self:?}");
        }
    }
}

/// Runs what must be refused, and checks the shape of every refusal:
/// `error: ...`, causes indented by two spaces, an empty line and `hint: ...`; nothing on stdout.
#[track_caller]
pub fn refuse<S: AsRef<str>>(args: &[S]) -> Refusal {
    let args: Vec<&str> = ["--quiet"].into_iter().chain(args.iter().map(AsRef::as_ref)).collect();
    let out = qpeft(&args);
    let (stdout, stderr) = (utf8(out.stdout), utf8(out.stderr));
    let line = args.join(" ");
    let code = out.status.code().expect("no signal ends it");
    assert!(code == 1 || code == 2, "qpeft {line} exits with {code}\n{stderr}");
    assert_eq!(stdout, "", "qpeft {line}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let text = stderr.strip_suffix('\n').expect("a last line ends");
    let (error, hint) = text.split_once("\n\nhint: ").unwrap_or((text, ""));
    let mut lines = error.lines();
    assert!(lines.next().is_some_and(|l| l.starts_with("error: ")), "{stderr}");
    assert!(lines.all(|l| l.starts_with("  ")), "{stderr}");
    assert!(!hint.contains('\n'), "{stderr}");
    Refusal { code, error: error.to_owned(), hint: hint.to_owned() }
}

fn utf8(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("the output is UTF-8")
}

/// `qpeft train` on one thread of the CPU, with flags that are short to write: `train(&[...], "--lora-r 4")`.
pub fn train_args(model: &str, data: &str, output: &str, flags: &str) -> Vec<String> {
    let mut args: Vec<String> =
        ["train", "--model", model, "--data", data, "--output", output].map(str::to_owned).to_vec();
    args.extend(flags.split_whitespace().map(str::to_owned));
    if !flags.contains("--threads") {
        args.extend(["--threads".to_owned(), "1".to_owned()]);
    }
    if !flags.contains("--device") {
        args.extend(["--device".to_owned(), "cpu".to_owned()]);
    }
    args
}

/// Trains, which must succeed; what it prints to stderr.
pub fn train(model: &str, data: &str, output: &str, flags: &str) -> String {
    succeed(&train_args(model, data, output, flags)).1
}

/// Starts a training, ends it by SIGKILL when the log has reached `step`, and makes sure that it had
/// not come to its end.
pub fn train_and_kill(args: &[String], output: &str, step: u64) {
    let mut child: Child =
        command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary runs");
    while last_step(output) < step {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before step {step}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), None, "killed in the middle");
    assert!(!Path::new(output).join("adapter_model.safetensors").exists(), "killed in the middle");
}

fn last_step(output: &str) -> u64 {
    let log = std::fs::read_to_string(Path::new(output).join("log.jsonl")).unwrap_or_default();
    log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()?["step"].as_u64()).max().unwrap_or(0)
}

/// `qpeft eval --json`: the loss.
pub fn eval_loss(model: &str, data: &str, adapter: Option<&str>) -> f64 {
    let mut args = vec!["eval", "--model", model, "--data", data, "--batch-size", "2", "--threads", "1"];
    args.extend(["--device", "cpu"]);
    args.extend(adapter.into_iter().flat_map(|dir| ["--adapter", dir]));
    let result = json(&args);
    let (loss, perplexity) = (result["loss"].as_f64().unwrap(), result["perplexity"].as_f64().unwrap());
    assert!(result["tokens"].as_u64().unwrap() > 0);
    assert!((perplexity.ln() - loss).abs() < 1e-9);
    loss
}

/// One line of `log.jsonl`, without its times.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub step: u64,
    pub loss: f64,
    pub eval: bool,
}

/// `log.jsonl` of a run; every line has `step` and `loss`.
pub fn log(output: &str) -> Vec<Line> {
    let text = std::fs::read_to_string(Path::new(output).join("log.jsonl")).unwrap();
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("one JSON object per line");
        Line {
            step: line["step"].as_u64().expect("`step` is in every line"),
            loss: line["loss"].as_f64().expect("`loss` is in every line"),
            eval: line["split"] == "eval",
        }
    };
    text.lines().map(line).collect()
}

/// The losses of the optimizer steps, which must be 1, 2, 3, ...
pub fn step_losses(output: &str) -> Vec<f64> {
    let steps: Vec<Line> = log(output).into_iter().filter(|l| !l.eval).collect();
    for (index, line) in steps.iter().enumerate() {
        assert_eq!(line.step, index as u64 + 1, "every step once");
    }
    steps.iter().map(|l| l.loss).collect()
}

/// The losses on held-out data.
pub fn eval_losses(output: &str) -> Vec<f64> {
    log(output).iter().filter(|l| l.eval).map(|l| l.loss).collect()
}

/// The trained adapter's file.
pub fn adapter_bytes(output: &str) -> Vec<u8> {
    std::fs::read(Path::new(output).join("adapter_model.safetensors")).unwrap()
}

/// The trained adapter.
pub fn adapter(output: &str) -> PeftAdapter {
    PeftAdapter::read(Path::new(output)).unwrap()
}

/// Every file below a folder with its bytes.
pub fn files(dir: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let (mut all, mut open) = (Vec::new(), vec![PathBuf::from(dir)]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                open.push(path);
            } else {
                let bytes = std::fs::read(&path).unwrap();
                all.push((path, bytes));
            }
        }
    }
    all.sort();
    all
}

/// Pre-tokenized examples that can be learned: each counts upwards by its own stride from its own start,
/// and the first three tokens carry no loss. The same `seed` gives the same text.
pub fn sequences(count: usize, length: usize, seed: u64) -> String {
    let mut state = seed;
    let mut next = |below: u64| {
        // Knuth's constants; the high bits are the good ones.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut text = String::new();
    for _ in 0..count {
        let (start, stride) = (next(40), 7 * (1 + next(3)));
        let length = length as u64 - next(1 + length as u64 / 3);
        let ids: Vec<u64> = (0..length).map(|i| 10 + (start + stride * i) % 300).collect();
        let labels: Vec<i64> =
            ids.iter().enumerate().map(|(i, &id)| if i < 3 { -100 } else { id as i64 }).collect();
        writeln!(text, "{}", serde_json::json!({"input_ids": ids, "labels": labels})).unwrap();
    }
    text
}

/// Asserts |a - b| <= tolerance * |b|.
#[track_caller]
pub fn assert_relative(a: f64, b: f64, tolerance: f64) {
    assert!((a - b).abs() <= tolerance * b.abs(), "{a} and {b} differ by {:.3e}", (a / b - 1.0).abs());
}
