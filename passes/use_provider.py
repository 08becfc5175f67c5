"""use-provider: have one of ONNX Runtime's execution providers for NVIDIA GPUs run a graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from optimize.passes._links import link_tree
from optimize.passes._onnx import count_nodes, input_names
from optimize.passes._tensorrt import profile_ranges
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Kind, Pass, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.memory import FRAMEWORKS

PROVIDER = "provider.json"  # which provider, and its options
NAMES = {
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
CAPTURES = "enable_cuda_graph"  # an option of CUDA's
COUNTING = ("Range", "GatherND")  # operators that positions are made and looked up by
PREFIX = {"tensorrt": "trt", "tensorrt-rtx": "nv"}  # of the options that both have


@dataclass(frozen=True)
class UseProvider(Pass):
    """The same graph for a GPU: it computes in the types that the graph has, so TF32 is off.

    With `graphs`, CUDA's provider has shapes that come again captured into CUDA graphs; but not of a graph that counts
    positions, which ONNX Runtime does on the processor. TensorRT's build their engines where the graph is opened, for
    the workload's shapes.
    Source: https://onnxruntime.ai/docs/execution-providers, https://nvidia.github.io/TensorRT-RTX-EP-ABI
    """

    name: ClassVar = "use-provider"
    accepts: ClassVar = Kind.ONNX
    produces: ClassVar = Kind.ONNX_GPU
    version: ClassVar = 2
    tools: ClassVar = ("onnx",)

    provider: Literal["cuda", "tensorrt", "tensorrt-rtx"] = "cuda"
    graphs: bool = True

    def __post_init__(self) -> None:
        if not self.graphs and self.provider != "cuda":
            raise RequestError(f"{self.name}: graphs is for provider=cuda alone")

    @property
    def shaped(self) -> bool:
        return self.provider in PREFIX

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return "its providers run on NVIDIA GPUs, and here is none" if not target.gpus else None

    def memory(self, checkpoint: Checkpoint) -> int:
        return FRAMEWORKS

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        link_tree(source.path, out)
        options = self._options(input_names(source.path), context.workload)
        if self.provider == "cuda":
            options |= {CAPTURES: str(int(self.graphs and not count_nodes(source.path, COUNTING)))}
        (out / PROVIDER).write_text(json.dumps({"provider": NAMES[self.provider], "options": options}, indent=1))
        return {"options": options}

    def _options(self, inputs: Sequence[str], workload: Sequence[Cell]) -> dict[str, str]:
        if self.provider == "cuda":
            return {"use_tf32": "0"}
        columns = zip(*profile_ranges(workload), strict=True)
        return {
            f"{PREFIX[self.provider]}_profile_{which}_shapes": ",".join(
                f"{name}:{batch}x{length}" for batch, length in column for name in inputs
            )
            for which, column in zip(("min", "opt", "max"), columns, strict=True)
        }

    def ensures(self, out: Path) -> None:
        for name in ("model.onnx", PROVIDER):
            if not (out / name).is_file():
                raise FileNotFoundError(f"{name} was not written")
