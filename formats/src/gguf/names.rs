//! The llama architecture under its two sets of names, Hugging Face's and GGUF's, and the row order of
//! Q and K, in which the two differ.
//!
//! Rotary position embedding turns pairs of features. Hugging Face pairs feature `j` of a head with
//! `j + head_dim / 2`; GGUF files of this architecture pair `2 j` with `2 j + 1`. The rows of the Q and K
//! projections (and of their biases, and of the B factor of an adapter on them) are therefore permuted
//! within each head; no other tensor is. Source: `tensor_mapping.py` of gguf-py and the permutation in
//! llama.cpp's converter, checked tensor by tensor against converted files.

use crate::error::{Error, Kind, Result};

/// Modules outside of the layers: Hugging Face, GGUF.
const GLOBAL: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Modules of layer `N`, after `model.layers.N.` and `blk.N.`: Hugging Face, GGUF.
const LAYER: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// `model.layers.0.self_attn.q_proj` to `blk.0.attn_q`; `None` for what the architecture does not have.
pub fn gguf_module(hf: &str) -> Option<String> {
    match hf.strip_prefix("model.layers.") {
        Some(rest) => {
            let (layer, module) = split_layer(rest)?;
            let (_, gguf) = LAYER.iter().find(|(hf, _)| *hf == module)?;
            Some(format!("blk.{layer}.{gguf}"))
        }
        None => GLOBAL.iter().find(|(name, _)| *name == hf).map(|(_, gguf)| (*gguf).to_owned()),
    }
}

/// `blk.0.attn_q` to `model.layers.0.self_attn.q_proj`; `None` for what the architecture does not have.
pub fn hf_module(gguf: &str) -> Option<String> {
    match gguf.strip_prefix("blk.") {
        Some(rest) => {
            let (layer, module) = split_layer(rest)?;
            let (hf, _) = LAYER.iter().find(|(_, gguf)| *gguf == module)?;
            Some(format!("model.layers.{layer}.{hf}"))
        }
        None => GLOBAL.iter().find(|(_, name)| *name == gguf).map(|(hf, _)| (*hf).to_owned()),
    }
}

/// As [`gguf_module`], for the name of a tensor: module and `.weight` or `.bias`.
pub fn gguf_tensor(hf: &str) -> Option<String> {
    with_suffix(hf, gguf_module)
}

/// As [`hf_module`], for the name of a tensor: module and `.weight` or `.bias`.
pub fn hf_tensor(gguf: &str) -> Option<String> {
    with_suffix(gguf, hf_module)
}

fn with_suffix(name: &str, module: fn(&str) -> Option<String>) -> Option<String> {
    let (path, suffix) = name.rsplit_once('.')?;
    matches!(suffix, "weight" | "bias").then(|| module(path).map(|m| format!("{m}.{suffix}")))?
}

/// `12.attn_q` to 12 and `attn_q`; a number has one spelling, without sign or leading zero.
fn split_layer(rest: &str) -> Option<(u32, &str)> {
    let (number, module) = rest.split_once('.')?;
    let layer: u32 = number.parse().ok()?;
    (layer.to_string() == number).then_some((layer, module))
}

/// The row of a Hugging Face Q or K weight that is row `row` of the GGUF weight.
///
/// `n_heads` is the number of Q heads for Q and of KV heads for K; `head_dim` is even.
pub fn hf_row_of_gguf_row(row: usize, n_heads: usize, head_dim: usize) -> usize {
    debug_assert!(row < n_heads * head_dim && head_dim.is_multiple_of(2));
    let (head, feature) = (row / head_dim, row % head_dim);
    head * head_dim + (feature % 2) * (head_dim / 2) + feature / 2
}

/// The inverse of [`hf_row_of_gguf_row`].
pub fn gguf_row_of_hf_row(row: usize, n_heads: usize, head_dim: usize) -> usize {
    debug_assert!(row < n_heads * head_dim && head_dim.is_multiple_of(2));
    let (head, feature) = (row / head_dim, row % head_dim);
    head * head_dim + (feature % (head_dim / 2)) * 2 + feature / (head_dim / 2)
}

/// Rows of a Q or K weight in Hugging Face order to `out` in GGUF order. Rows are `row_bytes` long and of
/// any type: they move as a whole, so quantized ones stay as they are.
///
/// # Errors
/// `out` and `rows` are not `n_heads * head_dim` rows, or `head_dim` is odd.
pub fn rows_to_gguf(
    out: &mut [u8],
    rows: &[u8],
    row_bytes: usize,
    n_heads: usize,
    head_dim: usize,
) -> Result<()> {
    permute(out, rows, row_bytes, n_heads, head_dim, hf_row_of_gguf_row)
}

