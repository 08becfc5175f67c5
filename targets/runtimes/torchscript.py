"""TorchScript, run by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimize.passes._torchscript import MODEL
from optimize.pipeline.contract import Array, Batch
from optimize.targets.runtimes.tensors import to_numpy


class TorchscriptSession:
    """A traced model. Its inputs' names lie in its file."""

    def __init__(self, path: Path) -> None:
        extra = {"inputs": ""}
        self._model: Any = torch.jit.load(str(path / MODEL), _extra_files=extra)
        self.inputs = tuple(_text(extra["inputs"]).split(","))

    def run(self, batch: Batch) -> dict[str, Array]:
        with torch.no_grad():  # not inference mode, in which the extension's own operations refuse tensors
            outputs = self._model(*(torch.from_numpy(batch[name]) for name in self.inputs))
        return {name: to_numpy(value) for name, value in outputs.items()}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def open_session(path: Path, task: str, cores: int) -> TorchscriptSession:
    torch.set_num_threads(cores)
    return TorchscriptSession(path)
