//! Every shape of record against expected ids and labels, and every refusal.

use std::path::PathBuf;

use qpeft_formats::gguf::GgufFile;
use serde_json::{Value, json};

use super::*;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn vocabulary(model: &str) -> Tokenizer {
    let file = GgufFile::open(&testdata(&format!("tokenizer/{model}-vocab.gguf"))).unwrap();
    Tokenizer::from_gguf(file.metadata()).unwrap()
}

fn template(t: &Tokenizer) -> ChatTemplate {
    let token = |id: Option<u32>| id.and_then(|id| t.id_to_token(id));
    ChatTemplate::new(t.chat_template().unwrap(), token(t.bos()), token(t.eos())).unwrap()
}

/// Loads `lines` as a file with the extension `ext`, with the tiny llama's vocabulary and template.
fn load_as(ext: &str, content: impl AsRef<[u8]>, options: &DataOptions) -> Result<Dataset> {
    let t = vocabulary("tiny-llama");
    load_with(&t, Some(&template(&t)), ext, content, options)
}

fn load_with(
    t: &Tokenizer,
    template: Option<&ChatTemplate>,
    ext: &str,
    content: impl AsRef<[u8]>,
    options: &DataOptions,
) -> Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("data.{ext}"));
    std::fs::write(&path, content).unwrap();
    load(&path, t, template, options, &mut |_, _| {})
}

fn one(record: &Value, options: &DataOptions) -> Example {
    let mut dataset = load_as("jsonl", record.to_string(), options).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    dataset.examples.remove(0)
}

/// The text of the tokens that carry loss, runs separated by `|`.
fn trained(t: &Tokenizer, example: &Example) -> String {
    assert_eq!(example.input_ids.len(), example.labels.len());
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (&id, &label) in example.input_ids.iter().zip(&example.labels) {
        if label == IGNORE {
            runs.push(Vec::new());
        } else {
            assert_eq!(label, id as i32);
            runs.last_mut().unwrap().push(id);
        }
    }
    runs.retain(|run| !run.is_empty());
    runs.iter().map(|run| t.decode(run, false).unwrap()).collect::<Vec<_>>().join("|")
}

fn plain() -> DataOptions {
    DataOptions { use_chat_template: false, ..DataOptions::default() }
}

#[test]
fn gsm8k_in_chatml_has_the_ids_of_transformers_and_loss_on_the_answer_and_its_end() {
    let t = vocabulary("smollm2");
    let options = DataOptions {
        prompt_field: Some("question".into()),
        completion_field: Some("answer".into()),
        ..DataOptions::default()
    };
    let mut seen = Vec::new();
    let path = testdata("data/gsm8k-3.jsonl");
    let dataset =
        load(&path, &t, Some(&template(&t)), &options, &mut |done, total| seen.push((done, total))).unwrap();
    let golden: Vec<Value> =
        serde_json::from_slice(&std::fs::read(testdata("data/gsm8k-3.chatml.json")).unwrap()).unwrap();
    assert_eq!(dataset.examples.len(), golden.len());
    for (example, golden) in dataset.examples.iter().zip(&golden) {
        assert_eq!(json!(example.input_ids), golden["input_ids"]);
        assert_eq!(json!(example.labels), golden["labels"]);
    }
    let text = trained(&t, &dataset.examples[0]);
    assert!(text.starts_with("Natalia sold") && text.ends_with("#### 72<|im_end|>"), "{text}");
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(seen.last(), Some(&(bytes.len() as u64, bytes.len() as u64)));
    assert_eq!(dataset.hash, blake3::hash(&bytes).to_hex().to_string());
    assert_eq!((dataset.truncated, dataset.skipped.len(), dataset.warning()), (0, 0, None));
}

#[test]
fn every_assistant_turn_carries_loss_up_to_its_end_token() {
    let t = vocabulary("tiny-llama");
    let record = json!({"messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "\n\n3?"},
        {"role": "assistant", "content": "\nthree  "},
    ]});
    let example = one(&record, &DataOptions::default());
    assert_eq!(trained(&t, &example), "4<|im_end|>|\nthree  <|im_end|>");
    let text = t.decode(&example.input_ids, false).unwrap();
    assert!(
        text.starts_with("<|im_start|>system\nBe short.<|im_end|>\n")
            && text.ends_with("three  <|im_end|>\n")
    );
    let all = one(&record, &DataOptions { train_on_prompt: true, ..DataOptions::default() });
    assert_eq!(trained(&t, &all), text);
    assert_eq!(masked_share(&all), 0.0);
    assert!((0.5..1.0).contains(&masked_share(&example)));
}

