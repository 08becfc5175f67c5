"""Text to judge and to calibrate with: reading it, splitting it so that the two never overlap, and encoding it.

Reading and splitting happen while planning, so that bad data is refused before anything runs; encoding needs the
checkpoint's tokenizer and happens in a worker.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.tasks import TASKS, Labelled, Task
from optimize.pipeline.answers import CONTEXT, OFFSETS, WORDS
from optimize.pipeline.batches import Encoded
from optimize.pipeline.contract import LabelKind, Labels
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
    """Text for one run, already split. Labels are in the order of `evaluation`: one for each row, or each two rows."""

    source: str  # where the text came from, for the manifest
    evaluation: tuple[Row, ...]
    calibration: tuple[Row, ...]
    labels: Labels | None = None

    @property
    def calibration_digest(self) -> str:
        """sha256 over what calibrates: part of the key of every calibrated pass."""
        return hashlib.sha256(json.dumps(self.calibration, sort_keys=True, default=str).encode()).hexdigest()


def read_examples(data: str | None, task: Task, id2label: Mapping[int, str] | None = None) -> Examples:
    """The examples of a file or hub dataset, or the text that ships with the package.

    `data` names a .jsonl, .csv or .parquet file, or a dataset on the hub as `NAME` or `NAME:SPLIT`. It is labelled
    where it has the columns of `task.labelled` and labels in any row. Rows that repeat an earlier text are dropped, and
    what evaluation has is left out of the calibration, so that the two cannot share one. Raises RequestError for files
    that cannot be read, missing columns, empty or non-text cells, and labels that are none or that the model lacks.
    """
    rows = _shipped(task) if data is None else _rows(data)
    labelled, label = (None, "") if data is None else _labelled(rows, task)
    columns = {column: _column(rows, column, data, task) for column in (labelled or task).columns}
    pair = next((name for name in ALIASES["text_pair"] if rows and name in rows[0]), None)
    if "text" in columns and pair and task.name != "sentence-similarity":
        columns["text_pair"] = pair
    seen: set[str] = set()
    kept: list[tuple[Row, Any]] = []
    for number, row in enumerate(rows, start=1):
        where = f"--data {data}: row {number}"
        texts = {name: READERS.get(name, _text)(row.get(source), source, where) for name, source in columns.items()}
        if _identity(texts) in seen:
            continue
        seen.add(_identity(texts))
        kept.append((texts, _label(row, label, labelled.kind, texts, where, id2label or {}) if labelled else None))
    evaluation, calibration = _split(kept, labelled)
    if len(evaluation) < MIN_EVALUATION:
        raise RequestError(
            f"--data {data}: {len(evaluation)} examples are left to evaluate on, {MIN_EVALUATION} are the least",
            hint="give more distinct rows, or leave --data out to use the text that ships with optimize",
        )
    labels = tuple(label for _, label in evaluation) if labelled else None
    if labelled and labelled.kind == LabelKind.SCORE and len(set(labels or ())) == 1:
        raise RequestError(
            f"--data {data}: every score is {evaluation[0][1]:g}, so nothing can be compared with them",
            hint="give pairs that people found more alike and less alike",
        )
    judged = _inputs([texts for texts, _ in evaluation], labelled)
    return Examples(data or f"shipped text ({SHIPPED.name})", tuple(judged), tuple(calibration), labels)


def _split(kept: Sequence[tuple[Row, Any]], labelled: Labelled | None) -> tuple[list[tuple[Row, Any]], list[Row]]:
    """Rows with labels to evaluate, and inputs to calibrate with: every third row's, but none that is evaluated."""
    calibrating = {index for index in range(len(kept)) if index % 3 == 1}
    while len(calibrating) > MAX_CALIBRATION:
        calibrating.discard(max(calibrating))
    inputs_of_a_row = len(labelled.columns) if labelled and labelled.apart else 1
    evaluation = [pair for index, pair in enumerate(kept) if index not in calibrating]
    evaluation = evaluation[: MAX_EVALUATION // inputs_of_a_row]
    judged = {_identity(row) for row in _inputs([texts for texts, _ in evaluation], labelled)}
    others = {_identity(row): row for row in _inputs([kept[index][0] for index in sorted(calibrating)], labelled)}
    return evaluation, [row for identity, row in others.items() if identity not in judged][:MAX_CALIBRATION]


def encode(
    folder: Path, rows: Sequence[Row], max_length: int, sizes: Iterable[int], *, labelled: bool = False
) -> list[Encoded]:
    """Batches of [batch, sequence] int64 arrays by input name; each batch is padded to its own longest row.

    `sizes` is repeated until the rows are used up. Rows are cut at `max_length` tokens. With `labelled`, batches also
    have what turns outputs into answers (see answers.py), which is no input of a model. Raises RequestError for a
    tokenizer that cannot tell it.
    """
    split = bool(rows) and "tokens" in rows[0]
    tokenizer = _tokenizer(folder)
    spans = labelled and bool(rows) and "context" in rows[0]
    if (split or spans) and not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} cannot tell which token belongs to which word",
            hint="save the checkpoint with a tokenizer.json, or give text without labels",
        )
    if split:
        _begin_words_as_after_a_space(tokenizer)
    turns = tuple(sizes)
    batches: list[Encoded] = []
    start = 0
    while start < len(rows):
        chunk = rows[start : start + turns[len(batches) % len(turns)]]
        start += len(chunk)
        first = [row.get("question", row.get("tokens", row.get("text"))) for row in chunk]
        second = [row.get("context", row.get("text_pair")) for row in chunk]
        encoded = tokenizer(
            first, second if second[0] is not None else None, is_split_into_words=split,
            padding=True, truncation=True, max_length=max_length, return_tensors="np",
        )  # fmt: skip
        batch = {name: np.asarray(array, dtype=np.int64) for name, array in encoded.items()}
        if labelled and split:
            batch[WORDS] = _first_tokens(encoded)
        if spans:
            batch[OFFSETS] = _context_offsets(encoded, tokenizer.cls_token_id)
            batch[CONTEXT] = np.array(second, dtype=np.str_)
        batches.append(batch)
    return batches


