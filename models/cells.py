"""Cells of --data: text, words and labels, each refused in words where it is none. `where` names file and row."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimize.pipeline.contract import LabelKind
from optimize.pipeline.errors import RequestError

Row = Mapping[str, Any]


def read_text(value: object, column: str, where: str) -> str:
    """A cell of text, as it is."""
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if value in (None, "") or isinstance(value, str) else f"is not text ({value!r})"
        raise RequestError(f"{where}: {column} {what}", hint="remove the row, or fill the cell")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{where}: {column} is not Unicode text (a lone surrogate)")
    return value


def _words(value: object, column: str, where: str) -> list[str]:
    return [read_text(word, f"a word of {column}", where) for word in _list(value, column, where)]


def _list(value: object, column: str, where: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    what = f"is not a list ({value!r:.40})" if value else "is empty"
    raise RequestError(
        f"{where}: {column} {what}",
        hint="a .csv has no lists: give a .jsonl or .parquet file" if value else "remove the row, or fill the cell",
    )


def _choices(value: object, column: str, where: str) -> list[str]:
    """A list of texts, or ARC's {"text": [...], "label": [...]}."""
    if value is None:
        raise RequestError(
            f"{where} has no {column}, which other rows have",
            hint="questions with choices and questions without go into files of their own",
        )
    found = value.get("text") if isinstance(value, Mapping) else value
    texts = [read_text(text, f"a text of {column}", where) for text in _list(found, column, where)]
    if len(texts) == 1:
        raise RequestError(f"{where}: {column} has one text alone", hint="give at least two to choose from")
    if isinstance(value, Mapping) and len(_letters(value, texts)) != len(texts):
        raise RequestError(f"{where}: {len(texts)} texts of {column} and {len(_letters(value, texts))} labels")
    return texts


def _letters(value: object, texts: Sequence[str]) -> list[str]:
    """What choices are called: their own labels, or A, B, C, ..."""
    labels = value.get("label") if isinstance(value, Mapping) else None
    if labels is None:
        return [chr(ord("A") + index) for index in range(min(len(texts), 26))]
    return [str(label).strip() for label in labels] if isinstance(labels, list) else []


def read_file(value: object, column: str, where: str) -> Mapping[str, Any]:
    """A cell that is a file: its path, its bytes, or the datasets library's {"bytes": ..., "path": ...}.

    Gives its path or bytes, and the sha256 by which two of them are the same.
    """
    given = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    if isinstance(given, str) and given.strip():
        try:
            content = Path(given).read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"{where}: {column} {given} cannot be read: {why}", hint="give its path") from None
        found: dict[str, Any] = {"path": str(Path(given).resolve())}
    elif isinstance(given, bytes) and given:
        content, found = given, {"bytes": given}
    else:
        what = "is empty" if given in (None, "", b"") else f"is no file ({value!r:.40})"
        raise RequestError(f"{where}: {column} {what}", hint="give its path, or its bytes in a .parquet file")
    return found | {"sha256": hashlib.sha256(content).hexdigest(), "where": where}


def read_sound(value: object, column: str, where: str) -> Mapping[str, Any]:
    """The same of a sound, which may be samples, too: the datasets library's {"array": ..., "sampling_rate": ...}."""
    if not isinstance(value, Mapping) or value.get("array") is None:
        return read_file(value, column, where)
    import soundfile

    file = io.BytesIO()
    try:
        samples = np.asarray(value["array"], dtype=np.float32)
        soundfile.write(file, samples, value["sampling_rate"], format="WAV", subtype="FLOAT")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"{where}: {column} has an array that is no sound: {error}",
            hint='write {"array": [...], "sampling_rate": N}',
        ) from None
    return read_file(file.getvalue(), column, where)


LARGEST_SCORE = 1e100  # squares of larger ones are no numbers any more
READERS = {
    "tokens": _words,
    "choices": _choices,
    "image": read_file,
    "audio": read_sound,
}  # of the columns that are not text


def read_label(
    row: Row, column: str, kind: LabelKind, texts: Row, where: str, id2label: Mapping[int, str]
) -> int | float | tuple[int, ...] | tuple[str, ...]:
    """A row's label, as contract.LabelKind has it: classes by the model's own names or indices."""
    value = row.get(column)
    if kind == LabelKind.CLASS:
        return _class(value, column, where, id2label)
    if kind == LabelKind.SCORE:
        return _score(value, column, where)
    if kind == LabelKind.ANSWERS:
        return _answers(value, column, where, none_is_allowed=True)
    if kind in (LabelKind.TARGETS, LabelKind.TRANSCRIPT):
        return _answers(value, column, where, none_is_allowed=False)
    if kind == LabelKind.CHOICE:
        return _right(value, column, texts["choices"], row["choices"], where)
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


def _right(value: object, column: str, texts: Sequence[str], choices: object, where: str) -> int:
    """The index of the right choice, given as that, by its letter or label, or as its text.

    Labels that the choices bring along come first. Else no order of the readings is right for all data: where they
    name different choices, the row is refused.
    """
    letters = _letters(choices, texts)
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    if isinstance(value, bool):
        text = ""
    if isinstance(choices, Mapping) and letters.count(text) == 1:
        return letters.index(text)
    found = {index for index, choice in enumerate(texts) if isinstance(value, str) and choice.strip() == text}
    found |= {index for index, letter in enumerate(letters) if letter == text and isinstance(value, str)}
    found |= {int(text)} if text.isascii() and text.isdigit() and int(text) < len(texts) else set()
    if len(found) == 1:
        return found.pop()
    named = "names none of the choices" if not found else f"can name {len(found)} of the choices"
    raise RequestError(
        f"{where}: {column} {value!r:.40} {named}",
        hint=f"give the right one's index, from 0 to {len(texts) - 1}; or one of {', '.join(letters)}; or its text",
    )


def _score(value: object, column: str, where: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if abs(score) < LARGEST_SCORE:
        return score
    raise RequestError(
        f"{where}: {column} {value!r} is not a number", hint="give every pair one, or leave out the column"
    )


def _answers(value: object, column: str, where: str, *, none_is_allowed: bool) -> tuple[str, ...]:
    """SQuAD's {"text": [...]}, a list of texts, or one text; an empty list can say that there is no answer."""
    found = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(found, str):
        if re.match(r"\s*(\{.*\banswer_start\b|\[\s*['\"])", found, re.DOTALL):
            raise RequestError(
                f"{where}: {column} is a list written as text", hint="give a .jsonl or .parquet file, or one plain text"
            )
        found = [found]
    if not isinstance(found, list) or not (found or none_is_allowed):
        none = "[] says that there is no answer" if none_is_allowed else "every question needs a text that is right"
        raise RequestError(
            f"{where}: {column} {value!r:.40} is no list of texts",
            hint=f'write ["..."], or {{"text": ["..."]}} as SQuAD does; {none}',
        )
    return tuple(read_text(answer, column, where) for answer in found)