#[test]
fn a_prompt_of_messages_carries_no_loss() {
    let t = vocabulary("tiny-llama");
    let record = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    });
    assert_eq!(trained(&t, &one(&record, &DataOptions::default())), "d<|im_end|>");
}

#[test]
fn prompt_and_completion_without_template_end_with_end_of_text() {
    let t = vocabulary("tiny-llama");
    let record = json!({"prompt": "Question: 1\nAnswer:", "completion": " 7"});
    let example = one(&record, &plain());
    assert_eq!(t.decode(&example.input_ids, false).unwrap(), "Question: 1\nAnswer: 7<|im_end|>");
    assert_eq!(trained(&t, &example), " 7<|im_end|>");
    let all = one(&record, &DataOptions { train_on_prompt: true, ..plain() });
    assert_eq!(all.input_ids, example.input_ids);
    assert_eq!(masked_share(&all), 0.0);
}

#[test]
fn a_token_across_the_border_of_prompt_and_completion_is_cut_there() {
    let t = vocabulary("smollm2");
    assert_eq!(t.encode("Hello world", false).unwrap().len(), 2);
    let record = json!({"prompt": "Hello wo", "completion": "rld"}).to_string();
    let dataset = load_with(&t, None, "jsonl", record, &plain()).unwrap();
    let parts = [t.encode("Hello wo", false).unwrap(), t.encode("rld", false).unwrap(), vec![2]].concat();
    assert_eq!(dataset.examples[0].input_ids, parts);
    assert_eq!(trained(&t, &dataset.examples[0]), "rld<|im_end|>");
}

#[test]
fn sentencepiece_adds_its_space_once_and_begin_of_text_when_asked() {
    let t = vocabulary("tiny-mistral");
    let record = json!({"prompt": "Question: How", "completion": " many?"}).to_string();
    let example = load_with(&t, None, "jsonl", record, &plain()).unwrap().examples.remove(0);
    let whole = [t.encode("Question: How many?", true).unwrap(), vec![2]].concat();
    assert_eq!(example.input_ids, whole);
    // Decoded alone, a run loses the space that looks like the one that encoding adds.
    assert_eq!(trained(&t, &example), "many?</s>");
}

#[test]
fn text_is_trained_whole_and_ends_with_end_of_text_once() {
    let t = vocabulary("tiny-llama");
    let content = "{\"text\": \"Hello\"}\n\r\n{\"text\": \"Hello<|im_end|>\"}\n";
    let dataset = load_as("jsonl", content, &DataOptions::default()).unwrap();
    assert_eq!(dataset.examples.len(), 2);
    for example in &dataset.examples {
        assert_eq!(trained(&t, example), "Hello<|im_end|>");
    }
    let with_bom = [b"\xEF\xBB\xBF", content.as_bytes()].concat();
    assert_eq!(load_as("jsonl", with_bom, &DataOptions::default()).unwrap().examples, dataset.examples);
}

#[test]
fn tokens_are_taken_as_they_are() {
    let content = "{\"input_ids\": [5, 6, 7], \"labels\": [-100, 6, 8]}\n{\"input_ids\": [9, 10]}";
    let dataset = load_as("jsonl", content, &DataOptions::default()).unwrap();
    let expected = [
        Example { input_ids: vec![5, 6, 7], labels: vec![-100, 6, 8] },
        Example { input_ids: vec![9, 10], labels: vec![9, 10] },
    ];
    assert_eq!(dataset.examples, expected);
    assert_eq!(dataset.tokens(), 5);
    assert_eq!(masked_share(&expected[0]), 1.0 / 3.0);
}

