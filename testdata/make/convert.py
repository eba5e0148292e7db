"""Makes the tiny checkpoints `models/tiny-gemma3`, `tiny-llama3` and `tiny-phi4` (random weights) from nothing.

Usage: convert.py TESTDATA OUT. The tokenizers are those of tiny-gemma2, tiny-llama and tiny-phi3 in TESTDATA/models.
The GGUF files beside them are what `convert_hf_to_gguf.py --outtype f32` writes for these folders; as the vocabularies
are made up, its check of the pre-tokenizer was answered with `gpt-2`.
"""

import os
import shutil
import sys

import torch
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config,
                          Phi3ForCausalLM)

source, out = sys.argv[1:3]
torch.manual_seed(0)


def save(model, name, dtype, tokenizer):
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.3)
    folder = os.path.join(out, name)
    model.to(dtype).save_pretrained(folder)
    for file in ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]:
        path = os.path.join(source, "models", tokenizer, file)
        if os.path.exists(path):
            shutil.copy(path, folder)


save(Gemma3ForCausalLM(Gemma3TextConfig(
    vocab_size=352, hidden_size=32, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, query_pre_attn_scalar=16, sliding_window=6,
    bos_token_id=2, eos_token_id=1, pad_token_id=0, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}})),
     "tiny-gemma3", torch.bfloat16, "tiny-gemma2")
save(LlamaForCausalLM(LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=131072, attention_bias=True, mlp_bias=True,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0})),
     "tiny-llama3", torch.float16, "tiny-llama")
save(Phi3ForCausalLM(Phi3Config(
    vocab_size=352, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=1024, original_max_position_embeddings=128, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, sliding_window=100, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.01 * i for i in range(12)], "long_factor": [1.0 + 0.3 * i for i in range(12)]})),
     "tiny-phi4", torch.bfloat16, "tiny-phi3")
