"""AOTInductor packages, loaded by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimize.pipeline.contract import Array, Batch
from optimize.targets.runtimes.tensors import to_numpy, to_torch


class AotiSession:
    """A compiled package. Its inputs' names, and the dtype of those that are floats, lie in the package's metadata."""

    def __init__(self, package: Any) -> None:
        self._package = package
        metadata = package.get_metadata()
        self.inputs = tuple(metadata["inputs"].split(","))
        self._dtype = getattr(torch, metadata["dtype"])

    def run(self, batch: Batch) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = self._package(**{name: to_torch(batch[name], self._dtype) for name in self.inputs})
        return {name: to_numpy(value) for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def open_session(path: Path, task: str, cores: int) -> AotiSession:
    torch.set_num_threads(cores)
    return AotiSession(torch._inductor.aoti_load_package(str(path / "model.pt2")))
