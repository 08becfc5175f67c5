"""Running optimum-cli in the toolchain of the pass that calls it: what its users run, and nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from optimize.models.tasks import TASKS
from optimize.models.translating import readable_checkpoint


def export(source: Path, task: str, out: Path, *words: str) -> None:
    """`optimum-cli export WORDS` of a checkpoint into `out`. Its output is the step's log.

    Raises subprocess.CalledProcessError when it fails.
    """
    named = f"{task}-with-past" if TASKS[task].generates else task
    form, *options = words
    with readable_checkpoint(source) as folder:
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", form, "--model", str(folder)]
        subprocess.run([*command, "--task", named, "--library", "transformers", *options, str(out)], check=True)
