//! A tokenizer from the `tokenizer.*` keys of a GGUF.
//!
//! First the keys become plain fields, then the fields become a tokenizer: everything that can be wrong
//! with a vocabulary is checked in [`build`], whoever wrote the file. Special tokens are cut out of a
//! text first; what lies between goes to the merging of the vocabulary's own kind.

use qpeft_formats::gguf::Metadata;

use super::error::{Result, TokenizerError};
use super::vocab::{Kind, Part, Vocab};
use super::{END_OF_GENERATION, END_OF_TURN, bpe, pre, spm};

/// What the metadata says, not yet believed.
#[derive(Debug, Default, Clone)]
pub(super) struct Fields {
    pub model: String,
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    pub token_types: Option<Vec<i32>>,
    pub scores: Option<Vec<f32>>,
    pub merges: Option<Vec<String>>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    pub specials: SpecialFields,
    /// `general.name`: the only place that tells a Phi-3 vocabulary.
    pub name: Option<String>,
}

/// The ids and the template that the metadata names.
#[derive(Debug, Default, Clone)]
pub(super) struct SpecialFields {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unknown: Option<u32>,
    pub chat_template: Option<String>,
}

/// A tokenizer and what else the fields said.
pub(super) struct Parts {
    pub engine: GgufTokenizer,
    pub specials: super::Specials,
    pub add_bos: bool,
    pub add_eos: bool,
}

/// Vocabulary and merging.
pub(super) struct GgufTokenizer {
    vocab: Vocab,
    merging: Merging,
}

enum Merging {
    Bpe(Box<bpe::Bpe>),
    Spm { pieces: spm::Spm, add_space_prefix: bool },
}

/// Whether the texts of control tokens become control tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Specials {
    Parse,
    KeepAsText,
}

/// Whether a text begins here or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Text,
    Continuation,
}

impl Fields {
    pub(super) fn read(metadata: &Metadata) -> Result<Fields> {
        Ok(Fields {
            model: metadata.require_str("tokenizer.ggml.model")?.to_owned(),
            pre: metadata.str("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: metadata.require_strings("tokenizer.ggml.tokens")?.to_vec(),
            token_types: metadata.i32s("tokenizer.ggml.token_type")?,
            scores: metadata.f32s("tokenizer.ggml.scores")?,
            merges: metadata.strings("tokenizer.ggml.merges")?.map(<[String]>::to_vec),
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
            specials: SpecialFields::read(metadata)?,
            name: metadata.str("general.name")?.map(str::to_owned),
        })
    }
}

impl SpecialFields {
    pub(super) fn read(metadata: &Metadata) -> Result<SpecialFields> {
        Ok(SpecialFields {
            bos: metadata.u32("tokenizer.ggml.bos_token_id")?,
            eos: metadata.u32("tokenizer.ggml.eos_token_id")?,
            eot: metadata.u32("tokenizer.ggml.eot_token_id")?,
            eom: metadata.u32("tokenizer.ggml.eom_token_id")?,
            unknown: metadata.u32("tokenizer.ggml.unknown_token_id")?,
            chat_template: metadata.str("tokenizer.chat_template")?.map(str::to_owned),
        })
    }

