"""Shared by the tests of pipeline/: fixed checkpoints and targets, and third-party passes that really are installed."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from optimize.pipeline import plan
from optimize.pipeline.contract import Checkpoint, Target

TOOLS = {
    "torch": "2.13.0", "transformers": "5.17.0", "safetensors": "0.7.0", "onnx": "1.20.0", "onnxscript": "0.7.0",
    "onnx-ir": "0.2.0", "onnxruntime": "1.23.0", "openvino": "2026.1.0", "nncf": "3.0.0",
}  # fmt: skip

HEADER = """
import os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from optimize.pipeline.contract import Kind, Pass

class Base(Pass):
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 1
    tools: ClassVar = ()
"""


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


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """Install a distribution of passes, here and for child processes: takes a module's text and name -> class."""

    def install(code: str, passes: dict[str, str]) -> None:
        site = tmp_path / "site"
        info = site / "extra_passes-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (site / "extra_passes.py").write_text(HEADER + textwrap.dedent(code))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-passes\nVersion: 1.0\n")
        points = "\n".join(f"{name} = extra_passes:{cls}" for name, cls in passes.items())
        (info / "entry_points.txt").write_text(f"[optimize.passes]\n{points}\n")
        monkeypatch.setenv("PYTHONPATH", str(site))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "extra_passes", raising=False)

    return install
