"""Let every tool make what it makes of one model, each in its own environment; what is there already is kept.

    python benchmarks/peers/make_all.py CHECKPOINT TASK OUT [--data FILE] [--ours OPTIONS]

Writes OUT/inputs and, for each tool, OUT/TOOL.jsonl: one line an artifact, the failed ones too.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from inputs import write

HERE = Path(__file__).parent
# script: the environment that it runs in; None is the project's own
SCRIPTS = {
    "torch": None,
    "optimum-onnx": "optimum-onnx",
    "optimum-intel": "optimum-intel",
    "olive": "olive",
    "optimize": None,
}


def python_of(venv: str | None, venvs: Path) -> str:
    """The interpreter of a tool's environment."""
    return sys.executable if venv is None else str(venvs / f"venv-{venv}" / "bin" / "python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("task")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--venvs", type=Path, default=Path("out/peers"))
    parser.add_argument("--ours", default="", help="further options of optimize, in one word")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    data = ["--data", given.data] if given.data else []
    ours = [f"--ours={given.ours}"]
    inputs = given.out / "inputs"
    if not (inputs / "labels.json").exists():
        write(given.checkpoint, given.task, given.data, inputs)
    for tool, venv in SCRIPTS.items():
        if (given.out / f"{tool}.jsonl").exists():
            continue
        script = HERE / f"make_{tool.replace('-', '_')}.py"
        words = [script, given.checkpoint, given.task, inputs, given.out, *data, *ours]
        subprocess.run([python_of(venv, given.venvs), *words], check=True)


if __name__ == "__main__":
    main()
