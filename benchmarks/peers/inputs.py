"""What every tool is given and every artifact is judged by: token ids, made once, in the project's environment.

    python benchmarks/peers/inputs.py CHECKPOINT TASK OUT [--data FILE]

Writes cells.npz (what is timed), text.npz (held out: what accuracy is judged on), calibration.npz and
calibration.jsonl (what may calibrate), and labels.json. The text is split by the product's own rule, so that ours and
all others calibrate on the same text and none has seen what it is judged on.
"""

import argparse
import json
from pathlib import Path

from optimize.models import examples
from optimize.models.checkpoint import max_length, read_config
from optimize.models.tasks import TASKS
from optimize.pipeline.batches import save_batches

CELLS = ((1, 32), (1, 128), (8, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("task")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data")
    given = parser.parse_args()
    config = read_config(given.checkpoint)
    id2label = {int(index): name for index, name in config.get("id2label", {}).items()}
    read = examples.read_examples(given.data, TASKS[given.task], id2label)
    longest = max_length(given.checkpoint, config)
    given.out.mkdir(parents=True, exist_ok=True)
    encoded = {
        "cells": examples.encode_cells(given.checkpoint, read.evaluation, CELLS),
        "text": examples.encode(given.checkpoint, read.evaluation, longest, examples.BATCH_SIZES),
        "calibration": examples.encode(given.checkpoint, read.calibration, longest, (1,)),
    }
    for name, batches in encoded.items():
        save_batches(given.out / f"{name}.npz", batches)
    lines = [json.dumps(row, ensure_ascii=False) for row in read.calibration]
    (given.out / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (given.out / "labels.json").write_text(json.dumps(read.labels) + "\n")


if __name__ == "__main__":
    main()
