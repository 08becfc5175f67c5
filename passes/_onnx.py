"""What several passes read of an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimize.passes._sensitivity import noisiest
from optimize.pipeline.batches import Encoded

GRAPH = "model.onnx"
PRODUCTS = ("MatMul", "Gemm", "Conv")


def read_graph(folder: Path) -> Any:
    """The graph of `folder`/model.onnx, without the weights that lie beside it."""
    import onnx

    return onnx.load(folder / GRAPH, load_external_data=False).graph


def input_names(folder: Path) -> list[str]:
    """What it is fed, in its own order."""
    return [port.name for port in read_graph(folder).input]


def quantized_products(before: Path, after: Path) -> dict[str, int]:
    """How many matrix products have weights from DequantizeLinear, of how many before. Raises RuntimeError for none."""
    nodes = read_graph(after).node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    quantized = sum(node.op_type in PRODUCTS and node.input[1] in dequantized for node in nodes)
    return coverage(quantized, count_nodes(before, PRODUCTS))


def count_nodes(folder: Path, operators: Sequence[str]) -> int:
    """How many nodes have one of these operators."""
    return sum(node.op_type in operators for node in read_graph(folder).node)


def coverage(quantized: int, eligible: int) -> dict[str, int]:
    """As facts of a step. Raises RuntimeError where nothing was quantized."""
    if not quantized:
        raise RuntimeError(f"none of {eligible} matrix products was quantized")
    return {"quantized": quantized, "eligible": eligible}


def noisiest_products(path: Path, feeds: list[Encoded], count: int) -> list[str]:
    """Names of the `count` products by weights whose inputs int8 represents worst: see noisiest."""
    if count == 0:
        return []
    import onnx
    import onnxruntime

    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in PRODUCTS and node.input[1] in weights]
    inputs = list(dict.fromkeys(node.input[0] for node in nodes))
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    taken = [port.name for port in session.get_inputs()]
    answers = (
        dict(zip(inputs, session.run(inputs, {name: feed[name] for name in taken}), strict=True)) for feed in feeds
    )
    return noisiest(
        [node.name for node in nodes], ([answer[node.input[0]] for node in nodes] for answer in answers), count
    )


class Feed:
    """ONNX Runtime's CalibrationDataReader, which quantizers read calibration batches through. Theirs would have to be
    imported to be inherited from.
    """

    def __init__(self, batches: Sequence[Encoded]) -> None:
        self._batches = batches
        self.rewind()

    def get_next(self) -> Encoded | None:
        return next(self._left, None)

    def get_first(self) -> Encoded:
        return self._batches[0]

    def rewind(self) -> None:
        self._left = iter(self._batches)
