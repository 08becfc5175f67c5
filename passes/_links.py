"""Carrying an artifact's files into one that is made of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_tree(source: Path, out: Path) -> None:
    """Fill `out` with the files of an artifact, of which no bytes are copied where links can be made.

    Not for a checkpoint: its files are the user's.
    """
    shutil.copytree(source, out, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """The store is read-only, so that two artifacts may share one file."""
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
