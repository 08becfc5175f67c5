"""Arrays between processes: batches of named arrays in one .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Encoded = dict[str, NDArray[Any]]  # input or output name -> array
# what a batch may have beside inputs, under names that no model's input can have
FIRST = "language.first"  # the index of the first token that is scored: of a window, or of each choice of a question
NEW = "language.new"  # of prompts: how many tokens are generated for each
UNTIMED = "language.untimed"  # prompts that are judged and belong to no cell of the workload


def save_batches(path: Path, batches: Sequence[Mapping[str, NDArray[Any]]]) -> None:
    """Write batches to one .npz: `INDEX/NAME` -> array."""
    arrays: dict[str, Any] = {
        f"{index}/{name}": array for index, batch in enumerate(batches) for name, array in batch.items()
    }
    np.savez(path, **arrays)


def load_batches(path: Path) -> list[Encoded]:
    """Read what `save_batches` wrote. Never unpickles. Raises ValueError for anything else."""
    batches: dict[int, Encoded] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                index, name = key.split("/", 1)
                batches.setdefault(int(index), {})[name] = file[key]
    except (EOFError, zipfile.BadZipFile, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has no batches of arrays: {error}") from error
    return [batches[index] for index in sorted(batches)]
