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

from optimize.models.encoding import BATCH_SIZES, encode, encode_cells
from optimize.models.examples import SHIPPED, Examples, read_examples
from optimize.models.tasks import TASKS
from optimize.pipeline.answers import CONTEXT, OFFSETS, WORDS
from optimize.pipeline.batches import load_batches, save_batches
from optimize.pipeline.contract import LabelKind
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
    last = {row["text"] for row in sentences(3000)[2700:]}  # of a file that may be sorted
    assert 60 < len(last & {row["text"] for row in found.evaluation}) < 150
    assert 5 <= len(last & {row["text"] for row in found.calibration}) < 25


@pytest.mark.parametrize(
    "task", [name for name, task in TASKS.items() if "text" in task.columns or name == "question-answering"]
)
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


# Labelled data of other tasks

SIMILARITY, TAGGING, ANSWERING = (
    TASKS[name] for name in ("sentence-similarity", "token-classification", "question-answering")
)
TAGS = {0: "O", 1: "B-PER", 2: "I-PER"}


def pairs(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"sentence1": f"First {index}.", "sentence2": f"Second {index}.", "score": index / 10} | columns
        for index in range(number)
    ]


def tagged(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {"tokens": ["Ann", "Lee", f"ate {index}"], "tags": ["B-PER", "I-PER", "O"]} | columns for index in range(number)
    ]


def asked(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"question": f"Who is {index}?", "context": f"It is Ann {index}."} | columns for index in range(number)]


@pytest.mark.parametrize("column", ["score", "similarity", "label"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_a_scored_pair_is_two_texts(name: str, column: str, tmp_path: Path) -> None:
    rows = [{column if key == "score" else key: value for key, value in row.items()} for row in pairs(30)]
    found = read_examples(write(tmp_path / name, rows), SIMILARITY)
    judged = [index for index in range(30) if index % 3 != 1]
    assert found.labels == tuple(index / 10 for index in judged)
    assert [row["text"] for row in found.evaluation] == [
        f"{n} {index}." for index in judged for n in ("First", "Second")
    ]
    assert len(found.calibration) == 20 and not texts(found.evaluation) & texts(found.calibration)


@pytest.mark.parametrize("seed", range(10))
def test_sentences_that_recur_in_other_pairs_do_not_calibrate(seed: int, tmp_path: Path) -> None:
    choose = random.Random(seed)
    rows = [
        {"sentence1": f"S {choose.randrange(150)}.", "sentence2": f"S {choose.randrange(150)}.", "score": index}
        for index in range(100)
    ]
    found = read_examples(write(tmp_path / "d.jsonl", rows), SIMILARITY)
    assert not texts(found.evaluation) & texts(found.calibration)
    assert len(found.evaluation) == 2 * len(found.labels or ())
    assert 0 < len(found.calibration) == len(texts(found.calibration))


def test_where_every_sentence_is_judged_nothing_calibrates(tmp_path: Path) -> None:
    rows = [{"sentence1": f"S {i % 5}.", "sentence2": f"T {i // 5}.", "score": i} for i in range(30)]
    assert read_examples(write(tmp_path / "d.jsonl", rows), SIMILARITY).calibration == ()


def test_pairs_take_no_more_texts_than_other_data(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / "d.jsonl", pairs(6000)), SIMILARITY)
    assert (len(found.evaluation), len(found.labels or ()), len(found.calibration)) == (4500, 2250, 128)


@pytest.mark.parametrize("task", [SIMILARITY, TAGGING])
def test_text_without_labels_is_as_it_was(task: Any, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / "d.jsonl", sentences(30)), task, TAGS)
    assert found.labels is None and len(found.evaluation) == 20
    unlabelled = [{key: row[key] for key in ("sentence1", "sentence2")} for row in pairs(30)]
    assert dict(read_examples(write(tmp_path / "p.jsonl", unlabelled), SIMILARITY).evaluation[0]) == {
        "text": "First 0."
    }


