//! A micro-batch as the decoder takes it: sequences laid end to end, without padding.

/// Tokens and labels of some sequences, one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all sequences.
    pub tokens: Vec<u32>,
    /// The token itself where it is trained on, [`IGNORE`] elsewhere (Hugging Face's convention: the
    /// model predicts `labels[t]` from the tokens before `t`).
    pub labels: Vec<i32>,
    /// Where each sequence starts, and the end of the last: `starts.len()` is sequences + 1.
    pub starts: Vec<u32>,
}

/// A label that takes no part in the loss.
pub const IGNORE: i32 = -100;

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch { starts: vec![0], ..Batch::default() }
    }

    /// Appends one sequence.
    ///
    /// # Panics
    /// `tokens` and `labels` differ in length.
    pub fn push(&mut self, tokens: &[u32], labels: &[i32]) {
        assert_eq!(tokens.len(), labels.len(), "one label per token");
        self.tokens.extend_from_slice(tokens);
        self.labels.extend_from_slice(labels);
        self.starts.push(self.tokens.len() as u32);
    }

    /// Number of tokens (T).
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Position of every token within its sequence.
    pub fn positions(&self) -> Vec<u32> {
        self.starts.windows(2).flat_map(|w| 0..w[1] - w[0]).collect()
    }

    /// The rows whose output predicts a trained token, and those tokens: `(row t, labels[t + 1])`.
    pub fn supervised(&self) -> (Vec<u32>, Vec<u32>) {
        let rows = self.starts.windows(2).flat_map(|w| w[0]..w[1].saturating_sub(1).max(w[0]));
        rows.filter_map(|row| u32::try_from(self.labels[row as usize + 1]).ok().map(|target| (row, target)))
            .unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_predicts_the_next_label_of_its_own_sequence() {
        let mut batch = Batch::new();
        batch.push(&[5, 6, 7], &[IGNORE, 6, 7]);
        batch.push(&[8], &[8]);
        batch.push(&[9, 3], &[9, IGNORE]);
        assert_eq!(batch.supervised(), (vec![0, 1], vec![6, 7]));
        assert_eq!(batch.positions(), [0, 1, 2, 0, 0, 1]);
        assert_eq!(batch.starts, [0, 3, 4, 6]);
    }
}