#[test]
fn padding_that_a_mask_names_is_cut_off() {
    let content = "{\"input_ids\": [0, 5, 6, 7, 0, 0], \"attention_mask\": [0, 1, 1, 1, 0, 0]}\n\
        {\"input_ids\": [9, 10, 3], \"labels\": [-100, 10, 3], \"attention_mask\": [1, 1, 0]}";
    let dataset = load_as("jsonl", content, &DataOptions::default()).unwrap();
    let expected = [
        Example { input_ids: vec![5, 6, 7], labels: vec![5, 6, 7] },
        Example { input_ids: vec![9, 10], labels: vec![-100, 10] },
    ];
    assert_eq!(dataset.examples, expected);
}

#[test]
fn a_document_falls_into_windows() {
    let t = vocabulary("tiny-llama");
    let text = "Question: How many?\nAnswer: 7\n".repeat(10);
    let ids = t.encode(&text, false).unwrap();
    let dataset =
        load_as("txt", &text, &DataOptions { max_seq_length: 16, ..DataOptions::default() }).unwrap();
    let joined: Vec<u32> = dataset.examples.iter().flat_map(|e| e.input_ids.clone()).collect();
    assert!(ids.starts_with(&joined) && ids.len() - joined.len() <= 1);
    assert!(
        dataset.examples.iter().all(|e| e.input_ids.len() <= 16 && e.supervised() + 1 == e.input_ids.len())
    );
    let m = vocabulary("tiny-mistral");
    let first = load_with(&m, None, "txt", &text, &DataOptions::default()).unwrap().examples.remove(0);
    assert_eq!(first.input_ids[0], 1);
    let e = load_as("txt", b"ok\n\xFF", &DataOptions::default()).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::NotUtf8) && e.line == Some(2), "{e}");
}

#[test]
fn a_template_that_rewrites_earlier_turns_gives_one_example_per_turn() {
    let t = vocabulary("tiny-llama");
    // The last answer is written with a thought, earlier ones without, and the prompt opens more than that.
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(think){% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n(thinkmore){% endif %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let record = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]});
    let dataset =
        load_with(&t, Some(&template), "jsonl", record.to_string(), &DataOptions::default()).unwrap();
    let runs: Vec<String> = dataset.examples.iter().map(|e| trained(&t, e)).collect();
    assert_eq!(runs, [")b<|im_end|>", ")d<|im_end|>"]);
    assert!(t.decode(&dataset.examples[1].input_ids, false).unwrap().contains("assistant\nb<|im_end|>"));
}

