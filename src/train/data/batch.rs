//! A micro-batch: sequences laid end to end, so that no computation goes into padding.

use super::Example;

/// Sequence s is `tokens[starts[s]..starts[s + 1]]`; positions begin at 0 and attention ends at its
/// borders, and labels are shifted inside of it, never across.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Ids of all sequences.
    pub tokens: Vec<u32>,
    /// The token at the same place, or -100.
    pub labels: Vec<i32>,
    /// Where each sequence begins, and the end: one more than sequences.
    pub starts: Vec<u32>,
}

impl Batch {
    /// Lays examples end to end.
    pub fn of<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Batch {
        let mut batch = Batch { tokens: Vec::new(), labels: Vec::new(), starts: vec![0] };
        for example in examples {
            batch.tokens.extend_from_slice(&example.input_ids);
            batch.labels.extend_from_slice(&example.labels);
            batch.starts.push(batch.tokens.len() as u32);
        }
        batch
    }

    /// Sequences in the batch.
    pub fn sequences(&self) -> usize {
        self.starts.len() - 1
    }

    /// Tokens that carry loss: a sequence's first token never does.
    pub fn supervised(&self) -> usize {
        let sequence = |pair: &[u32]| self.labels[pair[0] as usize..pair[1] as usize].iter().skip(1);
        self.starts.windows(2).flat_map(sequence).filter(|&&label| label != super::IGNORE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_its_examples_end_to_end() {
        let a = Example { input_ids: vec![1, 2, 3], labels: vec![-100, 2, 3] };
        let b = Example { input_ids: vec![4, 5], labels: vec![4, 5] };
        let batch = Batch::of([&a, &b]);
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5]);
        assert_eq!(batch.labels, [-100, 2, 3, 4, 5]);
        assert_eq!(batch.starts, [0, 3, 5]);
        assert_eq!((batch.sequences(), batch.supervised()), (2, 3));
    }
}
