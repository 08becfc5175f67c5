"""Tracing into TorchScript, which passes of two toolchains do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimize.models.tasks import TASKS
from optimize.pipeline.contract import Checkpoint

MODEL = "model.pt"


def why_not(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot be traced, or None."""
    if TASKS[checkpoint.task].generates:
        return "a trace is one forward pass: it has no KV cache to go on from"
    return None


def trace(model: Any, inputs: dict[str, Any], out: Path) -> int:
    """Write `model` as it computes on `inputs` (of [batch, sequence]), frozen. Returns how many operations it has.

    What is no tensor in its outputs, which come as a dictionary, is not there. Source: torch.jit
    """
    import torch

    class Plain(torch.nn.Module):  # type: ignore[misc]
        """The model with a plain dictionary of tensors as output, which is what TorchScript can give."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> dict[str, Any]:
            found = self.model(**dict(zip(inputs, values, strict=True)))
            return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    traced = torch.jit.trace(Plain().eval(), tuple(inputs.values()), strict=False, check_trace=False)
    frozen = torch.jit.freeze(traced)
    torch.jit.save(frozen, str(out / MODEL), _extra_files={"inputs": ",".join(inputs)})
    return len(list(frozen.inlined_graph.nodes()))


def check(out: Path) -> None:
    """Raise unless the model is there."""
    if not (out / MODEL).is_file():
        raise FileNotFoundError(f"torch wrote no {MODEL}")
