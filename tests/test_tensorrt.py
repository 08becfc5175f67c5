"""A real engine of TensorRT for RTX, built here, and what is said where no GPU can run it."""

import json
import shutil
from pathlib import Path

import pytest

from optimize.passes._tensorrt import check_capabilities, profile_ranges
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
