"""ONNX graphs, run by one of ONNX Runtime's providers for NVIDIA GPUs.

The provider for RTX is a plug-in; the others lie in onnxruntime-gpu. One that does not load would leave the work to the
processor without a word: that is refused.
Source: https://onnxruntime.ai/docs/execution-providers, https://nvidia.github.io/TensorRT-RTX-EP-ABI
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime

from optimize.passes.use_provider import NAMES, PROVIDER
from optimize.pipeline.errors import HostError
from optimize.targets.runtimes.onnxruntime import OnnxSession

RTX = NAMES["tensorrt-rtx"]


def open_session(path: Path, task: str, cores: int) -> OnnxSession:
    chosen = json.loads((path / PROVIDER).read_text())
    provider, provided = chosen["provider"], chosen["options"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    onnxruntime.preload_dlls()  # CUDA's libraries, from beside it
    if provider == RTX:
        options.add_provider_for_devices(_devices(), provided)
        session = onnxruntime.InferenceSession(path / "model.onnx", options)
    else:
        session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=[(provider, provided)])
    if provider not in session.get_providers():
        raise HostError(f"ONNX Runtime's {provider} did not load: the log says why, or see `nvidia-smi`")
    return OnnxSession(session)


def _devices() -> list[onnxruntime.OrtEpDevice]:
    """The GPU that the plug-in takes. Raises HostError where it takes none."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    onnxruntime.register_execution_provider_library(RTX, plugin.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX]
    if not found:
        raise HostError(f"ONNX Runtime's {RTX} takes none of this host's devices: it needs an RTX GPU")
    return found[:1]
