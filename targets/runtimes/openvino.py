"""OpenVINO IRs, run by OpenVINO's CPU plugin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from optimize.models.tasks import TASKS
from optimize.passes.convert_openvino import IR, RUNTIME_OPTIONS
from optimize.passes.quantize_openvino import PRODUCTS, is_product_of_weights, weight_of
from optimize.pipeline.contract import Array, Batch, Form
from optimize.pipeline.sessions import Layers
from optimize.targets.runtimes import weights_key

# operations whose outputs are layers to a reader; what lies between them is layout and arithmetic of one layer
SHOWN = (*PRODUCTS, "Gather", "Add", "Gelu", "Relu", "Tanh", "MVN", "ScaledDotProductAttention", "Softmax")


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


def layers(path: Path, task: str, batches: Sequence[Batch]) -> Layers:
    """The operations of SHOWN, by their friendly names. A product's is the one after its bias was added."""
    model = openvino.Core().read_model(path / IR)
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in SHOWN and _is_real_array(node)]
    products = {}
    for node in nodes:
        if is_product_of_weights(node):
            users = [port.get_node() for port in node.output(0).get_target_inputs()]
            biased = len(users) == 1 and users[0].get_type_name() == "Add"
            last = users[0] if biased else node
            products[last.get_friendly_name()] = weights_key(np.asarray(weight_of(node).data))
    names = [node.get_friendly_name() for node in nodes]
    probe = openvino.Model([node.output(0) for node in nodes], model.get_parameters(), "layers")
    compiled = openvino.Core().compile_model(probe, "CPU", json.loads((path / RUNTIME_OPTIONS).read_text()))
    taken = [port.any_name for port in compiled.inputs]
    outputs = []
    for batch in batches:
        answer = compiled({name: batch[name] for name in taken})
        outputs.append({name: np.array(answer[index], dtype=np.float32) for index, name in enumerate(names)})
    return Layers(tuple(outputs), products)


def _is_real_array(node: Any) -> bool:
    """Not a number that shapes are reckoned with."""
    port = node.output(0)
    return bool(port.get_element_type().is_real() and port.get_partial_shape().rank.get_length() > 1)


def open_session(path: Path, task: str, cores: int) -> Any:
    options = {"INFERENCE_NUM_THREADS": cores} | json.loads((path / RUNTIME_OPTIONS).read_text())
    if TASKS[task].form is Form.CLIPS:
        from optimize.targets.runtimes.openvino_transcriber import OpenvinoTranscriber

        return OpenvinoTranscriber(path, options)
    if TASKS[task].generates:
        from optimize.targets.runtimes.openvino_generator import OpenvinoGenerator  # an encoder needs no openvino-genai

        return OpenvinoGenerator(path, options)
    return OpenvinoSession(openvino.Core().compile_model(path / IR, "CPU", options))
