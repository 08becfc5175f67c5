"""Engines of TensorRT."""

from __future__ import annotations

from pathlib import Path

import tensorrt

from optimize.targets.runtimes.engines import EngineSession


def open_session(path: Path, task: str, cores: int) -> EngineSession:
    return EngineSession(tensorrt, path)
