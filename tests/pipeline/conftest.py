"""Shared by the tests of pipeline/: a fixed checkpoint, a fixed target, fixed versions."""

from pathlib import Path

import pytest

from optimize.pipeline import plan
from optimize.pipeline.contract import Checkpoint, Target

TOOLS = {
    "torch": "2.13.0", "transformers": "5.17.0", "safetensors": "0.7.0", "onnx": "1.20.0", "onnxscript": "0.7.0",
    "onnx-ir": "0.2.0", "onnxruntime": "1.23.0", "openvino": "2026.1.0", "nncf": "3.0.0",
}  # fmt: skip


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
    monkeypatch.setattr(plan, "installed_version", pinned.get)
    return pinned
