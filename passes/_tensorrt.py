"""Building an engine from an ONNX graph, as TensorRT and TensorRT for RTX both do: they share one Python interface.

Networks are strongly typed: an engine computes in the types that the graph has, 16 bits where it was exported so,
int8 or fp8 where it has Q/DQ. Source: https://docs.nvidia.com/deeplearning/tensorrt
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimize.models.encoding import BATCH_SIZES, LONGEST
from optimize.pipeline.contract import Cell
from optimize.pipeline.errors import RequestError

ENGINE, INSPECTED, FACTS, TIMINGS = "model.engine", "inspector.json", "engine.json", "timing.cache"


def check_capabilities(name: str, text: str) -> tuple[str, ...]:
    """`8.9+12.0` as ("8.9", "12.0"). Raises RequestError for anything else."""
    found = tuple(filter(None, text.split("+")))
    for each in found:
        major, _, minor = each.partition(".")
        if not (major.isdigit() and minor.isdigit()):
            raise RequestError(f"{name}: {each!r} is not a compute capability", hint="for example 8.9, or 8.6+8.9")
    return found


def build(trt: Any, source: Path, out: Path, workload: Sequence[Cell], capabilities: Sequence[str]) -> dict[str, Any]:
    """Write the engine of `source`/model.onnx, what the inspector says of it, and what runs it must know.

    `trt` is the module, tensorrt or tensorrt_rtx. Raises RuntimeError with what its logger said.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(source / "model.onnx")):
        raise RuntimeError(f"the graph was not taken: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, each in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{each.replace('.', '')}"), index)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    ranges = profile_ranges(workload)
    for smallest, best, largest in ranges:
        profile = builder.create_optimization_profile()
        for port in inputs:
            profile.set_shape(port.name, smallest, best, largest)
        config.add_optimization_profile(profile)
    begun = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError(f"no engine was built: {logger.tail()}")
    seconds = time.perf_counter() - begun
    (out / ENGINE).write_bytes(bytes(engine))
    (out / TIMINGS).write_bytes(bytes(config.get_timing_cache().serialize()))  # for whoever builds it again by hand
    facts = {
        "version": trt.__version__, "compute_capabilities": list(capabilities), "profiles": ranges,
        "inputs": [port.name for port in inputs], "layers": network.num_layers, "build_seconds": round(seconds, 2),
    }  # fmt: skip
    (out / FACTS).write_text(json.dumps(facts, indent=1))
    remark = _inspect(trt, logger, network, out)
    return facts | {"engine_bytes": (out / ENGINE).stat().st_size, "inspected": remark or "every layer of the engine"}


def profile_ranges(workload: Sequence[Cell]) -> list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
    """Least, best and most of [batch, sequence]: one that takes every text, then one for each cell alone."""
    cells = [(cell.batch, cell.sequence) for cell in workload]
    most = (max(*BATCH_SIZES, *(batch for batch, _ in cells)), max(LONGEST, *(length for _, length in cells)))
    best = max(cells, key=lambda cell: cell[0] * cell[1])
    return [((1, 1), best, most), *((cell, cell, cell) for cell in dict.fromkeys(cells))]


def check(out: Path) -> None:
    """Raise unless an engine is there."""
    if not (out / ENGINE).is_file() or not (out / ENGINE).stat().st_size:
        raise FileNotFoundError(f"no {ENGINE} was written")


def _inspect(trt: Any, logger: Any, network: Any, out: Path) -> str:
    """Write what the engine inspector says of every layer. It needs a driver: without one, the layers as given to the
    builder; why is then returned.
    """
    engine = trt.Runtime(logger).deserialize_cuda_engine((out / ENGINE).read_bytes())
    if engine is not None:
        inspector = engine.create_engine_inspector()
        (out / INSPECTED).write_text(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        return ""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [
        {"name": layer.name, "type": layer.type.name,
         "outputs": [_tensor(layer.get_output(index)) for index in range(layer.num_outputs)]}
        for layer in layers
    ]  # fmt: skip
    remark = f"the network alone, since the engine cannot be opened here: {logger.tail()}"
    (out / INSPECTED).write_text(json.dumps({"remark": remark, "layers": found}, indent=1))
    return remark


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def make_logger(trt: Any) -> Any:
    """A logger that keeps errors: the interface's calls return None in their place."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Writes to the step's log, and keeps errors."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                print(f"{severity.name}: {text}", flush=True)
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(text)

        def tail(self) -> str:
            return "; ".join(self.errors[-2:]) or "it did not say why"

    return Logger()