def _first_tokens(encoded: Any) -> Any:
    """For each position of [batch, sequence] the index of the word that begins there, -1 where none does."""
    found = np.full(encoded["input_ids"].shape, -1, dtype=np.int64)
    for row in range(len(found)):
        previous = None
        for position, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != previous:
                found[row, position] = word
            previous = word
    return found


def _context_offsets(encoded: Any, cls: int | None) -> Any:
    """For each position of [batch, sequence] its characters' range in the context; CLS has (0, 0), others (-1, -1)."""
    found = np.full((*encoded["input_ids"].shape, 2), -1, dtype=np.int64)
    for row, tokens in enumerate(encoded["input_ids"].tolist()):
        for position, (sequence, ends) in enumerate(
            zip(encoded.sequence_ids(row), encoded.encodings[row].offsets, strict=True)
        ):
            if sequence == 1 and ends[0] < ends[1]:
                found[row, position] = ends
        if cls in tokens:
            found[row, tokens.index(cls)] = 0
    return found


def encode_cells(folder: Path, rows: Sequence[Row], cells: Iterable[tuple[int, int]]) -> list[Encoded]:
    """One batch for each cell (batch, sequence): running text, cut to exactly that length, with no padding."""
    tokenizer = _tokenizer(folder)
    texts = [value if isinstance(value, str) else " ".join(value) for row in rows for value in row.values()]
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


def _begin_words_as_after_a_space(tokenizer: Any) -> None:
    """Have each word of a list tokenized as in running text. `add_prefix_space` does it for some tokenizers only."""
    from tokenizers import pre_tokenizers

    first: Any = tokenizer.backend_tokenizer.pre_tokenizer
    several = isinstance(first, pre_tokenizers.Sequence)
    for each in first if several else (first,):
        if isinstance(each, pre_tokenizers.ByteLevel):
            each.add_prefix_space = True
        elif isinstance(each, pre_tokenizers.Metaspace):
            each.prepend_scheme = "always"


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

            table = pyarrow.parquet.read_table(path)
            described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            rows = _tags_by_name(table.to_pylist(), described.get("info", {}).get("features", {}))
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
        loaded = datasets.load_dataset(name, split=split or "test", streaming=False)
        return _tags_by_name(list(loaded), loaded.features.to_dict())
    except Exception as error:  # the library raises a dozen unrelated types for what is one thing to the user
        raise RequestError(
            f"--data {data}: no such file, and not a dataset that can be loaded: {type(error).__name__}: {error}",
            hint="give a .jsonl, .csv or .parquet file, or NAME:SPLIT of a dataset on the hub (split `test` if none)",
        ) from error


