"""ONNX graphs, run by one of ONNX Runtime's providers for NVIDIA GPUs.

The provider for RTX is a plug-in; the others lie in onnxruntime-gpu. One that does not load would leave the work to the
processor without a word: that is refused.
Source: https://onnxruntime.ai/docs/execution-providers, https://nvidia.github.io/TensorRT-RTX-EP-ABI
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from optimize.passes.use_provider import CAPTURES, NAMES, PROVIDER
from optimize.pipeline.contract import Array, Batch
from optimize.pipeline.errors import HostError
from optimize.targets.runtimes.onnxruntime import OnnxSession

RTX = NAMES["tensorrt-rtx"]
GRAPHS = 16  # shapes that come again and are captured, at most: a session never gives one back
SEEN = 1024  # shapes that are remembered to have come once
GRAPH_ID, NONE = "gpu_graph_id", -1  # of a run: which CUDA graph it replays, or captures first
Shapes = tuple[tuple[int, ...], ...]


@dataclass
class Bound:
    """Buffers on the device, bound to the graph's inputs and outputs, and which CUDA graph computes between them."""

    held: list[Array]  # what was last put into those of the inputs
    inputs: list[OrtValue]
    outputs: list[OrtValue]
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions

    def hold(self, arrays: list[Array]) -> None:
        if self.held is not arrays:
            for value, array in zip(self.inputs, arrays, strict=True):
                value.update_inplace(array)
            self.held = arrays


class OnnxGpuSession(OnnxSession):
    """What is timed is a call whose inputs lie on the device and whose outputs stay there, until the next call: it
    returns when they do.

    With `captures`, the provider makes a CUDA graph of each shape that is timed, and of GRAPHS that come again.
    """

    def __init__(self, session: onnxruntime.InferenceSession, device: str = "cuda", *, captures: bool = False) -> None:
        super().__init__(session)
        self._device, self._captures = device, captures
        self._seen: set[Shapes] = set()
        self._repeats = 0  # how many of them were captured since they came again
        self._graphs: dict[Shapes, Bound] = {}

    def run(self, batch: Batch) -> dict[str, Array]:
        arrays = self._arrays(batch)
        bound = self._repeated(arrays) if self._captures else None
        if bound is None:
            outputs = self._session.run(None, dict(zip(self.inputs, arrays, strict=True)), _graph(NONE))
        else:
            bound.hold(arrays)
            self._session.run_with_iobinding(bound.binding, bound.options)
            outputs = [value.numpy() for value in bound.outputs]
        return {name: array.astype(np.float32) for name, array in zip(self._outputs, outputs, strict=True)}

    def prepare(self, batch: Batch) -> Callable[[], list[OrtValue]]:
        """A call of that batch, whose inputs stay on the device: in a CUDA graph's buffers, until others go there."""
        arrays = self._arrays(batch)
        if not self._captures:
            return self._uncaptured(self._bind(self._put(arrays)))
        bound = self._captured(arrays)

        def call() -> list[OrtValue]:
            bound.hold(arrays)
            self._session.run_with_iobinding(bound.binding, bound.options)
            return bound.outputs

        return call

    @staticmethod
    def seconds(call: Callable[[], Any]) -> float:
        """Of one call, by the host's clock: ONNX Runtime shows no stream whose events could be timed."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def _uncaptured(self, binding: onnxruntime.IOBinding) -> Callable[[], list[OrtValue]]:
        options = _graph(NONE)

        def call() -> list[OrtValue]:
            self._session.run_with_iobinding(binding, options)
            found: list[OrtValue] = binding.get_outputs()
            return found

        return call

    def _repeated(self, arrays: list[Array]) -> Bound | None:
        """What replays a batch of these shapes; None the first time that they come, and where enough others have."""
        shapes = _shapes(arrays)
        if shapes in self._graphs:
            return self._graphs[shapes]
        if shapes in self._seen and self._repeats < GRAPHS:
            self._repeats += 1
            return self._captured(arrays)
        if len(self._seen) < SEEN:
            self._seen.add(shapes)
        return None

    def _captured(self, arrays: list[Array]) -> Bound:
        shapes = _shapes(arrays)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(arrays)
        return self._graphs[shapes]

    def _capture(self, arrays: list[Array]) -> Bound:
        inputs = self._put(arrays)
        binding = self._bind(inputs)
        outputs = self._uncaptured(binding)()  # which tells their sizes, and sets up what a capture may not
        for name, value in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        bound = Bound(arrays, inputs, outputs, binding, _graph(len(self._graphs)))
        self._session.run_with_iobinding(binding, bound.options)
        return bound

    def _bind(self, inputs: list[OrtValue]) -> onnxruntime.IOBinding:
        """Those inputs, and outputs that each run allocates."""
        binding = self._session.io_binding()
        for name, value in zip(self.inputs, inputs, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)
        return binding

    def _arrays(self, batch: Batch) -> list[Array]:
        return [np.ascontiguousarray(array) for array in self._feed(batch).values()]

    def _put(self, arrays: list[Array]) -> list[OrtValue]:
        return [OrtValue.ortvalue_from_numpy(array.copy(), self._device, 0) for array in arrays]  # never the caller's


def _shapes(arrays: list[Array]) -> Shapes:
    return tuple(array.shape for array in arrays)


def _graph(number: int) -> onnxruntime.RunOptions:
    """Options of a run that replays that CUDA graph."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(number))
    return options


def open_session(path: Path, task: str, cores: int) -> OnnxGpuSession:
    chosen = json.loads((path / PROVIDER).read_text())
    provider, provided = chosen["provider"], chosen["options"]
    captures = provided.get(CAPTURES) == "1"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    onnxruntime.preload_dlls()  # CUDA's libraries, from beside it
    if provider == RTX:
        options.add_provider_for_devices(_devices(), provided)
        session = onnxruntime.InferenceSession(path / "model.onnx", options)
    else:
        session = _built_in(path, options, provider, provided)
    if provider not in session.get_providers():
        raise HostError(f"ONNX Runtime's {provider} did not load: the log says why, or see `nvidia-smi`")
    return OnnxGpuSession(session, captures=captures)


def _built_in(path: Path, options: Any, provider: str, provided: Mapping[str, str]) -> onnxruntime.InferenceSession:
    """Raises ValueError where it cannot be captured as it should be: some of it would compute on the processor."""
    try:
        return onnxruntime.InferenceSession(path / "model.onnx", options, providers=[(provider, provided)])
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        if "graph capture" not in str(error):
            raise
        raise ValueError(f"use-provider{{graphs=false}} takes it: {error}") from error


def _devices() -> list[onnxruntime.OrtEpDevice]:
    """The GPU that the plug-in takes. Raises HostError where it takes none."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    onnxruntime.register_execution_provider_library(RTX, plugin.get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX]
    if not found:
        raise HostError(f"ONNX Runtime's {RTX} takes none of this host's devices: it needs an RTX GPU")
    return found[:1]
