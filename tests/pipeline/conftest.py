"""Shared by the tests of pipeline/: a fixed checkpoint, a fixed target, fixed versions, a manifest of both."""

from pathlib import Path

import pytest

from optimize.pipeline import keys
from optimize.pipeline.accuracy import Accuracy
from optimize.pipeline.contract import Cell, Checkpoint, Gates, Kind, LabelKind, Labelling, Meaning, Objective, Target
from optimize.pipeline.errors import ExitCode
from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.manifest import SCHEMA_VERSION, Baseline, Evaluation, Manifest, Report, host_of, source_of
from optimize.pipeline.measure import CellSpeed, Speed
from optimize.pipeline.metrics import Metric
from optimize.pipeline.statistics import Interval
from optimize.pipeline.verdict import Candidate, Status, StepReport

TOOLS = {
    "torch": "2.13.0", "transformers": "5.17.0", "safetensors": "0.7.0", "onnx": "1.20.0", "onnxscript": "0.7.0",
    "onnx-ir": "0.2.0", "onnxruntime": "1.23.0", "openvino": "2026.1.0", "nncf": "3.0.0",
}  # fmt: skip
LABELLING = Labelling(LabelKind.CLASS, (0, 1, 1), {0: "bad", 1: "good"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(
        model_id="maker/tiny", folder=tmp_path / "tiny", revision="0123456789abcdef0123", task="feature-extraction",
        architecture="BertModel", dtype="float32", parameters=22_713_216, weight_bytes=90_852_864, max_length=256,
        files={"config.json": "c0" * 32, "model.safetensors": "a0" * 32},
    )  # fmt: skip


@pytest.fixture
def target() -> Target:
    return Target(
        name="cpu", device="Example 9000", arch="x86_64", features=("avx2", "avx512_bf16"),
        dtypes=("float32", "bfloat16"), cores=4, memory=16 << 30,
    )  # fmt: skip


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that are taken to be installed; a test may change them."""
    pinned = dict(TOOLS)
    monkeypatch.setattr(keys, "installed_version", pinned.get)
    return pinned


@pytest.fixture
def manifest(checkpoint: Checkpoint, target: Target) -> Manifest:
    cells = (Cell(1, 32), Cell(8, 128))
    drop, ratio = Interval(0.0002, 0.0001, 0.0003), Interval(2.1, 2.0, 2.2)
    accuracy = Accuracy(
        drop, 0.002, 0.03, 0.4, 0.99, {str(cell): 0.0003 for cell in cells}, 210,
        (Metric("accuracy", 0.91, 0.9095, Interval(0.0005, -0.001, 0.002), 0.4, 210, 0.02),),
    )  # fmt: skip
    speed = Speed(ratio, tuple(CellSpeed(cell, ratio, 0.02, 0.01) for cell in cells), 12)
    held = GpuMemory(3 << 30)
    winner = Candidate(
        "onnx-int8-dynamic", "export-onnx,quantize-onnx", Kind.ONNX, Status.PASSED, None,
        [StepReport("export-onnx", "e" * 64, True, 12.5, 1 << 30, {"nodes": 300}),
         StepReport("quantize-onnx", "f" * 64, False, 2.5, 1 << 29, {"quantized": 36, "eligible": 36})],
        23_000_000, 0.2, 0.03, 1 << 28, accuracy, speed, gpu_memory=held, judged_gpu_memory=held,
    )  # fmt: skip
    lost = Candidate("aoti", "compile-aoti", Kind.AOTI, Status.NOT_BUILT, "compile-aoti failed: no space")
    report = Report(
        SCHEMA_VERSION, "2026-01-02T03:04:05+00:00", ExitCode.EMITTED, source_of(checkpoint), host_of(target), cells,
        Gates(), Evaluation("shipped text", "d" * 64, "mean", Meaning.VECTOR, LABELLING), {"eager-bf16": "no bfloat16"},
        (winner, lost), winner.name, Objective.LATENCY, {"build": 15.0}, Baseline(0.5, 0.1, 1 << 29),
    )  # fmt: skip
    return Manifest(SCHEMA_VERSION, Kind.ONNX, winner.recipe, {"model.onnx": "9" * 64}, accuracy, speed, report)
