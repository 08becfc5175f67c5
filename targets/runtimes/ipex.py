"""TorchScript with the operations of Intel's extension, which its own toolchain has."""

from __future__ import annotations

from pathlib import Path

import intel_extension_for_pytorch  # noqa: F401 (it registers its operations)

from optimize.targets.runtimes import torchscript


def open_session(path: Path, task: str, cores: int) -> torchscript.TorchscriptSession:
    return torchscript.open_session(path, task, cores)
