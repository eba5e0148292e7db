//! Records to token ids and labels: what carries loss.
//!
//! A text is cut where loss begins and ends, and the cuts are found in the *text* by rendering prefixes of
//! the conversation. The ids are those of the whole text wherever no token crosses a cut. Where one does,
//! the segments are tokenized one by one: that is what the model meets when it answers, because then the
//! prompt was tokenized alone.

use super::error::DataErrorKind;
use super::record::Record;
use super::{DataOptions, Example, IGNORE};
use crate::model::chat::{ChatTemplate, Message};
use crate::model::tokenizer::Tokenizer;

type Result<T> = std::result::Result<T, DataErrorKind>;

/// What turns records into examples.
pub(super) struct Masker<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub options: &'a DataOptions,
}

/// An example and what became of it.
pub(super) struct Made {
    pub example: Example,
    /// Tokens before the first that carries loss, counted before the end was cut off.
    pub prompt_tokens: usize,
    pub truncated: bool,
}

/// A part of a text, with or without loss.
struct Segment<'t> {
    text: &'t str,
    supervised: bool,
}

impl Masker<'_> {
    /// The examples of a record: one, or one per assistant turn where the template cannot be cut.
    pub(super) fn examples(&self, record: Record) -> Result<Vec<Made>> {
        let everything = self.options.train_on_prompt;
        match record {
            Record::Conversation { field, messages, train_from } => {
                let template = self.template.ok_or(DataErrorKind::NeedsTemplate { field })?;
                self.conversation(template, &messages, train_from)
            }
            Record::Pair { prompt, completion } => {
                if let Some(template) = self.template {
                    let turns = [Message::new("user", prompt), Message::new("assistant", completion)];
                    return self.conversation(template, &turns, 1);
                }
                let whole = format!("{prompt}{completion}");
                let (prompt, completion) = whole.split_at(prompt.len());
                let segments = [
                    Segment { text: prompt, supervised: everything },
                    Segment { text: completion, supervised: true },
                ];
                self.plain(&whole, &segments).map(|made| vec![made])
            }
            Record::Text(text) => {
                self.plain(&text, &[Segment { text: &text, supervised: true }]).map(|made| vec![made])
            }
            Record::Tokens { mut input_ids, mut labels, attention_mask } => {
                if let Some(mask) = attention_mask {
                    without_padding(&mut input_ids, &mut labels, &mask)?;
                }
                self.tokens(&input_ids, labels).map(|made| vec![made])
            }
        }
    }

    /// A document in windows of `max_seq_length` tokens. What the tokenizer puts before a text stands
    /// before the first. A last window of one token predicts nothing and is left out.
    pub(super) fn windows(&self, text: &str) -> Result<Vec<Example>> {
        let mut ids = self.tokenizer.prefix().to_vec();
        if !text.is_empty() {
            ids.extend(self.tokenizer.encode(text, false)?);
        }
        let windows = ids.chunks(self.options.max_seq_length).filter(|window| window.len() > 1);
        let example = |window: &[u32]| Example {
            input_ids: window.to_vec(),
            labels: window.iter().map(|&id| id as i32).collect(),
        };
        Ok(windows.map(example).collect())
    }

    /// Text without a template: what the tokenizer puts before it, the segments, end of text.
    fn plain(&self, whole: &str, segments: &[Segment]) -> Result<Made> {
        let eos = self.tokenizer.eos().ok_or(DataErrorKind::NoEos)?;
        let (mut ids, mut supervised) = (self.tokenizer.prefix().to_vec(), Vec::new());
        supervised.resize(ids.len(), segments.first().is_some_and(|s| s.supervised));
        for (segment, part) in segments.iter().zip(self.tokenize(whole, segments)?) {
            supervised.resize(supervised.len() + part.len(), segment.supervised);
            ids.extend(part);
        }
        if ids.last() != Some(&eos) {
            ids.push(eos);
            supervised.push(true);
        }
        Ok(self.finish(ids, &supervised))
    }

    fn tokens(&self, input_ids: &[i64], labels: Option<Vec<i64>>) -> Result<Made> {
        let vocab_size = self.tokenizer.vocab_size();
        let fits = |id: i64| (0..vocab_size as i64).contains(&id);
        if let Some((index, &id)) = input_ids.iter().enumerate().find(|(_, id)| !fits(**id)) {
            return Err(DataErrorKind::TokenId { index, id, vocab_size });
        }
        let labels = labels.unwrap_or_else(|| input_ids.to_vec());
        if labels.len() != input_ids.len() {
            return Err(DataErrorKind::LabelCount { input_ids: input_ids.len(), labels: labels.len() });
        }
        let ignored = i64::from(IGNORE);
        if let Some((index, &label)) = labels.iter().enumerate().find(|(_, l)| **l != ignored && !fits(**l)) {
            return Err(DataErrorKind::Label { index, label, vocab_size });
        }
        let supervised: Vec<bool> =
            labels.iter().map(|&label| label != ignored || self.options.train_on_prompt).collect();
        let ids = input_ids.iter().map(|&id| id as u32).collect();
        let mut made = self.finish(ids, &supervised);
        // The file's labels are the targets, also where they are not the input.
        for (own, &given) in made.example.labels.iter_mut().zip(&labels) {
            if given != ignored {
                *own = given as i32;
            }
        }
        Ok(made)
    }

    /// Loss on the assistant turns from message `train_from` on. Templates that rewrite earlier turns once
    /// another follows (they drop its reasoning) give one example per turn, each as the model met it.
    fn conversation(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        train_from: usize,
    ) -> Result<Vec<Made>> {
        if self.options.train_on_prompt {
            let text = template.render(messages, false)?;
            let whole = [Segment { text: &text, supervised: true }];
            return Ok(vec![self.turns(&text, &whole)?]);
        }
        let assistant = |i: &usize| *i >= train_from && messages[*i].role == "assistant";
        let turns: Vec<usize> = (0..messages.len()).filter(assistant).collect();
        if turns.is_empty() {
            return Err(DataErrorKind::NoAssistant);
        }
        if turns[0] == 0 {
            return Err(DataErrorKind::AssistantFirst);
        }
        let full = template.render(messages, false)?;
        if let Some(cuts) = cuts(template, messages, &turns, &full)? {
            return Ok(vec![self.turns(&full, &segments(&full, &cuts))?]);
        }
        let one = |&turn: &usize| {
            let messages = &messages[..=turn];
            let text = template.render(messages, false)?;
            let cuts =
                cuts(template, messages, &[turn], &text)?.ok_or(DataErrorKind::UnstableTemplate { turn })?;
            self.turns(&text, &segments(&text, &cuts))
        };
        turns.iter().map(one).collect()
    }

    /// A rendered conversation. A supervised segment ends with its last end-of-generation token: the line
    /// break that templates write after it is never generated, so it is not trained.
    fn turns(&self, whole: &str, segments: &[Segment]) -> Result<Made> {
        let (mut ids, mut supervised) = (Vec::new(), Vec::new());
        for (segment, part) in segments.iter().zip(self.tokenize(whole, segments)?) {
            let ends = |id: &u32| self.tokenizer.end_of_generation().contains(id);
            let end = part.iter().rposition(ends).map_or(part.len(), |last| last + 1);
            let end = if self.options.train_on_prompt { part.len() } else { end };
            supervised.extend((0..part.len()).map(|i| segment.supervised && i < end));
            ids.extend(part);
        }
        Ok(self.finish(ids, &supervised))
    }

    /// The ids of each segment of `whole`; see the head of this file.
    fn tokenize(&self, whole: &str, segments: &[Segment]) -> Result<Vec<Vec<u32>>> {
        let mut parts = Vec::with_capacity(segments.len());
        for (i, segment) in segments.iter().enumerate() {
            parts.push(match i {
                0 => self.tokenizer.encode(segment.text, false)?,
                _ => self.tokenizer.encode_continuation(segment.text)?,
            });
        }
        if segments.len() < 2 {
            return Ok(parts);
        }
        let full = self.tokenizer.encode(whole, false)?;
        if parts.concat() == full {
            return Ok(parts);
        }
        // Not the same ids, but perhaps only a segment's first token differs from the one in context:
        // then every prefix still ends between two tokens of the whole.
        let (mut bounds, mut end) = (vec![0], 0);
        for segment in segments {
            end += segment.text.len();
            let prefix = self.tokenizer.encode(&whole[..end], false)?;
            if !full.starts_with(&prefix) || prefix.len() < bounds[bounds.len() - 1] {
                return Ok(parts);
            }
            bounds.push(prefix.len());
        }
        Ok(bounds.windows(2).map(|pair| full[pair[0]..pair[1]].to_vec()).collect())
    }

    /// Labels, and the cut at `max_seq_length`.
    fn finish(&self, mut ids: Vec<u32>, supervised: &[bool]) -> Made {
        let first = supervised.iter().position(|&s| s);
        let prompt_tokens = first.unwrap_or(ids.len());
        let truncated = ids.len() > self.options.max_seq_length;
        ids.truncate(self.options.max_seq_length);
        let labels = ids.iter().zip(supervised).map(|(&id, &s)| if s { id as i32 } else { IGNORE }).collect();
        Made { example: Example { input_ids: ids, labels }, prompt_tokens, truncated }
    }
}

