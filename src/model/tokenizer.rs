//! Text to token ids and back, with the ids that llama.cpp or transformers would give.
//!
//! The vocabulary comes from a GGUF (byte-level BPE or SentencePiece scores) or from a `tokenizer.json`.
//! Which tokens are special, which of them begin, end and stop a text, and the chat template belong to
//! it, because they come from the same file.

mod bpe;
mod error;
mod gguf;
mod hf;
mod parts;
pub mod pre;
mod spm;
mod vocab;

use std::collections::BTreeSet;
use std::path::Path;

use qpeft_formats::gguf::Metadata;

use super::chat::{ChatTemplate, ChatTemplateError};
pub use error::TokenizerError;

use error::Result;

/// A tokenizer: vocabulary, special tokens and the chat template that came with them.
pub struct Tokenizer {
    engine: Engine,
    specials: Specials,
    /// Ids that `add_special` puts before and after a text.
    before: Vec<u32>,
    after: Vec<u32>,
}

/// Who turns a text into ids: the two sources do not share a notion of special token.
enum Engine {
    Gguf(gguf::GgufTokenizer),
    Hf(Box<hf::HfTokenizer>),
}

/// What a model's files say about its special tokens, as far as they say it.
#[derive(Debug, Default, Clone)]
struct Specials {
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    end_of_generation: BTreeSet<u32>,
    chat_template: Option<String>,
}

/// Texts of tokens that end a turn, in the order in which they are looked for.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Texts of further tokens after which generation stops.
const END_OF_GENERATION: &[&str] = &["<|return|>", "<|call|>", "<|eom_id|>"];

impl Tokenizer {
    /// Reads the `tokenizer.*` keys of a GGUF: `tokenizer.ggml.model` must be `gpt2` (with one of the
    /// pre-tokenizers of [`pre::TABLE`]) or `llama`.
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer> {
        Tokenizer::from_fields(gguf::Fields::read(metadata)?)
    }

    fn from_fields(fields: gguf::Fields) -> Result<Tokenizer> {
        let parts = gguf::build(fields)?;
        let before = parts.specials.bos.filter(|_| parts.add_bos);
        let after = parts.specials.eos.filter(|_| parts.add_eos);
        Ok(Tokenizer {
            engine: Engine::Gguf(parts.engine),
            specials: parts.specials,
            before: Vec::from_iter(before),
            after: Vec::from_iter(after),
        })
    }

    /// Reads a `tokenizer.json`, and beside it `tokenizer_config.json` (begin and end of text, chat
    /// template) and `chat_template.jinja` where they exist.
    pub fn from_file(path: &Path) -> Result<Tokenizer> {
        let parts = hf::read(path)?;
        Ok(Tokenizer {
            engine: Engine::Hf(Box::new(parts.engine)),
            specials: parts.specials,
            before: parts.before,
            after: parts.after,
        })
    }

