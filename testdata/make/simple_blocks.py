"""Writes testdata/ggml/simple_blocks.safetensors: what llama.cpp makes of a few rows, for every type that is neither a
K-quant nor an IQ type.

Run with numpy and safetensors installed: python testdata/make/simple_blocks.py PATH/libggml-base.so
`rows` are the sources, `importance` one importance per column. For each type: `<TYPE>.bytes` without and
`<TYPE>.weighted` with importance (ggml_quantize_chunk), `<TYPE>.f32` the bytes dequantized, `<TYPE>.random` blocks of
random bytes (finite scales) and `<TYPE>.random.f32` what they stand for. Types without to_float in ggml: the product in
numpy.
"""

import ctypes as c
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GGML = Path(__file__).parent.parent / "ggml"
COLUMNS = 512

# name: number, block length, block bytes, offsets of f16 scales
QUANTIZED = {
    "Q4_0": (2, 32, 18, [0]),
    "Q4_1": (3, 32, 20, [0, 2]),
    "Q5_0": (6, 32, 22, [0]),
    "Q5_1": (7, 32, 24, [0, 2]),
    "Q8_0": (8, 32, 34, [0]),
    "TQ1_0": (34, 256, 54, [52]),
    "TQ2_0": (35, 256, 66, [64]),
    "MXFP4": (39, 32, 17, []),
    "NVFP4": (40, 64, 36, []),
    "Q1_0": (41, 128, 18, [0]),
    "Q2_0": (42, 64, 18, [0]),
}

lib = c.CDLL(sys.argv[1])
floats = c.POINTER(c.c_float)
lib.ggml_quantize_chunk.restype = c.c_size_t
lib.ggml_quantize_chunk.argtypes = [c.c_int, floats, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, floats]


class Traits(c.Structure):
    _fields_ = [
        ("name", c.c_char_p),
        ("block_len", c.c_int64),
        ("interleave", c.c_int64),
        ("block_bytes", c.c_size_t),
        ("quantized", c.c_bool),
        ("to_float", c.CFUNCTYPE(None, c.c_void_p, floats, c.c_int64)),
        ("from_float", c.CFUNCTYPE(None, floats, c.c_void_p, c.c_int64)),
    ]


lib.ggml_get_type_traits.restype = c.POINTER(Traits)


def pointer(x):
    return None if x is None else x.ctypes.data_as(floats)


def quantized(number, row_bytes, rows, importance):
    out = np.zeros((len(rows), row_bytes), np.uint8)
    written = lib.ggml_quantize_chunk(
        number, pointer(rows), out.ctypes.data, 0, len(rows), rows.shape[1], pointer(importance)
    )
    assert written == out.size
    return out


def dequantized(number, packed, columns):
    out = np.zeros((len(packed), columns), np.float32)
    for bytes_, row in zip(packed, out):
        lib.ggml_get_type_traits(number).contents.to_float(bytes_.ctypes.data, pointer(row), columns)
    return out


def sources(rng):
    """Real weights, Gaussians, heavy tails, and what breaks quantizers."""
    real = load_file(GGML / "blocks.safetensors")["F32.blk.2.ffn_up.weight"][0]
    gauss = rng.standard_normal(COLUMNS)
    edge = np.concatenate(
        [
            np.zeros(32),
            np.full(32, -0.0),
            np.full(32, 0.25),
            np.full(32, -0.25),
            np.linspace(-2, 2, 32),  # ties
            np.abs(gauss[:32]) + 1,  # min above zero
            -np.abs(gauss[:32]) - 1,  # max below zero
            np.r_[np.zeros(31), 7.0],
            gauss[:32] * 1e-6,
            gauss[:32] * 1e-16,
            gauss[:32] * 1e-39,  # subnormal, with an infinite inverse
            gauss[:32] * 6e4,  # scales beyond f16
            gauss[:32] * 1e30,
            np.r_[-1e4, gauss[:31]],
            np.r_[1, -1, gauss[:30] * 0.1],
            2.0 ** -np.arange(32),
        ]
    )
    just_below = np.repeat(
        [np.nextafter(np.float32(2.0**k), np.float32(0)) for k in (-100, -20, -3, -1, 0, 1, 3, 5, 10, 17, 40, 70, 100, 120, 126, -126)],
        32,
    )
    rows = [real, gauss * 0.05, rng.standard_t(2, COLUMNS) * 0.02, edge, just_below]
    return np.stack(rows).astype(np.float32)


def main():
    rng = np.random.default_rng(1)
    rows = sources(rng)
    importance = rng.exponential(size=COLUMNS).astype(np.float32) ** 2
    importance[::7] = 0
    importance[64:96] = 0
    out = {"rows": rows, "importance": importance}
    for name, (number, block_len, block_bytes, scales) in QUANTIZED.items():
        row_bytes = COLUMNS // block_len * block_bytes
        out[f"{name}.bytes"] = quantized(number, row_bytes, rows, None)
        out[f"{name}.weighted"] = quantized(number, row_bytes, rows, importance)
        out[f"{name}.f32"] = dequantized(number, out[f"{name}.bytes"], COLUMNS)
        blocks = rng.integers(0, 256, (COLUMNS // block_len, block_bytes), np.uint8)
        for at in scales:
            blocks[:, at : at + 2] = rng.standard_normal(len(blocks)).astype(np.float16)[:, None].view(np.uint8)
        out[f"{name}.random"] = blocks.reshape(1, -1)
        out[f"{name}.random.f32"] = dequantized(number, out[f"{name}.random"], COLUMNS)

    d = rng.standard_normal(16).astype(np.float16)
    q = rng.integers(-127, 128, (16, 32), np.int8)
    s = (d.astype(np.float32) * q.sum(1)).astype(np.float16)
    out["Q8_1.random"] = np.concatenate([d[:, None].view(np.uint8), s[:, None].view(np.uint8), q.view(np.uint8)], 1).reshape(1, -1)
    out["Q8_1.random.f32"] = (d.astype(np.float32)[:, None] * q.astype(np.float32)).reshape(1, -1)
    d = rng.standard_normal(2).astype(np.float32)
    q = rng.integers(-128, 128, (2, 256), np.int8)
    sums = q.reshape(2, 16, 16).sum(2).astype(np.int16)
    out["Q8_K.random"] = np.concatenate([d[:, None].view(np.uint8), q.view(np.uint8), sums.view(np.uint8)], 1).reshape(1, -1)
    out["Q8_K.random.f32"] = (d[:, None] * q.astype(np.float32)).reshape(1, -1)
    for name in ["I8", "I16", "I32", "I64"]:
        dtype = np.dtype(name.replace("I", "int").lower())
        numbers = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 64, dtype)
        numbers[:2] = np.iinfo(dtype).min, np.iinfo(dtype).max
        out[f"{name}.random"] = numbers.view(np.uint8).reshape(1, -1)
        out[f"{name}.random.f32"] = numbers.astype(np.float32).reshape(1, -1)
    numbers = rng.standard_normal(64) * 10.0 ** rng.integers(-50, 50, 64)
    out["F64.random"] = numbers.view(np.uint8).reshape(1, -1)
    with np.errstate(over="ignore"):
        out["F64.random.f32"] = numbers.astype(np.float32).reshape(1, -1)
    save_file({k: np.ascontiguousarray(v) for k, v in out.items()}, GGML / "simple_blocks.safetensors")


main()