/// Where each of `turns` begins and ends in `full`, the rendering of all messages; `None` if the template
/// writes a prefix of the conversation in another way than inside of the whole.
fn cuts(
    template: &ChatTemplate,
    messages: &[Message],
    turns: &[usize],
    full: &str,
) -> Result<Option<Vec<(usize, usize)>>> {
    let mut cuts = Vec::with_capacity(turns.len());
    for &turn in turns {
        let before = template.render(&messages[..turn], false)?;
        let prompt = template.render(&messages[..turn], true)?;
        let through = if turn + 1 == messages.len() {
            full.to_owned()
        } else {
            template.render(&messages[..=turn], false)?
        };
        if !full.starts_with(&before) || !full.starts_with(&through) {
            return Ok(None);
        }
        // Some templates prompt with more than they write for a turn that is there (an opened thought):
        // the turn begins where the two part.
        let start = common_prefix(&prompt, full);
        if start < before.len() || through.len() < start {
            return Ok(None);
        }
        cuts.push((start, through.len()));
    }
    Ok(Some(cuts))
}

/// Bytes of the longest common prefix that ends between characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
}

fn segments<'t>(full: &'t str, cuts: &[(usize, usize)]) -> Vec<Segment<'t>> {
    let (mut segments, mut end) = (Vec::new(), 0);
    for &(from, to) in cuts {
        segments.push(Segment { text: &full[end..from], supervised: false });
        segments.push(Segment { text: &full[from..to], supervised: true });
        end = to;
    }
    segments.push(Segment { text: &full[end..], supervised: false });
    segments.retain(|segment| !segment.text.is_empty());
    segments
}
/// Cuts off what an attention mask of 0 says is padding, before and behind the tokens.
fn without_padding(input_ids: &mut Vec<i64>, labels: &mut Option<Vec<i64>>, mask: &[i64]) -> Result<()> {
    let len = input_ids.len();
    if mask.len() != len {
        return Err(DataErrorKind::MaskCount { input_ids: len, mask: mask.len() });
    }
    let start = mask.iter().position(|&m| m != 0).unwrap_or(len);
    let end = mask.iter().rposition(|&m| m != 0).map_or(len, |last| last + 1);
    if let Some(index) = (start..end).find(|&i| mask[i] != 1) {
        return Err(DataErrorKind::Mask { index, found: mask[index] });
    }
    // Wrong counts of labels are refused with the tokens.
    if let Some(labels) = labels.as_mut().filter(|labels| labels.len() == len) {
        *labels = labels[start..end].to_vec();
        *input_ids = input_ids[start..end].to_vec();
    } else if labels.is_none() {
        *input_ids = input_ids[start..end].to_vec();
    }
    Ok(())
}
