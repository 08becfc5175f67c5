"""quantize-openvino: int8 by NNCF, weights and activations on calibration text (static) or weights alone (weights)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes.convert_openvino import IR, write_precision
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import Artifact, Context, Kind, Pass


@dataclass(frozen=True)
class QuantizeOpenvino(Pass):
    """NNCF post-training quantization with its transformer scheme (SmoothQuant, fast bias correction).

    Raises RuntimeError when nothing was quantized. Source: https://docs.openvino.ai (NNCF post-training quantization,
    weight compression)
    """

    name: ClassVar = "quantize-openvino"
    accepts: ClassVar = Kind.OPENVINO
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 1
    tools: ClassVar = ("openvino", "nncf")

    mode: Literal["static", "weights"] = "static"
    samples: int = 128

    @property
    def calibrated(self) -> bool:
        return self.mode == "static"

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import nncf
        import openvino

        model = openvino.Core().read_model(source.path / IR)
        eligible = _count(model, _is_matmul_of_weights)
        if self.mode == "weights":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        else:
            if context.calibration is None:
                raise RuntimeError("static quantization needs calibration data")
            names = {port.any_name for port in model.inputs}
            batches = load_batches(context.calibration)[: self.samples]
            feeds = [{name: array for name, array in batch.items() if name in names} for batch in batches]
            model = nncf.quantize(
                model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)
            )
        quantized = _count(
            model, lambda node: _is_matmul_of_weights(node) and _weight(node).get_element_type().size == 1
        )
        if not quantized:
            raise RuntimeError(f"none of {eligible} matrix products was quantized")
        openvino.save_model(model, out / IR, compress_to_fp16=False)
        write_precision(out, "f32")
        return {"quantized": quantized, "eligible": eligible}


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
