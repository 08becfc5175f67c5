"""Rows of --data: .jsonl, .csv and .parquet files, folders of images by class, and datasets on the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimize.pipeline.errors import RequestError

MAX_CELL = 1 << 24  # characters of one cell of a .csv
FILES = ("image", "audio")  # columns whose text is the path of a file
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

Row = Mapping[str, Any]


def read_rows(data: str) -> list[Row]:
    """The rows of a file, of a folder with a folder of images for each class, or of a hub dataset: column -> value.

    Paths in a file are relative to its folder. Raises RequestError for what cannot be read.
    """
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
            info = described.get("info") if isinstance(described, dict) else None
            features = info.get("features") if isinstance(info, dict) else None
            rows = _classes_by_name(table.to_pylist(), features if isinstance(features, dict) else {})
        elif path.is_dir():
            rows = _images_by_class(path)
        elif path.suffix in (".jsonl", ".json", ".csv", ".parquet") or path.exists():
            state = "is not there" if not path.exists() else "is none of .jsonl, .csv, .parquet"
            raise RequestError(f"--data {data} {state}", hint="give a file, or the id of a dataset on the hub")
        else:
            rows = _hub_dataset(data)
    except UnicodeDecodeError as error:
        raise RequestError(f"--data {data} is not UTF-8: {error}", hint="save it as UTF-8") from error
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:  # of which Arrow's errors are
        raise RequestError(f"--data {data} cannot be read: {error}") from error
    if not rows:
        raise RequestError(f"--data {data} has no rows")
    return [_with_paths(row, path.parent) for row in rows] if path.is_file() else rows


def _with_paths(row: Row, folder: Path) -> Row:
    return {**row, **{name: str(folder / row[name]) for name in FILES if row.get(name) and isinstance(row[name], str)}}


def _images_by_class(folder: Path) -> list[Row]:
    """FOLDER/CLASS/*, as the datasets library's imagefolder and torchvision's ImageFolder have it."""
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGES)
    if not files:
        raise RequestError(
            f"--data {folder} has no folders with images in them",
            hint=f"put each class's images ({', '.join(IMAGES)}) into a folder of its name, or give a file",
        )
    return [{"image": str(path), "label": path.parent.name} for path in files]


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
        for column, feature in loaded.features.items():
            if isinstance(feature, (datasets.Image, datasets.Audio)):
                loaded = loaded.cast_column(column, type(feature)(decode=False))
        return _classes_by_name(list(loaded), loaded.features.to_dict())
    except Exception as error:  # the library raises a dozen unrelated types for what is one thing to the user
        raise RequestError(
            f"--data {data}: no such file, and not a dataset that can be loaded: {type(error).__name__}: {error}",
            hint="give a .jsonl, .csv or .parquet file, or NAME:SPLIT of a dataset on the hub (split `test` if none)",
        ) from error


def _classes_by_name(rows: list[Row], features: Mapping[str, Any]) -> list[Row]:
    """Rows with the names of classes, and of lists of them, in place of their indices, where the data set names them.

    The indices are the data set's own: the model's classes may stand in another order. `features` is how the datasets
    library describes columns.
    """
    named: dict[str, Sequence[str]] = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("names"), list):  # else no metadata of the library's
            named[column] = inner["names"]

    if not named:
        return rows

    def name(tag: Any, names: Sequence[str]) -> Any:
        if isinstance(tag, list) and names:
            return [name(each, names) for each in tag]
        return names[tag] if isinstance(tag, int) and 0 <= tag < len(names) else tag

    return [{column: name(value, named.get(column, ())) for column, value in row.items()} for row in rows]