def _tags_by_name(rows: list[Row], features: Mapping[str, Any]) -> list[Row]:
    """Rows with the names of lists of classes in place of their indices, where the data set names them.

    The indices are the data set's own: the model's classes may stand in another order. `features` is how the datasets
    library describes columns.
    """
    named = {
        column: feature["feature"]["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and isinstance(feature.get("feature"), dict) and "names" in feature["feature"]
    }
    if not named:
        return rows

    def name(tag: Any, names: Sequence[str]) -> Any:
        return names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag

    return [
        {**row, **{column: [name(tag, names) for tag in row[column] or ()] for column, names in named.items()}}
        for row in rows
    ]


def _labelled(rows: Sequence[Row], task: Task) -> tuple[Labelled | None, str]:
    """The task's labelled columns and the name of the labels', if any row has them: rows without are refused later."""
    found = {name for row in rows for name in row}
    labelled = task.labelled
    if labelled is None or not all(found & set(ALIASES.get(name, (name,))) for name in labelled.columns):
        return None, ""
    label = next((name for name in labelled.names if name in found), None)
    return (labelled, label) if label is not None else (None, "")


def _column(rows: Sequence[Row], column: str, data: str | None, task: Task) -> str:
    names = ALIASES.get(column, (column,))
    for name in names:
        if name in rows[0]:
            return name
    labelled = task.labelled
    columns = "" if labelled is None else f"; labelled data have {', '.join((*labelled.columns, labelled.names[0]))}"
    raise RequestError(
        f"--data {data} has no column {' or '.join(names)}",
        hint=f"columns found: {', '.join(map(str, rows[0]))}{columns}",
    )


def _inputs(rows: Sequence[Row], labelled: Labelled | None) -> list[Row]:
    """What a model is given for each row: the row itself, or each of its texts alone."""
    if labelled is None or not labelled.apart:
        return list(rows)
    return [{"text": row[column]} for row in rows for column in labelled.columns]


def _identity(row: Row) -> str:
    return json.dumps(row, sort_keys=True)


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if value in (None, "") or isinstance(value, str) else f"is not text ({value!r})"
        raise RequestError(f"{where}: {column} {what}", hint="remove the row, or fill the cell")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{where}: {column} is not Unicode text (a lone surrogate)")
    return value


def _words(value: object, column: str, where: str) -> list[str]:
    return [_text(word, f"a word of {column}", where) for word in _list(value, column, where)]


def _list(value: object, column: str, where: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    what = f"is not a list ({value!r:.40})" if value else "is empty"
    raise RequestError(
        f"{where}: {column} {what}",
        hint="a .csv has no lists: give a .jsonl or .parquet file" if value else "remove the row, or fill the cell",
    )


READERS = {"tokens": _words}  # of the columns that are not text


def _label(
    row: Row, column: str, kind: LabelKind, texts: Row, where: str, id2label: Mapping[int, str]
) -> int | float | tuple[int, ...] | tuple[str, ...]:
    value = row.get(column)
    if kind == LabelKind.CLASS:
        return _class(value, column, where, id2label)
    if kind == LabelKind.SCORE:
        return _score(value, column, where)
    if kind == LabelKind.ANSWERS:
        return _answers(value, column, where)
    tags, words = _list(value, column, where), texts["tokens"]
    if len(tags) != len(words):
        raise RequestError(f"{where}: {len(words)} tokens and {len(tags)} {column}", hint="give each token its tag")
    return tuple(_class(tag, "tag", where, id2label) for tag in tags)


def _class(value: object, column: str, where: str, id2label: Mapping[int, str]) -> int:
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
    raise RequestError(f"{where}: {column} {value!r} is not one of the model's", hint=f"the model's labels: {listed}")


def _score(value: object, column: str, where: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if math.isfinite(score):
        return score
    raise RequestError(
        f"{where}: {column} {value!r} is not a number", hint="give every pair one, or leave out the column"
    )


def _answers(value: object, column: str, where: str) -> tuple[str, ...]:
    """SQuAD's {"text": [...]}, a list of texts, or one text; an empty list says that there is no answer."""
    found = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(found, str):
        if re.match(r"\s*(\{.*\banswer_start\b|\[\s*['\"])", found, re.DOTALL):
            raise RequestError(
                f"{where}: {column} is a list written as text", hint="give a .jsonl or .parquet file, or one plain text"
            )
        found = [found]
    if not isinstance(found, list):
        raise RequestError(
            f"{where}: {column} {value!r:.40} is no list of texts",
            hint='write ["..."], or {"text": ["..."]} as SQuAD does; [] says that there is no answer',
        )
    return tuple(_text(answer, column, where) for answer in found)
