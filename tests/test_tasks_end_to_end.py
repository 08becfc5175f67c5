"""Every task, end to end on a tiny model: the emitted artifact answers as eager does in transformers.pipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK, Cli, MakeCheckpoint

CASES = [
    ("text-classification", "BertForSequenceClassification", "BertConfig", "export-onnx"),
    ("token-classification", "BertForTokenClassification", "BertConfig", "convert-openvino"),
    ("fill-mask", "RobertaForMaskedLM", "RobertaConfig", "export-onnx{fused=true}"),
    ("question-answering", "DistilBertForQuestionAnswering", "DistilBertConfig", "convert-openvino"),
]


@pytest.mark.parametrize(("task", "architecture", "config", "recipe"), CASES)
def test_answers_are_eagers(
    task: str, architecture: str, config: str, recipe: str, make_checkpoint: MakeCheckpoint, some_text: Path, cli: Cli,
    tmp_path: Path,
) -> None:  # fmt: skip
    from transformers import pipeline

    import optimize

    options = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128} if config == "DistilBertConfig" else {}
    folder = make_checkpoint(architecture, config, **options)
    out = tmp_path / "out"
    data = () if task == "question-answering" else ("--data", some_text)
    outcome = cli(folder, "--recipe", recipe, *QUICK, *data, "--out", out)
    assert outcome.code == 0, outcome.output
    text = {"fill-mask": "The harbour was [MASK] in the morning."}.get(task, "Rain fell on the harbour for three days.")
    given = {"question": "Where did it fall?", "context": text} if task == "question-answering" else text
    # question answering left transformers' pipelines: its outputs are compared instead
    if task == "question-answering":
        _compare_outputs(folder, out, given)
        return
    ours = pipeline(task, model=optimize.load(out), tokenizer=str(out))(given)
    theirs = pipeline(task, model=str(folder), dtype="float32")(given)
    assert len(ours) == len(theirs) > 0
    for found, expected in zip(ours, theirs, strict=True):
        assert found["score"] == pytest.approx(expected["score"], rel=1e-3)
        assert {k: v for k, v in found.items() if k != "score"} == {k: v for k, v in expected.items() if k != "score"}


def _compare_outputs(folder: Path, out: Path, given: dict[str, str]) -> None:
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    import optimize

    inputs = AutoTokenizer.from_pretrained(out)(given["question"], given["context"], return_tensors="pt")
    found = optimize.load(out)(**inputs)
    with torch.inference_mode():
        model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
        expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.allclose(found.start_logits, expected.start_logits, atol=1e-3)
    assert torch.allclose(found.end_logits, expected.end_logits, atol=1e-3)


def test_a_bfloat16_checkpoint_is_judged_by_float32(make_checkpoint: MakeCheckpoint, cli: Cli, tmp_path: Path) -> None:
    folder = make_checkpoint(dtype="bfloat16")
    outcome = cli(folder, "--recipe", "convert-openvino", *QUICK, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    assert outcome.report["checkpoint"]["dtype"] == "bfloat16"
    assert outcome.report["candidates"][0]["accuracy"]["worst_drop"] < 1e-5


def test_labels_give_an_accuracy_with_its_paired_drop(
    make_checkpoint: MakeCheckpoint, cli: Cli, tmp_path: Path
) -> None:
    folder = make_checkpoint(
        "BertForSequenceClassification", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}
    )
    data = tmp_path / "data.jsonl"
    random = np.random.default_rng(0)
    words = ["harbour", "rain", "stone", "quick", "letter", "green", "seven", "song"]
    rows = [
        {"text": " ".join(random.permutation(words)) + f" {index}", "label": ["bad", "good"][index % 2]}
        for index in range(60)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    outcome = cli(folder, "--recipe", "convert-openvino", "--data", data, *QUICK, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    metric, macro = outcome.report["candidates"][0]["accuracy"]["metrics"]
    assert (metric["name"], macro["name"]) == ("accuracy", "macro F1")
    assert "cannot show a drop below" in outcome.output  # forty examples and a gate of 0.001
    assert 0 <= metric["reference"] <= 1
    assert metric["drop"]["value"] == pytest.approx(metric["reference"] - metric["candidate"])
    assert outcome.report["evaluation"]["labelling"]["labels"] == [index % 2 for index in range(60) if index % 3 != 1]


NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WORDS = ("harbour", "rain", "stone", "quick", "letter", "antidisestablishment", "seven", "song")


def labelled_rows(task: str) -> list[dict[str, object]]:
    """Sixty rows of eight words in random order, labelled at random."""
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for index in range(60):
        words = [*map(str, random.permutation(WORDS)), f"{index}"]
        text = " ".join(words)
        if task == "sentence-similarity":
            rows.append({"sentence1": text, "sentence2": " ".join(words[::-2]), "score": float(random.uniform(0, 5))})
        elif task == "token-classification":
            rows.append({"tokens": words, "tags": [NAMES[tag] for tag in random.integers(0, 5, len(words))]})
        else:
            answers = words[2:4] if index % 5 else []
            rows.append({"question": f"Which is {index}?", "context": text, "answers": answers})
    return rows


@pytest.mark.parametrize(
    ("task", "architecture", "metrics"),
    [
        ("sentence-similarity", "BertModel", ["Pearson", "Spearman"]),
        ("token-classification", "BertForTokenClassification", ["entity F1", "token accuracy"]),
        ("question-answering", "BertForQuestionAnswering", ["exact match", "token F1"]),
    ],
)
def test_each_tasks_own_metrics_are_reported_and_verified(
    task: str, architecture: str, metrics: list[str], make_checkpoint: MakeCheckpoint, cli: Cli, tmp_path: Path
) -> None:
    named = task == "token-classification"
    labels = (
        {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}} if named else {}
    )
    folder = make_checkpoint(architecture, **labels)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("\n".join(map(json.dumps, labelled_rows(task))))
    given = ("--task", task, "--data", data, "--recipe", "convert-openvino", "--max-drop", "0.01")
    outcome = cli(folder, *given, *QUICK, "--workload", "1x8", "--out", out)
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    found = outcome.report["candidates"][0]["accuracy"]["metrics"]
    assert [metric["name"] for metric in found] == metrics
    for metric in found:
        assert metric["drop"]["value"] == pytest.approx(metric["reference"] - metric["candidate"])
        assert metric["name"] + f" {metric['candidate']:.4f}" in outcome.output
    labelling = outcome.report["evaluation"]["labelling"]
    assert len(labelling["labels"]) == 40
    assert (labelling["classes"] is not None) is named
    if named:
        assert found[1]["examples"] == 40 * 9 and 0.05 < found[1]["reference"] < 0.5, "chance, but not none"
    shutil.rmtree(folder)  # what it came from is not needed to judge it again
    verified = cli("verify", out, "--budget", "1s")
    assert verified.code == 0, verified.output
    assert verified.report is not None and verified.report["accuracy"]["metrics"] == found
    assert all(name in verified.output for name in metrics)