    /// Reads the tokenizer of a Hugging Face model folder; it must hold a `tokenizer.json`.
    pub fn from_hf_dir(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::NoTokenizerJson { dir: dir.to_owned() });
        }
        Tokenizer::from_file(&path)
    }

    /// Fills what a lone `tokenizer.json` did not say (begin and end of text, chat template) from the
    /// GGUF that it is used with. What it did say wins.
    pub fn or_gguf(mut self, metadata: &Metadata) -> Result<Tokenizer> {
        let fields = gguf::SpecialFields::read(metadata)?;
        let vocab_size = self.vocab_size();
        let given = fields.resolve(|text| self.token_to_id(text), vocab_size)?;
        let own = &mut self.specials;
        own.bos = own.bos.or(given.bos);
        own.eos = own.eos.or(given.eos);
        own.eot = own.eot.or(given.eot);
        own.end_of_generation.extend(given.end_of_generation);
        own.chat_template = own.chat_template.take().or(given.chat_template);
        Ok(self)
    }

    /// The ids of `text`. Texts of special tokens in it become those tokens, as in `llama-tokenize` and
    /// transformers. `add_special` adds the begin and end tokens that the model asks for
    /// (`add_bos_token`, `add_eos_token`, or the post-processor of a `tokenizer.json`). A byte that a BPE
    /// vocabulary lacks (SmolLM2 has no 0x04) is left out, as both of them do.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if add_special {
            ids.extend_from_slice(&self.before);
        }
        match &self.engine {
            Engine::Gguf(t) => t.encode(text, gguf::Specials::Parse, gguf::Start::Text, &mut ids)?,
            Engine::Hf(t) => t.encode(text, &mut ids)?,
        }
        if add_special {
            ids.extend_from_slice(&self.after);
        }
        Ok(ids)
    }

    /// The ids of `text`, where a control token's text stays text: nobody can forge a turn with it.
    /// Nothing is added.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        match &self.engine {
            Engine::Gguf(t) => t.encode(text, gguf::Specials::KeepAsText, gguf::Start::Text, &mut ids)?,
            Engine::Hf(t) => t.encode_plain(text, &mut ids)?,
        }
        Ok(ids)
    }

    /// The ids of `text` as the continuation of an earlier text: SentencePiece vocabularies put no
    /// space before it. Nothing is added. (A `tokenizer.json` has no such mode; there it is [`encode`].)
    ///
    /// [`encode`]: Tokenizer::encode
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        match &self.engine {
            Engine::Gguf(t) => {
                t.encode(text, gguf::Specials::Parse, gguf::Start::Continuation, &mut ids)?;
            }
            Engine::Hf(t) => t.encode(text, &mut ids)?,
        }
        Ok(ids)
    }

    /// The text of `ids`; the inverse of [`encode`](Tokenizer::encode) for a whole text. Bytes that are
    /// not UTF-8 become U+FFFD, so decode a growing sequence from its start. `skip_special` leaves
    /// control tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let vocab_size = self.vocab_size();
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(TokenizerError::UnknownId { id, vocab_size });
        }
        match &self.engine {
            Engine::Gguf(t) => Ok(t.decode(ids, skip_special)),
            Engine::Hf(t) => t.decode(ids, skip_special),
        }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        match &self.engine {
            Engine::Gguf(t) => t.vocab_size(),
            Engine::Hf(t) => t.vocab_size(),
        }
    }

    /// The id of the token whose stored form is `token`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.engine {
            Engine::Gguf(t) => t.token_to_id(token),
            Engine::Hf(t) => t.token_to_id(token),
        }
    }

    /// The stored form of a token (byte-level BPE and SentencePiece write a space as `Ġ` and `▁`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.engine {
            Engine::Gguf(t) => t.id_to_token(id).map(str::to_owned),
            Engine::Hf(t) => t.id_to_token(id),
        }
    }

    /// Begin of text.
    pub fn bos(&self) -> Option<u32> {
        self.specials.bos
    }

    /// End of text.
    pub fn eos(&self) -> Option<u32> {
        self.specials.eos
    }

    /// End of a turn, where the vocabulary has such a token.
    pub fn eot(&self) -> Option<u32> {
        self.specials.eot
    }

    /// Every token after which generation stops: end of text, of turn, of message.
    pub fn end_of_generation(&self) -> &BTreeSet<u32> {
        &self.specials.end_of_generation
    }

    /// The ids that `add_special` puts before a text.
    pub fn prefix(&self) -> &[u32] {
        &self.before
    }

    /// The ids that `add_special` puts after a text.
    pub fn suffix(&self) -> &[u32] {
        &self.after
    }

    /// The Jinja source that came with the vocabulary.
    pub fn chat_template(&self) -> Option<&str> {
        self.specials.chat_template.as_deref()
    }

    /// The chat template, ready to render; `None` if the model has none.
    ///
    /// # Errors
    /// The template does not parse.
    pub fn template(&self) -> std::result::Result<Option<ChatTemplate>, ChatTemplateError> {
        let token = |id: Option<u32>| id.and_then(|id| self.id_to_token(id));
        self.chat_template()
            .map(|source| ChatTemplate::new(source, token(self.bos()), token(self.eos())))
            .transpose()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
