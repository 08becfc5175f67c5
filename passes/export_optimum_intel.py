"""export-optimum-intel: the OpenVINO IR that `optimum-cli export openvino` makes, in an environment of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes._optimum import export
from optimize.passes.convert_openvino import IR, TOKENIZERS, check_dynamic, write_runtime_options
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind, Pass
from optimize.pipeline.memory import FRAMEWORKS

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class ExportOptimumIntel(Pass):
    """optimum-intel's exporter; `weights` is the format that it keeps weights in, by its own defaults for each.

    What it makes is run in float32, as `hint-openvino` may change. Its static int8 needs a data set of the hub's and is
    left out. Source: https://huggingface.co/docs/optimum-intel
    """

    name: ClassVar = "export-optimum-intel"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 1
    tools: ClassVar = ("torch", "transformers", "optimum-intel", "openvino", "openvino-tokenizers", "nncf")
    toolchain: ClassVar = "optimum-intel"

    weights: Literal["fp32", "fp16", "int8", "int4"] = "fp32"

    @property
    def arithmetic(self) -> str | None:
        return "int8" if self.weights in ("int8", "int4") else "float32"  # OpenVINO rounds what meets such weights

    def memory(self, checkpoint: Checkpoint) -> int:
        return 2 * FRAMEWORKS + 4 * 4 * checkpoint.parameters

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return BITS[self.weights] * checkpoint.parameters // 8

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import openvino

        export(source.path, context.task, out, "openvino", "--weight-format", self.weights)
        kept = {Path(name).stem for name in (IR, *TOKENIZERS)}
        for path in out.iterdir():  # the checkpoint's own files are carried along by whoever emits the folder
            if path.stem not in kept:
                path.unlink()
        write_runtime_options(out, "f32")
        return {"operations": len(openvino.Core().read_model(out / IR).get_ops())}

    def ensures(self, out: Path) -> None:
        check_dynamic(out)
