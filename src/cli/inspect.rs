//! `qpeft inspect`: what is in a GGUF, a safetensors file, a model folder or an adapter folder.
//!
//! Each kind of input becomes one `Listing`; text and `--json` are two views of it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use qpeft_formats::file::fingerprint;
use qpeft_formats::gguf::{self, Array, GgufFile};
use qpeft_formats::mixture::FileType;
use qpeft_formats::peft::{self, PeftAdapter};
use qpeft_formats::safetensors::{Checkpoint, SafetensorsFile, TensorView};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::args::InspectArgs;
use super::printer::Printer;
use super::problems;
use super::report::Usage;
use crate::model::base::folder_matrix;
use crate::model::config::Config;
use crate::model::save_folder::weights;
use crate::train::{checkpoint, run_files::RunFile};

/// Longer arrays are shown by their length and first elements.
const WHOLE_ARRAY: usize = 8;
const FIRST: usize = 4;
/// Longer texts are cut on a terminal; JSON has them whole.
const TEXT_WIDTH: usize = 64;

/// Everything that is shown of an input.
#[derive(Debug, Serialize)]
struct Listing {
    kind: &'static str,
    path: String,
    size_bytes: u64,
    fingerprint: String,
    parameters: u64,
    bits_per_weight: f64,
    types: BTreeMap<String, Share>,
    /// What is wrong although it can be read, one line each.
    problems: Vec<String>,
    /// What is particular to the kind: versions, the settings of an adapter, ...
    #[serde(flatten)]
    facts: Map<String, Value>,
    metadata: Map<String, Value>,
    tensors: Vec<Tensor>,
}

