"""Load a checkpoint folder as a transformers model: the one place that calls `from_pretrained` for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimize.models.tasks import TASKS
from optimize.models.weights import inspect_weights
from optimize.pipeline.errors import CheckpointError


def load_model(folder: Path, task: str, dtype: str | None = None) -> Any:
    """The eager model in inference mode, in `dtype` (torch's spelling) or that of its weights, not of its config; one
    that quantize-torchao made, in the dtype that it was made from.

    safetensors only, no remote code, no network. Raises CheckpointError when the checkpoint lacks weights that the
    task needs: transformers would fill them with random numbers and go on. A pooler that was never trained is left out.
    """
    import torch
    import transformers

    auto_class = getattr(transformers, TASKS[task].auto_class)
    options: dict[str, Any] = {
        "dtype": "auto" if is_quantized(folder) else getattr(torch, dtype or inspect_weights(folder).dtype),
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    model, info = auto_class.from_pretrained(folder, **options)
    missing = sorted(info["missing_keys"])
    if missing and all("pooler." in name for name in missing):
        model, info = auto_class.from_pretrained(folder, add_pooling_layer=False, **options)
        missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the checkpoint has no weights for {', '.join(missing[:3])}: it was not trained for {task}",
            hint="name the task that it was trained for with --task",
        )
    return model.eval()


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint's weights are torchao's: its config says so, and with what."""
    from optimize.models.checkpoint import read_config

    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == "torchao"


def sample_inputs(folder: Path) -> dict[str, Any]:
    """Two padded sentences as torch tensors of [2, sequence], by the names that the tokenizer gives: for tracing.

    Two, since a batch of one would be traced as a constant.
    """
    import torch

    from optimize.models.encoding import encode

    rows = [
        {"text": "A batch of one is traced as a constant."},
        {"text": "So there are two of them, unlike in length, padded."},
    ]
    (batch,) = encode(folder, rows, max_length=64, sizes=(2,))
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def dynamic_shapes(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """torch.export's dynamic shapes: batch and sequence vary, the latter up to what the model takes."""
    import torch

    from optimize.models.checkpoint import max_length, read_config

    batch = torch.export.Dim("batch", min=1, max=4096)
    sequence = torch.export.Dim("sequence", min=1, max=max_length(folder, read_config(folder)))
    return {name: {0: batch, 1: sequence} for name in inputs}


def copy_carried(folder: Path, out: Path) -> None:
    """Copy configuration and tokenizer along, so that a derived checkpoint is one by itself."""
    import shutil

    from optimize.models.checkpoint import carried_files

    for name in carried_files(folder):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
