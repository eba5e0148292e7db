//! Which tensors are quantized at all: matrices that hold weights. Norms, small matrices, routers,
//! positions and filters keep their type.
//!
//! Source: the exclusions of llama.cpp's quantizer, by fact.

/// A name that contains one of these is not quantized, in any architecture.
const KEPT: [&str; 35] = [
    "_norm.weight",
    // The router of a mixture of experts, and DeepSeek-V4's table from tokens to experts.
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    // Gemma 3n's small matrices.
    "altup",
    "laurel",
    "per_layer_model_proj",
    // Convolutions of a few taps.
    "ssm_conv1d",
    "shortconv.conv.weight",
    // MiniMax's indexer.
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    // RWKV's small matrices.
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    // T5's positions.
    "attn_rel_b.weight",
    // Vision and audio towers.
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

/// BERT's positions and token types: whole names.
const KEPT_WHOLE: [&str; 2] = ["position_embd.weight", "token_types.weight"];

/// As `KEPT`, in the architecture `glm5-next` only.
const KEPT_GLM5_NEXT: [&str; 14] = [
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
];

/// Whether a tensor of this shape (row length first) and name is quantized.
pub(super) fn is_quantized(arch: &str, name: &str, shape: &[u64]) -> bool {
    // Dimensions of 1 at the end do not count, as in ggml.
    let is_matrix = shape.iter().skip(1).any(|&dim| dim > 1);
    is_matrix
        && name.ends_with("weight")
        && !KEPT.iter().any(|part| name.contains(part))
        && !KEPT_WHOLE.contains(&name)
        && !(arch == "glm5-next" && KEPT_GLM5_NEXT.iter().any(|part| name.contains(part)))
}
