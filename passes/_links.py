"""Carrying an artifact's files into one that is made of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from optimize.models.checkpoint import carried_files
from optimize.pipeline.contract import Artifact


def link_tree(source: Path, out: Path) -> None:
    """Fill `out` with the files of an artifact in the store, of which no bytes are copied where links can be made."""
    shutil.copytree(source, out, copy_function=_link, dirs_exist_ok=True)


def link_checkpoint(source: Artifact, out: Path) -> None:
    """Fill `out` with a checkpoint's weights, configuration and tokenizer: with nothing else that lies beside them.

    Files of a checkpoint that the user gave are theirs to change, and so are copied.
    """
    copy = _link if source.is_stored else shutil.copyfile
    weights = (path.name for path in source.path.glob("*.safetensors*"))
    for name in (*carried_files(source.path), *weights):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        copy(str(source.path / name), str(out / name))


def _link(source: str, target: str) -> None:
    """The store is read-only, so that two artifacts may share one file."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
