"""Models captured into CUDA graphs: a call is launched at once, so that small batches are not launch-bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from optimize.models.loading import load_model
from optimize.models.speech import read_decoding
from optimize.models.tasks import SEQUENCE, TASKS
from optimize.passes._captured_generation import CapturedGeneration
from optimize.passes._cuda_graphs import Captured, widened
from optimize.pipeline.contract import Array, Batch
from optimize.targets.runtimes.captured import CapturedGenerator, CapturedTranscriber
from optimize.targets.runtimes.cuda import seconds
from optimize.targets.runtimes.eager import end_nowhere
from optimize.targets.runtimes.tensors import to_numpy, to_torch


class CudaGraphSession:
    """Batches are padded up to a captured shape, and what comes out is cut back. One that fits no shape is computed by
    the model as it is.
    """

    seconds = staticmethod(seconds)

    def __init__(self, captured: Captured, task: str) -> None:
        self._captured, self.inputs = captured, captured.inputs
        self._axes = TASKS[task].outputs

    def run(self, batch: Batch) -> dict[str, Array]:
        rows, *rest = batch[self.inputs[0]].shape
        outputs = self.prepare(batch)()
        return {name: to_numpy(value)[:rows, : rest[0]] if self._per_token(name, value) else to_numpy(value)[:rows]
                for name, value in outputs.items()}  # fmt: skip

    def prepare(self, batch: Batch) -> Callable[[], dict[str, Any]]:
        """A call of that batch: its inputs, which lie on the device, go into the graph's buffers, and its outputs are
        copied from there, so that the next call does not overwrite them.
        """
        given = {name: batch[name] for name in self.inputs}
        found = self._captured.graph(given)
        if found is None:
            return self._uncaptured(self._on_device(given))
        shape, replay, buffers, outputs = found
        sources = list(self._on_device(widened(given, shape, self._captured.fill)).values())
        targets = [buffers[name] for name in self.inputs]

        def call() -> dict[str, Any]:
            torch._foreach_copy_(targets, sources)
            replay()
            return {name: value.clone() for name, value in outputs.items()}

        return call

    def _on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: to_torch(array, self._captured.model.dtype).cuda() for name, array in batch.items()}

    def _uncaptured(self, inputs: dict[str, torch.Tensor]) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            with torch.inference_mode():
                outputs = self._captured.model(**inputs)
            return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}

        return call

    def _per_token(self, name: str, value: torch.Tensor) -> bool:
        """Whether its second axis is the sequence: by the task's row, and by its axes for what the row has not."""
        return SEQUENCE in self._axes[name] if name in self._axes else value.dim() > 2


def open_session(path: Path, task: str, cores: int) -> CudaGraphSession | CapturedGenerator | CapturedTranscriber:
    torch.set_num_threads(cores)
    model = load_model(path, task, device="cuda")
    if TASKS[task].generates:
        return open_generation(path, model)
    return CudaGraphSession(Captured(path, model, task), task)


def open_generation(path: Path, model: Any) -> CapturedGenerator | CapturedTranscriber:
    """On the device that the model is on."""
    captured, device = CapturedGeneration(path, model), model.device.type
    if model.config.is_encoder_decoder:
        return CapturedTranscriber(model, read_decoding(path), captured, device)
    end_nowhere(model)
    return CapturedGenerator(model, captured, device)
