"""Weights in another floating-point type, file by file and piece by piece: no model is built, and what is resident does
not grow with it.

The safetensors format: see models/weights.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimize.models.weights import DTYPES, INDEX, SINGLE, inspect_weights

PIECE = 1 << 20  # elements that are cast at a time
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
FLOATS = ("F64", "F32", "F16", "BF16")  # narrower ones have scales beside them
NAMES = {torch: name for name, (_, torch) in DTYPES.items()}


def cast_weights(folder: Path, out: Path, dtype: str, kept: Callable[[str], bool]) -> tuple[int, int]:
    """Write a checkpoint's weights into `out`, floating-point ones in `dtype` (torch's spelling), names and shards as
    they are. A tensor whose name is `kept` stays as it is.

    Returns how many tensors are in that type then, and of how many. Raises CheckpointError as inspect_weights does.
    """
    files = inspect_weights(folder).files
    found = [_cast_file(folder / name, out / name, NAMES[dtype], kept) for name in files]
    if not (folder / SINGLE).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = sum(size for _, _, size in found)
        (out / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return sum(cast for cast, _, _ in found), sum(count for _, count, _ in found)


def align_weights(path: Path) -> None:
    """Write a safetensors file anew, with each tensor where vector instructions can read it as it is mapped.

    The format promises 8 bytes, as does what writes it; torch's product by int8 weights (2.13, CPU) ends in a
    segmentation fault unless there are 16.
    """
    aligned = path.with_suffix(".aligned")
    _cast_file(path, aligned, "F32", lambda name: True)
    aligned.replace(path)


def _cast_file(source: Path, out: Path, dtype: str, kept: Callable[[str], bool]) -> tuple[int, int, int]:
    """How many tensors are in `dtype` (safetensors' spelling), of how many, and their bytes."""
    with source.open("rb") as file, out.open("wb") as result:
        length = int.from_bytes(file.read(8), "little")
        tensors: dict[str, dict[str, Any]] = json.loads(file.read(length))
        metadata = tensors.pop("__metadata__", {"format": "pt"})
        dtypes = {
            name: dtype if tensor["dtype"] in FLOATS and not kept(name) else tensor["dtype"]
            for name, tensor in tensors.items()
        }
        header: dict[str, Any] = {"__metadata__": metadata}
        position = 0
        sizes = {
            name: _size(tensor) * _bits(dtypes[name]) // _bits(tensor["dtype"]) for name, tensor in tensors.items()
        }
        # round sizes first: then each tensor begins at a multiple of what divides its own size, up to ALIGNMENT
        for name in sorted(tensors, key=lambda name: -math.gcd(sizes[name], ALIGNMENT)):
            size = sizes[name]
            offsets = [position, position + size]
            header[name] = {"dtype": dtypes[name], "shape": tensors[name]["shape"], "data_offsets": offsets}
            position += size
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        result.write(len(text).to_bytes(8, "little") + text)
        for name in list(header)[1:]:
            begin, end = tensors[name]["data_offsets"]
            file.seek(8 + length + begin)
            _cast_tensor(file, result, end - begin, tensors[name]["dtype"], dtypes[name])
    return list(dtypes.values()).count(dtype), len(dtypes), position


def _cast_tensor(file: Any, result: Any, size: int, old: str, new: str) -> None:
    import torch

    while size > 0:
        data = bytearray(min(PIECE * _bits(old) // 8, size))
        size -= len(data)
        if file.readinto(data) != len(data):
            raise OSError(f"{file.name} became shorter while it was read")
        if old != new:
            values = torch.frombuffer(data, dtype=getattr(torch, DTYPES[old][1])).to(getattr(torch, DTYPES[new][1]))
            result.write(values.view(torch.uint8).numpy().data)
        else:
            result.write(data)


def _size(tensor: dict[str, Any]) -> int:
    begin, end = tensor["data_offsets"]
    return int(end - begin)


def _bits(dtype: str) -> int:
    return DTYPES[dtype][0]
