"""What opens an artifact: one file per kind, each with `open_session(path, task, cores) -> Session`; where a server
takes and gives text alone, `tokenizer` is one more argument, a folder that has the checkpoint's.

Only a worker (or `optimize.load`) opens one, so these modules import their libraries at the top.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from optimize.pipeline.contract import Array, Batch, Kind
from optimize.pipeline.sessions import Layers, Session

TEXTUAL = (Kind.OLLAMA,)
PLACED = (Kind.CHECKPOINT, Kind.TENSOR_PARALLEL)  # kinds that run on either device; others say where by what they are
RUNTIMES = {
    Kind.CHECKPOINT: "eager",
    Kind.AOTI: "aoti",
    Kind.ONNX: "onnxruntime",
    Kind.ONNX_GPU: "onnxruntime_gpu",
    Kind.OPENVINO: "openvino",
    Kind.GGUF: "llamacpp",
    Kind.GENAI: "genai",
    Kind.OLLAMA: "ollama",
    Kind.TORCHSCRIPT: "torchscript",
    Kind.IPEX: "ipex",
    Kind.TENSORRT: "tensorrt",
    Kind.TENSORRT_RTX: "tensorrt_rtx",
    Kind.TENSORRT_LLM: "tensorrt_llm",
    Kind.CUDA_GRAPHS: "cuda_graphs",
    Kind.TENSOR_PARALLEL: "tensor_parallel",
    Kind.VLLM: "vllm",
}


def layers(kind: Kind, path: Path, task: str, batches: Sequence[Batch]) -> Layers | None:
    """What an artifact computes on the way; None for a kind that does not show it."""
    look = getattr(importlib.import_module(f"optimize.targets.runtimes.{RUNTIMES[kind]}"), "layers", None)
    return None if look is None else cast(Layers, look(path, task, batches))


def weights_key(weights: Array) -> str:
    """The same for one matrix in every kind, transposed or not: its size and norm."""
    return f"{weights.size} {np.linalg.norm(weights.astype(np.float64)):.6e}"


def open_session(
    kind: Kind, path: Path, task: str, cores: int, tokenizer: Path | None = None, device: str = "cpu",
    dtype: str | None = None,
) -> Session:  # fmt: skip
    """Open an artifact folder with the runtime of its kind, on `cores` threads and that device (torch's spelling). An
    emitted one has its tokenizer. A checkpoint may be computed in another `dtype` than it has.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, by what is imported next: see pipeline/workers.py
    module = importlib.import_module(f"optimize.targets.runtimes.{RUNTIMES[kind]}")
    options: dict[str, Any] = {"tokenizer": tokenizer or path} if kind in TEXTUAL else {}
    options |= {"device": device} if kind in PLACED else {}
    options |= {"dtype": dtype} if dtype is not None else {}
    return cast(Session, module.open_session(path, task, cores, **options))
