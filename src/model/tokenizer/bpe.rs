//! Byte-level BPE: bytes written as printable characters, merged by rank inside each piece of a text.

use std::collections::HashSet;
use std::sync::LazyLock;

use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use super::error::{Result, TokenizerError};
use super::pre::Pre;

/// The merging of a text without special tokens.
pub(super) struct Bpe {
    words: tokenizers::Tokenizer,
}

impl Bpe {
    /// `merges` are pairs `left right` in order of rank; every token and every result must be a token.
    pub(super) fn new(tokens: &[String], merges: &[String], pre: &Pre) -> Result<Bpe> {
        let merges = check_merges(tokens, merges)?;
        let vocab: BpeVocab = tokens.iter().enumerate().map(|(id, t)| (t.clone(), id as u32)).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre.ignore_merges)
            .build()
            .map_err(|e| TokenizerError::Library(e.to_string()))?;
        let mut words = tokenizers::Tokenizer::new(model);
        words.with_pre_tokenizer(Some(pre.split.build()?));
        Ok(Bpe { words })
    }

    /// Appends the ids of `text`.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let encoding =
            self.words.encode_fast(text, false).map_err(|e| TokenizerError::Library(e.to_string()))?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// Splits each merge at its first space after the first character (a token may itself begin with one).
fn check_merges(tokens: &[String], merges: &[String]) -> Result<Vec<(String, String)>> {
    let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    let mut pairs = Vec::with_capacity(merges.len());
    for (index, merge) in merges.iter().enumerate() {
        let skip = merge.chars().next().map_or(0, char::len_utf8);
        let Some(space) = merge[skip..].find(' ') else {
            return Err(TokenizerError::MergeForm { index, merge: merge.clone() });
        };
        let (left, right) = (&merge[..skip + space], &merge[skip + space + 1..]);
        let joined = format!("{left}{right}");
        if let Some(token) = [left, right, joined.as_str()].into_iter().find(|t| !known.contains(t)) {
            let (place, token) = ("key `tokenizer.ggml.merges`".to_owned(), token.to_owned());
            return Err(TokenizerError::MergeToken { place, index, token });
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

/// Appends the bytes that a byte-level token stands for. A character outside of the byte alphabet
/// makes the token stand for its own text.
pub(super) fn token_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        let Some(&Some(byte)) = BYTE_OF_CHAR.get(c as usize) else {
            out.truncate(start);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes, in order, for
/// the characters from U+0100 on.
static BYTE_OF_CHAR: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x100];
    let mut others = Vec::new();
    for byte in 0..=255u8 {
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => table[byte as usize] = Some(byte),
            _ => others.push(Some(byte)),
        }
    }
    table.extend(others);
    table
});
