"""What the make_*.py scripts share: run a tool, and write down what came of it, one JSON line for each artifact.

Runs in every tool's own environment, so it imports nothing but the standard library.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

# task: the transformers class that loads it, the output that is compared
TASKS = {
    "feature-extraction": ("AutoModel", "last_hidden_state"),
    "text-classification": ("AutoModelForSequenceClassification", "logits"),
}
WORDS = 700  # of a failed tool's error


class ToolError(Exception):
    """A tool that failed, in its own words."""


@dataclass(frozen=True)
class Made:
    """What a tool made: the file or folder that serve.py opens, with which of its runtimes, and how."""

    path: Path
    runtime: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: str = ""  # what is only known afterwards


class Recorder:
    """Makes a tool's artifacts in OUT/NAME and writes a line for each to OUT/TOOL.jsonl.

    `checkpoint`, `task` and `inputs` (a folder that inputs.py wrote) are what every tool is given.
    """

    def __init__(self, tool: str, *packages: str) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("checkpoint", type=Path)
        parser.add_argument("task", choices=TASKS)
        parser.add_argument("inputs", type=Path)
        parser.add_argument("out", type=Path)
        parser.add_argument("--data")
        parser.add_argument("--ours", default="")
        given = parser.parse_args()
        self.checkpoint: Path = given.checkpoint
        self.task: str = given.task
        self.inputs: Path = given.inputs
        self.out: Path = given.out
        self.data: str | None = given.data
        self.ours: list[str] = given.ours.split()
        self.tool = tool
        self._versions = {name: metadata.version(name) for name in packages}
        self._lines: list[dict[str, Any]] = []

    def calibration(self) -> list[str]:
        """The text that may calibrate."""
        lines = (self.inputs / "calibration.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
        return [json.loads(line)["text"] for line in lines]

    def artifact(self, name: str, settings: str, build: Callable[[Path], Made]) -> Made | None:
        """Let `build` fill an empty folder. None, and a recorded error, if it fails. `settings`: what is asked for."""
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        line: dict[str, Any] = {"name": name, "tool": self.tool, "settings": settings, "versions": self._versions}
        made, started = None, time.monotonic()
        try:
            made = build(folder)
            if not made.path.exists():
                raise ToolError(f"{made.path.name} was not written")
        except Exception as error:  # whatever it is: a tool's failure is a result
            made = None
            text = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
            line["error"] = anonymous(text)[:WORDS]
        line["seconds"] = round(time.monotonic() - started, 1)
        if made is not None:
            auto_class, output = TASKS[self.task]
            line["settings"] += made.settings
            line |= {"runtime": made.runtime, "path": str(made.path)}
            line["options"] = {"auto_class": auto_class, "output": output, **made.options}
            line["megabytes"] = megabytes(made.path)
        self._lines.append(line)
        print(f"{self.tool}: {name}: {line['seconds']} s {line.get('error', '')}", flush=True)
        return made

    def done(self) -> None:
        """Write the lines down: all that is to be made was tried."""
        text = "\n".join(map(json.dumps, self._lines)) + "\n"
        (self.out / f"{self.tool}.jsonl").write_text(text)


def megabytes(path: Path) -> float:
    """Of a graph with the weights beside it, or of a checkpoint's weights."""
    files = path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.stem}.*")
    return round(sum(each.stat().st_size for each in files) / 1e6, 1)


def command(*words: str | Path, folder: Path | None = None) -> str:
    """Run a command of this environment, in `folder`. Returns its output; raises ToolError with the output's end."""
    program = Path(sysconfig.get_path("scripts"), str(words[0]))
    result = subprocess.run(
        [program, *map(str, words[1:])],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if result.returncode:
        raise ToolError(f"exit code {result.returncode}: {last_words(result.stdout)}")
    return result.stdout


def last_words(output: str) -> str:
    """The last error in a tool's output with what follows it; where none is named, the last lines."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in output.splitlines()]
    lines = [line for line in lines if line and "%|" not in line and not line.startswith("[")]
    errors = [index for index, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return "\n".join(lines[errors[-1] :] if errors else lines[-3:])


def anonymous(text: str) -> str:
    """Without the folders of this machine."""
    for folder, short in ((sys.prefix, "VENV"), (str(Path.cwd()), "."), (sys.base_prefix, "PYTHON")):
        text = text.replace(folder, short)
    return re.sub(r"/(?:tmp|root|home)/[^\s'\",:]*", "PATH", text)
