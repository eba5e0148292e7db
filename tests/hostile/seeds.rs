//! The inputs that damage to tokenizers, templates and models starts from.

use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorDecl, Value};

use super::formats_seeds::{files, read};
use super::target::{pack, scratch};

/// The seeds of one of this package's targets.
pub fn seeds(target: &str, testdata: &Path) -> Vec<Vec<u8>> {
    let all = |extension| files(testdata, extension).iter().map(|path| read(path)).collect::<Vec<_>>();
    match target {
        "tokenizer_gguf" => all("gguf"),
        "tokenizer_hf" => folders(testdata),
        "chat_template" => templates(testdata),
        "model" => [all("gguf"), vec![tiny()]].concat(),
        other => panic!("no seeds for `{other}`"),
    }
}

fn folders(testdata: &Path) -> Vec<Vec<u8>> {
    let folder = testdata.join("tokenizer/tiny-llama");
    let (json, config) = (read(&folder.join("tokenizer.json")), read(&folder.join("tokenizer_config.json")));
    let template = b"{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}";
    let model = |model: &str| {
        format!(
            r#"{{"version": "1.0", "added_tokens": [{{"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}}], "normalizer": {{"type": "Sequence", "normalizers": [{{"type": "Prepend", "prepend": "_"}}, {{"type": "Replace", "pattern": {{"String": " "}}, "content": "_"}}]}}, "pre_tokenizer": {{"type": "Split", "pattern": {{"Regex": "\\s+(?!\\S)|\\p{{L}}+"}}, "behavior": "Isolated", "invert": false}}, "post_processor": {{"type": "TemplateProcessing", "single": [{{"SpecialToken": {{"id": "<s>", "type_id": 0}}}}, {{"Sequence": {{"id": "A", "type_id": 0}}}}], "pair": [], "special_tokens": {{"<s>": {{"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}}}}, "decoder": {{"type": "Sequence", "decoders": [{{"type": "Replace", "pattern": {{"String": "_"}}, "content": " "}}, {{"type": "ByteFallback"}}, {{"type": "Fuse"}}, {{"type": "Strip", "content": " ", "start": 1, "stop": 0}}]}}, "truncation": {{"max_length": 4, "strategy": "LongestFirst", "stride": 2, "direction": "Right"}}, "padding": {{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}}, "model": {model}}}"#
        )
        .into_bytes()
    };
    let bpe = model(
        r#"{"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "_": 4, "<0x41>": 5}, "merges": [["a", "b"]], "unk_token": "<s>", "byte_fallback": true, "fuse_unk": true, "continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": null, "ignore_merges": false}"#,
    );
    let unigram = model(
        r#"{"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.0], ["_a", -2.0]], "byte_fallback": false}"#,
    );
    let words = model(r#"{"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "<s>"}"#);
    let pieces = model(
        r###"{"type": "WordPiece", "vocab": {"<s>": 0, "a": 1, "##b": 2}, "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}"###,
    );
    vec![
        pack(&[&json]),
        pack(&[&json, &config]),
        pack(&[&bpe, &config, template]),
        pack(&[&bpe, br#"{"bos_token": {"content": "<s>"}, "add_bos_token": true, "chat_template": [{"name": "default", "template": "d"}]}"#]),
        pack(&[&unigram]),
        pack(&[&words]),
        pack(&[&pieces]),
    ]
}

fn templates(testdata: &Path) -> Vec<Vec<u8>> {
    let chat: serde_json::Value =
        serde_json::from_slice(&read(&testdata.join("tokenizer/chat.json"))).expect("JSON");
    let mut all: Vec<Vec<u8>> = [
        chat["chat_template"].as_str().expect("it has one"),
        "{% for m in messages %}{% generation %}{{ m.content | trim | tojson(indent=2) }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i * 2 %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
        "{% macro f(x, y='a') %}{{ x.upper().split('-')[1:] }}{{ y }}{% endmacro %}{{ f('a-b') }}{{ strftime_now('%d %b %Y') }}",
        "{{ raise_exception('no') }}{{ messages[::-1] | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ '%5d|%s' | format(3, 'x') }}{{ 'ab' * 3 }}{{ [1, 2] + [3] }}{{ 'x' ~ 1 }}{{ {'a': 1}.items() | list }}",
    ]
    .map(|source| source.as_bytes().to_vec())
    .to_vec();
    for path in files(testdata, "gguf") {
        let Ok(file) = GgufFile::open(&path) else { continue };
        if let Ok(Some(source)) = file.metadata().str("tokenizer.chat_template") {
            all.push(source.as_bytes().to_vec());
        }
    }
    all
}

/// A whole model of a few hundred bytes: one layer, two heads of two channels, four tokens.
fn tiny() -> Vec<u8> {
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value| metadata.insert(key, value);
    put("general.architecture", Value::String("llama".into()));
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 8),
        ("embedding_length", 4),
        ("feed_forward_length", 6),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 2),
    ] {
        put(&format!("llama.{key}"), Value::U32(value));
    }
    put("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    put("llama.rope.freq_base", Value::F32(1e4));
    let decls: Vec<TensorDecl> = [
        ("token_embd.weight", vec![4, 4]),
        ("output_norm.weight", vec![4]),
        ("rope_freqs.weight", vec![1]),
        ("blk.0.attn_norm.weight", vec![4]),
        ("blk.0.ffn_norm.weight", vec![4]),
        ("blk.0.attn_q.weight", vec![4, 4]),
        ("blk.0.attn_k.weight", vec![4, 2]),
        ("blk.0.attn_v.weight", vec![4, 2]),
        ("blk.0.attn_output.weight", vec![4, 4]),
        ("blk.0.ffn_gate.weight", vec![4, 6]),
        ("blk.0.ffn_up.weight", vec![4, 6]),
        ("blk.0.ffn_down.weight", vec![6, 4]),
    ]
    .map(|(name, shape)| TensorDecl { name: name.into(), shape, dtype: GgmlType::F32 })
    .to_vec();
    let dir = scratch();
    let path = dir.path().join("tiny.gguf");
    let mut writer = GgufWriter::create(&path, &metadata, &decls).expect("a plain file");
    for decl in &decls {
        let data = vec![0x3c; 4 * decl.shape.iter().product::<u64>() as usize];
        writer.write(&decl.name, &data).expect("in order");
    }
    writer.finish().expect("complete");
    read(&path)
}
