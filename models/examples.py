"""Examples to judge and to calibrate with: from the package or --data, split so that the two never overlap.

This happens while planning, so that bad data is refused before anything runs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimize.models.cells import READERS, read_label, read_text
from optimize.models.files import read_rows
from optimize.models.images import DRAWN as DRAWN_IMAGES
from optimize.models.speech import DRAWN as DRAWN_SOUNDS
from optimize.models.tasks import TASKS, TRANSCRIPT, Labelled, Task
from optimize.pipeline.contract import Form, LabelKind, Labels
from optimize.pipeline.errors import RequestError

SHIPPED = Path(__file__).parent / "data" / "text.jsonl"
MAX_CALIBRATION = 128  # examples
MAX_EVALUATION = 1024
MAX_LABELLED = 4500  # as many as resolve the default gate where no answer changes
MAX_QUESTIONS = 450  # likewise, of a language model, whose gate is wider and whose questions take longer
MIN_EVALUATION = 8
DRAWN = {  # how many, and what they are, in words
    Form.IMAGES: (
        DRAWN_IMAGES, "drawn images (gradients, shapes, waves and noise, the same ones each time: no photographs)"
    ),
    Form.CLIPS: (DRAWN_SOUNDS, "drawn sounds (a buzzing voice and noise, the same ones each time: no speech)"),
}  # fmt: skip
ALIASES = {
    "text": ("text", "sentence", "sentence1"),
    "text_pair": ("text_pair", "sentence2"),
    "transcript": TRANSCRIPT,
    "query": ("query", "question", "ctx", "context"),  # all that a language model reads before it answers
}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Examples:
    """Text, images or sounds for one run, already split.

    Labels are in the order of `evaluation`: one for each row, or each two rows. Those of a language model are in the
    order of `questions`.
    """

    source: str  # where they came from, for the manifest
    evaluation: tuple[Row, ...]
    calibration: tuple[Row, ...]
    labels: Labels | None = None
    kind: LabelKind | None = None  # of the labels
    questions: tuple[Row, ...] = ()  # that a language model answers; `evaluation` is then the shipped text

    @property
    def calibration_digest(self) -> str:
        """sha256 over what calibrates: part of the key of every calibrated pass."""
        content = [_content(row) for row in self.calibration]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_examples(data: str | None, task: Task, id2label: Mapping[int, str] | None = None) -> Examples:
    """The examples of a file or hub dataset, or the text that ships with the package, or images that are drawn: these
    calibrate nothing, since they are like nobody's own.

    `data` names a .jsonl, .csv or .parquet file, a folder of images by class, or a dataset on the hub as `NAME` or
    `NAME:SPLIT`. It is labelled
    where it has the columns of one of `task.labelled` and labels in any row. Rows that repeat an earlier text are
    dropped, and what evaluation has is left out of the calibration, so that the two cannot share one. Questions that a
    language model answers are no text to take its perplexity on: that is then the shipped one.

    Raises RequestError for files that cannot be read, missing columns, empty or non-text cells, and labels that are
    none or that the model lacks.
    """
    if data is None and task.form in DRAWN:
        count, source = DRAWN[task.form]
        return Examples(source, tuple({task.columns[0]: {"drawn": index}} for index in range(count)), ())
    rows = _shipped(task) if data is None else read_rows(data)
    labelled, label = (None, "") if data is None else _labelled(rows, task)
    asks = labelled is not None and labelled.kind.of_questions
    if task.form is Form.PROMPTS:
        _check_one_form(rows, labelled, data, task)
    columns = {column: _column(rows, column, data, task) for column in (labelled or task).columns}
    pair = next((name for name in ALIASES["text_pair"] if rows and name in rows[0]), None)
    if "text" in columns and pair and task.name != "sentence-similarity":
        columns["text_pair"] = pair
    seen: set[str] = set()
    kept: list[tuple[Row, Any]] = []
    # files are read here: no more of them than may be needed
    for index in _some(range(len(rows)), 2 * task.examples if task.examples else len(rows)):
        row, where = rows[index], f"--data {data}: row {index + 1}"
        texts = {name: READERS.get(name, read_text)(row.get(source), source, where) for name, source in columns.items()}
        if _identity(texts) in seen:
            continue
        seen.add(_identity(texts))
        kept.append((texts, read_label(row, label, labelled.kind, texts, where, id2label or {}) if labelled else None))
    evaluation, calibration = _split(kept, labelled, task)
    if len(evaluation) < MIN_EVALUATION:
        raise RequestError(
            f"--data {data}: {len(evaluation)} examples are left to evaluate on, {MIN_EVALUATION} are the least",
            hint="give more distinct rows, or leave --data out to use what comes with optimize",
        )
    labels = tuple(label for _, label in evaluation) if labelled else None
    if labelled and labelled.kind == LabelKind.SCORE and len(set(labels or ())) == 1:
        raise RequestError(
            f"--data {data}: every score is {evaluation[0][1]:g}, so nothing can be compared with them",
            hint="give pairs that people found more alike and less alike",
        )
    judged = _inputs([texts for texts, _ in evaluation], labelled)
    kind = labelled.kind if labelled else None
    if asks:
        return replace(read_examples(None, task), labels=labels, kind=kind, questions=tuple(judged))
    return Examples(data or f"shipped text ({SHIPPED.name})", tuple(judged), tuple(calibration), labels, kind)


def _split(
    kept: Sequence[tuple[Row, Any]], labelled: Labelled | None, task: Task
) -> tuple[list[tuple[Row, Any]], list[Row]]:
    """Rows with labels to evaluate, and inputs to calibrate with: every third row's, but none that is evaluated.

    A language model's questions do not calibrate, and nothing that is made of a speech model is calibrated.
    """
    if labelled and labelled.kind.of_questions:
        return [kept[index] for index in _some(range(len(kept)), MAX_QUESTIONS)], []
    calibrating = set() if task.form is Form.CLIPS else set(_some(range(1, len(kept), 3), MAX_CALIBRATION))
    inputs_of_a_row = len(labelled.columns) if labelled and labelled.apart else 1
    most = (task.examples or (MAX_LABELLED if labelled else MAX_EVALUATION)) // inputs_of_a_row
    evaluation = [kept[index] for index in _some([each for each in range(len(kept)) if each not in calibrating], most)]
    judged = {_identity(row) for row in _inputs([texts for texts, _ in evaluation], labelled)}
    others = {_identity(row): row for row in _inputs([kept[index][0] for index in sorted(calibrating)], labelled)}
    return evaluation, [row for identity, row in others.items() if identity not in judged][:MAX_CALIBRATION]


def _some(indices: Sequence[int], most: int) -> list[int]:
    """Not the first ones: a file may be sorted by class, or by length. The same ones every time."""
    return list(indices) if len(indices) <= most else sorted(random.Random(0).sample(indices, most))


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


def _labelled(rows: Sequence[Row], task: Task) -> tuple[Labelled | None, str]:
    """The task's labelled columns and the name of the labels', if any row has them: rows without are refused later."""
    found = {name for row in rows for name in row}
    for labelled in task.labelled:
        label = next((name for name in labelled.names if name in found), None)
        if label is not None and all(found & set(ALIASES.get(name, (name,))) for name in labelled.columns):
            return labelled, label
    return None, ""


def _check_one_form(rows: Sequence[Row], labelled: Labelled | None, data: str | None, task: Task) -> None:
    """Nothing of what a language model might be judged on is left out silently."""
    found = {name: None for row in rows for name in row}
    asked = [name for name in ALIASES["query"] if name in found]
    text = [name for name in ALIASES["text"] if name in found]
    if labelled is None and "choices" in found and not text:
        names = next(form.names for form in task.labelled if form.kind == LabelKind.CHOICE)
        raise RequestError(
            f"--data {data} has choices, and no column {' or '.join(names)} to say which is right",
            hint=f"columns found: {', '.join(map(str, found))}",
        )
    if labelled is None:
        return
    if text:
        raise RequestError(
            f"--data {data} has running text ({text[0]}) and questions ({asked[0]})",
            hint="give one of them, or each in a file and a run of its own",
        )
    if len(asked) > 1 and asked[0] != ALIASES["query"][0]:
        raise RequestError(
            f"--data {data} has the columns {' and '.join(asked)}: it is not known what the model is to read",
            hint=f"put all of it, as the model is to read it, into one column, {ALIASES['query'][0]}",
        )


def _column(rows: Sequence[Row], column: str, data: str | None, task: Task) -> str:
    names = ALIASES.get(column, (column,))
    for name in names:
        if name in rows[0]:
            return name
    forms = [", ".join((*labelled.columns, labelled.names[0])) for labelled in task.labelled]
    columns = f"; labelled data have {'; or '.join(forms)}" if forms else ""
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
    return json.dumps(_content(row), sort_keys=True)


def _content(row: Row) -> Row:
    """A row with what its files hold in place of where they lie."""
    return {name: value["sha256"] if isinstance(value, Mapping) else value for name, value in row.items()}
