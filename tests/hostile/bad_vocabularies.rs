//! One malformed vocabulary for every way in which a GGUF or a `tokenizer.json` can be refused, in
//! `testdata/bad`, named after the variant; stored as those of `formats/tests/containers/bad_files.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use qpeft::model::tokenizer::{Tokenizer, TokenizerError};
use qpeft_formats::gguf::{Array, GgufFile, GgufWriter, Metadata, Value};

use super::target::scratch;
use super::testdata;

type Case = (&'static str, Vec<u8>);

fn strings(list: &[&str]) -> Value {
    Value::Array(Array::String(list.iter().map(|s| (*s).to_owned()).collect()))
}

/// A vocabulary of three letters and their merge, changed.
fn gguf(change: impl FnOnce(&mut Metadata)) -> Vec<u8> {
    let mut metadata = Metadata::new();
    for (key, value) in [
        ("general.architecture", Value::String("llama".into())),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", strings(&["a", "b", "ab"])),
        ("tokenizer.ggml.merges", strings(&["a b"])),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ] {
        metadata.insert(key, value);
    }
    change(&mut metadata);
    let dir = scratch();
    let path = dir.path().join("a.gguf");
    GgufWriter::create(&path, &metadata, &[]).and_then(GgufWriter::finish).expect("a plain file");
    fs::read(path).expect("it was written")
}

fn set(key: &'static str, value: Value) -> Vec<u8> {
    gguf(|metadata| drop(metadata.insert(key, value)))
}

fn without(key: &str) -> Vec<u8> {
    gguf(|metadata| drop(metadata.remove(key)))
}

fn cases() -> Vec<Case> {
    let text = |s: &str| Value::String(s.into());
    let spm = |scores: Option<Vec<f32>>| {
        gguf(|metadata| {
            metadata.insert("tokenizer.ggml.model", text("llama"));
            scores.map(|scores| metadata.insert("tokenizer.ggml.scores", Value::Array(Array::F32(scores))));
        })
    };
    let json = |vocab: &str, merges: &str| {
        format!(r#"{{"model": {{"type": "BPE", "vocab": {{{vocab}}}, "merges": [{merges}]}}}}"#).into_bytes()
    };
    let abc = r#""a": 0, "b": 1, "ab": 2"#;
    let with = |part: &str| {
        let model = r#"{"type": "BPE", "vocab": {"a": 0}, "merges": []}"#;
        format!(r#"{{"model": {model}, {part}}}"#).into_bytes()
    };
    vec![
        ("tokenizer-metadata.no-model.gguf", without("tokenizer.ggml.model")),
        (
            "tokenizer-metadata.tokens-type.gguf",
            set("tokenizer.ggml.tokens", Value::Array(Array::U8(vec![1]))),
        ),
        ("tokenizer-metadata.id-negative.gguf", set("tokenizer.ggml.bos_token_id", Value::I32(-1))),
        ("tokenizer-unknown-model.gguf", set("tokenizer.ggml.model", text("bert"))),
        ("tokenizer-unknown-pre.gguf", set("tokenizer.ggml.pre", text("tomorrow"))),
        ("tokenizer-missing-pre.gguf", without("tokenizer.ggml.pre")),
        ("tokenizer-empty-vocabulary.gguf", set("tokenizer.ggml.tokens", strings(&[]))),
        ("tokenizer-missing-key.merges.gguf", without("tokenizer.ggml.merges")),
        ("tokenizer-missing-key.scores.gguf", spm(None)),
        (
            "tokenizer-length.types.gguf",
            set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![1; 2]))),
        ),
        ("tokenizer-length.scores.gguf", spm(Some(vec![0.0; 4]))),
        ("tokenizer-merge-form.gguf", set("tokenizer.ggml.merges", strings(&["ab"]))),
        ("tokenizer-merge-form.first.gguf", set("tokenizer.ggml.merges", strings(&[" ab"]))),
        ("tokenizer-merge-form.empty.gguf", set("tokenizer.ggml.merges", strings(&[""]))),
        ("tokenizer-merge-token.gguf", set("tokenizer.ggml.merges", strings(&["a c"]))),
        ("tokenizer-merge-token.result.gguf", set("tokenizer.ggml.merges", strings(&["b a"]))),
        ("tokenizer-special-id.eos.gguf", set("tokenizer.ggml.eos_token_id", Value::U32(3))),
        ("tokenizer-special-id.bos.gguf", set("tokenizer.ggml.bos_token_id", Value::U32(u32::MAX))),
        ("tokenizer-special-id.unknown.gguf", set("tokenizer.ggml.unknown_token_id", Value::U64(3))),
        ("tokenizer-json.json", b"{".to_vec()),
        ("tokenizer-json.merge.json", json(abc, r#""ab""#)),
        // Each of these would end the library's program, at opening or at the first text.
        ("tokenizer-json.words.json", br#"{"model": {"type": "WordLevel", "vocab": {"a": 0}}}"#.to_vec()),
        ("tokenizer-json.length-0.json", with(r#""pre_tokenizer": {"type": "FixedLength", "length": 0}"#)),
        (
            "tokenizer-json.charsmap.json",
            with(
                r#""normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "!"}]}"#,
            ),
        ),
        (
            "tokenizer-json.strip.json",
            with(r#""decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9}"#),
        ),
        (
            "tokenizer-json.post-processor.json",
            with(
                r#""post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"a": {"id": "a", "ids": [4294967295], "tokens": ["a"]}}}"#,
            ),
        ),
        (
            "tokenizer-json.template-token.json",
            with(
                r#""post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "b", "type_id": 0}}], "pair": [], "special_tokens": {}}"#,
            ),
        ),
        (
            "tokenizer-json.template-second.json",
            with(
                r#""post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [], "special_tokens": {}}"#,
            ),
        ),
        ("tokenizer-merge-token.json", json(abc, r#"["a", "c"]"#)),
        ("tokenizer-empty-vocabulary.json", json("", "")),
    ]
}

/// The variants that no file shows on opening, and why.
const ELSEWHERE: &[(&str, &str)] = &[
    ("Byte", "of a text: tokenizer/tests.rs and the target `tokenizer_gguf`"),
    ("UnknownId", "of an id: an_id_outside_of_the_vocabulary_is_refused_when_decoded"),
    ("NoTokenizerJson", "of a folder: a_damaged_or_missing_tokenizer_json_is_refused_with_its_path"),
    ("Io", "of the file system: a_damaged_or_missing_tokenizer_json_is_refused_with_its_path"),
    ("NamedToken", "of two files: a_damaged_or_missing_tokenizer_json_is_refused_with_its_path"),
    ("Library", "of a text: what the library refuses at encoding"),
];

fn open(path: &Path) -> Result<Tokenizer, TokenizerError> {
    if path.extension().is_some_and(|e| e == "gguf") {
        let file = GgufFile::open(path).expect("right as a GGUF file");
        return Tokenizer::from_gguf(file.metadata());
    }
    Tokenizer::from_file(path)
}

fn kebab(name: &str) -> String {
    let mut kebab = String::new();
    for c in name.chars().take_while(char::is_ascii_alphanumeric) {
        kebab.extend((c.is_ascii_uppercase() && !kebab.is_empty()).then_some('-'));
        kebab.push(c.to_ascii_lowercase());
    }
    kebab
}

#[test]
fn every_bad_vocabulary_is_refused_for_the_reason_in_its_name() {
    let dir = testdata().join("bad");
    if std::env::var_os("BLESS").is_some() {
        for (name, bytes) in cases() {
            fs::write(dir.join(name), bytes).expect("testdata can be written");
        }
    }
    let mut wrong = Vec::new();
    for (name, bytes) in cases() {
        let path = dir.join(name);
        assert!(fs::read(&path).expect("it is stored") == bytes, "{name}");
        let expected = name.split_once('-').expect("a format").1.split_once('.').expect("an end").0;
        match open(&path) {
            Ok(_) => wrong.push(format!("{name}: accepted")),
            Err(error) if kebab(&format!("{error:?}")) != expected => wrong.push(format!("{name}: {error}")),
            Err(error) => assert!(error.to_string().contains('`'), "{error}"),
        }
    }
    let stored = fs::read_dir(&dir).expect("testdata can be listed");
    let stored: BTreeSet<String> = stored
        .map(|entry| entry.expect("testdata can be listed").file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("tokenizer-"))
        .collect();
    assert_eq!(stored, cases().iter().map(|(name, _)| (*name).to_owned()).collect());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_refusal_of_a_vocabulary_has_a_file_or_a_reason() {
    let source = include_str!("../../src/model/tokenizer/error.rs");
    let (_, body) = source.split_once("pub enum TokenizerError {").expect("it is there");
    let (body, _) = body.split_once("\n}\n").expect("it ends");
    let variants =
        body.lines().filter_map(|l| l.strip_prefix("    ").filter(|l| l.starts_with(char::is_uppercase)));
    let mut count = 0;
    for line in variants {
        let name: String = line.chars().take_while(char::is_ascii_alphanumeric).collect();
        let has_file = cases().iter().any(|(file, _)| {
            file.strip_prefix("tokenizer-").and_then(|f| f.split('.').next()) == Some(&kebab(&name))
        });
        let elsewhere = ELSEWHERE.iter().any(|(variant, _)| *variant == name);
        assert!(has_file != elsewhere, "`{name}`: a file in testdata/bad or a reason in ELSEWHERE, not both");
        count += 1;
    }
    assert!(count >= 15, "{count} variants");
}
