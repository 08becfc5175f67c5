"""An eager encoder on a GPU, and how calls there are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optimize.pipeline.contract import Batch
from optimize.targets.runtimes.eager import EagerSession
from optimize.targets.runtimes.tensors import to_torch


def seconds(call: Callable[[], Any]) -> float:
    """Of one call on the current device, by its events: from when it is begun to when its work there is done."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    outputs = call()
    end.record()
    end.synchronize()
    del outputs
    return float(start.elapsed_time(end)) / 1e3


class CudaSession(EagerSession):
    """As EagerSession, with float32 in full: TF32 is off."""

    seconds = staticmethod(seconds)

    def __init__(self, model: Any, device: str) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        super().__init__(model, device)

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        """A call of that batch, whose inputs lie on the device and whose outputs stay there."""
        inputs = {name: to_torch(array, self.model.dtype).to(self.device) for name, array in batch.items()}

        def call() -> Any:
            with torch.inference_mode():
                return self.model(**inputs)

        return call
