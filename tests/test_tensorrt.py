"""A real engine of TensorRT for RTX, built here, and what is said where no GPU can run it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from optimize.models.encoding import encode
from optimize.passes._tensorrt import check_capabilities, profile_ranges
from optimize.pipeline.batches import Encoded
from optimize.pipeline.contract import Cell
from optimize.pipeline.errors import ExitCode, RequestError
from optimize.pipeline.installing import install
from optimize.pipeline.recipe import parse
from optimize.pipeline.store import Store
from optimize.pipeline.toolchains import Toolchains
from tests.conftest import QUICK, Cli


def test_profiles_hold_every_text_and_each_cell_alone() -> None:
    wide, *exact = profile_ranges([Cell(1, 32), Cell(16, 128), Cell(1, 32)])
    assert wide == ((1, 1), (16, 128), (16, 512))
    assert exact == [((1, 32),) * 3, ((16, 128),) * 3]
    assert profile_ranges([Cell(2, 1024)])[0] == ((1, 1), (2, 1024), (8, 1024))


@pytest.mark.parametrize("text", ["8", "8.9,12.0", "sm89", "8.", ".9", "8.9+x"])
def test_what_is_no_compute_capability_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a compute capability"):
        check_capabilities("build-tensorrt-rtx", text)


def test_capabilities_may_be_several() -> None:
    assert check_capabilities("build-tensorrt-rtx", "8.6+12.0") == ("8.6", "12.0")
    (step,) = parse("export-onnx,build-tensorrt-rtx{capabilities=8.6+12.0}").passes[1:]
    assert step.shaped


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="here is a GPU, which may run it")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_engine_is_built_without_a_gpu_and_refused_in_words(
    dtype: str, tiny: Path, some_text: Path, shared_cache: Path, cli: Cli
) -> None:
    install(Toolchains(shared_cache), "tensorrt-rtx")
    onnx = "export-onnx" if dtype == "float32" else f"export-onnx{{dtype={dtype}}}"
    outcome = cli(tiny, "--recipe", f"{onnx},build-tensorrt-rtx{{capabilities=8.9}}", "--data", some_text, *QUICK)
    assert outcome.code == ExitCode.NOT_ACCURATE, outcome.output
    assert outcome.report is not None
    (candidate,) = outcome.report["candidates"]
    assert candidate["status"] == "broken"
    assert "needs an NVIDIA GPU of compute capability 8.9, and this host has none" in candidate["reason"]
    assert "what was built for another host is kept: " in outcome.output
    assert "Traceback" not in outcome.output and "optimize explain" not in outcome.output
    facts = candidate["steps"][1]["facts"]
    assert facts["compute_capabilities"] == ["8.9"] and facts["engine_bytes"] > 1e6 and facts["build_seconds"] > 0
    assert [profile[1] for profile in facts["profiles"]] == [[2, 16], [1, 8], [2, 16]]
    entry = Store(shared_cache / "store").describe(candidate["steps"][1]["key"])
    layers = json.loads((entry.artifact.path / "inspector.json").read_text())["layers"]
    kinds = {output["dtype"] for layer in layers for output in layer["outputs"]}
    assert ("HALF" in kinds) == (dtype == "float16")


def test_without_capabilities_it_is_left_out_where_no_gpu_is(tiny: Path, cli: Cli) -> None:
    outcome = cli(tiny, "--recipe", "export-onnx,build-tensorrt-rtx", "--dry-run")
    assert outcome.code == ExitCode.REFUSED
    assert "name the compute capabilities that it is for" in outcome.output
    outcome = cli(tiny, "--recipe", "export-onnx,build-tensorrt", "--dry-run")
    assert outcome.code == ExitCode.REFUSED
    assert "it times kernels on the GPU that it builds for, and here is none" in outcome.output


def test_q_dq_in_int8_is_judged_here_and_engines_are_built_of_it_and_of_fp8(
    tiny: Path, some_text: Path, shared_cache: Path, cli: Cli
) -> None:
    for name in ("tensorrt-rtx", "modelopt"):
        install(Toolchains(shared_cache), name)
    quantize = "export-onnx,quantize-modelopt{{mode={};rest={};samples=8;keep=1}}"
    engine = ",build-tensorrt-rtx{capabilities=8.9}"
    recipes = [quantize.format("int8", "fp32"), *(quantize.format(mode, "fp16") + engine for mode in ("int8", "fp8"))]
    asked = [word for recipe in recipes for word in ("--recipe", recipe)]
    outcome = cli(tiny, *asked, "--data", some_text, "--max-drop", "1", *QUICK)
    assert outcome.report is not None, outcome.output
    judged, *engines = outcome.report["candidates"]
    assert judged["status"] == "passed" and 1e-6 < judged["accuracy"]["drop"]["value"] < 0.1, outcome.output
    store = Store(shared_cache / "store")
    for candidate, dtype in zip(engines, ("INT8", "FP8"), strict=True):
        assert "this host has none" in candidate["reason"]
        facts = candidate["steps"][1]["facts"]
        assert 0 < facts["quantized"] < facts["eligible"] and len(facts["kept"]) == 1
        layers = json.loads((_folder(store, candidate) / "inspector.json").read_text())["layers"]
        assert dtype in {output["dtype"] for layer in layers for output in layer["outputs"]}
        assert (_folder(store, candidate) / "timing.cache").stat().st_size
    # what ONNX Runtime fuses of fp8 it cannot run: unfused, it answers as the graph before it
    plain, fp8 = (store.describe(engines[1]["steps"][step]["key"]).artifact.path for step in (0, 1))
    batch = encode(tiny, [{"text": "The tide came in slowly over the flats."}], 64, (1,))[0]
    found, expected = (_outputs(folder, batch) for folder in (fp8, plain))
    cosine = (found * expected).sum() / np.sqrt((found**2).sum() * (expected**2).sum())
    assert 0.9 < cosine < 0.999999


def _folder(store: Store, candidate: dict[str, Any]) -> Path:
    return store.describe(candidate["steps"][-1]["key"]).artifact.path


def _outputs(folder: Path, batch: Encoded) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["last_hidden_state"], {port.name: batch[port.name] for port in session.get_inputs()})
    return np.asarray(found, dtype=np.float64)
