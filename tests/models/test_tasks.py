"""The task table: which task a checkpoint is for, and what of its outputs is judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimize.models.tasks import TASKS, infer_task, judged_outputs, sentence_pooling
from optimize.pipeline.answers import MAX_ELEMENTS
from optimize.pipeline.errors import CheckpointError

HIDDEN = "last_hidden_state"


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("XLMRobertaModel", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("DistilBertForSequenceClassification", "text-classification"),
        ("RobertaForTokenClassification", "token-classification"),
        ("ModernBertForMaskedLM", "fill-mask"),
        ("ElectraForQuestionAnswering", "question-answering"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("ViTForImageClassification", "image-classification"),
        ("ConvNextV2ForImageClassification", "image-classification"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
    ],
)
def test_infers_the_task(architecture: str, task: str, tmp_path: Path) -> None:
    import transformers

    assert hasattr(transformers, architecture) and hasattr(transformers, TASKS[task].auto_class)
    assert infer_task(tmp_path, architecture) == task


@pytest.mark.parametrize(
    "architecture",
    [
        *("T5ForConditionalGeneration", "BertForMultipleChoice", "ViTForMaskedImageModeling"),
        *("BertForPreTraining", "Wav2Vec2ForCTC", "CLIPTextModelWithProjection"),
        "GPT2DoubleHeadsModel",
    ],
)
def test_an_architecture_without_a_task_is_refused_with_the_tasks_there_are(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=architecture) as caught:
        infer_task(tmp_path, architecture)
    assert all(task in str(caught.value.hint) for task in TASKS)


def test_what_sentence_transformers_wrote_is_for_sentences(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert infer_task(tmp_path, "BertModel") == "sentence-similarity"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean", "embedding_dimension": 384}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_that_is_known(config: dict[str, Any] | None, expected: str, tmp_path: Path) -> None:
    if config is not None:
        write_pooling(tmp_path, config)
    assert sentence_pooling(tmp_path) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "lasttoken"},
        {"pooling_mode_lasttoken": True, "pooling_mode": "mean"},
        {},
    ],
)
def test_other_pooling_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    write_pooling(tmp_path, config)
    with pytest.raises(CheckpointError, match="not supported") as caught:
        sentence_pooling(tmp_path)
    assert "feature-extraction" in str(caught.value.hint)


def write_pooling(folder: Path, config: dict[str, Any]) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def random(*shape: int) -> NDArray[Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_padding_is_left_out() -> None:
    output = random(2, 5, 4)
    first, second = judged_outputs(TASKS["feature-extraction"], {HIDDEN: output, "other": output}, MASK, None)
    assert first.keys() == {HIDDEN}
    assert np.array_equal(first[HIDDEN], output[0, :3]) and np.array_equal(second[HIDDEN], output[1])
    changed = np.where(MASK[..., None] == 0, np.float32(9), output)
    again = judged_outputs(TASKS["feature-extraction"], {HIDDEN: changed}, MASK, None)
    assert np.array_equal(again[0][HIDDEN], first[HIDDEN])


def test_padding_on_the_left_is_left_out() -> None:
    output, mask = random(1, 5, 4), np.array([[0, 0, 1, 1, 1]])
    (only,) = judged_outputs(TASKS["sentence-similarity"], {HIDDEN: output}, mask, "cls")
    assert np.allclose(only[HIDDEN][0], output[0, 2] / np.linalg.norm(output[0, 2]))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_sentence_is_one_normalised_vector(pooling: str) -> None:
    output = random(2, 5, 4)
    first, _ = judged_outputs(TASKS["sentence-similarity"], {HIDDEN: output}, MASK, pooling)
    expected = output[0, :3].mean(axis=0) if pooling == "mean" else output[0, 0]
    assert first[HIDDEN].shape == (1, 4) and first[HIDDEN].dtype == np.float32
    assert np.allclose(first[HIDDEN][0], expected / np.linalg.norm(expected), atol=1e-6)


def test_a_sentence_of_zeros_stays_finite() -> None:
    (only,) = judged_outputs(TASKS["sentence-similarity"], {HIDDEN: np.zeros((1, 3, 4))}, np.ones((1, 3)), "mean")
    assert np.isfinite(only[HIDDEN]).all()


def test_logits_of_a_text_and_of_spans() -> None:
    logits, start, end = random(2, 3), random(2, 5), random(2, 5)
    first, second = judged_outputs(TASKS["text-classification"], {"logits": logits}, MASK, None)
    assert np.array_equal(first["logits"], logits[:1]) and np.array_equal(second["logits"], logits[1:])
    spans = {"start_logits": start, "end_logits": end}
    first, second = judged_outputs(TASKS["question-answering"], spans, MASK, None)
    assert np.array_equal(first["start_logits"], start[:1, :3]) and np.array_equal(second["end_logits"], end[1:])


def test_of_a_long_output_evenly_spaced_positions_are_kept() -> None:
    features = MAX_ELEMENTS // 10
    output = np.broadcast_to(np.arange(100, dtype=np.float32)[None, :, None], (1, 100, features))
    mask = np.array([[1] * 91 + [0] * 9])
    (only,) = judged_outputs(TASKS["fill-mask"], {"logits": output}, mask, None)
    assert only["logits"].shape == (10, features)
    assert only["logits"][:, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
