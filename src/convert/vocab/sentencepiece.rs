//! `tokenizer.model`: SentencePiece's protobuf, read and written as far as a vocabulary needs it.
//!
//! ```text
//! ModelProto       1 piece*: SentencePiece   2 trainer_spec   3 normalizer_spec
//! SentencePiece    1 piece string   2 score float   3 type enum (as `tokenizer.ggml.token_type`)
//! TrainerSpec      3 model_type enum (1 unigram, 2 BPE)   35 byte_fallback bool   40.. ids
//! NormalizerSpec   1 name   3 add_dummy_prefix bool   4 remove_extra_whitespaces   5 escape_whitespaces
//! ```
//!
//! A message is a run of fields; a field is a varint `number << 3 | wire`, then a varint (wire 0), 8 bytes
//! (1), a varint length and bytes (2), or 4 bytes (5). Source: `sentencepiece_model.proto`.

use std::path::Path;

use super::bpe::{of_config, padding};
use super::json::TokenizerJson;
use super::{How, Tokens, kind, looks_special, too_many};
use crate::convert::settings::Settings;
use crate::error::{Error, Result};

/// One token of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its text, with U+2581 for spaces.
    pub text: String,
    /// Higher is merged first.
    pub score: f32,
    /// See [`kind`].
    pub kind: i32,
}

/// What of a model matters here.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Tokens by id.
    pub pieces: Vec<Piece>,
    /// Whether tokens were made by merging pairs (BPE).
    pub is_bpe: bool,
    /// Whether a space is put before a text.
    pub add_dummy_prefix: bool,
}

/// The tokens of a folder with a `tokenizer.model`, with those that were added to it, also by `json` if it is
/// given.
///
/// # Errors
/// The file is damaged or not BPE, or an added token is mistyped.
pub(super) fn tokens(
    dir: &Path,
    size: u32,
    config: &Settings,
    json: Option<&TokenizerJson>,
) -> Result<Tokens> {
    let path = dir.join("tokenizer.model");
    let bytes = qpeft_formats::file::Bytes::map(&path)?;
    let model =
        Model::parse(&bytes).map_err(|what| Error::refused(format!("`{}`: {what}", path.display())))?;
    if !model.is_bpe {
        return Err(Error::refused(format!(
            "`{}`: a unigram model has no place in a GGUF of this architecture; supported: BPE",
            path.display()
        )));
    }
    let mut tokens: Vec<String> = (0..size as usize).map(padding).collect();
    let mut scores = vec![-10_000.0; size as usize];
    let mut kinds = vec![kind::UNUSED; size as usize];
    // Pieces beyond the model's vocabulary can never be embedded.
    for (id, piece) in model.pieces.into_iter().take(size as usize).enumerate() {
        (tokens[id], scores[id]) = (piece.text, piece.score);
        kinds[id] = if piece.kind == kind::USER_DEFINED { kind::NORMAL } else { piece.kind };
    }
    let added = dir.join("added_tokens.json");
    if added.is_file() {
        let added = Settings::read(&added)?;
        for content in added.keys() {
            let id = added.require_size(content)?;
            let slot = tokens.get_mut(id as usize).ok_or_else(|| too_many(added.path(), id.into(), size))?;
            content.clone_into(slot);
            (scores[id as usize], kinds[id as usize]) = (-1000.0, kind::USER_DEFINED);
        }
    }
    let given = of_config(config)?.into_iter().chain(json.iter().flat_map(|json| json.added.clone()));
    for token in given {
        let slot =
            tokens.get_mut(token.id as usize).ok_or_else(|| too_many(config.path(), token.id, size))?;
        let at = token.id as usize;
        scores[at] = -1000.0;
        if token.special || json.is_none() && looks_special(&token.content) {
            *slot = token.content;
            kinds[at] = kind::CONTROL;
        } else {
            *slot = token.content.replace('\u{2581}', " ");
            kinds[at] = kind::USER_DEFINED;
        }
    }
    let space_prefix = (!model.add_dummy_prefix).then_some(false);
    Ok(Tokens { texts: tokens, kinds, how: How::Scores(scores), space_prefix })
}

