"""Text to judge and to calibrate with: reading, splitting, encoding."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from optimize.models.examples import BATCH_SIZES, SHIPPED, Examples, encode, encode_cells, read_examples
from optimize.models.tasks import TASKS
from optimize.pipeline.errors import RequestError

FEATURES, CLASSES = TASKS["feature-extraction"], TASKS["text-classification"]
LABELS = {0: "bad", 1: "good"}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows in the format of the path's name."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentences(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"text": f'Sentence number {index}, "quoted",\nover two lines: é 漢字.', **columns} for index in range(number)
    ]


def texts(rows: Sequence[Any]) -> set[str]:
    return {json.dumps(dict(row), sort_keys=True) for row in rows}


# Splitting


@pytest.mark.parametrize("seed", range(20))
def test_no_example_both_calibrates_and_judges(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    rows = [{"text": f"Sentence {choose.randrange(100)}."} for _ in range(choose.randrange(60, 600))]
    found = read_examples(write(tmp_path / "d.jsonl", rows), FEATURES)
    evaluation, calibration = texts(found.evaluation), texts(found.calibration)
    assert not evaluation & calibration
    assert len(evaluation) == len(found.evaluation) and len(calibration) == len(found.calibration)
    assert evaluation | calibration == texts(rows)


def test_a_split_is_the_same_each_time_and_its_digest_tells(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", sentences(60))
    first, again = read_examples(data, FEATURES), read_examples(data, FEATURES)
    assert first == again and first.calibration_digest == again.calibration_digest
    changed = sentences(60)
    changed[1] = {"text": "Another one."}  # the second row calibrates
    assert read_examples(write(tmp_path / "d.jsonl", changed), FEATURES).calibration_digest != first.calibration_digest


def test_of_much_data_most_is_evaluated_on_up_to_a_limit(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / "d.jsonl", sentences(3000)), FEATURES)
    assert (len(found.evaluation), len(found.calibration)) == (1024, 128)


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_text_is_unique_and_split(task: str) -> None:
    shipped = [json.loads(line)["text"] for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    assert len(shipped) == len(set(shipped)) == 384
    found = read_examples(None, TASKS[task])
    assert found.labels is None and not texts(found.evaluation) & texts(found.calibration)
    assert all(row.keys() == set(TASKS[task].columns) for row in found.evaluation)
    if task == "question-answering":  # its questions are asked about all the other texts
        assert len(found.evaluation) > 200 and len(found.calibration) > 100
    else:
        assert (len(found.evaluation), len(found.calibration)) == (256, 128)


# Reading


@pytest.mark.parametrize("value", ["good", 1, "1"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_labels_are_names_or_numbers_in_every_format(name: str, value: Any, tmp_path: Path) -> None:
    rows = sentences(30, label=value)
    expected = read_examples(write(tmp_path / "expected.jsonl", sentences(30, label=1)), CLASSES, LABELS)
    found = read_examples(write(tmp_path / name, rows), CLASSES, LABELS)
    assert found.labels == (1,) * 20 == expected.labels
    assert (found.evaluation, found.calibration) == (expected.evaluation, expected.calibration)


def test_labels_stay_with_their_rows(tmp_path: Path) -> None:
    rows = [{"text": f"{index % 2} is the label of {index}.", "label": index % 2} for index in range(60)]
    found = read_examples(write(tmp_path / "d.csv", rows), CLASSES, LABELS)
    assert found.labels == tuple(int(row["text"][0]) for row in found.evaluation)


def test_a_label_that_is_a_name_wins_over_its_number(tmp_path: Path) -> None:
    data = write(tmp_path / "d.csv", sentences(30, label="1"))
    assert read_examples(data, CLASSES, {0: "1", 1: "0"}).labels == (0,) * 20


@pytest.mark.parametrize("value", [True, 1.5, "", "ugly", 2, -1])
def test_other_labels_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not one of the model's") as caught:
        read_examples(write(tmp_path / "d.jsonl", sentences(30, label=value)), CLASSES, LABELS)
    assert "0 bad, 1 good" in str(caught.value.hint)


def test_labels_are_read_only_for_tasks_that_have_them(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path / "d.jsonl", sentences(30, label="any")), FEATURES).labels is None


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(name: str, tmp_path: Path) -> None:
    path = Path(write(tmp_path / name, sentences(30)))
    plain = read_examples(str(path), FEATURES)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_examples(str(path), FEATURES) == plain


@pytest.mark.parametrize("character", ["\u2028", "\x85"])
def test_a_json_line_ends_only_with_a_newline(character: str, tmp_path: Path) -> None:
    rows = [{"text": f"Sentence{character}{index}."} for index in range(30)]
    assert len(read_examples(write(tmp_path / "d.jsonl", rows), FEATURES).evaluation) == 20


def test_empty_lines_between_rows_are_fine(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "d.jsonl", sentences(30)))
    path.write_text("\n" + path.read_text().replace("\n", "\r\n\n"))
    assert len(read_examples(str(path), FEATURES).evaluation) == 20


@pytest.mark.parametrize(("first", "second"), [("text", "text_pair"), ("sentence1", "sentence2")])
def test_pairs(first: str, second: str, tmp_path: Path) -> None:
    rows = [{first: "The same.", second: f"Another, {index}."} for index in range(30)]
    found = read_examples(write(tmp_path / "d.jsonl", rows), CLASSES)
    assert dict(found.evaluation[0]) == {"text": "The same.", "text_pair": "Another, 0."}
    alone = read_examples(write(tmp_path / "d.jsonl", [{"sentence": f"{index}"} for index in range(30)]), FEATURES)
    assert dict(alone.evaluation[0]) == {"text": "0"}


def test_questions_need_their_contexts(tmp_path: Path) -> None:
    task = TASKS["question-answering"]
    rows = [{"question": f"Who is {index}?", "context": f"It is {index}."} for index in range(30)]
    found = read_examples(write(tmp_path / "d.jsonl", rows), task)
    assert dict(found.evaluation[0]) == rows[0]
    with pytest.raises(RequestError, match="no column context"):
        read_examples(write(tmp_path / "d.jsonl", [{"question": "Who?"}]), task)


# Encoding


@pytest.fixture(scope="module")
def shipped() -> Examples:
    return read_examples(None, FEATURES)


def test_batches_take_their_sizes_in_turn_and_are_padded_to_their_own_longest_row(
    shipped: Examples, minilm: Path
) -> None:
    rows = shipped.evaluation[:25]
    batches = encode(minilm, rows, 64, BATCH_SIZES)
    assert [len(batch["input_ids"]) for batch in batches] == [1, 2, 8, 1, 2, 8, 1, 2]
    alone = encode(minilm, rows, 64, (1,))
    lengths = [batch["input_ids"].shape[1] for batch in alone]
    assert max(lengths) == 64, "some are cut"
    start = 0
    for batch in batches:
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
        size = len(batch["input_ids"])
        assert batch["input_ids"].shape == (size, max(lengths[start : start + size]))
        assert batch["attention_mask"].sum(axis=1).tolist() == lengths[start : start + size]
        start += size
    assert start == 25


def test_cells_have_exactly_their_shape_and_no_padding(shipped: Examples, minilm: Path) -> None:
    cells = [(1, 4), (1, 32), (8, 128), (3, 512)]
    batches = encode_cells(minilm, shipped.evaluation, cells)
    assert [batch["input_ids"].shape for batch in batches] == cells
    assert all((batch["attention_mask"] == 1).all() for batch in batches)
    assert len({row.tobytes() for row in batches[2]["input_ids"]}) == 8, "rows of one batch differ"


def test_cells_of_few_short_texts_are_filled_by_repeating_them(minilm: Path) -> None:
    (batch,) = encode_cells(minilm, [{"text": "One."}, {"text": "漢字"}], [(2, 256)])
    assert batch["input_ids"].shape == (2, 256) and (batch["attention_mask"] == 1).all()


def test_questions_and_contexts_are_encoded_as_pairs(minilm: Path) -> None:
    from transformers import AutoTokenizer

    rows = [{"question": "Who?", "context": "It is the baker."}, {"question": "Where is it?", "context": "There."}]
    (batch,) = encode(minilm, rows, 64, (2,))
    expected = AutoTokenizer.from_pretrained(minilm)(
        ["Who?", "Where is it?"], ["It is the baker.", "There."], padding=True
    )
    assert all(batch[name].tolist() == expected[name] for name in batch)
    assert batch["token_type_ids"].any(axis=1).all()
    (cut,) = encode(minilm, [{"text": "a " * 50, "text_pair": "b " * 50}], 16, (1,))
    assert cut["input_ids"].shape == (1, 16)
