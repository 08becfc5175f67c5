"""Encoders captured into CUDA graphs: a call is launched at once, so that small batches are not launch-bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from optimize.models.loading import load_model
from optimize.models.tasks import SEQUENCE, TASKS
from optimize.passes._cuda_graphs import Captured, widened
from optimize.pipeline.contract import Array, Batch
from optimize.targets.runtimes.cuda import seconds
from optimize.targets.runtimes.tensors import to_numpy


class CudaGraphSession:
    """Batches are padded up to a captured shape, and what comes out is cut back. One that fits no shape is computed by
    the model as it is.
    """

    seconds = staticmethod(seconds)

    def __init__(self, captured: Captured, task: str) -> None:
        self._captured, self.inputs = captured, captured.inputs
        self._axes = TASKS[task].outputs

    def run(self, batch: Batch) -> dict[str, Array]:
        rows, tokens = batch["input_ids"].shape
        outputs = self.prepare(batch)()
        return {name: to_numpy(value)[:rows, :tokens] if self._per_token(name, value) else to_numpy(value)[:rows]
                for name, value in outputs.items()}  # fmt: skip

    def prepare(self, batch: Batch) -> Callable[[], dict[str, Any]]:
        """A call of that batch: its inputs, which lie on the device, go into the graph's buffers, and its outputs are
        copied from there, so that the next call does not overwrite them.
        """
        given = {name: batch[name] for name in self.inputs}
        found = self._captured.graph(*batch["input_ids"].shape)
        if found is None:
            return self._uncaptured(given)
        shape, graph, buffers, outputs = found
        wide = widened(given, shape, self._captured.fill)
        sources = [torch.from_numpy(wide[name]).cuda() for name in self.inputs]
        targets = [buffers[name] for name in self.inputs]

        def call() -> dict[str, Any]:
            torch._foreach_copy_(targets, sources)
            graph.replay()
            return {name: value.clone() for name, value in outputs.items()}

        return call

    def _uncaptured(self, batch: Batch) -> Callable[[], dict[str, Any]]:
        inputs = {name: torch.from_numpy(array).cuda() for name, array in batch.items()}

        def call() -> dict[str, Any]:
            with torch.inference_mode():
                outputs = self._captured.model(**inputs)
            return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

        return call

    def _per_token(self, name: str, value: torch.Tensor) -> bool:
        """Whether its second axis is the sequence: by the task's row, and by its axes for what the row has not."""
        return SEQUENCE in self._axes[name] if name in self._axes else value.dim() > 2


def open_session(path: Path, task: str, cores: int) -> CudaGraphSession:
    torch.set_num_threads(cores)
    return CudaGraphSession(Captured(path, load_model(path, task)), task)