impl Model {
    /// Reads a model.
    ///
    /// # Errors
    /// The bytes are no such protobuf: what is wrong, and at which byte.
    pub fn parse(bytes: &[u8]) -> Result<Model, String> {
        let mut model = Model { pieces: Vec::new(), is_bpe: false, add_dummy_prefix: true };
        let mut reader = Reader { bytes, at: 0 };
        while let Some((number, field)) = reader.field()? {
            match (number, field) {
                (1, Field::Bytes(start, bytes)) => model.pieces.push(piece(start, bytes)?),
                (2, Field::Bytes(start, bytes)) => {
                    let mut spec = Reader { bytes, at: 0 };
                    while let Some((number, field)) = spec.field().map_err(|e| inside(start, &e))? {
                        if let (3, Field::Varint(kind)) = (number, field) {
                            model.is_bpe = kind == 2;
                        }
                    }
                }
                (3, Field::Bytes(start, bytes)) => {
                    let mut spec = Reader { bytes, at: 0 };
                    while let Some((number, field)) = spec.field().map_err(|e| inside(start, &e))? {
                        if let (3, Field::Varint(flag)) = (number, field) {
                            model.add_dummy_prefix = flag != 0;
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("holds no tokens; expected a SentencePiece model".to_owned());
        }
        Ok(model)
    }

    /// The bytes of a model: what sentencepiece, transformers and llama.cpp's converter need to load it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in &self.pieces {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, piece.text.as_bytes());
            put_varint(&mut message, 2 << 3 | 5);
            message.extend(piece.score.to_le_bytes());
            put_field(&mut message, 3, piece.kind as u64);
            put_bytes(&mut out, 1, &message);
        }
        let first = |wanted: i32| self.pieces.iter().position(|piece| piece.kind == wanted);
        let named =
            |names: &[&str]| self.pieces.iter().position(|piece| names.contains(&piece.text.as_str()));
        let mut trainer = Vec::new();
        put_field(&mut trainer, 3, if self.is_bpe { 2 } else { 1 });
        put_field(&mut trainer, 4, self.pieces.len() as u64);
        put_field(&mut trainer, 35, first(kind::BYTE).is_some().into());
        // An id that does not exist is -1.
        let id = |at: Option<usize>| at.map_or(u64::MAX, |at| at as u64);
        put_field(&mut trainer, 40, id(first(kind::UNKNOWN)));
        put_field(&mut trainer, 41, id(named(&["<s>", "<bos>"])));
        put_field(&mut trainer, 42, id(named(&["</s>", "<eos>"])));
        put_field(&mut trainer, 43, id(named(&["<pad>"])));
        for (field, at) in [
            (45, first(kind::UNKNOWN)),
            (46, named(&["<s>", "<bos>"])),
            (47, named(&["</s>", "<eos>"])),
            (48, named(&["<pad>"])),
        ] {
            if let Some(at) = at {
                put_bytes(&mut trainer, field, self.pieces[at].text.as_bytes());
            }
        }
        put_bytes(&mut out, 2, &trainer);
        let mut normalizer = Vec::new();
        put_bytes(&mut normalizer, 1, b"identity");
        put_field(&mut normalizer, 3, self.add_dummy_prefix.into());
        put_field(&mut normalizer, 4, 0);
        put_field(&mut normalizer, 5, 1);
        put_bytes(&mut out, 3, &normalizer);
        out
    }
}

fn piece(start: usize, bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: kind::NORMAL };
    let mut reader = Reader { bytes, at: 0 };
    while let Some((number, field)) = reader.field().map_err(|e| inside(start, &e))? {
        match (number, field) {
            (1, Field::Bytes(at, text)) => {
                let text = std::str::from_utf8(text);
                let text = text.map_err(|_| format!("a token is not UTF-8 (at byte {})", start + at))?;
                text.clone_into(&mut piece.text);
            }
            (2, Field::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Varint(kind @ 1..=6)) => piece.kind = kind as i32,
            (3, _) => return Err(format!("a token has no known type (at byte {start})")),
            _ => {}
        }
    }
    if piece.score.is_finite() {
        Ok(piece)
    } else {
        Err(format!("a score is {} (at byte {start})", piece.score))
    }
}

fn inside(start: usize, error: &str) -> String {
    format!("in the message at byte {start}: {error}")
}

/// A field's value; bytes come with where they start.
enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(usize, &'a [u8]),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn field(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let start = self.at;
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let len = self.varint()?;
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let bytes = self.take(len)?;
                Field::Bytes(self.at - len, bytes)
            }
            5 => {
                let bytes = self.take(4)?.first_chunk().copied();
                Field::Fixed32(u32::from_le_bytes(bytes.expect("four bytes were taken")))
            }
            wire => return Err(format!("wire type {wire} is not supported (at byte {start})")),
        };
        Ok(Some((tag >> 3, field)))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let left = self.bytes.len() - self.at;
        if len > left {
            return Err(format!("a field needs {len} bytes, {left} are left (at byte {})", self.at));
        }
        self.at += len;
        Ok(&self.bytes[self.at - len..self.at])
    }

    fn varint(&mut self) -> Result<u64, String> {
        let start = self.at;
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(format!("a number has more than ten bytes (at byte {start})"))
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_field(out: &mut Vec<u8>, number: u64, value: u64) {
    put_varint(out, number << 3);
    put_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    put_varint(out, number << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        let piece = |text: &str, score, kind| Piece { text: text.to_owned(), score, kind };
        let pieces = vec![
            piece("<unk>", 0.0, kind::UNKNOWN),
            piece("<s>", 0.0, kind::CONTROL),
            piece("<0x00>", 0.0, kind::BYTE),
            piece("\u{2581}a", -0.5, kind::NORMAL),
        ];
        Model { pieces, is_bpe: true, add_dummy_prefix: false }
    }

    #[test]
    fn a_model_is_read_as_it_was_written() {
        assert_eq!(Model::parse(&model().to_bytes()), Ok(model()));
    }

    #[test]
    fn no_damage_makes_the_reader_panic() {
        let bytes = model().to_bytes();
        for len in 0..bytes.len() {
            let _ = Model::parse(&bytes[..len]);
        }
        for at in 0..bytes.len() {
            for value in [0, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                let _ = Model::parse(&damaged);
            }
        }
        let huge = [&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f][..], b"x"].concat();
        let error = Model::parse(&huge).unwrap_err();
        assert!(error.contains("bytes, 1 are left (at byte 10)"), "{error}");
        assert!(Model::parse(b"").unwrap_err().contains("holds no tokens"));
    }
}
