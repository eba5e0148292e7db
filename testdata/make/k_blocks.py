"""Writes testdata/ggml/k_blocks.safetensors: what llama.cpp makes of a few rows in the K-quants.

Run with numpy and safetensors installed: python testdata/make/k_blocks.py PATH/libggml-base.so
`rows` are the sources, `importance` holds several importances per column. For each type: `<TYPE>.bytes` without and
`<TYPE>.weighted.<i>` with row i of the importance (ggml_quantize_chunk), `<TYPE>.f32` the bytes dequantized,
`<TYPE>.random` blocks of random bytes (finite scales) and `<TYPE>.random.f32` what they stand for (dequantize_row_*).
"""

import ctypes as c
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GGML = Path(__file__).parent.parent / "ggml"
COLUMNS = 512

# name: number, block bytes, offsets of f16 scales
TYPES = {
    "Q2_K": (10, 84, [80, 82]),
    "Q3_K": (11, 110, [108]),
    "Q4_K": (12, 144, [0, 2]),
    "Q5_K": (13, 176, [0, 2]),
    "Q6_K": (14, 210, [208]),
}

lib = c.CDLL(sys.argv[1])
floats = c.POINTER(c.c_float)
lib.ggml_quantize_chunk.restype = c.c_size_t
lib.ggml_quantize_chunk.argtypes = [c.c_int, floats, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, floats]


def pointer(x):
    return None if x is None else x.ctypes.data_as(floats)


def quantized(name, rows, importance):
    number, block_bytes, _ = TYPES[name]
    out = np.zeros((len(rows), COLUMNS // 256 * block_bytes), np.uint8)
    written = lib.ggml_quantize_chunk(number, pointer(rows), out.ctypes.data, 0, len(rows), COLUMNS, pointer(importance))
    assert written == out.size
    return out


def dequantized(name, packed):
    out = np.zeros((len(packed), packed.shape[1] // TYPES[name][1] * 256), np.float32)
    to_float = getattr(lib, f"dequantize_row_{name.replace('Q', 'q')}")
    to_float(c.c_void_p(packed.ctypes.data), pointer(out), c.c_int64(out.size))
    return out


def sources(rng):
    """Real weights, Gaussians, heavy tails, and what breaks quantizers."""
    gauss = rng.standard_normal
    sparse = np.where(rng.random(COLUMNS) < 0.03, gauss(COLUMNS), 0)
    outliers = gauss(COLUMNS) * 0.01
    outliers[rng.integers(0, COLUMNS, 5)] = gauss(5) * 50
    scales = np.repeat(10.0 ** rng.uniform(-6, 2, COLUMNS // 16), 16)
    offsets = np.repeat(gauss(COLUMNS // 16), 16)
    constant = np.repeat(rng.choice([0.0, 1.0, -0.25, 3.0], COLUMNS // 16), 16)
    edges = np.concatenate([np.zeros(256), np.full(64, 1e-20), np.full(64, -1e-9), gauss(128) * 1e-12])
    return np.stack([
        load_file(GGML / "blocks.safetensors")["F32.blk.2.ffn_up.weight"][0],
        gauss(COLUMNS) * 0.02,
        rng.laplace(size=COLUMNS),
        gauss(COLUMNS) ** 3 * 1e4,
        sparse,
        outliers,
        gauss(COLUMNS) * scales,
        (gauss(COLUMNS) + offsets) * scales,
        np.abs(gauss(COLUMNS)) + 0.1,
        -np.abs(gauss(COLUMNS)) - 0.1,
        constant,
        edges,
    ]).astype(np.float32)


def importances(rng):
    """As activations have them, the same with most of it zero, and zero."""
    full = rng.standard_normal(COLUMNS) ** 2
    return np.stack([full, np.where(rng.random(COLUMNS) < 0.1, full, 0), np.zeros(COLUMNS)]).astype(np.float32)


def random_blocks(rng, name):
    _, block_bytes, scales = TYPES[name]
    blocks = rng.integers(0, 256, (2, block_bytes), np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = rng.standard_normal(2).astype(np.float16).view(np.uint8).reshape(2, 2)
    return blocks


rng = np.random.default_rng(2)
tensors = {"rows": sources(rng), "importance": importances(rng)}
for name in TYPES:
    tensors[f"{name}.bytes"] = quantized(name, tensors["rows"], None)
    tensors[f"{name}.f32"] = dequantized(name, tensors[f"{name}.bytes"])
    for i, importance in enumerate(tensors["importance"]):
        tensors[f"{name}.weighted.{i}"] = quantized(name, tensors["rows"], importance)
    tensors[f"{name}.random"] = random_blocks(rng, name)
    tensors[f"{name}.random.f32"] = dequantized(name, tensors[f"{name}.random"])
save_file(tensors, GGML / "k_blocks.safetensors")
