"""What opens an artifact: one file per kind, each with `open_session(path, task, cores) -> Session`.

Only a worker (or `optimize.load`) opens one, so these modules import their libraries at the top.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from optimize.pipeline.contract import Kind, Session

RUNTIMES = {
    Kind.CHECKPOINT: "eager",
    Kind.AOTI: "aoti",
    Kind.ONNX: "onnxruntime",
    Kind.OPENVINO: "openvino",
}


def open_session(kind: Kind, path: Path, task: str, cores: int) -> Session:
    """Open an artifact folder with the runtime of its kind, on `cores` threads."""
    module = importlib.import_module(f"optimize.targets.runtimes.{RUNTIMES[kind]}")
    return cast(Session, module.open_session(path, task, cores))
