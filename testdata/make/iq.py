"""Writes testdata/ggml/iq_blocks.safetensors: the rows of blocks.safetensors in the IQ types, by ggml itself.

Run with llama-cpp-python (for its libggml-base), numpy and safetensors installed: python testdata/make/iq.py
`importance.<tensor>`: one number per column, some of them zero. `<TYPE>.<tensor>.weighted`: the rows quantized with
it, `<TYPE>.<tensor>.plain`: without. `<TYPE>.random.f32`: what ggml makes of `<TYPE>.random.bytes`, which are random
bits with a finite scale.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent.parent / "ggml"
# name: (number, elements, bytes, offset of the scale, whether it quantizes without importance)
TYPES = {
    "IQ1_S": (19, 256, 50, 0, False),
    "IQ1_M": (29, 256, 56, None, True),
    "IQ2_XXS": (16, 256, 66, 0, False),
    "IQ2_XS": (17, 256, 74, 0, False),
    "IQ2_S": (22, 256, 82, 0, True),
    "IQ3_XXS": (18, 256, 98, 0, True),
    "IQ3_S": (21, 256, 110, 0, True),
    "IQ4_NL": (20, 32, 18, 0, True),
    "IQ4_XS": (23, 256, 136, 0, True),
}

ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [
    ctypes.c_void_p
]


def quantize(name, rows, importance):
    number, elements, size, _, _ = TYPES[name]
    n, columns = rows.shape
    out = np.zeros((n, columns // elements * size), np.uint8)
    ggml.ggml_quantize_init(number)
    weights = importance.ctypes.data if importance is not None else None
    written = ggml.ggml_quantize_chunk(number, rows.ctypes.data, out.ctypes.data, 0, n, columns, weights)
    assert written == out.size
    return out


def dequantize(name, blocks):
    _, elements, size, _, _ = TYPES[name]
    out = np.zeros((blocks.shape[0], blocks.shape[1] // size * elements), np.float32)
    read = getattr(ggml, f"dequantize_row_{name.lower()}")
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    read.restype = None
    read(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def main():
    random = np.random.default_rng(3)
    rows = {k[4:]: v for k, v in load_file(FOLDER / "blocks.safetensors").items() if k.startswith("F32.")}
    saved = {}
    for tensor, source in rows.items():
        # Mean squared activations: heavy tails, a few columns that were never active.
        importance = (random.standard_normal(source.shape[1]) ** 2 * np.exp(2 * random.standard_normal(source.shape[1])))
        importance[random.random(source.shape[1]) < 0.02] = 0
        saved[f"importance.{tensor}"] = importance.astype(np.float32)
    for name, (_, elements, size, scale_at, plain) in TYPES.items():
        blocks = random.integers(0, 256, (4, size), np.uint8)
        if scale_at is not None:
            blocks[:, scale_at : scale_at + 2] = random.standard_normal(4).astype(np.float16).view(np.uint8).reshape(4, 2)
        else:
            blocks[:, 55] &= 0xBF  # the exponent of the scale spread over the block is then below 31
        saved[f"{name}.random.bytes"] = blocks
        saved[f"{name}.random.f32"] = dequantize(name, blocks)
        for tensor, source in rows.items():
            saved[f"{name}.{tensor}.weighted"] = quantize(name, source, saved[f"importance.{tensor}"])
            if plain:
                saved[f"{name}.{tensor}.plain"] = quantize(name, source, None)
    save_file({k: np.ascontiguousarray(v) for k, v in saved.items()}, FOLDER / "iq_blocks.safetensors")


main()
