"""Engines of TensorRT and of TensorRT for RTX, which share one Python interface.

Device memory is given once, for the widest profile; work is queued on one stream. Calls of a shape that comes again are
captured into a CUDA graph. Source: https://docs.nvidia.com/deeplearning/tensorrt
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda

from optimize.passes._tensorrt import ENGINE, FACTS, make_logger
from optimize.pipeline.contract import Array, Batch
from optimize.pipeline.errors import HostError

GRAPHS = 16  # shapes whose graphs are kept
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class EngineSession:
    """An engine with its context. Inputs are copied to the device and outputs back, but not while a call is timed."""

    def __init__(self, trt: Any, path: Path) -> None:
        self._trt, logger = trt, make_logger(trt)
        facts = json.loads((path / FACTS).read_text())
        _check_device(facts["compute_capabilities"])
        engine = trt.Runtime(logger).deserialize_cuda_engine((path / ENGINE).read_bytes())
        if engine is None:
            raise HostError(f"TensorRT {trt.__version__} refuses the engine: {logger.tail()}")
        self._engine, self._context = engine, engine.create_execution_context()
        self._profiles: list[Any] = [tuple(map(tuple, each)) for each in facts["profiles"]]
        self.inputs = tuple(facts["inputs"])
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._outputs = [name for name in names if name not in self.inputs]
        self._stream = _checked(cuda.cudaStreamCreate())
        widest = dict.fromkeys(self.inputs, self._profiles[0][2])
        self._select(0)
        self._shape(widest)
        self._memory = {name: _checked(cuda.cudaMalloc(self._bytes(name))) for name in names}
        for name, pointer in self._memory.items():
            self._context.set_tensor_address(name, pointer)
        self._graphs: OrderedDict[Shapes, Any] = OrderedDict()
        self._seen: set[Shapes] = set()

    def run(self, batch: Batch) -> dict[str, Array]:
        feeds, shapes = self._feeds(batch)
        for name, feed in feeds.items():
            self._copy(self._memory[name], feed.ctypes.data, feed.nbytes, "cudaMemcpyHostToDevice")
        self._queue(shapes)
        outputs = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name)) for name in self._outputs
        }
        for name, array in outputs.items():
            self._copy(array.ctypes.data, self._memory[name], array.nbytes, "cudaMemcpyDeviceToHost")
        _checked(cuda.cudaStreamSynchronize(self._stream))
        return {name: array.astype(np.float32) for name, array in outputs.items()}

    def prepare(self, batch: Batch) -> Callable[[], None]:
        """A call of that batch, whose inputs lie on the device and whose outputs stay there."""
        feeds, shapes = self._feeds(batch)
        sources = {name: _checked(cuda.cudaMalloc(feed.nbytes)) for name, feed in feeds.items()}
        for name, feed in feeds.items():
            self._copy(sources[name], feed.ctypes.data, feed.nbytes, "cudaMemcpyHostToDevice")
        _checked(cuda.cudaStreamSynchronize(self._stream))

        def call() -> None:
            for name, feed in feeds.items():
                self._copy(self._memory[name], sources[name], feed.nbytes, "cudaMemcpyDeviceToDevice")
            self._queue(shapes)

        return call

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, by the device's events: see cuda.seconds."""
        start, end = _checked(cuda.cudaEventCreate()), _checked(cuda.cudaEventCreate())
        _checked(cuda.cudaStreamSynchronize(self._stream))
        _checked(cuda.cudaEventRecord(start, self._stream))
        call()
        _checked(cuda.cudaEventRecord(end, self._stream))
        _checked(cuda.cudaEventSynchronize(end))
        taken = float(_checked(cuda.cudaEventElapsedTime(start, end))) / 1e3
        for event in (start, end):
            _checked(cuda.cudaEventDestroy(event))
        return taken

    def _feeds(self, batch: Batch) -> tuple[dict[str, Array], Shapes]:
        feeds = {name: np.ascontiguousarray(batch[name], dtype=self._dtype(name)) for name in self.inputs}
        return feeds, tuple((name, feed.shape) for name, feed in feeds.items())

    def _queue(self, shapes: Shapes) -> None:
        """One call; at the second of one shape it is captured, and launched as a graph from then on."""
        self._select(self._fitting(dict(shapes)))
        self._shape(dict(shapes))
        if shapes in self._graphs:
            self._graphs.move_to_end(shapes)
            _checked(cuda.cudaGraphLaunch(self._graphs[shapes], self._stream))
            return
        if shapes not in self._seen:  # what the first call of a shape sets up cannot be captured
            self._seen.add(shapes)
            self._enqueue()
            return
        _checked(cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        self._enqueue()
        graph = _checked(cuda.cudaStreamEndCapture(self._stream))
        self._graphs[shapes] = _checked(cuda.cudaGraphInstantiate(graph, 0))
        if len(self._graphs) > GRAPHS:
            _checked(cuda.cudaGraphExecDestroy(self._graphs.popitem(last=False)[1]))
        _checked(cuda.cudaGraphLaunch(self._graphs[shapes], self._stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise RuntimeError("the engine did not run")

    def _fitting(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The profile of this shape alone, or else the wide one. Raises ValueError where that is too narrow."""
        shape = next(iter(shapes.values()))
        for index, (least, _, most) in reversed(list(enumerate(self._profiles))):
            if all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                return int(index)
        raise ValueError(f"the engine takes up to {list(self._profiles[0][2])}, and was given {list(shape)}")

    def _select(self, profile: int) -> None:
        if self._context.active_optimization_profile != profile:
            self._context.set_optimization_profile_async(profile, self._stream)
            _checked(cuda.cudaStreamSynchronize(self._stream))

    def _shape(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ValueError(f"the engine does not take {name} of {list(shape)}")

    def _dtype(self, name: str) -> Any:
        return self._trt.nptype(self._engine.get_tensor_dtype(name))

    def _bytes(self, name: str) -> int:
        return int(math.prod(self._context.get_tensor_shape(name)) * np.dtype(self._dtype(name)).itemsize)

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        _checked(cuda.cudaMemcpyAsync(to, source, size, getattr(cuda.cudaMemcpyKind, kind), self._stream))


def _check_device(capabilities: list[str]) -> None:
    """Raise HostError where no GPU is here, or none that the engine was built for."""
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or not count:
        wanted = f" of compute capability {' or '.join(capabilities)}" if capabilities else ""
        raise HostError(f"the engine needs an NVIDIA GPU{wanted}, and this host has none ({error.name})")
    properties = _checked(cuda.cudaGetDeviceProperties(0))
    found = f"{properties.major}.{properties.minor}"
    if capabilities and found not in capabilities:
        raise HostError(f"the engine is for compute capability {' or '.join(capabilities)}, and this GPU has {found}")


def _checked(answer: tuple[Any, ...]) -> Any:
    error, *values = answer
    if error != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None
