//! The token embedding: rows of a packed table.
//!
//! There is no backward: the table belongs to the frozen base model, nothing trainable lies below it,
//! and tokens have no gradient, so the backward pass of a model ends at the input of its first layer.

use rayon::prelude::*;

use crate::cpu::rows::rows_per_task;
use crate::error::{Error, Result, check};
use crate::ids::Ids;
use crate::ops::dequantize::rows_by_id;
use crate::tensor::ViewMut;
use crate::weight::BaseWeight;

const FORWARD: &str = "embedding_forward";

/// Looks up the row of every token.
///
/// y_t = table\[tokens_t\].
///
/// Shapes: `y` (T, C); `tokens` T ids; `table` (V, C).
/// Accumulates: nothing, `y` is overwritten.
/// Precision: exact, the dequantized rows.
///
/// # Errors
/// A token outside of the table, shapes that do not belong together, or no kernel for the device.
///
/// Source: the definition of an embedding; `torch.nn.Embedding`.
pub fn embedding_forward<'a>(y: ViewMut, tokens: impl Into<Ids<'a>>, table: &BaseWeight) -> Result<()> {
    let ids: Ids = tokens.into();
    let tokens = ids.host();
    check(FORWARD, "rows of y", tokens.len(), y.rows)?;
    check(FORWARD, "columns of y", table.cols(), y.cols)?;
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= table.rows()) {
        let (index, limit) = (token as usize, table.rows());
        return Err(Error::IndexOutOfRange { op: FORWARD, what: "token", index, limit });
    }
    if y.cuda().is_some() {
        let table = table.device().ok_or_else(|| Error::NoKernel {
            op: FORWARD,
            device: "a table in host memory and activations on a device".to_owned(),
        })?;
        return rows_by_id(FORWARD, &y, table, ids);
    }
    forward_fast(y, tokens, table)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(y: &mut [f64], tokens: &[u32], table: &[f64], channels: usize) {
    for (t, &token) in tokens.iter().enumerate() {
        for c in 0..channels {
            y[t * channels + c] = table[token as usize * channels + c];
        }
    }
}

fn forward_fast(y: ViewMut, tokens: &[u32], table: &BaseWeight) -> Result<()> {
    let (cols, stride) = (y.cols, y.stride);
    let y = y.cpu(FORWARD)?;
    if cols == 0 {
        return Ok(());
    }
    y.par_chunks_mut(stride).zip(tokens).with_min_len(rows_per_task(cols)).for_each(|(y, &token)| {
        let token = token as usize;
        table.dequantize_rows(token..token + 1, &mut y[..cols]);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use qpeft_formats::GgmlType;
    use qpeft_formats::file::Bytes;

    use super::*;
    use crate::testing::{Mat, Out, check_fast, tolerance};

    #[test]
    fn rows_of_every_type_are_looked_up_exactly() {
        for dtype in GgmlType::writable() {
            let (vocabulary, channels) = (11, 256);
            let zeros = Bytes::from(vec![0; vocabulary * dtype.row_bytes(channels).unwrap()]);
            let values = Mat::random(1, vocabulary, channels, 1.0).values();
            let table = BaseWeight::from_ggml(dtype, vocabulary, channels, zeros).unwrap();
            let table = table.requantize(&values).unwrap();
            let dequantized: Vec<f64> = table.dequantize().iter().map(|&x| x as f64).collect();
            let all: Vec<u32> = (0..129).map(|i| i * 7 % 11).collect();
            for tokens in [&[][..], &[10], &all] {
                let mut y = vec![0.0; tokens.len() * channels];
                forward_naive(&mut y, tokens, &dequantized, channels);
                check_fast(
                    dtype.name(),
                    [(Out::Set(tokens.len(), channels), &y)],
                    [],
                    tolerance(0.0, 0.0),
                    |[y], []| embedding_forward(y, tokens, &table),
                );
            }
        }
    }

    #[test]
    fn tokens_outside_of_the_table_and_wrong_shapes_are_refused() {
        let table = BaseWeight::from_f32(3, 2, &[0.0; 6]).unwrap();
        let error = |tokens: &[u32], rows, cols| {
            embedding_forward(Mat::poisoned(rows, cols).view_mut(), tokens, &table).unwrap_err().to_string()
        };
        assert_eq!(error(&[0, 3], 2, 2), "embedding_forward: token 3 is outside of 0..3");
        assert_eq!(error(&[u32::MAX], 1, 2), "embedding_forward: token 4294967295 is outside of 0..3");
        assert_eq!(error(&[0, 1], 1, 2), "embedding_forward: rows of y is 1, expected 2");
        assert_eq!(error(&[0, 1], 2, 3), "embedding_forward: columns of y is 3, expected 2");
    }
}
