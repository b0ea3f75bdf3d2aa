"""The arrays of a cache, in memory or in a file of their own that is mapped.

Layout of a file:

    1. MAGIC, 16 bytes.
    2. The length of the header in bytes, uint64, little endian.
    3. The header: JSON, {"description": ..., "sha256": of the description as it is written}.
    4. The arrays, each from the next multiple of ALIGNMENT on, in the order of the table that `lay_out` makes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = b"sparsekd teacher"
ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 1 << 24

# Name -> (shape, dtype).
Arrays = Mapping[str, tuple[tuple[int, ...], str]]


def num_bytes(arrays: Arrays) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())


def in_memory(arrays: Arrays) -> dict[str, Tensor]:
    """Arrays of zeros."""
    return {name: torch.from_numpy(np.zeros(shape, dtype)) for name, (shape, dtype) in arrays.items()}


def mapped(path: Path, description: Mapping[str, Any], arrays: Arrays) -> dict[str, Tensor]:
    """The arrays of the file, which is made, with zeros, where there is none.

    Raises ValueError for a file of something else, of another `description`, or one that is damaged.
    """
    if path.is_dir():
        raise ValueError(f"sparsekd.TeacherCache: {path} is a folder; give the path of a file in it")
    if not path.exists():
        _create(path, description, arrays)
    begin = _check(path, description)
    offsets, end = _lay_out(begin, arrays)
    size = path.stat().st_size
    if size != end:
        raise ValueError(
            f"sparsekd.TeacherCache: {path} is damaged: expected {end} bytes, got {size}; delete it, and the teacher "
            "is run again"
        )
    return {
        name: torch.from_numpy(np.memmap(path, dtype, "r+", offsets[name], shape))
        if math.prod(shape)
        else torch.from_numpy(np.zeros(shape, dtype))  # nothing can be mapped to nothing
        for name, (shape, dtype) in arrays.items()
    }


def _create(path: Path, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Whole or not at all: a file of another name, which takes its place once it is as long as it will be."""
    text = json.dumps(description)
    header = json.dumps({"description": description, "sha256": _digest(text)}).encode()
    _, end = _lay_out(len(MAGIC) + _LENGTH.size + len(header), arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(MAGIC + _LENGTH.pack(len(header)) + header)
            file.truncate(end)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check(path: Path, description: Mapping[str, Any]) -> int:
    """Where the header ends, of a file that belongs to this description."""
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + _LENGTH.size)
        if start[: len(MAGIC)] != MAGIC:
            raise ValueError(
                f"sparsekd.TeacherCache: {path} is no file of a TeacherCache; give another path, or delete it"
            )
        length = _LENGTH.unpack(start[len(MAGIC) :])[0] if len(start) == len(MAGIC) + _LENGTH.size else 0
        text = file.read(min(length, _LONGEST_HEADER))
    try:
        header = json.loads(text)
        theirs, digest = header["description"], header["sha256"]
    except (ValueError, KeyError, TypeError):
        theirs = digest = None
    if digest is None or digest != _digest(json.dumps(theirs)):
        raise ValueError(
            f"sparsekd.TeacherCache: the header of {path} is damaged; delete it, and the teacher is run again"
        )
    ours = json.loads(json.dumps(description))
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"sparsekd.TeacherCache: {path} belongs to something else: expected {key} {ours.get(key)}, got "
                f"{theirs.get(key)}; give another path, or delete it, and the teacher is run again"
            )
    return len(start) + length


def _lay_out(begin: int, arrays: Arrays) -> tuple[dict[str, int], int]:
    """Where each array begins, and the length of the file."""
    offsets, end = {}, begin
    for name, (shape, dtype) in arrays.items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + math.prod(shape) * np.dtype(dtype).itemsize
    return offsets, end


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
