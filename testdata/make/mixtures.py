#!/usr/bin/env python3
"""Condenses llama.cpp's snapshots of tensor types (tests/snapshots/*.schema) to testdata/mixtures/*.txt.

A snapshot lists, for every file type, the tensors whose type is not the default. Under MXFP4_MOE that is
every tensor but the experts, and every expert is listed under some other file type, so the names of all
quantized tensors follow from the file. Their row lengths do not: those stand below.

usage: mixtures.py SNAPSHOT_FOLDER OUTPUT_FOLDER
"""

import re
import sys
from pathlib import Path

# Architecture, and row lengths: that of most tensors, then of those that differ.
MODELS = {
    "deepseek-v3.1": ("deepseek2", 7168, {"attn_k_b": 128, "attn_output": 16384, "attn_q_b": 1536, "ffn_down": 18432,
                                          "ffn_down_exps": 2048, "ffn_down_shexp": 2048}),
    "gemma-3-4b-it": ("gemma3", 2560, {"attn_output": 2048, "ffn_down": 10240}),
    "glm-4.6v": ("glm4moe", 4096, {"attn_output": 12288, "ffn_down": 10944, "ffn_down_exps": 1408, "ffn_down_shexp": 1408}),
    "gpt-oss-120b": ("gpt-oss", 2880, {"attn_output": 4096}),
    "meta-llama-3.1-70b-instruct": ("llama", 8192, {"ffn_down": 28672}),
    "nvidia-nemotron-3-nano-30b-a3b": ("nemotron_h_moe", 2688, {"attn_output": 4096, "ssm_out": 4096, "ffn_down_exps": 1856,
                                                                "ffn_down_shexp": 3712}),
    "qwen3-0.6b": ("qwen3", 1024, {"attn_output": 2048, "ffn_down": 3072}),
    "qwen3-14b": ("qwen3", 5120, {"ffn_down": 17408}),
    "qwen3-coder-next": ("qwen3next", 2048, {"attn_output": 4096, "ssm_out": 4096, "ffn_down_exps": 512, "ffn_down_shexp": 512}),
    "qwen3.5-397b-a17b": ("qwen35moe", 4096, {"attn_output": 8192, "ssm_out": 8192, "ffn_down_exps": 1024,
                                              "ffn_down_shexp": 1024}),
    "qwen3.6-27b": ("qwen35", 5120, {"attn_output": 6144, "ssm_out": 6144, "ffn_down": 17408}),
    "step-3.5-flash": ("step35", 4096, {"attn_output": 8192, "ffn_down": 11264, "ffn_down_exps": 1280, "ffn_down_shexp": 1280}),
}


def split(name):
    match = re.fullmatch(r"blk\.(\d+)\.(.*)", name)
    return (match[2], int(match[1])) if match else (name, None)


def ranges(layers):
    if layers == [None]:
        return "-"
    parts, layers = [], sorted(layers)
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def condense(source, name):
    arch, most, others = MODELS[name]
    facts, sections = {}, {}
    for line in source.read_text().splitlines():
        if line.startswith("# n_embd"):
            facts = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}
        elif line.startswith("["):
            file_type, default = re.fullmatch(r"\[(\w+)\] (\S+)", line).groups()
            chosen = sections[file_type] = {}
            sections[file_type] = (default, chosen)
        elif line and not line.startswith("#"):
            tensor, dtype = line.rsplit(" ", 1)
            role, layer = split(tensor)
            chosen.setdefault((role, dtype), []).append(layer)

    roles = {}
    for _, chosen in sections.values():
        for (role, _), layers in chosen.items():
            roles.setdefault(role, set()).update(layers)
    # The rules touch gates and ups of experts only in the middle layers; their downs have all.
    for role in ("ffn_gate_exps.weight", "ffn_up_exps.weight"):
        if role in roles:
            roles[role] = roles["ffn_down_exps.weight"]
    dense = {role for role, _ in sections["MXFP4_MOE"][1]}

    out = [f"model {arch} layers {facts['n_layer']} heads {facts['n_head']} kv-heads {facts['n_head_kv']} "
           f"experts {facts.get('n_expert', 0)}"]
    for role, layers in sorted(roles.items()):
        row_len = others.get(role.removesuffix(".weight"), most)
        out.append(f"tensor {role} {row_len} {1 if role in dense else 2} {ranges(list(layers))}")
    for file_type, (default, chosen) in sections.items():
        out.append(f"file-type {file_type} {default}")
        out += [f"{role} {dtype} {ranges(layers)}" for (role, dtype), layers in sorted(chosen.items())]
    return "\n".join(out) + "\n"


for model in MODELS:
    text = condense(Path(sys.argv[1]) / f"{model}.schema", model)
    (Path(sys.argv[2]) / f"{model}.txt").write_text(text)
