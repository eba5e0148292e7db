//! The targets above the formats: tokenizers and chat templates.

use std::fs;
use std::path::Path;

use qpeft::model::chat::{ChatTemplate, Message};
use qpeft::model::tokenizer::{Tokenizer, TokenizerError};
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::GgufFile;

use super::target::{Target, scratch, unpack};

/// Every target of the root package.
pub const TARGETS: &[Target] = &[
    // Patterns of pre-tokenizers compile to a few MiB; a vocabulary is stored some five times.
    Target { name: "tokenizer_gguf", run: tokenizer_gguf, bytes_per_byte: 400, bytes_at_least: 64 << 20 },
    Target { name: "tokenizer_hf", run: tokenizer_hf, bytes_per_byte: 600, bytes_at_least: 64 << 20 },
    Target { name: "chat_template", run: chat_template, bytes_per_byte: 4096, bytes_at_least: 512 << 20 },
];

/// What every vocabulary must take or refuse: spaces, digits, controls, special tokens, other scripts.
const TEXTS: [&str; 4] =
    ["", "Hello  world, 1234!\n\n\tdon't", "<s><|im_start|>user\u{0}</s> <unk>", "\u{2581}é 漢字 😀\u{feff}"];

fn conversation() -> Vec<Message> {
    vec![Message::new("system", "Be brief."), Message::new("user", "Hi"), Message::new("assistant", "Yo")]
}

/// Uses what was accepted; every id is one of the vocabulary's.
fn exercise(tokenizer: &Tokenizer) {
    let size = tokenizer.vocab_size();
    for text in TEXTS {
        for ids in [
            tokenizer.encode(text, true),
            tokenizer.encode(text, false),
            tokenizer.encode_plain(text),
            tokenizer.encode_continuation(text),
        ] {
            match ids {
                Ok(ids) => {
                    assert!(ids.iter().all(|&id| (id as usize) < size), "{ids:?} of {size}");
                    let _ = (tokenizer.decode(&ids, true), tokenizer.decode(&ids, false));
                }
                Err(error) => message(&error),
            }
        }
    }
    for id in tokenizer.end_of_generation().iter().chain(tokenizer.prefix()).copied() {
        assert!((id as usize) < size);
    }
    for id in [tokenizer.bos(), tokenizer.eos(), tokenizer.eot()].into_iter().flatten() {
        assert!((id as usize) < size);
        let _ = tokenizer.id_to_token(id);
    }
    if let Ok(outside) = u32::try_from(size) {
        assert!(tokenizer.decode(&[outside], false).is_err());
    }
    let _ = tokenizer.template().map(|template| template.map(|t| t.at(0).render(&conversation(), true)));
}

fn message(error: &TokenizerError) {
    let _ = (error.to_string(), error.hint());
}

/// The `tokenizer.*` keys of a GGUF file.
fn tokenizer_gguf(data: &[u8]) {
    let file = GgufFile::from_bytes(Path::new("a.gguf"), Bytes::from(data.to_vec()));
    let Ok(file) = file else { return };
    match Tokenizer::from_gguf(file.metadata()) {
        Ok(tokenizer) => exercise(&tokenizer),
        Err(error) => message(&error),
    }
}

/// `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a folder; empty parts are absent.
fn tokenizer_hf(data: &[u8]) {
    let dir = scratch();
    let names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    for (name, part) in names.into_iter().zip(unpack::<3>(data)) {
        if !part.is_empty() {
            fs::write(dir.path().join(name), part).expect("writable");
        }
    }
    match Tokenizer::from_hf_dir(dir.path()) {
        Ok(tokenizer) => exercise(&tokenizer),
        Err(error) => message(&error),
    }
}

/// A chat template, compiled and rendered.
fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let template = match ChatTemplate::new(source, Some("<s>".into()), None) {
        Ok(template) => template.at(1_000_000_000),
        Err(error) => return drop((error.to_string(), error.hint())),
    };
    for add_generation_prompt in [false, true] {
        if let Err(error) = template.render(&conversation(), add_generation_prompt) {
            let _ = (error.to_string(), error.hint());
        }
    }
}