#[test]
fn long_examples_lose_their_end_and_those_without_loss_are_skipped_and_listed() {
    let long = "word ".repeat(40);
    let lines = [
        json!({"prompt": "a", "completion": "b"}),
        json!({"prompt": long, "completion": "b"}),
        json!({"prompt": "a", "completion": long}),
    ]
    .map(|line| line.to_string());
    let options = DataOptions { max_seq_length: 40, ..DataOptions::default() };
    let dataset = load_as("jsonl", lines.join("\n"), &options).unwrap();
    assert_eq!((dataset.examples.len(), dataset.truncated), (2, 1));
    assert_eq!(dataset.examples[1].input_ids.len(), 40);
    assert_eq!(dataset.skipped.len(), 1);
    let prompt_tokens = dataset.skipped[0].prompt_tokens;
    assert!(dataset.skipped[0].line == 2 && prompt_tokens > 40);
    let warning = dataset.warning().unwrap();
    assert!(warning.contains("skipped 1 of 3") && warning.contains("line 2"), "{warning}");

    let e = load_as("jsonl", &lines[1], &options).unwrap_err();
    assert_eq!(e.line, Some(1));
    assert!(e.to_string().contains(&format!("{prompt_tokens} tokens without loss")), "{e}");
    assert!(e.to_string().contains("max_seq_length is 40"), "{e}");
    assert_eq!(e.hint().unwrap(), format!("raise `--max-seq-length` above {prompt_tokens}"));
    let e = load_as("jsonl", r#"{"input_ids": [1, 2], "labels": [-100, -100]}"#, &options).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::NoSupervised { examples: 1, .. }), "{e}");
    assert!(e.hint().unwrap().contains("not -100"));
    // The first token has nothing before it to be predicted from.
    let e = load_as("jsonl", r#"{"input_ids": [1]}"#, &options).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::NoSupervised { .. }), "{e}");
}

#[test]
fn a_bad_line_is_refused_with_its_number() {
    let good = r#"{"text": "a"}"#;
    let pair = r#"{"prompt": "a", "completion": "b"}"#;
    let tokens = r#"{"input_ids": [1, 2]}"#;
    let cases: &[(&str, &str, &str)] = &[
        (good, "{\"text\": ", "not a JSON object"),
        (good, "[1]", "found a list"),
        (good, "7", "found `7`"),
        (
            good,
            r#"{"txt": "a"}"#,
            "expected the field `text` as in the first record, found an object with `txt`",
        ),
        (good, "{}", "no fields"),
        (good, r#"{"text": 5}"#, "field `text`: expected a string, found `5`"),
        (
            pair,
            r#"{"prompt": "a", "completion": null}"#,
            "field `completion`: expected a string, found nothing",
        ),
        (
            pair,
            r#"{"prompt": [], "completion": "b"}"#,
            "field `prompt`: expected a list of messages, found an empty list",
        ),
        (
            pair,
            r#"{"prompt": [{"role": "user"}], "completion": []}"#,
            "field `prompt[0].content`: expected a string, found nothing",
        ),
        (tokens, r#"{"input_ids": [1, 512]}"#, "`input_ids[1]` is 512, outside of the vocabulary of 512"),
        (tokens, r#"{"input_ids": [-1]}"#, "`input_ids[0]` is -1"),
        (tokens, r#"{"input_ids": [1.5]}"#, "field `input_ids[0]`: expected integers, found `1.5`"),
        (tokens, r#"{"input_ids": [1, 2], "labels": [1]}"#, "`labels` has 1 entries and `input_ids` 2"),
        (tokens, r#"{"input_ids": [1, 2], "labels": [1, -1]}"#, "`labels[1]` is -1, expected -100"),
        (tokens, r#"{"input_ids": [1, 2], "attention_mask": [1]}"#, "`attention_mask` has 1 entries"),
        (
            tokens,
            r#"{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}"#,
            "`attention_mask[1]` is 0, expected 1",
        ),
    ];
    for (first, second, expected) in cases {
        let e =
            load_as("jsonl", format!("{first}\n\n{second}\n{first}"), &DataOptions::default()).unwrap_err();
        let message = e.to_string();
        assert!(
            message.contains("data.jsonl`, line 3: ") && message.contains(expected),
            "{second}: {message}"
        );
    }
    let e =
        load_as("jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xFF\"}", &DataOptions::default()).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::NotUtf8) && e.line == Some(2), "{e}");
}

#[test]
fn conversations_that_cannot_be_trained_on_are_refused() {
    let refused = |messages: Value| {
        let record = json!({"messages": messages}).to_string();
        load_as("jsonl", record, &DataOptions::default()).unwrap_err()
    };
    let e = refused(json!([{"role": "user", "content": "a"}]));
    assert!(matches!(e.kind, DataErrorKind::NoAssistant) && e.hint().is_some(), "{e}");
    let e = refused(json!([{"role": "assistant", "content": "a"}]));
    assert!(matches!(e.kind, DataErrorKind::AssistantFirst) && e.hint().is_some(), "{e}");
    let e = refused(json!([{"content": "a"}]));
    assert!(e.to_string().contains("`messages[0].role`: expected a string"), "{e}");
    let e = refused(json!("a"));
    assert!(e.to_string().contains("field `messages`: expected a list of messages, found a string"), "{e}");

    let t = vocabulary("tiny-llama");
    let ok = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        .to_string();
    let e = load_with(&t, None, "jsonl", &ok, &DataOptions::default()).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::NeedsTemplate { .. }) && e.hint().is_some(), "{e}");
    let raising = ChatTemplate::new("{{ raise_exception('not this one') }}", None, None).unwrap();
    let e = load_with(&t, Some(&raising), "jsonl", &ok, &DataOptions::default()).unwrap_err();
    assert!(e.to_string().ends_with("line 1: chat template, line 1: not this one"), "{e}");
    let unstable =
        ChatTemplate::new("{{ messages | length }}{{ messages[-1].content }}", None, None).unwrap();
    let e = load_with(&t, Some(&unstable), "jsonl", &ok, &DataOptions::default()).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::UnstableTemplate { turn: 1 }) && e.hint().is_some(), "{e}");
}

#[test]
fn files_without_a_known_record_are_refused() {
    let default = DataOptions::default();
    for (ext, content) in [("jsonl", ""), ("jsonl", "\n \n"), ("txt", "")] {
        let e = load_as(ext, content, &default).unwrap_err();
        assert!(matches!(e.kind, DataErrorKind::Empty), "{e}");
    }
    let e = load_as("jsonl", r#"{"question": "a", "answer": "b"}"#, &default).unwrap_err();
    let message = e.to_string();
    assert!(
        message.contains(r#"{"messages""#) && message.contains("found an object with `question`, `answer`"),
        "{message}"
    );
    assert!(e.hint().unwrap().contains("--prompt-field question --completion-field answer"));
    let named = DataOptions { prompt_field: Some("q".into()), ..default.clone() };
    let e = load_as("jsonl", r#"{"prompt": "a", "completion": "b"}"#, &named).unwrap_err();
    assert!(e.to_string().contains("expected the field `q`"), "{e}");
    let e = load_as("jsonl", "{}", &DataOptions { max_seq_length: 1, ..default.clone() }).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::MaxSeqLength { found: 1 }), "{e}");
    let t = vocabulary("tiny-llama");
    let e = load(Path::new("nowhere.jsonl"), &t, None, &default, &mut |_, _| {}).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::Io(_)) && e.to_string().contains("`nowhere.jsonl`"), "{e}");
    let bare = tempfile::tempdir().unwrap();
    let json = bare.path().join("tokenizer.json");
    std::fs::copy(testdata("tokenizer/tiny-llama/tokenizer.json"), &json).unwrap();
    let no_eos = Tokenizer::from_file(&json).unwrap();
    let e = load_with(&no_eos, None, "jsonl", r#"{"text": "a"}"#, &default).unwrap_err();
    assert!(matches!(e.kind, DataErrorKind::NoEos) && e.hint().is_some(), "{e}");
}

#[test]
fn the_evaluation_part_is_drawn_by_seed_and_keeps_the_order() {
    let lines: Vec<String> = (0..50).map(|i| json!({"input_ids": [i, i]}).to_string()).collect();
    let dataset = load_as("jsonl", lines.join("\n"), &DataOptions::default()).unwrap();
    let first = |d: &Dataset| d.examples.iter().map(|e| e.input_ids[0]).collect::<Vec<_>>();
    let (train, eval) = dataset.clone().split_eval(EvalSize::Fraction(0.1), 5).unwrap();
    assert_eq!((train.examples.len(), eval.examples.len()), (45, 5));
    assert_eq!(eval.hash, train.hash);
    let mut all = [first(&train), first(&eval)].concat();
    assert!(first(&train).is_sorted() && first(&eval).is_sorted());
    all.sort_unstable();
    assert_eq!(all, (0..50).collect::<Vec<_>>());
    assert_eq!(dataset.clone().split_eval(EvalSize::Count(5), 5).unwrap().1, eval);
    assert_ne!(dataset.clone().split_eval(EvalSize::Count(5), 6).unwrap().1, eval);
    assert_eq!(dataset.clone().split_eval(EvalSize::Fraction(0.001), 5).unwrap().1.examples.len(), 1);
    for size in [EvalSize::Count(50), EvalSize::Count(0), EvalSize::Fraction(1.0)] {
        let e = dataset.clone().split_eval(size, 5).unwrap_err();
        assert!(matches!(e.kind, DataErrorKind::EvalSize { found: 50, .. }), "{e}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_the_examples_or_the_first_error() {
    let lines: Vec<String> = (0..600).map(|i| json!({"text": format!("line {i}")}).to_string()).collect();
    let bad =
        lines.iter().enumerate().map(|(i, l)| if i == 300 || i == 301 { "{".into() } else { l.clone() });
    let bad = bad.collect::<Vec<String>>().join("\n");
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let good = load_as("jsonl", lines.join("\n"), &DataOptions::default()).unwrap();
            (good.examples, load_as("jsonl", &bad, &DataOptions::default()).unwrap_err().line)
        })
    };
    let (examples, line) = run(1);
    assert_eq!((examples.len(), line), (600, Some(301)));
    assert_eq!(run(4), (examples, line));
}