@pytest.mark.parametrize("column", ["tags", "ner_tags", "labels"])
@pytest.mark.parametrize("values", [["B-PER", "I-PER", "O"], [1, 2, 0]])
@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_tags_are_names_or_the_models_numbers(name: str, values: list[Any], column: str, tmp_path: Path) -> None:
    rows = [{"tokens": row["tokens"], column: values} for row in tagged(30)]
    found = read_examples(write(tmp_path / name, rows), TAGGING, TAGS)
    assert found.labels == ((1, 2, 0),) * 20
    assert dict(found.evaluation[0]) == {"tokens": ["Ann", "Lee", "ate 0"]}


def test_tags_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", tagged(30))
    assert read_examples(data, TAGGING, {0: "I-PER", 1: "O", 2: "B-PER"}).labels == ((2, 0, 1),) * 20


def test_numbers_of_a_data_set_that_names_them_are_its_own(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")),
         "ner_tags": datasets.List(datasets.ClassLabel(names=["I-PER", "B-PER", "O"]))}
    )  # fmt: skip
    rows = {"tokens": [row["tokens"] for row in tagged(30)], "ner_tags": [[1, 0, 2]] * 30}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    assert read_examples(str(tmp_path / "d.parquet"), TAGGING, TAGS).labels == ((1, 2, 0),) * 20


def test_a_class_of_a_data_set_that_names_it_is_matched_by_name(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [row["text"] for row in sentences(30)], "label": [0, 1] * 15}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    found = read_examples(str(tmp_path / "d.parquet"), CLASSES, {0: "yes", 1: "no"})
    assert found.labels == tuple(1 - index % 2 for index in range(30) if index % 3 != 1)


@pytest.mark.parametrize(
    "answers",
    [{"text": ["Ann", "Lee"], "answer_start": [6, 6]}, ["Ann", "Lee"]],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_answers_are_squads_or_a_list(name: str, answers: Any, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / name, asked(30, answers=answers)), ANSWERING)
    assert found.labels == (("Ann", "Lee"),) * 20


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_one_answer_is_text(name: str, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / name, asked(30, answer="Ann")), ANSWERING)
    assert found.labels == (("Ann",),) * 20


@pytest.mark.parametrize("answers", [[], {"text": [], "answer_start": []}])
def test_a_question_can_have_no_answer(answers: Any, tmp_path: Path) -> None:
    rows = [*asked(1, answers=answers), *asked(30, answers=["Ann"])[1:]]
    labels = read_examples(write(tmp_path / "d.jsonl", rows), ANSWERING).labels
    assert labels is not None and labels[:2] == ((), ("Ann",))


