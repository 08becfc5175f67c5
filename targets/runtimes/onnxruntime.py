"""ONNX graphs, run by ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from optimize.passes._onnx import PRODUCTS
from optimize.pipeline.contract import Array, Batch
from optimize.pipeline.sessions import Layers
from optimize.targets.runtimes import weights_key


class OnnxSession:
    """An inference session; it allocates fresh outputs at each call. Those of 16 bits are widened, images narrowed."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(port.name for port in session.get_inputs())
        self._halves = {port.name for port in session.get_inputs() if port.type == "tensor(float16)"}
        self._outputs = [port.name for port in session.get_outputs()]

    def run(self, batch: Batch) -> dict[str, Array]:
        arrays = self._session.run(None, self._feed(batch))
        return {name: array.astype(np.float32, copy=False) for name, array in zip(self._outputs, arrays, strict=True)}

    def _feed(self, batch: Batch) -> dict[str, Array]:
        return {name: batch[name].astype(np.float16) if name in self._halves else batch[name] for name in self.inputs}


def layers(path: Path, task: str, batches: Sequence[Batch]) -> Layers:
    """Every tensor of floats, by its name in the graph. A product's is the one after its bias was added."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path / "model.onnx"))
    graph = model.graph
    products = _products(graph)
    own = {port.name for port in graph.output}
    floats = {info.name for info in graph.value_info if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    names = [name for node in graph.node for name in node.output if name in floats | own]
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in own)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # which would remove tensors
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = [port.name for port in session.get_inputs()]
    answers = (session.run(names, {name: batch[name] for name in taken}) for batch in batches)
    return Layers(tuple(dict(zip(names, arrays, strict=True)) for arrays in answers), products)


def _products(graph: Any) -> dict[str, str]:
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {}
    for node in graph.node:
        if node.op_type in PRODUCTS and node.input[1] in constants:
            (output,) = node.output
            after = users.get(output, [])
            if len(after) == 1 and after[0].op_type == "Add" and any(name in constants for name in after[0].input):
                (output,) = after[0].output
            found[output] = weights_key(numpy_helper.to_array(constants[node.input[1]]))
    return found


def open_session(path: Path, task: str, cores: int) -> OnnxSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    return OnnxSession(onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"]))
