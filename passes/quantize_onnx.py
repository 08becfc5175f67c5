"""quantize-onnx: int8 weights, and int8 activations measured at run time (dynamic) or on calibration text (static)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes._onnx import GRAPH, PRODUCTS, Feed, count_nodes, coverage, noisiest_products, quantized_products
from optimize.passes._sensitivity import SAMPLES, check_options
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass
from optimize.pipeline.memory import FRAMEWORKS

INTEGER = ("MatMulInteger", "QGemm", "ConvInteger")  # what dynamic quantization makes of products


@dataclass(frozen=True)
class QuantizeOnnx(Pass):
    """ONNX Runtime's quantizer, symmetric int8 weights.

    Static mode writes QDQ pairs whose ranges come from `samples` calibration texts. Raises RuntimeError when no
    product was quantized. `keep` leaves that many products in floating point: those whose inputs int8 represents worst.
    Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """

    name: ClassVar = "quantize-onnx"
    accepts: ClassVar = Kind.ONNX
    produces: ClassVar = Kind.ONNX
    version: ClassVar = 2
    tools: ClassVar = ("onnx", "onnxruntime")

    mode: Literal["dynamic", "static"] = "dynamic"
    per_channel: bool = True
    samples: int = 64
    keep: int = 0

    def __post_init__(self) -> None:
        check_options(self.name, samples=self.samples, keep=self.keep)

    @property
    def calibrated(self) -> bool:
        return self.mode == "static" or self.keep > 0

    @property
    def arithmetic(self) -> str | None:
        return "int8"

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS + 4 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        sizes = checkpoint.dimensions
        looked_up = 3 * sizes.vocabulary * sizes.hidden if self.mode == "static" else 0  # embeddings, which stay floats
        return checkpoint.parameters + looked_up

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_dynamic,
            quantize_static,
        )

        graph, result = source.path / GRAPH, out / GRAPH
        model = _without_shapes_of_weights(graph)
        batches = load_batches(context.calibration) if context.calibration else []
        if self.calibrated and not batches:
            raise RuntimeError("static quantization and keep need calibration data")
        kept = noisiest_products(graph, batches[:SAMPLES], self.keep)
        if self.mode == "dynamic":
            quantize_dynamic(
                model, result, weight_type=QuantType.QInt8, per_channel=self.per_channel, nodes_to_exclude=kept,
                use_external_data_format=True,
            )  # fmt: skip
        else:
            quantize_static(
                model, result, Feed(batches[: self.samples]), nodes_to_exclude=kept,
                quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                per_channel=self.per_channel, calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=list(PRODUCTS), use_external_data_format=True,
            )  # fmt: skip
        if self.mode == "static":
            return quantized_products(source.path, out) | {"kept": kept}
        eligible, quantized = count_nodes(source.path, PRODUCTS), count_nodes(out, INTEGER)
        return coverage(quantized, eligible) | {"kept": kept}


def _without_shapes_of_weights(graph: Path) -> Any:
    """ONNX Runtime transposes some weights, and would then find them unlike the shapes that the graph has for them."""
    import onnx

    model = onnx.load(graph)
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    return model