@pytest.mark.parametrize(
    ("task", "rows", "says", "hint"),
    [
        (TAGGING, tagged(30, tags=["O", "O"]), "row 1: 3 tokens and 2 tags", "each token"),
        (TAGGING, tagged(30, tags=["O", "O", "B-LOC"]), "row 1: tag 'B-LOC' is not one of the model's", "1 B-PER"),
        (TAGGING, tagged(30, tags=["O", "O", 3]), "row 1: tag 3 is not", "0 O"),
        (TAGGING, tagged(30, tags="O O O"), r"row 1: tags is not a list \('O O O'\)", "jsonl or .parquet"),
        (TAGGING, tagged(30, tokens=["a", 1, "c"]), r"row 1: a word of tokens is not text \(1\)", "remove"),
        (TAGGING, tagged(30, tokens=[]), "row 1: tokens is empty", "remove"),
        (TAGGING, [{"tokens": ["a"]}], "has no column text", "labelled data have tokens, tags"),
        (SIMILARITY, pairs(30, score="alike"), "row 1: score 'alike' is not a number", "every pair"),
        (SIMILARITY, pairs(30, score=True), "row 1: score True is not a number", "every pair"),
        (SIMILARITY, pairs(30, score=1), "every score is 1", "more alike"),
        (SIMILARITY, [*pairs(30), {"sentence1": "One.", "score": 1}], "row 31: sentence2 is empty", "remove"),
        (ANSWERING, asked(30, answers=7), "row 1: answers 7 is no list of texts", "SQuAD"),
        (ANSWERING, asked(30, answers={"start": [1]}), "row 1: answers {'start'.* is no list of texts", "SQuAD"),
        (ANSWERING, asked(30, answers=["Ann", ""]), "row 1: answers is empty", "fill"),
        (ANSWERING, asked(30, answers="{'text': ['Ann'], 'answer_start': [6]}"), "row 1: .* written as text", "plain"),
    ],
)
def test_labels_that_are_none_are_refused_with_their_row(
    task: Any, rows: list[dict[str, Any]], says: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        read_examples(write(tmp_path / "d.jsonl", rows), task, TAGS)
    assert hint in str(caught.value.hint)


def test_a_csv_has_no_lists(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="row 1: tokens is not a list") as caught:
        read_examples(write(tmp_path / "d.csv", tagged(30)), TAGGING, TAGS)
    assert "a .csv has no lists" in str(caught.value.hint)


# Questions that a language model answers

GENERATION = TASKS["text-generation"]
CITIES = ["Rome", "Paris", "Oslo"]


def questions(number: int, **columns: Any) -> list[dict[str, Any]]:
    good = {"choices": CITIES, "answer": 1}
    return [{"question": f"Where is {index}?"} | good | columns for index in range(number)]


def open_questions(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"question": f"Where is {index}?", "answer": "Paris"} | columns for index in range(number)]


def renamed(rows: list[dict[str, Any]], old: str, new: str) -> list[dict[str, Any]]:
    return [{new if name == old else name: value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("value", [1, 1.0, "1", "B", "Paris", " B "])
@pytest.mark.parametrize("column", ["answer", "gold", "label", "answerKey", "target"])
def test_a_right_choice_is_an_index_a_letter_or_a_text(column: str, value: Any, tmp_path: Path) -> None:
    found = read_examples(
        write(tmp_path / "d.jsonl", renamed(questions(9, answer=value), "answer", column)), GENERATION
    )
    assert (found.kind, found.labels) == (LabelKind.CHOICE, (1,) * 9)
    assert dict(found.questions[0]) == {"query": "Where is 0?", "choices": CITIES}


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
@pytest.mark.parametrize(
    ("labels", "key", "right"),
    [(["A", "B", "C"], "C", 2), (["1", "2", "3"], "1", 0), ([1, 2, 3], 1, 0), (["x", "y", "z"], "Rome", 0)],
)
def test_choices_are_a_list_or_arcs(name: str, labels: list[Any], key: Any, right: int, tmp_path: Path) -> None:
    rows = renamed(questions(9, choices={"text": CITIES, "label": labels}, answer=key), "answer", "answerKey")
    found = read_examples(write(tmp_path / name, rows), GENERATION)
    assert found.labels == (right,) * 9 and found.questions[0]["choices"] == CITIES


def test_letters_of_a_data_set_that_names_them_are_read(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "choices": datasets.List(datasets.Value("string")),
         "answer": datasets.ClassLabel(names=["A", "B", "C"])}
    )  # fmt: skip
    rows = {"question": [f"Where is {index}?" for index in range(9)], "choices": [CITIES] * 9, "answer": [2] * 9}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    assert read_examples(str(tmp_path / "d.parquet"), GENERATION).labels == (2,) * 9


@pytest.mark.parametrize("column", ["question", "query", "ctx", "context"])
def test_a_question_has_several_names(column: str, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path / "d.jsonl", renamed(questions(9), "question", column)), GENERATION)
    assert found.questions[0]["query"] == "Where is 0?"
    both = [row | {"query": f"All of {row['question']}"} for row in questions(9)]  # as lm-eval's own documents have
    assert read_examples(write(tmp_path / "b.jsonl", both), GENERATION).questions[0]["query"] == "All of Where is 0?"


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
@pytest.mark.parametrize("column", ["answer", "target"])
def test_an_open_question_has_texts_that_are_right(name: str, column: str, tmp_path: Path) -> None:
    rows = renamed(open_questions(9), "answer", column)
    found = read_examples(write(tmp_path / name, rows), GENERATION)
    assert (found.kind, found.labels) == (LabelKind.TARGETS, (("Paris",),) * 9)
    assert dict(found.questions[0]) == {"query": "Where is 0?"}
    if not name.endswith("csv"):
        several = renamed(open_questions(9, answer=["Paris", "paris"]), "answer", column)
        assert read_examples(write(tmp_path / name, several), GENERATION).labels == (("Paris", "paris"),) * 9


