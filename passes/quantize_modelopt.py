"""quantize-modelopt: explicit Q/DQ in int8 or fp8, where TensorRT wants it, by NVIDIA's Model Optimizer."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes._onnx import GRAPH, PRODUCTS, Feed, input_names, noisiest_products, quantized_products
from optimize.passes._sensitivity import SAMPLES, check_options
from optimize.pipeline.batches import load_batches
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass
from optimize.pipeline.memory import FRAMEWORKS


@dataclass(frozen=True)
class QuantizeModelopt(Pass):
    """Weights and inputs of matrix products in int8 or fp8, their ranges from `samples` calibration texts.

    Products of activations stay as they are, and so do `keep` of the others: those whose inputs int8 represents worst.
    `rest` is what everything else computes in. Raises RuntimeError when no product was quantized.
    Source: https://nvidia.github.io/Model-Optimizer (ONNX quantization)
    """

    name: ClassVar = "quantize-modelopt"
    accepts: ClassVar = Kind.ONNX
    produces: ClassVar = Kind.ONNX
    version: ClassVar = 1
    tools: ClassVar = ("nvidia-modelopt", "onnx", "onnxruntime")
    toolchain: ClassVar = "modelopt"

    mode: Literal["int8", "fp8"] = "int8"
    rest: Literal["fp32", "fp16", "bf16"] = "fp16"
    method: Literal["max", "entropy"] = "max"
    samples: int = 64
    keep: int = 0

    def __post_init__(self) -> None:
        check_options(self.name, samples=self.samples, keep=self.keep)

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def arithmetic(self) -> str | None:
        return {"int8": "int8", "fp8": "float8_e4m3fn"}[self.mode]

    def memory(self, checkpoint: Checkpoint) -> int:
        return 2 * FRAMEWORKS + 6 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        sizes = checkpoint.dimensions
        return checkpoint.parameters + (4 if self.rest == "fp32" else 2) * sizes.vocabulary * sizes.hidden

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        from modelopt.onnx.quantization import quantize

        if context.calibration is None:
            raise RuntimeError("quantization needs calibration data")
        inputs = input_names(source.path)
        loaded = load_batches(context.calibration)[: self.samples]
        batches = [{name: batch[name] for name in inputs} for batch in loaded]
        kept = noisiest_products(source.path / GRAPH, batches[:SAMPLES], self.keep)
        with tempfile.TemporaryDirectory() as scratch:
            graph = Path(shutil.copytree(source.path, scratch, dirs_exist_ok=True), GRAPH)  # it writes there too
            quantize(
                onnx_path=str(graph), output_path=str(out / GRAPH), quantize_mode=self.mode,
                calibration_data_reader=Feed(batches),
                calibration_method=self.method, calibration_eps=["cpu"], op_types_to_quantize=list(PRODUCTS),
                high_precision_dtype=self.rest, use_external_data_format=True, dq_only=True, disable_mha_qdq=True,
                nodes_to_exclude=[*kept],
            )  # fmt: skip
        return quantized_products(source.path, out) | {"kept": kept}

    def ensures(self, out: Path) -> None:
        if not (out / GRAPH).is_file():
            raise FileNotFoundError(f"{GRAPH} was not written")
