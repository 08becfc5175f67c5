"""ONNX graphs, run by one of ONNX Runtime's providers for NVIDIA GPUs.

The provider for RTX is a plug-in; the others lie in onnxruntime-gpu. One that does not load would leave the work to the
processor without a word: that is refused.
Source: https://onnxruntime.ai/docs/execution-providers, https://nvidia.github.io/TensorRT-RTX-EP-ABI
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from optimize.passes.use_provider import NAMES, PROVIDER
from optimize.pipeline.contract import Batch
from optimize.pipeline.errors import HostError
from optimize.targets.runtimes.onnxruntime import OnnxSession

RTX = NAMES["tensorrt-rtx"]


class OnnxGpuSession(OnnxSession):
    """What is timed is a call whose inputs lie on the device and whose outputs stay there: it returns when they do."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str = "cuda") -> None:
        super().__init__(session)
        self._device = device

    def prepare(self, batch: Batch) -> Callable[[], onnxruntime.IOBinding]:
        binding = self._session.io_binding()
        for name in self.inputs:
            array = np.ascontiguousarray(batch[name])
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0))
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)

        def call() -> onnxruntime.IOBinding:
            self._session.run_with_iobinding(binding)
            return binding

        return call

    @staticmethod
    def seconds(call: Callable[[], Any]) -> float:
        """Of one call, by the host's clock."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def open_session(path: Path, task: str, cores: int) -> OnnxGpuSession:
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
    return OnnxGpuSession(session)


def _devices() -> list[onnxruntime.OrtEpDevice]:
    """The GPU that the plug-in takes. Raises HostError where it takes none."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    onnxruntime.register_execution_provider_library(RTX, plugin.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX]
    if not found:
        raise HostError(f"ONNX Runtime's {RTX} takes none of this host's devices: it needs an RTX GPU")
    return found[:1]
