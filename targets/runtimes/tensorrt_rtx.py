"""Engines of TensorRT for RTX."""

from __future__ import annotations

from pathlib import Path

import tensorrt_rtx_bindings

from optimize.targets.runtimes.engines import EngineSession


def open_session(path: Path, task: str, cores: int) -> EngineSession:
    return EngineSession(tensorrt_rtx_bindings, path)