    /// Checks the ids and finds by their text what no key names.
    pub(super) fn resolve(
        self,
        find: impl Fn(&str) -> Option<u32>,
        vocab_size: usize,
    ) -> Result<super::Specials> {
        let check = |key, id: Option<u32>| match id {
            Some(id) if id as usize >= vocab_size => Err(TokenizerError::SpecialId { key, id, vocab_size }),
            id => Ok(id),
        };
        let bos = check("tokenizer.ggml.bos_token_id", self.bos)?;
        let eos = check("tokenizer.ggml.eos_token_id", self.eos)?;
        let eot = check("tokenizer.ggml.eot_token_id", self.eot)?;
        let eom = check("tokenizer.ggml.eom_token_id", self.eom)?;
        check("tokenizer.ggml.unknown_token_id", self.unknown)?;
        let eot = eot.or_else(|| END_OF_TURN.iter().find_map(|text| find(text)));
        let by_text = END_OF_TURN.iter().chain(END_OF_GENERATION).filter_map(|text| find(text));
        let end_of_generation = by_text.chain(eos).chain(eot).chain(eom).collect();
        Ok(super::Specials { bos, eos, eot, end_of_generation, chat_template: self.chat_template })
    }
}

/// Checks the fields and builds the tokenizer.
pub(super) fn build(fields: Fields) -> Result<Parts> {
    let mut specials = fields.specials;
    let is_spm = match fields.model.as_str() {
        "gpt2" => false,
        "llama" => true,
        _ => return Err(TokenizerError::UnknownModel { found: fields.model }),
    };
    if is_spm {
        // The ids of the original Llama vocabulary, which its files need not repeat.
        specials.bos = specials.bos.or(Some(1));
        specials.eos = specials.eos.or(Some(2));
        specials.unknown = specials.unknown.or(Some(0));
    }
    let mut kinds: Vec<Kind> = match fields.token_types {
        Some(types) => types.into_iter().map(Kind::from_gguf).collect(),
        None => vec![Kind::Normal; fields.tokens.len()],
    };
    // Tokens that end a turn are control tokens even where a converter forgot to say so.
    for (kind, token) in kinds.iter_mut().zip(&fields.tokens) {
        if END_OF_TURN.iter().chain(END_OF_GENERATION).any(|text| text == token) {
            *kind = Kind::Control;
        }
    }
    let mut vocab = Vocab::new(fields.tokens, kinds)?;
    let name = fields.name.unwrap_or_default().to_lowercase();
    if name.contains("phi-3") || name.contains("phi3") {
        vocab.eat_space_after_specials(&["<unk>", "<s>", "<|endoftext|>"]);
    }
    let unknown = specials.unknown;
    let specials = specials.resolve(|text| vocab.id(text), vocab.len())?;

    let (merging, add_bos_default) = if is_spm {
        let scores = fields.scores.ok_or(TokenizerError::MissingKey { key: "tokenizer.ggml.scores" })?;
        let unknown = unknown.or_else(|| vocab.first_of(Kind::Unknown));
        let pieces = spm::Spm::new(&vocab, scores, unknown)?;
        (Merging::Spm { pieces, add_space_prefix: fields.add_space_prefix.unwrap_or(true) }, true)
    } else {
        let merges = fields.merges.ok_or(TokenizerError::MissingKey { key: "tokenizer.ggml.merges" })?;
        let row = pre::find(&fields.pre.ok_or(TokenizerError::MissingPre)?)?;
        (Merging::Bpe(Box::new(bpe::Bpe::new(vocab.tokens(), &merges, row)?)), row.add_bos)
    };
    Ok(Parts {
        engine: GgufTokenizer { vocab, merging },
        specials,
        add_bos: fields.add_bos.unwrap_or(add_bos_default),
        add_eos: fields.add_eos.unwrap_or(false),
    })
}

impl GgufTokenizer {
    /// Appends the ids of `text`.
    pub(super) fn encode(
        &self,
        text: &str,
        specials: Specials,
        start: Start,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        let mut at_start = start == Start::Text;
        for part in self.vocab.split(text, specials == Specials::Parse) {
            match (part, &self.merging) {
                (Part::Token(id), _) => out.push(id),
                (Part::Text(text), Merging::Bpe(bpe)) => bpe.encode(text, out)?,
                (Part::Text(text), Merging::Spm { pieces, add_space_prefix }) => {
                    let mut escaped = String::with_capacity(text.len() + 8);
                    if at_start && *add_space_prefix {
                        escaped.push(spm::SPACE);
                    }
                    escaped.extend(text.chars().map(|c| if c == ' ' { spm::SPACE } else { c }));
                    pieces.encode(&self.vocab, &escaped, out)?;
                }
            }
            at_start = matches!(part, Part::Token(_));
        }
        Ok(())
    }

    /// The text of `ids`, all of which are in the vocabulary.
    pub(super) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut at_start = true;
        for &id in ids {
            let (kind, token) = (self.vocab.kind(id), &self.vocab.tokens()[id as usize]);
            let special = matches!(kind, Kind::Control | Kind::Unknown);
            match (&self.merging, kind) {
                _ if special && skip_special => {}
                (_, Kind::UserDefined | Kind::Control | Kind::Unknown) => {
                    bytes.extend_from_slice(token.as_bytes());
                }
                (Merging::Bpe(_), _) => bpe::token_bytes(token, &mut bytes),
                (Merging::Spm { add_space_prefix, .. }, _) => {
                    let before = bytes.len();
                    spm::token_bytes(kind, token, &mut bytes);
                    // The space that encoding put before this run of text.
                    if at_start && *add_space_prefix && bytes.get(before) == Some(&b' ') {
                        bytes.remove(before);
                    }
                }
            }
            at_start = special || kind == Kind::UserDefined;
        }
        String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.vocab.id(token)
    }

    pub(super) fn id_to_token(&self, id: u32) -> Option<&str> {
        self.vocab.token(id)
    }
}
