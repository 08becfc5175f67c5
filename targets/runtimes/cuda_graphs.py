"""Encoders captured into CUDA graphs: a call is launched at once, so that small batches are not launch-bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from optimize.models.loading import load_model
from optimize.passes._cuda_graphs import Captured, widened
from optimize.pipeline.contract import Array, Batch
from optimize.targets.runtimes.cuda import seconds
from optimize.targets.runtimes.tensors import to_numpy


class CudaGraphSession:
    """Batches are padded up to a captured shape, and what comes out is cut back."""

    seconds = staticmethod(seconds)

    def __init__(self, captured: Captured) -> None:
        self._captured, self.inputs = captured, captured.inputs

    def run(self, batch: Batch) -> dict[str, Array]:
        rows, tokens = batch["input_ids"].shape
        outputs = self.prepare(batch)()
        return {name: to_numpy(value)[:rows, :tokens] if value.dim() > 2 else to_numpy(value)[:rows]
                for name, value in outputs.items()}  # fmt: skip

    def prepare(self, batch: Batch) -> Callable[[], dict[str, Any]]:
        """A call of that batch: its inputs, which lie on the device, go into the graph's buffers, and its outputs are
        copied from there, so that the next call does not overwrite them.
        """
        shape, graph, buffers, outputs = self._captured.graph(*batch["input_ids"].shape)
        wide = widened({name: batch[name] for name in self.inputs}, shape, self._captured.fill)
        sources = [torch.from_numpy(wide[name]).cuda() for name in self.inputs]
        targets = [buffers[name] for name in self.inputs]

        def call() -> dict[str, Any]:
            torch._foreach_copy_(targets, sources)
            graph.replay()
            return {name: value.clone() for name, value in outputs.items()}

        return call


def open_session(path: Path, task: str, cores: int) -> CudaGraphSession:
    torch.set_num_threads(cores)
    return CudaGraphSession(Captured(path, load_model(path, task)))
