"""What every tool is given and every artifact is judged by: token ids, made once, in the project's environment.

`write` writes cells.npz (what is timed), text.npz (held out: what accuracy is judged on), calibration.npz and
calibration.jsonl (what may calibrate), and labels.json. The text is split by the product's own rule, so that ours and
all others calibrate on the same text and none has seen what it is judged on.
"""

import json
from pathlib import Path

from optimize.models.checkpoint import max_length, read_config
from optimize.models.encoding import BATCH_SIZES, encode, encode_cells
from optimize.models.examples import read_examples
from optimize.models.tasks import TASKS
from optimize.pipeline.batches import save_batches

CELLS = ((1, 32), (1, 128), (8, 128))


def write(checkpoint: Path, task: str, data: str | None, out: Path) -> None:
    """Write all of it into `out`. Raises RequestError for data that cannot be used."""
    config = read_config(checkpoint)
    id2label = {int(index): name for index, name in config.get("id2label", {}).items()}
    read = read_examples(data, TASKS[task], id2label)
    longest = max_length(checkpoint, config)
    out.mkdir(parents=True, exist_ok=True)
    encoded = {
        "cells": encode_cells(checkpoint, read.evaluation, CELLS),
        "text": encode(checkpoint, read.evaluation, longest, BATCH_SIZES),
        "calibration": encode(checkpoint, read.calibration, longest, (1,)),
    }
    for name, batches in encoded.items():
        save_batches(out / f"{name}.npz", batches)
    lines = [json.dumps(row, ensure_ascii=False) for row in read.calibration]
    (out / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "labels.json").write_text(json.dumps(read.labels) + "\n")
