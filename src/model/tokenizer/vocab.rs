//! The tokens of a GGUF vocabulary, and the splitting of a text at its special tokens.

use std::collections::HashMap;

use super::error::{Result, TokenizerError};

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

impl Kind {
    pub(super) fn from_gguf(value: i32) -> Kind {
        match value {
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            6 => Kind::Byte,
            _ => Kind::Normal,
        }
    }
}

/// Tokens by id and ids by token.
pub(super) struct Vocab {
    tokens: Vec<String>,
    kinds: Vec<Kind>,
    ids: HashMap<String, u32>,
    /// Tokens that are split out of a text, by their first byte.
    split_by_first: Vec<Vec<u32>>,
    /// White space after a control token belongs to it (Phi-3's tokenizer, which its file does not say).
    eats_space: Vec<u32>,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

impl Vocab {
    pub(super) fn new(tokens: Vec<String>, kinds: Vec<Kind>) -> Result<Vocab> {
        if tokens.is_empty() {
            return Err(TokenizerError::EmptyVocabulary);
        }
        if kinds.len() != tokens.len() {
            let (expected, found) = (tokens.len(), kinds.len());
            return Err(TokenizerError::Length { key: "tokenizer.ggml.token_type", expected, found });
        }
        // A token that is listed twice means its last id, as in llama.cpp.
        let ids = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
        let mut split_by_first = vec![Vec::new(); 256];
        for (id, token) in tokens.iter().enumerate() {
            let split = matches!(kinds[id], Kind::Control | Kind::UserDefined | Kind::Unknown);
            if let (true, Some(&first)) = (split, token.as_bytes().first()) {
                split_by_first[first as usize].push(id as u32);
            }
        }
        Ok(Vocab { tokens, kinds, ids, split_by_first, eats_space: Vec::new() })
    }

    /// Makes every special token swallow the white space after it, except the named ones.
    pub(super) fn eat_space_after_specials(&mut self, except: &[&str]) {
        let specials = self.split_by_first.iter().flatten();
        self.eats_space =
            specials.copied().filter(|&id| !except.contains(&self.tokens[id as usize].as_str())).collect();
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub(super) fn tokens(&self) -> &[String] {
        &self.tokens
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds[id as usize]
    }

    /// The first token of a kind.
    pub(super) fn first_of(&self, kind: Kind) -> Option<u32> {
        self.kinds.iter().position(|&k| k == kind).map(|id| id as u32)
    }

    /// Cuts `text` at its special tokens; with `parse_control` false only at user-defined ones. Longer
    /// tokens are cut out first, everywhere, as llama.cpp does; between tokens of one length the
    /// smaller id goes first.
    pub(super) fn split<'a>(&self, text: &'a str, parse_control: bool) -> Vec<Part<'a>> {
        let mut present = self.present(text, parse_control);
        present.sort_by_key(|&id| (std::cmp::Reverse(self.tokens[id as usize].len()), id));
        let mut parts = Vec::new();
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        for id in present {
            let token = self.tokens[id as usize].as_str();
            let eats_space = self.eats_space.contains(&id);
            let mut cut = Vec::with_capacity(parts.len() + 2);
            for part in parts {
                let Part::Text(mut rest) = part else {
                    cut.push(part);
                    continue;
                };
                while let Some(at) = rest.find(token) {
                    if at > 0 {
                        cut.push(Part::Text(&rest[..at]));
                    }
                    cut.push(Part::Token(id));
                    rest = &rest[at + token.len()..];
                    if eats_space {
                        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
                    }
                }
                if !rest.is_empty() {
                    cut.push(Part::Text(rest));
                }
            }
            parts = cut;
        }
        parts
    }

    /// The special tokens that occur in `text`: one pass, so that thousands of them cost nothing.
    fn present(&self, text: &str, parse_control: bool) -> Vec<u32> {
        let mut found: Vec<u32> = Vec::new();
        for (at, byte) in text.bytes().enumerate() {
            for &id in &self.split_by_first[byte as usize] {
                let wanted = parse_control || self.kinds[id as usize] == Kind::UserDefined;
                let token = self.tokens[id as usize].as_bytes();
                if wanted && text.as_bytes()[at..].starts_with(token) && !found.contains(&id) {
                    found.push(id);
                }
            }
        }
        found
    }
}
