//! SentencePiece by scores, as in GGUF files with the tokenizer `llama`: no merge list, the pair whose
//! joined piece has the highest score is merged first (the leftmost of equals), and what is no piece in
//! the end falls to its bytes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::error::{Result, TokenizerError};
use super::vocab::{Kind, Vocab};

/// The character that stands for a space inside pieces.
pub(super) const SPACE: char = '\u{2581}';

/// The scores, the byte tokens and the token for what has no bytes.
pub(super) struct Spm {
    scores: Vec<f32>,
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
}

/// A span of the text that is one piece so far; a linked list, so that a merge costs nothing.
struct Symbol {
    start: usize,
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours whose joined text is a piece.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Length of the joined text: tells a stale candidate.
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Candidate) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl Spm {
    pub(super) fn new(vocab: &Vocab, mut scores: Vec<f32>, unknown: Option<u32>) -> Result<Spm> {
        if scores.len() != vocab.len() {
            let (expected, found) = (vocab.len(), scores.len());
            return Err(TokenizerError::Length { key: "tokenizer.ggml.scores", expected, found });
        }
        for score in &mut scores {
            // One zero only, so that the total order below agrees with `<`.
            *score += 0.0;
        }
        let byte = |b: u8| {
            vocab.id(&format!("<0x{b:02X}>")).or_else(|| {
                let text = [b];
                std::str::from_utf8(&text).ok().and_then(|text| vocab.id(text))
            })
        };
        Ok(Spm { scores, bytes: (0..=255).map(byte).collect(), unknown })
    }

    /// Appends the ids of `text`, in which spaces are already written as U+2581.
    pub(super) fn encode(&self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                prev: i.checked_sub(1),
                next: Some(i + 1).filter(|_| start + c.len_utf8() < text.len()),
            })
            .collect();
        let mut queue = BinaryHeap::new();
        for i in 1..symbols.len() {
            self.propose(vocab, text, &symbols, Some(i - 1), Some(i), &mut queue);
        }
        while let Some(best) = queue.pop() {
            let (left, right) = (&symbols[best.left], &symbols[best.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != best.len {
                continue;
            }
            let next = right.next;
            symbols[best.left].len = best.len;
            symbols[best.left].next = next;
            symbols[best.right].len = 0;
            if let Some(next) = next {
                symbols[next].prev = Some(best.left);
            }
            let prev = symbols[best.left].prev;
            self.propose(vocab, text, &symbols, prev, Some(best.left), &mut queue);
            self.propose(vocab, text, &symbols, Some(best.left), next, &mut queue);
        }
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let piece = &text[symbol.start..symbol.start + symbol.len];
            match vocab.id(piece) {
                Some(id) => out.push(id),
                None => self.push_bytes(piece, out)?,
            }
        }
        Ok(())
    }

    fn propose(
        &self,
        vocab: &Vocab,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
        queue: &mut BinaryHeap<Candidate>,
    ) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let start = symbols[left].start;
        let len = symbols[left].len + symbols[right].len;
        if let Some(id) = vocab.id(&text[start..start + len]) {
            queue.push(Candidate { score: self.scores[id as usize], left, right, len });
        }
    }

    fn push_bytes(&self, piece: &str, out: &mut Vec<u32>) -> Result<()> {
        for byte in piece.bytes() {
            let id = self.bytes[byte as usize].or(self.unknown).ok_or(TokenizerError::Byte { byte })?;
            out.push(id);
        }
        Ok(())
    }
}

/// Appends the bytes that a piece stands for.
pub(super) fn token_bytes(kind: Kind, token: &str, out: &mut Vec<u8>) {
    let byte =
        || token.strip_prefix("<0x")?.strip_suffix('>').and_then(|hex| u8::from_str_radix(hex, 16).ok());
    match (kind, byte()) {
        (Kind::Byte, Some(byte)) => out.push(byte),
        _ => out.extend_from_slice(token.replace(SPACE, " ").as_bytes()),
    }
}
