"""Text to judge and to calibrate with: reading it, splitting it so that the two never overlap, and encoding it.

Reading and splitting happen while planning, so that bad data is refused before anything runs; encoding needs the
checkpoint's tokenizer and happens in a worker.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.tasks import TASKS, Task
from optimize.pipeline.batches import Encoded
from optimize.pipeline.errors import RequestError

SHIPPED = Path(__file__).parent / "data" / "text.jsonl"
MAX_CALIBRATION = 128  # examples
MAX_EVALUATION = 1024
MIN_EVALUATION = 8
MAX_CELL = 1 << 24  # characters of one cell of a .csv
BATCH_SIZES = (1, 2, 8)  # evaluation batches, in turn: none is the batch that exporters trace with padding alone
ALIASES = {"text": ("text", "sentence", "sentence1"), "text_pair": ("text_pair", "sentence2")}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Examples:
    """Text for one run, already split. Labels are class indices, one for each row of `evaluation`."""

    source: str  # where the text came from, for the manifest
    evaluation: tuple[Row, ...]
    calibration: tuple[Row, ...]
    labels: tuple[int, ...] | None = None

    @property
    def calibration_digest(self) -> str:
        """sha256 over what calibrates: part of the key of every calibrated pass."""
        return hashlib.sha256(json.dumps(self.calibration, sort_keys=True, default=str).encode()).hexdigest()


def read_examples(data: str | None, task: Task, id2label: Mapping[int, str] | None = None) -> Examples:
    """The examples of a file or hub dataset, or the text that ships with the package.

    `data` names a .jsonl, .csv or .parquet file, or a dataset on the hub as `NAME` or `NAME:SPLIT`. Rows that repeat
    an earlier text are dropped, so that calibration and evaluation cannot share one. Raises RequestError for files
    that cannot be read, missing columns, empty or non-text cells, and labels that the model does not have.
    """
    rows = _shipped(task) if data is None else _rows(data)
    columns = {column: _column(rows, column, data) for column in task.columns}
    pair = next((name for name in ALIASES["text_pair"] if rows and name in rows[0]), None)
    if "text" in columns and pair and task.name != "sentence-similarity":
        columns["text_pair"] = pair
    label = task.label_column if data is not None and any(task.label_column in row for row in rows) else None
    seen: set[str] = set()
    kept: list[tuple[Row, int | None]] = []
    for number, row in enumerate(rows, start=1):
        texts = {name: _text(row.get(source), source, number, data) for name, source in columns.items()}
        identity = json.dumps(texts, sort_keys=True)
        if identity in seen:
            continue
        seen.add(identity)
        kept.append((texts, _label(row.get(label), number, data, id2label or {}) if label else None))
    calibrating = {index for index in range(len(kept)) if index % 3 == 1}
    while len(calibrating) > MAX_CALIBRATION:
        calibrating.discard(max(calibrating))
    evaluation = [pair for index, pair in enumerate(kept) if index not in calibrating][:MAX_EVALUATION]
    if len(evaluation) < MIN_EVALUATION:
        raise RequestError(
            f"--data {data}: {len(evaluation)} examples are left to evaluate on, {MIN_EVALUATION} are the least",
            hint="give more distinct rows, or leave --data out to use the text that ships with optimize",
        )
    return Examples(
        data or f"shipped text ({SHIPPED.name})",
        tuple(texts for texts, _ in evaluation),
        tuple(kept[index][0] for index in sorted(calibrating)),
        tuple(index for _, index in evaluation if index is not None) if label else None,
    )


def encode(folder: Path, rows: Sequence[Row], max_length: int, sizes: Iterable[int]) -> list[Encoded]:
    """Batches of [batch, sequence] int64 arrays by input name; each batch is padded to its own longest row.

    `sizes` is repeated until the rows are used up. Rows are cut at `max_length` tokens.
    """
    tokenizer = _tokenizer(folder)
    turns = tuple(sizes)
    batches: list[Encoded] = []
    start = 0
    while start < len(rows):
        chunk = rows[start : start + turns[len(batches) % len(turns)]]
        start += len(chunk)
        first = [row.get("question", row.get("text")) for row in chunk]
        second = [row.get("context", row.get("text_pair")) for row in chunk]
        encoded = tokenizer(
            first, second if second[0] is not None else None,
            padding=True, truncation=True, max_length=max_length, return_tensors="np",
        )  # fmt: skip
        batches.append({name: np.asarray(array, dtype=np.int64) for name, array in encoded.items()})
    return batches


def encode_cells(folder: Path, rows: Sequence[Row], cells: Iterable[tuple[int, int]]) -> list[Encoded]:
    """One batch for each cell (batch, sequence): running text, cut to exactly that length, with no padding."""
    tokenizer = _tokenizer(folder)
    texts = [str(value) for row in rows for value in row.values()]
    batches = []
    for batch, sequence in cells:
        lines = []
        for index in range(batch):
            turned = texts[index * 7 % len(texts) :] + texts[: index * 7 % len(texts)]
            words = " ".join(turned)
            lines.append(" ".join([words] * max(1, math.ceil(4 * sequence / max(1, len(words.split()))))))
        encoded = tokenizer(lines, truncation=True, max_length=sequence, padding="max_length", return_tensors="np")
        batches.append({name: np.asarray(array, dtype=np.int64) for name, array in encoded.items()})
    return batches


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _shipped(task: Task) -> list[Row]:
    rows: list[Row] = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").strip().split("\n")]
    if task is TASKS["question-answering"]:
        questions = [row["text"] for row in rows if row["kind"] == "question"]
        return [
            {"question": questions[index % len(questions)], "context": row["text"]}
            for index, row in enumerate(rows)
            if row["kind"] != "question"
        ]
    return [{"text": row["text"]} for row in rows]


def _rows(data: str) -> list[Row]:
    path = Path(data)
    try:
        if path.suffix in (".jsonl", ".json") and path.is_file():
            rows = _jsonl(path)
        elif path.suffix == ".csv" and path.is_file():
            rows = _csv(path)
        elif path.suffix == ".parquet" and path.is_file():
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix in (".jsonl", ".json", ".csv", ".parquet") or path.exists():
            state = "is not there" if not path.exists() else "is none of .jsonl, .csv, .parquet"
            raise RequestError(f"--data {data} {state}", hint="give a file, or the id of a dataset on the hub")
        else:
            rows = _hub_dataset(data)
    except UnicodeDecodeError as error:
        raise RequestError(f"--data {data} is not UTF-8: {error}", hint="save it as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:  # ArrowInvalid is a ValueError
        raise RequestError(f"--data {data} cannot be read: {error}") from error
    if not rows:
        raise RequestError(f"--data {data} has no rows")
    return rows


def _csv(path: Path) -> list[Row]:
    csv.field_size_limit(MAX_CELL)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise RequestError(f"--data {path}: two columns have one name", hint=f"columns found: {', '.join(names)}")
        rows: list[Row] = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise RequestError(
                f"--data {path}: row {number} has more cells than the header", hint="quote text that holds commas"
            )
    return rows


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"--data {path}: line {number} is not JSON: {error}", hint='write {"text": "..."}'
            ) from None
        if not isinstance(row, dict):
            raise RequestError(f"--data {path}: line {number} is not a JSON object", hint='write {"text": "..."}')
        rows.append(row)
    return rows


def _hub_dataset(data: str) -> list[Row]:
    import datasets

    name, _, split = data.partition(":")
    try:
        return list(datasets.load_dataset(name, split=split or "test", streaming=False))
    except Exception as error:  # the library raises a dozen unrelated types for what is one thing to the user
        raise RequestError(
            f"--data {data}: no such file, and not a dataset that can be loaded: {type(error).__name__}: {error}",
            hint="give a .jsonl, .csv or .parquet file, or NAME:SPLIT of a dataset on the hub (split `test` if none)",
        ) from error


def _column(rows: Sequence[Row], column: str, data: str | None) -> str:
    names = ALIASES.get(column, (column,))
    for name in names:
        if name in rows[0]:
            return name
    raise RequestError(
        f"--data {data} has no column {' or '.join(names)}", hint=f"columns found: {', '.join(map(str, rows[0]))}"
    )


def _text(value: object, column: str, number: int, data: str | None) -> str:
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if value in (None, "") or isinstance(value, str) else f"is not text ({value!r})"
        raise RequestError(f"--data {data}: row {number}: {column} {what}", hint="remove the row, or fill the cell")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"--data {data}: row {number}: {column} is not Unicode text (a lone surrogate)")
    return value


def _label(value: object, number: int, data: str | None, id2label: Mapping[int, str]) -> int:
    by_name = {name: index for index, name in id2label.items()}
    if isinstance(value, str) and value in by_name:
        return by_name[value]
    try:
        index = int(value) if isinstance(value, str) else value
        if isinstance(value, float) and value.is_integer():
            index = int(value)  # what data frames make of integers in a column with gaps
    except ValueError:
        index = None
    if isinstance(index, int) and not isinstance(index, bool) and index in id2label:
        return index
    listed = ", ".join(f"{index} {name}" for index, name in list(id2label.items())[:10])
    raise RequestError(
        f"--data {data}: row {number}: label {value!r} is not one of the model's", hint=f"the model's labels: {listed}"
    )
