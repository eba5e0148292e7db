#!/usr/bin/env python3
"""Writes testdata/imatrix: the same two weights as a GGUF importance matrix and in the legacy form.

usage: imatrix.py OUTPUT_FOLDER
"""

import struct
import sys
from pathlib import Path

# Name, columns, experts, sums of squares, vectors seen by each expert.
WEIGHTS = [
    ("blk.0.attn_q.weight", 4, 1, [1, 2, 3, 0], [3]),
    ("blk.0.ffn_down_exps.weight", 2, 3, [1, 2, 3, 4, 5, 6], [2, 0, 2]),
]
DATASET = "calibration.txt"
CHUNKS = 5


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def gguf():
    keys = [
        string("general.type") + struct.pack("<I", 8) + string("imatrix"),
        string("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + string(DATASET),
        string("imatrix.chunk_count") + struct.pack("<II", 4, CHUNKS),
        string("imatrix.chunk_size") + struct.pack("<II", 4, 512),
    ]
    infos, data = b"", b""
    for name, columns, experts, sums, counts in WEIGHTS:
        for suffix, first, values in ((".in_sum2", columns, sums), (".counts", 1, counts)):
            infos += string(name + suffix) + struct.pack("<IQQIQ", 2, first, experts, 0, len(data))
            data += struct.pack(f"<{len(values)}f", *values)
            data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2 * len(WEIGHTS), len(keys)) + b"".join(keys) + infos
    return head + bytes(-len(head) % 32) + data


def legacy():
    out = struct.pack("<i", len(WEIGHTS))
    # The second has no calls: its values are taken as they are.
    for (name, _, _, sums, _), calls in zip(WEIGHTS, (5, 0)):
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(sums))
        out += struct.pack(f"<{len(sums)}f", *sums)
    return out + struct.pack("<ii", CHUNKS, len(DATASET)) + DATASET.encode()


folder = Path(sys.argv[1])
(folder / "tiny.gguf").write_bytes(gguf())
(folder / "tiny.dat").write_bytes(legacy())
