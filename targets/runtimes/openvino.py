"""OpenVINO IRs, run by OpenVINO's CPU plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from optimize.passes.convert_openvino import IR, RUNTIME_OPTIONS
from optimize.pipeline.contract import Array, Batch


class OpenvinoSession:
    """One infer request. Outputs are copied: the next call overwrites the request's own buffers."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self.inputs = tuple(port.any_name for port in compiled.inputs)
        self._outputs = [port.any_name for port in compiled.outputs]

    def run(self, batch: Batch) -> dict[str, Array]:
        self._request.infer({name: batch[name] for name in self.inputs}, share_inputs=True)
        tensors = [self._request.get_output_tensor(index).data for index in range(len(self._outputs))]
        return {name: np.array(tensor) for name, tensor in zip(self._outputs, tensors, strict=True)}


def open_session(path: Path, task: str, cores: int) -> OpenvinoSession:
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": cores}
    options |= json.loads((path / RUNTIME_OPTIONS).read_text())
    return OpenvinoSession(openvino.Core().compile_model(path / IR, "CPU", options))
