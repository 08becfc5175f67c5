"""Load a checkpoint folder as a transformers model: the one place that calls `from_pretrained` for weights."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimize.models.casting import cast_weights
from optimize.models.tasks import TASKS
from optimize.models.weights import inspect_weights
from optimize.pipeline.contract import SPREAD
from optimize.pipeline.errors import CheckpointError, HostError


def load_model(
    folder: Path, task: str, dtype: str | None = None, device: str = "cpu", shards: int = 1, quantization: Any = None
) -> Any:
    """The eager model in inference mode, in `dtype` (torch's spelling) or that of its weights, not of its config; one
    that is quantized, in the dtype that it was made from. On another `device`, weights go there one by one; with
    `quantization`, one of transformers' configurations for it, each is quantized as it comes. Of `shards`, which are
    the processes of torch's default group, this one has its own, on the device that it has chosen. With device SPREAD,
    layers lie on all GPUs, one after the other. Raises HostError where those do not hold them.

    safetensors only, no remote code, no network. Raises CheckpointError when the checkpoint lacks weights that the
    task needs: transformers would fill them with random numbers and go on. A pooler that was never trained is left out.

    Weights are mapped into memory, not read: they count as resident where they are used, and the kernel may drop them.
    So weights of another dtype are cast into a temporary file first, which then is mapped in their place; on their way
    to another device they are cast one by one.
    """
    import torch
    import transformers

    stored = inspect_weights(folder).dtype
    if device == "cpu" and dtype not in (None, stored):
        # a mapped file is there for as long as its mapping, whatever becomes of its name
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            cast_checkpoint(folder, Path(scratch), str(dtype), task)
            return load_model(Path(scratch), task, device=device)
    auto_class = getattr(transformers, TASKS[task].auto_class)
    method = quantized_by(folder)
    options: dict[str, Any] = {
        "dtype": "auto" if method else getattr(torch, dtype or stored),
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if shards > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=shards)
    elif device != "cpu" or quantization is not None or method == "bitsandbytes":  # which goes to a GPU unasked
        options["device_map"] = device
    if quantization is not None:
        options["quantization_config"] = quantization
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
    if device == SPREAD and any(weight.device.type != "cuda" for weight in model.parameters()):
        raise HostError("the GPUs of this host do not hold the model", hint="leave more of their memory free")
    return model.eval()


def quantized_by(folder: Path) -> str:
    """With what the checkpoint's weights are quantized, as its config says: `torchao` or the like, or nothing."""
    from optimize.models.checkpoint import quantization, read_config

    return quantization(read_config(folder))


def sample_inputs(folder: Path, task: str = "feature-extraction", dtype: str = "float32") -> dict[str, Any]:
    """Two examples as torch tensors by input name, as the task's encoder makes them: for tracing. `dtype` is that of
    a model that is given floats.
    """
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in TASKS[task].encoder.encode_sample(folder).items()}
    floats = {name: each.to(getattr(torch, dtype)) for name, each in tensors.items() if each.is_floating_point()}
    return tensors | floats


def dynamic_shapes(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """torch.export's dynamic shapes: the batch varies, and the sequence of text, up to what the model takes."""
    import torch

    from optimize.models.checkpoint import max_length, read_config

    batch = torch.export.Dim("batch", min=1, max=4096)
    sequence = torch.export.Dim("sequence", min=1, max=max_length(folder, read_config(folder)))
    return {name: {0: batch, 1: sequence} if value.dim() == 2 else {0: batch} for name, value in inputs.items()}


def cast_checkpoint(folder: Path, out: Path, dtype: str, task: str) -> tuple[int, int]:
    """Write a checkpoint into the empty folder `out` with its floating-point weights in `dtype`.

    What transformers computes in float32 whatever it is asked for stays as it is. Returns how many tensors are in that
    type then, and of how many.
    """
    copy_carried(folder, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({"dtype": dtype} | _with_dtype(config, dtype), indent=2))
    return cast_weights(folder, out, dtype, _stays_float32(folder, dtype, task))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`from_pretrained` goes by the config where nobody names a dtype; transformers 4 called it torch_dtype."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if key in config}


def _stays_float32(folder: Path, dtype: str, task: str) -> Callable[[str], bool]:
    """Whether transformers computes with a weight in float32, by its name: asked of a model without weights."""
    if dtype == "float32":
        return lambda name: False
    import torch

    model = model_without_weights(folder, task, dtype)
    parts = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == "float16":
        parts |= {*(model._keep_in_fp32_modules or ())}
    patterns = [re.compile(part.replace("*", ".*")) for part in parts]  # as from_pretrained takes them
    wide = {name for name, value in model.state_dict().items() if value.dtype is torch.float32}
    return lambda name: (
        any(pattern.search(name) for pattern in patterns)
        or any(f".{name}".endswith(f".{each}") or f".{each}".endswith(f".{name}") for each in wide)
    )


def model_without_weights(folder: Path, task: str, dtype: str = "float32") -> Any:
    """Its modules and their shapes, by transformers' own word, on no device."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return getattr(transformers, TASKS[task].auto_class).from_config(config, dtype=getattr(torch, dtype))


def copy_carried(folder: Path, out: Path) -> None:
    """Copy configuration and tokenizer along, so that a derived checkpoint is one by itself."""
    import shutil

    from optimize.models.checkpoint import carried_files

    for name in carried_files(folder):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
