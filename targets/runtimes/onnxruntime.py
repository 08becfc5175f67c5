"""ONNX graphs, run by ONNX Runtime's CPU provider."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from optimize.pipeline.contract import Array, Batch


class OnnxSession:
    """An inference session; it allocates fresh outputs at each call."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(port.name for port in session.get_inputs())
        self._outputs = [port.name for port in session.get_outputs()]

    def run(self, batch: Batch) -> dict[str, Array]:
        arrays = self._session.run(None, {name: batch[name] for name in self.inputs})
        return dict(zip(self._outputs, arrays, strict=True))


def open_session(path: Path, task: str, cores: int) -> OnnxSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    return OnnxSession(onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"]))