/// Rows of a Q or K weight in GGUF order to `out` in Hugging Face order; see [`rows_to_gguf`].
///
/// # Errors
/// See [`rows_to_gguf`].
pub fn rows_to_hf(
    out: &mut [u8],
    rows: &[u8],
    row_bytes: usize,
    n_heads: usize,
    head_dim: usize,
) -> Result<()> {
    permute(out, rows, row_bytes, n_heads, head_dim, gguf_row_of_hf_row)
}

fn permute(
    out: &mut [u8],
    rows: &[u8],
    row_bytes: usize,
    n_heads: usize,
    head_dim: usize,
    source: fn(usize, usize, usize) -> usize,
) -> Result<()> {
    if !head_dim.is_multiple_of(2) {
        let row_len = head_dim as u64;
        return Err(Error::new(Kind::PartialBlock { dtype: "rotary pair", block_len: 2, row_len }));
    }
    let expected = n_heads
        .checked_mul(head_dim)
        .and_then(|n| n.checked_mul(row_bytes))
        .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "rows" }))?;
    for found in [rows.len(), out.len()] {
        if found != expected {
            return Err(Error::new(Kind::WrongLength { expected: expected as u64, found: found as u64 }));
        }
    }
    if row_bytes == 0 {
        return Ok(());
    }
    for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
        let start = source(row, n_heads, head_dim) * row_bytes;
        out.copy_from_slice(&rows[start..start + row_bytes]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_goes_there_and_back() {
        let hf = ["model.embed_tokens", "model.norm", "lm_head"].map(str::to_owned);
        let layers = [0, 7, 31]
            .into_iter()
            .flat_map(|n| LAYER.iter().map(move |(module, _)| format!("model.layers.{n}.{module}")));
        for name in hf.into_iter().chain(layers) {
            for suffix in ["weight", "bias"] {
                let tensor = format!("{name}.{suffix}");
                let gguf = gguf_tensor(&tensor).unwrap();
                assert_eq!(hf_tensor(&gguf).unwrap(), tensor);
            }
        }
        assert_eq!(gguf_tensor("model.layers.3.self_attn.q_proj.weight").unwrap(), "blk.3.attn_q.weight");
        assert_eq!(hf_module("blk.29.ffn_down").unwrap(), "model.layers.29.mlp.down_proj");
    }

    #[test]
    fn foreign_names_have_no_counterpart() {
        for name in
            ["rope_freqs.weight", "blk.0.attn_qkv.weight", "blk.00.attn_q.weight", "blk.+1.attn_q.weight"]
        {
            assert_eq!(hf_tensor(name), None, "{name}");
        }
        for name in
            ["model.layers.0.mlp.gate.weight", "model.layers.x.mlp.up_proj.weight", "lm_head.scale", ""]
        {
            assert_eq!(gguf_tensor(name), None, "{name}");
        }
    }

    #[test]
    fn permuting_rows_is_undone_by_its_inverse() {
        for (n_heads, head_dim, row_bytes) in [(1, 2, 1), (2, 6, 3), (9, 64, 18), (3, 128, 5)] {
            let rows: Vec<u8> = (0..n_heads * head_dim * row_bytes).map(|i| (i * 31 % 251) as u8).collect();
            let mut gguf = vec![0; rows.len()];
            let mut back = vec![0; rows.len()];
            rows_to_gguf(&mut gguf, &rows, row_bytes, n_heads, head_dim).unwrap();
            rows_to_hf(&mut back, &gguf, row_bytes, n_heads, head_dim).unwrap();
            assert_eq!(back, rows);
            for row in 0..n_heads * head_dim {
                let hf = hf_row_of_gguf_row(row, n_heads, head_dim);
                assert_eq!(gguf_row_of_hf_row(hf, n_heads, head_dim), row);
            }
        }
    }

    #[test]
    fn rows_that_do_not_fit_the_heads_are_refused() {
        let mut out = vec![0; 24];
        let error = rows_to_gguf(&mut out, &[0; 23], 3, 2, 4).unwrap_err();
        assert!(matches!(error.kind, Kind::WrongLength { expected: 24, found: 23 }));
        let error = rows_to_hf(&mut out, &[0; 24], 4, 2, 3).unwrap_err();
        assert!(matches!(error.kind, Kind::PartialBlock { block_len: 2, row_len: 3, .. }));
    }
}
