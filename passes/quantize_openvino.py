"""quantize-openvino: int8 by NNCF, weights and activations on calibration text (static) or weights alone (weights)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from optimize.passes.convert_openvino import IR, write_precision
from optimize.pipeline.batches import Encoded, load_batches
from optimize.pipeline.contract import Artifact, Context, Kind, Pass

RANKING_SAMPLES = 16


@dataclass(frozen=True)
class QuantizeOpenvino(Pass):
    """NNCF post-training quantization with its transformer scheme (SmoothQuant, fast bias correction).

    `keep` leaves that many matrix products in floating point: those whose inputs int8 represents worst, ranked by the
    quantization noise of their calibrated range against their root mean square. In BERT's kin these are the first
    layers' feed-forward outputs. Raises RuntimeError when nothing was quantized.
    Source: https://docs.openvino.ai (NNCF post-training quantization, weight compression)
    """

    name: ClassVar = "quantize-openvino"
    accepts: ClassVar = Kind.OPENVINO
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 1
    tools: ClassVar = ("openvino", "nncf")

    mode: Literal["static", "weights"] = "static"
    samples: int = 128
    keep: int = 0

    @property
    def calibrated(self) -> bool:
        return self.mode == "static"

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import nncf
        import openvino

        model = openvino.Core().read_model(source.path / IR)
        eligible = _count(model, _is_matmul_of_weights)
        kept: list[str] = []
        if self.mode == "weights":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        else:
            if context.calibration is None:
                raise RuntimeError("static quantization needs calibration data")
            names = {port.any_name for port in model.inputs}
            batches = load_batches(context.calibration)[: self.samples]
            feeds = [{name: array for name, array in batch.items() if name in names} for batch in batches]
            kept = _noisiest(model, feeds[:RANKING_SAMPLES], self.keep)
            model = nncf.quantize(
                model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=kept),
            )  # fmt: skip
        quantized = _count(
            model, lambda node: _is_matmul_of_weights(node) and _weight(node).get_element_type().size == 1
        )
        if not quantized:
            raise RuntimeError(f"none of {eligible} matrix products was quantized")
        openvino.save_model(model, out / IR, compress_to_fp16=False)
        write_precision(out, "f32")
        return {"quantized": quantized, "eligible": eligible, "kept": kept}


def _noisiest(model: Any, feeds: list[Encoded], count: int) -> list[str]:
    """Names of the `count` matrix products by weights whose inputs int8 represents worst, worst first."""
    import openvino

    if count == 0:
        return []
    nodes = [node for node in model.get_ordered_ops() if _is_matmul_of_weights(node)]
    probe = openvino.Model([node.input_value(0) for node in nodes], model.get_parameters(), "inputs of products")
    compiled = openvino.Core().compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    low, high, squares = np.full(len(nodes), np.inf), np.full(len(nodes), -np.inf), np.zeros(len(nodes))
    elements = np.zeros(len(nodes))
    for feed in feeds:
        arrays = compiled(feed)
        for index in range(len(nodes)):
            array = arrays[index]
            low[index], high[index] = min(low[index], array.min()), max(high[index], array.max())
            squares[index] += np.square(array, dtype=np.float64).sum()
            elements[index] += array.size
    step = (high - low) / 255
    noise = step / math.sqrt(12) / np.sqrt(squares / elements)  # of uniform rounding
    return [nodes[index].get_friendly_name() for index in np.argsort(-noise)[:count]]


def _count(model: Any, wanted: Callable[[Any], bool]) -> int:
    return sum(wanted(node) for node in model.get_ordered_ops())


def _is_matmul_of_weights(node: Any) -> bool:
    return bool(node.get_type_name() == "MatMul" and _weight(node).get_type_name() == "Constant")


def _is_matmul_of_int8(node: Any) -> bool:
    return _is_matmul_of_weights(node) and _weight(node).get_element_type().size == 1


def _weight(node: Any) -> Any:
    """What the second input of a matrix product is made of: through dequantization, back to the stored constant."""
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose", "FakeQuantize"):
        source = source.input_value(0).get_node()
    return source