def test_text_beside_questions_is_the_shipped_one(tmp_path: Path) -> None:
    found, shipped = (
        read_examples(write(tmp_path / "d.jsonl", questions(9)), GENERATION),
        read_examples(None, GENERATION),
    )
    assert (found.evaluation, found.calibration, found.source) == (
        shipped.evaluation,
        shipped.calibration,
        shipped.source,
    )
    assert not shipped.questions and shipped.kind is None


def test_of_many_questions_some_are_drawn_from_all(tmp_path: Path) -> None:
    rows = [row | {"answer": index % 3} for index, row in enumerate(questions(2000))]
    found = read_examples(write(tmp_path / "d.jsonl", rows), GENERATION)
    numbers = [int(row["query"].split()[-1][:-1]) for row in found.questions]
    assert len(numbers) == 450 and found.labels == tuple(number % 3 for number in numbers)
    assert 100 < sum(number >= 1500 for number in numbers) < 125 + 25


@pytest.mark.parametrize(
    ("rows", "says", "hint"),
    [
        (questions(9, answer="D"), "row 1: answer 'D' names none of the choices", "from 0 to 2; or one of A, B, C"),
        (questions(9, answer=3), "row 1: answer 3 names none", "index"),
        (questions(9, answer=-1), "row 1: answer -1 names none", "index"),
        (questions(9, answer=True), "row 1: answer True names none", "index"),
        (questions(9, answer=""), "row 1: answer '' names none", "index"),
        (questions(9, answer=None), "row 1: answer None names none", "index"),
        (questions(9, choices=["B", "A"], answer="A"), "answer 'A' can name 2 of the choices", "index"),
        (questions(9, choices=["1", "2", "3"], answer="2"), "answer '2' can name 2 of the choices", "index"),
        (questions(9, choices=["a", "a"], answer="a"), "answer 'a' can name 2 of the choices", "index"),
        (questions(9, choices=["Paris"]), "row 1: choices has one text alone", "two"),
        (questions(9, choices=[]), "row 1: choices is empty", "fill"),
        (questions(9, choices=["Paris", ""]), "row 1: a text of choices is empty", "fill"),
        (questions(9, choices="Paris, Rome"), "row 1: choices is not a list", "jsonl or .parquet"),
        (questions(9, choices={"text": CITIES, "label": ["A"]}), "row 1: 3 texts of choices and 1 labels", "None"),
        (questions(9, question=" "), "row 1: question is empty", "fill"),
        ([*questions(9), *open_questions(9)], "row 10 has no choices, which other rows have", "files of their own"),
        (questions(9, text="Some."), r"running text \(text\) and questions \(question\)", "run of its own"),
        (open_questions(9, text="Some."), "running text", "run of its own"),
        (questions(9, context="Some."), "columns question and context: it is not known", "query"),
        (questions(7), "7 examples are left", "distinct"),
        (open_questions(9, answer=[]), r"row 1: answer \[\] is no list of texts", "a text that is right"),
        (open_questions(9, answer=7), "row 1: answer 7 is no list of texts", "a text that is right"),
        (
            renamed(questions(9), "answer", "right"),
            "has choices, and no column answer or gold",
            "question, choices, right",
        ),
        (
            renamed(open_questions(9), "answer", "right"),
            "no column text",
            "have query, choices, answer; or query, target",
        ),
    ],
)
def test_questions_that_are_none_are_refused_with_their_row(
    rows: list[dict[str, Any]], says: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        read_examples(write(tmp_path / "d.jsonl", rows), GENERATION)
    assert hint in str(caught.value.hint)


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


def padding(folder: Path, side: str, tmp_path: Path) -> Path:
    """The folder's tokenizer, padding on this side."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, padding_side=side).save_pretrained(tmp_path / side)
    return tmp_path / side


@pytest.mark.parametrize("side", ["left", "right"])
def test_words_are_marked_at_their_first_tokens(side: str, minilm: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["Harbours", "antidisestablishment", "rain"]}, {"tokens": ["Rain"]}]
    (batch,) = encode(padding(minilm, side, tmp_path), rows, 64, (2,), labelled=True)
    for row, count in enumerate((3, 1)):
        mask, words = batch["attention_mask"][row] == 1, batch[WORDS][row]
        assert words[words >= 0].tolist() == list(range(count)) and (words[~mask] == -1).all()
        assert words[mask][0] == words[mask][-1] == -1, "CLS and SEP are no words"
    assert (batch[WORDS][0] == -1).sum() > 2, "a word of several tokens is marked once"
    (alone,) = encode(minilm, rows[1:], 64, (1,))
    assert alone.keys() == {"input_ids", "token_type_ids", "attention_mask"}, "nothing but inputs calibrates"


def test_words_beyond_the_limit_are_not_marked(minilm: Path) -> None:
    (batch,) = encode(minilm, [{"tokens": ["rain"] * 20}], 8, (1,), labelled=True)
    assert batch[WORDS].tolist() == [[-1, 0, 1, 2, 3, 4, 5, -1]]


@pytest.mark.parametrize("kind", ["byte-level", "sequence", "metaspace"])
def test_words_begin_as_after_a_space(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u2581" if kind == "metaspace" else "\u0120"
    vocabulary = {token: index for index, token in enumerate(("[PAD]", space, "a", "b", f"{space}a", f"{space}b"))}
    made = Tokenizer(models.BPE(vocabulary, [(space, "a"), (space, "b")]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = {
        "byte-level": level,
        "sequence": pre_tokenizers.Sequence([pre_tokenizers.Digits(), level]),
        "metaspace": pre_tokenizers.Metaspace(prepend_scheme="never"),
    }[kind]
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(tmp_path)
    (batch,) = encode(tmp_path, [{"tokens": ["a", "b"]}], 8, (1,), labelled=True)
    assert batch["input_ids"].tolist() == [[4, 5]] and batch[WORDS].tolist() == [[0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_can_be_cut_from_the_context(side: str, minilm: Path, tmp_path: Path) -> None:
    context = "Über dem Hafen: 漢字 fell, twice."
    rows = [{"question": "What fell?", "context": context}, {"question": "Who? " * 9, "context": "Ann."}]
    (batch,) = encode(padding(minilm, side, tmp_path), rows, 64, (2,), labelled=True)
    assert batch[CONTEXT].tolist() == [context, "Ann."]
    offsets = batch[OFFSETS][0]
    pieces = [context[start:end] for start, end in offsets if end > start]
    assert "".join(pieces) == context.replace(" ", "")
    mask = batch["attention_mask"][0] == 1
    assert (offsets[~mask] == -1).all()
    assert offsets[mask][0].tolist() == [0, 0] and (offsets[mask][1:5] == -1).all(), "CLS, the question, SEP"
    save_batches(tmp_path / "b.npz", [batch])
    (read,) = load_batches(tmp_path / "b.npz")
    assert all(np.array_equal(read[name], batch[name]) for name in batch)


def test_cells_of_words_are_running_text(minilm: Path) -> None:
    (batch,) = encode_cells(minilm, [{"tokens": ["Rain", "fell"]}], [(1, 6)])
    (expected,) = encode_cells(minilm, [{"text": "Rain fell"}], [(1, 6)])
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