/// What the tensors of one type amount to.
#[derive(Debug, Default, Serialize)]
struct Share {
    tensors: u64,
    parameters: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Tensor {
    name: String,
    r#type: String,
    /// As the file has it: row length first in a GGUF, last everywhere else.
    shape: Vec<u64>,
    bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// The path is none of the four kinds, or the file is damaged.
pub fn run(args: &InspectArgs, printer: &Printer) -> anyhow::Result<()> {
    let listing = list(&args.path)?;
    let printed = if args.json { printer.json(&listing) } else { printer.data(&text(&listing, printer)) };
    printed.context("cannot print")
}

fn list(path: &Path) -> anyhow::Result<Listing> {
    let shown = path.display();
    let about = std::fs::metadata(path).with_context(|| format!("cannot open `{shown}`"))?;
    if about.is_dir() {
        if path.join(peft::CONFIG_FILE).exists() {
            return list_adapter(path);
        }
        if path.join("config.json").exists() {
            return list_checkpoint(path);
        }
        let hint = format!("a model folder has `config.json`, an adapter folder `{}`", peft::CONFIG_FILE);
        return Err(Usage::new(format!("`{shown}` is neither a model nor an adapter folder"))
            .hint(hint)
            .into());
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("gguf") => list_gguf(path),
        Some("safetensors") => list_safetensors(path),
        _ if starts_with_magic(path)? => list_gguf(path),
        _ => Err(Usage::new(format!("`{shown}` is neither a GGUF nor a safetensors file"))
            .hint("a safetensors file is known by its name, `*.safetensors`")
            .into()),
    }
}

fn starts_with_magic(path: &Path) -> anyhow::Result<bool> {
    use std::io::Read;
    let mut head = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(4).read_to_end(&mut head));
    read.with_context(|| format!("cannot read `{}`", path.display()))?;
    Ok(head == b"GGUF")
}

impl Listing {
    fn new(
        kind: &'static str,
        path: &Path,
        fingerprint: String,
        tensors: Vec<Tensor>,
    ) -> anyhow::Result<Listing> {
        let mut types = BTreeMap::<String, Share>::new();
        let (mut parameters, mut bytes) = (0, 0);
        for tensor in &tensors {
            let elements = tensor.shape.iter().product::<u64>();
            let share = types.entry(tensor.r#type.clone()).or_default();
            share.tensors += 1;
            share.parameters += elements;
            share.bytes += tensor.bytes;
            parameters += elements;
            bytes += tensor.bytes;
        }
        let bits_per_weight = if parameters == 0 { 0.0 } else { bytes as f64 * 8.0 / parameters as f64 };
        Ok(Listing {
            kind,
            path: path.display().to_string(),
            size_bytes: size_on_disk(path).with_context(|| format!("cannot read `{}`", path.display()))?,
            fingerprint,
            parameters,
            bits_per_weight,
            types,
            problems: Vec::new(),
            facts: Map::new(),
            metadata: Map::new(),
            tensors,
        })
    }
}

/// Of a file, or of the files that lie directly in a folder.
fn size_on_disk(path: &Path) -> std::io::Result<u64> {
    let about = std::fs::metadata(path)?;
    if about.is_file() {
        return Ok(about.len());
    }
    let mut size = 0;
    for entry in std::fs::read_dir(path)? {
        // Followed, not `entry.metadata`: weight files of a hub cache are links.
        if let Ok(about) = std::fs::metadata(entry?.path())
            && about.is_file()
        {
            size += about.len();
        }
    }
    Ok(size)
}

fn list_gguf(path: &Path) -> anyhow::Result<Listing> {
    let file = GgufFile::open(path)?;
    let tensors = file.tensors().iter().map(|t| Tensor {
        name: t.name.clone(),
        r#type: t.dtype.name().to_owned(),
        shape: t.shape.clone(),
        bytes: t.size,
    });
    let mut listing = Listing::new("gguf", path, file.fingerprint()?, tensors.collect())?;
    listing.facts.insert("version".to_owned(), json!(file.version()));
    listing.facts.insert("alignment".to_owned(), json!(file.alignment()));
    if file.paths().len() > 1 {
        let files = file.paths().map(|p| p.file_name().unwrap_or_default().to_string_lossy());
        listing.facts.insert("files".to_owned(), files.collect());
        let sizes = file.paths().map(size_on_disk).collect::<std::io::Result<Vec<_>>>();
        listing.size_bytes = sizes.context("cannot read the size of a file")?.into_iter().sum();
    }
    let tokens = problems::vocabulary(file.metadata());
    for (name, fact) in
        [("head", problems::head(&file).map(Value::from)), ("tokens", tokens.map(Value::from))]
    {
        if let Some(fact) = fact {
            listing.facts.insert(name.to_owned(), fact);
        }
    }
    if let Some(name) = file.metadata().u32("general.file_type").ok().flatten().and_then(FileType::from_id) {
        listing.facts.insert("mixture".to_owned(), name.name().into());
    }
    listing.problems = problems::of_gguf(&file)?;
    listing.metadata =
        file.metadata().iter().map(|(key, value)| (key.to_owned(), gguf_value(value))).collect();
    Ok(listing)
}

fn described(views: &[TensorView]) -> Vec<Tensor> {
    views
        .iter()
        .map(|view| Tensor {
            r#type: view.dtype.to_string(),
            shape: view.shape.iter().map(|&n| n as u64).collect(),
            bytes: view.bytes.len() as u64,
            name: view.name.clone(),
        })
        .collect()
}

fn list_safetensors(path: &Path) -> anyhow::Result<Listing> {
    let file = SafetensorsFile::open(path)?;
    let views: Vec<_> = file.names().filter_map(|name| file.tensor(name)).collect();
    let mut listing = Listing::new("safetensors", path, fingerprint(path)?, described(&views))?;
    listing.problems = problems::of_views(&views)?;
    listing.metadata = file.metadata().iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    Ok(listing)
}

fn list_checkpoint(path: &Path) -> anyhow::Result<Listing> {
    let folder = Checkpoint::open(path)?;
    let views: Vec<_> = folder.names().filter_map(|name| folder.tensor(name)).collect();
    let mut listing = Listing::new("model", path, folder.fingerprint()?, described(&views))?;
    if let Some(parameters) = parameters(&folder).filter(|&parameters| parameters > 0) {
        listing.parameters = parameters;
        let bytes: u64 = listing.tensors.iter().map(|tensor| tensor.bytes).sum();
        listing.bits_per_weight = bytes as f64 * 8.0 / parameters as f64;
    }
    listing.problems = problems::of_views(&views)?;
    if let Err(e) = Config::from_hf(folder.config(), &folder.config_path().display().to_string()) {
        listing.problems.push(format!("qpeft cannot train on it: {e}"));
    }
    if !path.join("tokenizer.json").exists() && !path.join("tokenizer.model").exists() {
        listing.problems.push("has neither `tokenizer.json` nor `tokenizer.model`".to_owned());
    }
    listing.metadata = folder.config().as_object().cloned().unwrap_or_default();
    Ok(listing)
}

/// Elements of a folder's weights: 4-bit ones hold two in a byte, and scales and code books are none.
///
/// `None` if a weight cannot be read; the tensors as they are stored are all that is known then.
fn parameters(folder: &Checkpoint) -> Option<u64> {
    let mut parameters = 0;
    for (name, stored) in weights(folder) {
        let view = folder.tensor(&name)?;
        parameters += if stored.len() > 1 && !view.is_fp8() {
            let weight = folder_matrix(folder, &name).ok()?;
            (weight.rows() * weight.cols()) as u64
        } else {
            view.shape.iter().product::<usize>() as u64
        };
    }
    Some(parameters)
}

fn list_adapter(path: &Path) -> anyhow::Result<Listing> {
    let adapter = PeftAdapter::read(path)?;
    let file = SafetensorsFile::open(&path.join(peft::TENSORS_FILE))?;
    let views: Vec<_> = file.names().filter_map(|name| file.tensor(name)).collect();
    let mut listing = Listing::new("adapter", path, fingerprint(file.path())?, described(&views))?;
    listing.problems = problems::of_views(&views)?;
    listing.facts.insert("modules".to_owned(), json!(adapter.modules().len()));
    listing.facts.insert("checkpoints".to_owned(), json!(checkpoint::steps(path)?));
    listing.facts.insert("qpeft".to_owned(), json!(RunFile::read(path)?));
    let config = path.join(peft::CONFIG_FILE);
    let text = std::fs::read(&config).with_context(|| format!("cannot read `{}`", config.display()))?;
    // `PeftAdapter::read` has checked that it is an object.
    listing.metadata = serde_json::from_slice(&text)?;
    Ok(listing)
}

/// The JSON form of a metadata value; a long array becomes its type, length and first elements.
fn gguf_value(value: &gguf::Value) -> Value {
    match value {
        gguf::Value::U8(x) => json!(x),
        gguf::Value::I8(x) => json!(x),
        gguf::Value::U16(x) => json!(x),
        gguf::Value::I16(x) => json!(x),
        gguf::Value::U32(x) => json!(x),
        gguf::Value::I32(x) => json!(x),
        gguf::Value::U64(x) => json!(x),
        gguf::Value::I64(x) => json!(x),
        gguf::Value::F32(x) => shortest(*x),
        gguf::Value::F64(x) => json!(x),
        gguf::Value::Bool(x) => json!(x),
        gguf::Value::String(x) => json!(x),
        gguf::Value::Array(array) if array.len() <= WHOLE_ARRAY => Value::Array(first(array, WHOLE_ARRAY)),
        gguf::Value::Array(array) => {
            json!({"type": value.type_name(), "length": array.len(), "first": first(array, FIRST)})
        }
    }
}

fn first(array: &Array, n: usize) -> Vec<Value> {
    fn of<T: Serialize>(elements: &[T], n: usize) -> Vec<Value> {
        elements.iter().take(n).map(|x| json!(x)).collect()
    }
    match array {
        Array::U8(v) => of(v, n),
        Array::I8(v) => of(v, n),
        Array::U16(v) => of(v, n),
        Array::I16(v) => of(v, n),
        Array::U32(v) => of(v, n),
        Array::I32(v) => of(v, n),
        Array::U64(v) => of(v, n),
        Array::I64(v) => of(v, n),
        Array::F32(v) => v.iter().take(n).map(|&x| shortest(x)).collect(),
        Array::F64(v) => of(v, n),
        Array::Bool(v) => of(v, n),
        Array::String(v) => of(v, n),
    }
}

/// 1e-5 and not 0.000009999999747378752.
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

fn text(listing: &Listing, printer: &Printer) -> String {
    let Listing { kind, path, facts, metadata, tensors, .. } = listing;
    let mut parts = vec![format!("{}\n", printer.bold(path))];
    let version = facts.get("version").map_or(String::new(), |v| format!(" version {v}"));
    let mut rows = vec![
        ("kind".to_owned(), format!("{kind}{version}")),
        ("size".to_owned(), size(listing.size_bytes)),
        ("fingerprint".to_owned(), listing.fingerprint.clone()),
        ("parameters".to_owned(), format!("{}", listing.parameters)),
        ("bits per weight".to_owned(), format!("{:.3}", listing.bits_per_weight)),
    ];
    for (key, value) in facts.iter().filter(|(key, _)| *key != "version" && *key != "qpeft") {
        rows.push((key.clone(), shown(value)));
    }
    if let Some(Value::Object(run)) = facts.get("qpeft") {
        let get = |pointer: &str| facts["qpeft"].pointer(pointer).map_or(String::new(), shown);
        rows.push(("written by".to_owned(), format!("qpeft {}", get("/qpeft_version"))));
        rows.push(("method".to_owned(), get("/config/method")));
        rows.push(("base".to_owned(), format!("{} {}", get("/base/name"), get("/base/fingerprint"))));
        for used in run.get("data").and_then(Value::as_array).into_iter().flatten() {
            let get = |key| used.get(key).map_or(String::new(), shown);
            rows.push(("data".to_owned(), format!("{} {}", get("name"), get("fingerprint"))));
        }
    }
    parts.push(columns(&rows.iter().map(|(a, b)| vec![a.clone(), b.clone()]).collect::<Vec<_>>()));

    if !listing.problems.is_empty() {
        let title = printer.red(&format!("problems ({})", listing.problems.len()));
        parts.push(format!("\n{title}\n  {}\n", listing.problems.join("\n  ")));
    }
    let mut section = |title: String, rows: &[Vec<String>]| {
        if !rows.is_empty() {
            parts.push(format!("\n{}\n{}", printer.bold(&title), columns(rows)));
        }
    };
    let rows = metadata.iter().map(|(key, value)| vec![printable(key), shown(value)]).collect::<Vec<_>>();
    section(format!("metadata ({})", rows.len()), &rows);
    let rows = listing.types.iter().map(|(name, share)| {
        let percent =
            100.0 * share.bytes as f64 / listing.types.values().map(|s| s.bytes).sum::<u64>().max(1) as f64;
        vec![
            name.clone(),
            format!("{} tensors", share.tensors),
            format!("{} parameters", share.parameters),
            format!("{} ({percent:.1} %)", size(share.bytes)),
        ]
    });
    section("types".to_owned(), &rows.collect::<Vec<_>>());
    let rows = tensors
        .iter()
        .map(|t| vec![printable(&t.name), t.r#type.clone(), format!("{:?}", t.shape), size(t.bytes)]);
    section(format!("tensors ({})", tensors.len()), &rows.collect::<Vec<_>>());
    parts.concat()
}

/// A text of a file without what would steer a terminal.
fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// A value on one line of bounded width.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => {
            let length = text.chars().count();
            let start = printable(&text.chars().take(TEXT_WIDTH).collect::<String>());
            if length > TEXT_WIDTH { format!("{start}... ({length} characters)") } else { start }
        }
        Value::Object(long) if long.contains_key("first") && long.contains_key("length") => {
            let first = long["first"].as_array().map(Vec::as_slice).unwrap_or_default();
            let first = first.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            format!("{} of length {}: [{first}, ...]", shown(&long["type"]), long["length"])
        }
        other => other.to_string(),
    }
}

/// Rows with two spaces before and between cells; the last cell is not padded.
fn columns(rows: &[Vec<String>]) -> String {
    let cells = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |i: usize| rows.iter().filter_map(|row| row.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths = (0..cells).map(width).collect::<Vec<_>>();
    let mut out = String::new();
    for row in rows {
        let padded = row.iter().zip(&widths).map(|(cell, &width)| format!("  {cell:width$}"));
        out += padded.collect::<Vec<_>>().concat().trim_end();
        out.push('\n');
    }
    out
}

/// `87.5 MiB`
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10).min(4);
    format!("{:.1} {}", bytes as f64 / f64::from(power * 10).exp2(), UNITS[power as usize - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_digit_after_the_point() {
        assert_eq!(
            [0, 1023, 1024, 1536, 1 << 20, 5 << 40].map(size),
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "5.0 TiB"]
        );
    }

    #[test]
    fn long_arrays_are_shown_by_type_length_and_start() {
        let long = gguf::Value::Array(Array::String((0..20).map(|i| format!("t{i}")).collect()));
        assert_eq!(
            shown(&gguf_value(&long)),
            r#"array of string of length 20: ["t0", "t1", "t2", "t3", ...]"#
        );
        let short = gguf::Value::Array(Array::F32(vec![1e-5, 0.5]));
        assert_eq!(gguf_value(&short).to_string(), "[0.00001,0.5]");
        assert_eq!(shown(&json!("a\nb")), r"a\nb");
        assert!(shown(&json!("x".repeat(100))).ends_with("x... (100 characters)"));
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "22".to_owned()]];
        assert_eq!(columns(&rows), "  a     1\n  long  22\n");
    }
}
