//! Every id against llama.cpp's, and every refusal.

use std::path::{Path, PathBuf};

use qpeft_formats::gguf::GgufFile;
use serde_json::Value;

use super::gguf::{Fields, SpecialFields};
use super::*;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/tokenizer").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata(name)).unwrap()).unwrap()
}

fn vocabulary(model: &str) -> Tokenizer {
    let file = GgufFile::open(&testdata(&format!("{model}-vocab.gguf"))).unwrap();
    Tokenizer::from_gguf(file.metadata()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn every_golden_string_of_smollm2_has_the_ids_of_llama_cpp() {
    let t = vocabulary("smollm2");
    let strings = json("strings.json");
    let strings = strings["strings"].as_array().unwrap();
    assert_eq!(strings.len(), 60);
    for s in strings {
        let text = s["text"].as_str().unwrap();
        assert_eq!(t.encode(text, false).unwrap(), ids(&s["ids"]), "{text:?}");
        let default = s.get("ids_default").unwrap_or(&s["ids"]);
        assert_eq!(t.encode(text, true).unwrap(), ids(default), "{text:?}");
        let plain = s.get("ids_no_parse_special").unwrap_or(&s["ids"]);
        assert_eq!(t.encode_plain(text).unwrap(), ids(plain), "{text:?}");
        assert_eq!(t.decode(&ids(&s["ids"]), false).unwrap(), text);
    }
    for c in json("chat.json")["conversations"].as_array().unwrap() {
        assert_eq!(t.encode(c["rendered"].as_str().unwrap(), false).unwrap(), ids(&c["ids"]));
    }
}

#[test]
fn every_golden_string_of_the_tiny_models_has_the_ids_of_llama_cpp() {
    let tiny = json("tiny.json");
    let models = tiny.as_object().unwrap();
    assert_eq!(models.len(), 6);
    for (model, strings) in models {
        let t = vocabulary(model);
        for s in strings.as_array().unwrap() {
            let text = s["text"].as_str().unwrap();
            assert_eq!(t.encode(text, true).unwrap(), ids(&s["ids"]), "{model} {text:?}");
            assert_eq!(t.encode(text, false).unwrap(), ids(&s["ids_no_bos"]), "{model} {text:?}");
            assert_eq!(t.decode(&ids(&s["ids"]), true).unwrap(), text, "{model}");
        }
    }
}

#[test]
fn a_tokenizer_json_gives_the_ids_of_the_gguf() {
    let (hf, gguf) = (Tokenizer::from_hf_dir(&testdata("tiny-llama")).unwrap(), vocabulary("tiny-llama"));
    let mut texts: Vec<String> = json("strings.json")["strings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["text"].as_str().unwrap().into())
        .collect();
    texts.push("<|im_start|>user\nHi<|im_end|>\n".into());
    for text in &texts {
        assert_eq!(hf.encode(text, true).unwrap(), gguf.encode(text, true).unwrap(), "{text:?}");
        assert_eq!(hf.encode_plain(text).unwrap(), gguf.encode_plain(text).unwrap(), "{text:?}");
        let ids = hf.encode(text, false).unwrap();
        assert_eq!(hf.decode(&ids, false).unwrap(), gguf.decode(&ids, false).unwrap());
    }
    assert_eq!(hf.vocab_size(), gguf.vocab_size());
    assert_eq!((hf.bos(), hf.eos(), hf.eot()), (gguf.bos(), gguf.eos(), gguf.eot()));
    assert_eq!(hf.chat_template(), gguf.chat_template());
    assert_eq!(hf.end_of_generation(), gguf.end_of_generation());
    assert_eq!(hf.id_to_token(2), gguf.id_to_token(2));
}

#[test]
fn special_ids_come_from_the_keys_and_from_the_texts_of_tokens() {
    let t = vocabulary("smollm2");
    assert_eq!((t.vocab_size(), t.bos(), t.eos(), t.eot()), (49152, Some(1), Some(2), Some(2)));
    assert_eq!(t.end_of_generation().iter().copied().collect::<Vec<_>>(), [0, 2]);
    assert_eq!(t.token_to_id("<|im_end|>"), Some(2));
    assert_eq!(t.id_to_token(2).as_deref(), Some("<|im_end|>"));
    assert!(t.prefix().is_empty());
    assert_eq!(vocabulary("tiny-mistral").prefix(), [1]);
    assert!(t.chat_template().unwrap().contains("SmolLM"));
    assert_eq!(t.decode(&[1, 4093, 2], true).unwrap(), "user");
    assert_eq!(t.decode(&[1, 4093, 2], false).unwrap(), "<|im_start|>user<|im_end|>");
}

#[test]
fn every_character_round_trips_through_every_vocabulary() {
    // SmolLM2's vocabulary lacks six control characters (0x04 is one), so llama.cpp drops them too.
    let all = "\t\n\r".chars().chain(' '..'\u{3000}').chain("😀\u{10FFFF}".chars()).collect::<String>();
    for model in ["smollm2", "tiny-llama", "tiny-qwen2", "tiny-gpt2", "tiny-mistral", "tiny-gemma2"] {
        let t = vocabulary(model);
        let ids = t.encode(&all, false).unwrap();
        // U+2581 is SentencePiece's own sign for a space.
        let spm = ["tiny-mistral", "tiny-gemma2"].contains(&model);
        let expected = if spm { all.replace('\u{2581}', " ") } else { all.clone() };
        let decoded = t.decode(&ids, false).unwrap();
        let differs = decoded.chars().zip(expected.chars()).find(|(a, b)| a != b);
        assert!(decoded == expected, "{model}: {differs:?}");
    }
}

#[test]
fn a_continuation_gets_no_space_from_sentencepiece() {
    let t = vocabulary("tiny-mistral");
    let (whole, head) = (t.encode("Hello world", false).unwrap(), t.encode("Hello", false).unwrap());
    let tail = t.encode_continuation(" world").unwrap();
    assert_eq!([head, tail].concat(), whole);
    let b = vocabulary("smollm2");
    assert_eq!(b.encode_continuation(" world").unwrap(), b.encode(" world", false).unwrap());
}

#[test]
fn white_space_after_a_special_token_belongs_to_it_in_phi3_only() {
    let phi = vocabulary("tiny-phi3");
    let (bos, eos) = (phi.bos().unwrap(), phi.eos().unwrap());
    assert_eq!(phi.encode("</s> \n\t</s>", false).unwrap(), [eos, eos]);
    assert_eq!(phi.encode("<s></s>", false).unwrap(), [bos, eos]);
    assert!(phi.encode("<s> </s>", false).unwrap().len() > 2);
    assert!(vocabulary("tiny-mistral").encode("</s> </s>", false).unwrap().len() > 2);
}

/// A vocabulary of three letters, their merge, and a control token inside a longer one.
fn small() -> Fields {
    Fields {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: ["a", "b", "ab", "<x>", "<x>>", "<u>"].map(String::from).to_vec(),
        token_types: Some(vec![1, 1, 1, 3, 3, 4]),
        merges: Some(vec!["a b".into()]),
        specials: SpecialFields { bos: Some(3), eos: Some(3), ..Default::default() },
        ..Default::default()
    }
}

fn refusal(fields: Fields) -> TokenizerError {
    Tokenizer::from_fields(fields).expect_err("refused")
}

#[test]
fn longer_special_tokens_are_cut_out_first() {
    let t = Tokenizer::from_fields(small()).unwrap();
    assert_eq!(t.encode("ab<x>>a<x><u>", false).unwrap(), [2, 4, 0, 3, 5]);
    // Only the user-defined token stays a token; `<`, `x`, `>` are not in this vocabulary.
    assert_eq!(t.encode_plain("a<x>b<u>").unwrap(), [0, 1, 5]);
    assert!(t.encode("", true).unwrap().is_empty());
}

#[test]
fn begin_and_end_are_added_when_asked_for_by_key_or_by_pre_tokenizer() {
    let with = |f: &dyn Fn(&mut Fields)| {
        let mut fields = small();
        f(&mut fields);
        Tokenizer::from_fields(fields).unwrap().encode("a", true).unwrap()
    };
    assert_eq!(with(&|_| {}), [0]);
    assert_eq!(with(&|f| f.add_bos = Some(true)), [3, 0]);
    assert_eq!(with(&|f| f.add_eos = Some(true)), [0, 3]);
    assert_eq!(with(&|f| f.pre = Some("llama-bpe".into())), [3, 0]);
    assert_eq!(with(&|f| (f.pre, f.add_bos) = (Some("llama3".into()), Some(false))), [0]);
}

#[test]
fn ignore_merges_takes_a_piece_that_is_a_token_as_a_whole() {
    let ids = |pre: &str| {
        let mut fields = small();
        fields.pre = Some(pre.into());
        fields.merges = Some(Vec::new());
        Tokenizer::from_fields(fields).unwrap().encode("ab", false).unwrap()
    };
    assert_eq!(ids("llama-bpe"), [2]);
    assert_eq!(ids("dbrx"), [0, 1]);
}

#[test]
fn pre_tokenizers_split_as_their_patterns_say() {
    use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
    let pieces = |name: &str, text: &str| {
        let mut s = PreTokenizedString::from(text);
        pre::find(name).unwrap().split.build().unwrap().pre_tokenize(&mut s).unwrap();
        let splits = s.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(_, (from, to), _)| text[*from..*to].to_owned()).collect::<Vec<_>>()
    };
    let text = "I'LL pay 12345 €!\n\n  ok";
    assert_eq!(pieces("gpt-2", text), ["I", "'", "LL", " pay", " 12345", " €!", "\n\n ", " ok"]);
    assert_eq!(
        pieces("smollm", text),
        ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " €!", "\n\n ", " ok"]
    );
    assert_eq!(pieces("llama-bpe", text), ["I", "'LL", " pay", " ", "123", "45", " €!\n\n", " ", " ok"]);
    assert_eq!(
        pieces("qwen2", text),
        ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €!\n\n", " ", " ok"]
    );
}

#[test]
fn an_unknown_or_missing_pre_tokenizer_is_refused_with_a_way_out() {
    let e = refusal(Fields { pre: Some("tomorrow".into()), ..small() });
    assert!(e.to_string().contains("`tomorrow`") && e.to_string().contains("`smollm`"), "{e}");
    assert!(e.hint().unwrap().contains("--tokenizer FILE"));
    let e = refusal(Fields { pre: None, ..small() });
    assert!(e.to_string().contains("`tokenizer.ggml.pre` is missing"), "{e}");
    assert!(e.hint().unwrap().contains("--tokenizer FILE"));
    let e = refusal(Fields { model: "bert".into(), ..small() });
    assert!(e.to_string().contains("`bert`") && e.to_string().contains("`llama`"), "{e}");
}

#[test]
fn a_damaged_vocabulary_is_refused() {
    type E = TokenizerError;
    type Case = (Fields, fn(&E) -> bool);
    let token = "long".repeat(20);
    let cases: Vec<Case> = vec![
        (Fields { tokens: vec![], token_types: None, ..small() }, |e| matches!(e, E::EmptyVocabulary)),
        (Fields { token_types: Some(vec![1]), ..small() }, |e| {
            matches!(e, E::Length { expected: 6, found: 1, .. })
        }),
        (Fields { merges: None, ..small() }, |e| matches!(e, E::MissingKey { key: "tokenizer.ggml.merges" })),
        (Fields { merges: Some(vec!["ab".into()]), ..small() }, |e| {
            matches!(e, E::MergeForm { index: 0, .. })
        }),
        (Fields { merges: Some(vec![String::new()]), ..small() }, |e| {
            matches!(e, E::MergeForm { index: 0, .. })
        }),
        (Fields { merges: Some(vec![format!("a {token}")]), ..small() }, |e| {
            matches!(e, E::MergeToken { index: 0, .. })
        }),
        (
            Fields { merges: Some(vec!["b a".into()]), ..small() },
            |e| matches!(e, E::MergeToken { token, .. } if token == "ba"),
        ),
        (Fields { specials: SpecialFields { eos: Some(6), ..Default::default() }, ..small() }, |e| {
            matches!(e, E::SpecialId { id: 6, vocab_size: 6, .. })
        }),
        (Fields { model: "llama".into(), ..small() }, |e| {
            matches!(e, E::MissingKey { key: "tokenizer.ggml.scores" })
        }),
        (Fields { model: "llama".into(), scores: Some(vec![0.0]), ..small() }, |e| {
            matches!(e, E::Length { key: "tokenizer.ggml.scores", .. })
        }),
    ];
    for (i, (fields, expected)) in cases.into_iter().enumerate() {
        let e = refusal(fields);
        assert!(expected(&e), "case {i}: {e}");
        assert!(e.hint().is_some(), "case {i}: {e}");
    }
}

#[test]
fn an_id_outside_of_the_vocabulary_is_refused_when_decoded() {
    let e = vocabulary("tiny-llama").decode(&[1, 512], false).unwrap_err();
    assert_eq!(e.to_string(), "token 512 is outside of the vocabulary of 512");
}

#[test]
fn a_damaged_or_missing_tokenizer_json_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let e = Tokenizer::from_hf_dir(dir.path()).err().unwrap();
    assert!(e.to_string().contains("no `tokenizer.json`") && e.hint().is_some(), "{e}");
    assert!(matches!(Tokenizer::from_file(&path).err().unwrap(), TokenizerError::Io { .. }));
    let original = std::fs::read_to_string(testdata("tiny-llama/tokenizer.json")).unwrap();
    for (from, to) in [
        ("{", ""),
        (r#""type":"BPE""#, r#""type":"Other""#),
        (r#"["M","ar"]"#, r#"["M","a long token that is nowhere in the vocabulary"]"#),
        (r#"["M","ar"]"#, r#"["M"]"#),
    ] {
        assert!(original.contains(from));
        std::fs::write(&path, original.replacen(from, to, 1)).unwrap();
        let e = Tokenizer::from_file(&path).err().unwrap();
        assert!(e.to_string().contains("tokenizer.json"), "{e}");
    }
    std::fs::write(&path, &original).unwrap();
    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"eos_token": {"content": "<|nowhere|>"}}"#).unwrap();
    let e = Tokenizer::from_file(&path).err().unwrap();
    assert!(e.to_string().contains("`eos_token`") && e.to_string().contains("<|nowhere|>"), "{e}");
    std::fs::write(&config, "[").unwrap();
    assert!(matches!(Tokenizer::from_file(&path).err().unwrap(), TokenizerError::Json { .. }));
}

#[test]
fn a_config_switches_begin_of_text_and_a_jinja_file_holds_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::copy(testdata("tiny-llama/tokenizer.json"), &path).unwrap();
    let bare = Tokenizer::from_file(&path).unwrap();
    assert_eq!((bare.bos(), bare.eos(), bare.chat_template()), (None, None, None));
    let gguf = GgufFile::open(&testdata("tiny-llama-vocab.gguf")).unwrap();
    let filled = bare.or_gguf(gguf.metadata()).unwrap();
    assert_eq!((filled.bos(), filled.eos()), (Some(1), Some(2)));
    assert!(filled.chat_template().is_some());

    let config = r#"{"bos_token": "<|im_start|>", "add_bos_token": true,
        "chat_template": [{"name": "other", "template": "o"}, {"name": "default", "template": "d"}]}"#;
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let t = Tokenizer::from_file(&path).unwrap();
    assert_eq!(t.encode("", true).unwrap(), [1]);
    assert_eq!(t.chat_template(), Some("d"));
    std::fs::write(dir.path().join("chat_template.jinja"), "j").unwrap();
    assert_eq!(Tokenizer::from_file(&path).unwrap().chat_template(), Some("j"));
}
