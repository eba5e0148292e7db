#!/usr/bin/env python3
"""Prints what llama.cpp's quantizer makes of small models: source, file type, SHA-256 of the whole file.

Needs llama-cpp-python. The file types are those that need no importance matrix.

usage: quantize.py MODEL_FOLDER [FILE_TYPE=NUMBER ...] > testdata/quantize/llama-cpp.txt
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import llama_cpp

SOURCES = ["tiny-mistral.F32.gguf", "tiny-llama-256.Q4_K.gguf"]
FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q4_K_S": 14, "Q4_K_M": 15,
    "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
}  # fmt: skip

more = dict(pair.split("=") for pair in sys.argv[2:])
FILE_TYPES.update({name: int(number) for name, number in more.items()})
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
for source in SOURCES:
    for name, number in FILE_TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = number
        params.nthread = 1
        params.allow_requantize = True
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.gguf"
            code = llama_cpp.llama_model_quantize(
                str(Path(sys.argv[1]) / source).encode(), str(out).encode(), params
            )
            if code != 0:
                sys.exit(f"{source} {name}: refused")
            print(source, name, hashlib.sha256(out.read_bytes()).hexdigest())
