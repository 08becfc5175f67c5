"""The task table: what each task loads, is fed and is judged by. A new modality is an added row and its encoder.

Nothing here imports an ML framework: planning reads this table.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optimize.pipeline.answers import kept_positions
from optimize.pipeline.batches import Encoded
from optimize.pipeline.contract import Cell, Form, LabelKind, Meaning
from optimize.pipeline.errors import CheckpointError

BATCH, SEQUENCE, FEATURES = "batch", "sequence", "features"


@dataclass(frozen=True)
class Labelled:
    """What --data with labels has: its columns, and what they are labelled with."""

    kind: LabelKind
    columns: tuple[str, ...]  # in place of the task's own
    names: tuple[str, ...]  # of the column of labels: the first that is there
    apart: bool = False  # whether each column is an input by itself, not all of them one


@dataclass(frozen=True)
class Task:
    """One row. `outputs` names the axes of every output that is judged; others are only checked for being finite."""

    name: str
    auto_class: str  # the transformers class that loads it
    architectures: tuple[str, ...]  # endings of the architecture names that mean this task
    columns: tuple[str, ...]  # the columns that --data must have
    outputs: Mapping[str, tuple[str, ...]]
    output_class: str  # of transformers.modeling_outputs
    meaning: Meaning = Meaning.VECTOR  # of the outputs; a classifier's config may say otherwise: see output_meaning
    labelled: tuple[
        Labelled, ...
    ] = ()  # what the task's own metrics are computed on: the first form whose columns are there
    form: Form = Form.TOKENS  # of what it is given
    workload: str = "1x32,1x128,8x128"  # cells that are measured, if none are asked for
    examples: int | None = None  # that are judged, at most, where they are larger than text
    max_drop: float = 0.001  # what may be lost, if nothing else is asked for
    budget: str = "3m"  # for measuring all candidates together

    @property
    def generates(self) -> bool:
        """Whether it writes tokens one after the other: a language model's, or a speech model's."""
        return self.meaning is Meaning.NEXT

    @property
    def encoder(self) -> Encoder:
        """What makes arrays of examples. Only a worker calls it."""
        module: Encoder = importlib.import_module(f"optimize.models.{ENCODERS[self.form]}")
        return module


@dataclass(frozen=True)
class Examples:
    """What a run is to feed a model with, as rows of --data; the cells are filled with the same."""

    evaluation: Sequence[Mapping[str, Any]]
    calibration: Sequence[Mapping[str, Any]] = ()
    questions: Sequence[Mapping[str, Any]] = ()
    cells: Sequence[Cell] = ()
    max_length: int = 0  # tokens
    labelled: bool = False


class Encoder(Protocol):
    """A module of models/ that makes a model's inputs, with what the checkpoint brings along for it."""

    def encode_all(self, folder: Path, asked: Examples) -> dict[str, list[Encoded]]:
        """Batches of `evaluation`, `calibration` (if there are any) and `cells`, by those names.

        Where examples are labelled, evaluation also has what turns outputs into answers (see answers.py). A language
        model's labelled questions stand behind the windows of its text.
        """

    def encode_sample(self, folder: Path) -> Encoded:
        """Two examples to trace a model with: a batch of one would be traced as a constant."""


ENCODERS = {Form.TOKENS: "encoding", Form.PROMPTS: "language", Form.IMAGES: "images", Form.CLIPS: "speech"}

HIDDEN = {"last_hidden_state": (BATCH, SEQUENCE, FEATURES)}
GENERATES = ("ForCausalLM", "LMHeadModel")  # endings of the names of language models that write on
HEADS = ("HeadModel", "HeadsModel")  # endings of names that are no bare encoders'
TRANSCRIPT = ("transcript", "text", "sentence", "transcription")  # what a column of them may be called
PER_TOKEN = {"logits": (BATCH, SEQUENCE, FEATURES)}

TASKS = {
    row.name: row
    for row in (
        Task("feature-extraction", "AutoModel", ("Model",), ("text",), HIDDEN, "BaseModelOutputWithPooling"),
        Task(
            "sentence-similarity", "AutoModel", (), ("text",), HIDDEN, "BaseModelOutputWithPooling",
            labelled=(
                Labelled(LabelKind.SCORE, ("sentence1", "sentence2"), ("score", "similarity", "label"), apart=True),
            ),
        ),
        Task(
            "text-classification", "AutoModelForSequenceClassification", ("ForSequenceClassification",), ("text",),
            {"logits": (BATCH, FEATURES)}, "SequenceClassifierOutput", meaning=Meaning.CHOICE,
            labelled=(Labelled(LabelKind.CLASS, ("text",), ("label",)),),
        ),
        Task(
            "token-classification", "AutoModelForTokenClassification", ("ForTokenClassification",), ("text",),
            PER_TOKEN, "TokenClassifierOutput", meaning=Meaning.CHOICE,
            labelled=(Labelled(LabelKind.TAGS, ("tokens",), ("tags", "ner_tags", "labels")),),
        ),
        Task(
            "fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",), ("text",), PER_TOKEN, "MaskedLMOutput",
            meaning=Meaning.CHOICE,
        ),
        Task(
            "question-answering", "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), ("question", "context"),
            {"start_logits": (BATCH, SEQUENCE), "end_logits": (BATCH, SEQUENCE)}, "QuestionAnsweringModelOutput",
            meaning=Meaning.CHOICE,
            labelled=(Labelled(LabelKind.ANSWERS, ("question", "context"), ("answers", "answer")),),
        ),
        Task(
            "text-generation", "AutoModelForCausalLM", GENERATES, ("text",), {}, "CausalLMOutputWithPast",
            meaning=Meaning.NEXT, form=Form.PROMPTS, workload="1x32+32,1x512+16,4x32+16", max_drop=0.01, budget="10m",
            labelled=(
                Labelled(LabelKind.CHOICE, ("query", "choices"), ("answer", "gold", "label", "answerKey", "target")),
                Labelled(LabelKind.TARGETS, ("query",), ("target", "answer")),
            ),
        ),
        Task(
            "image-classification", "AutoModelForImageClassification", ("ForImageClassification",), ("image",),
            {"logits": (BATCH, FEATURES)}, "ImageClassifierOutput", meaning=Meaning.CHOICE,
            labelled=(Labelled(LabelKind.CLASS, ("image",), ("label",)),), form=Form.IMAGES, workload="1,8,32",
            examples=512,
        ),
        Task(
            "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", ("WhisperForConditionalGeneration",),
            ("audio",), {}, "Seq2SeqLMOutput", meaning=Meaning.NEXT, form=Form.CLIPS, workload="1+32,4+32",
            max_drop=0.01, budget="5m", examples=64,
            labelled=(Labelled(LabelKind.TRANSCRIPT, ("audio", "transcript"), TRANSCRIPT),),
        ),
    )
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises CheckpointError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def infer_task(folder: Path, architecture: str) -> str:
    """The task of a checkpoint from its files and architecture name. Raises CheckpointError when none fits.

    optimum's TasksManager answers this only for ids on the hub, and by importing torch: planning does neither.
    """
    if (folder / "modules.json").is_file():  # written by sentence-transformers
        return "sentence-similarity"
    for task in TASKS.values():
        bare = task.auto_class == "AutoModel"
        if architecture.endswith(task.architectures) and not (bare and architecture.endswith(HEADS)):
            return task.name
    raise CheckpointError(
        f"no task is known for architecture {architecture}",
        hint=f"name one with --task ({', '.join(TASKS)}), if one of these fits",
    )


def sentence_pooling(folder: Path) -> str:
    """How sentence-transformers pools tokens into a sentence, from 1_Pooling/config.json: "mean" or "cls".

    Raises CheckpointError for another mode: its embeddings could not be judged.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = read_json(path)
    modes = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    known = {"mean_tokens": "mean", "cls_token": "cls"}
    mode = known.get(modes[0]) if len(modes) == 1 else config.get("pooling_mode")
    if mode not in ("mean", "cls"):
        raise CheckpointError(
            f"pooling {modes or config} is not supported for sentence-similarity",
            hint="give --task feature-extraction to judge token embeddings instead",
        )
    return str(mode)


def output_meaning(task: Task, config: Mapping[str, Any]) -> Meaning:
    """What a checkpoint's outputs are, as transformers' own pipeline takes them.

    Source: https://huggingface.co/docs/transformers (TextClassificationPipeline, problem_type)
    """
    if all(form.kind != LabelKind.CLASS for form in task.labelled):
        return task.meaning
    kind, classes = config.get("problem_type"), len(config.get("id2label") or (0, 1))
    if kind == "regression" or (kind is None and classes == 1) or config.get("num_labels") == 1:
        return Meaning.NUMBERS
    return Meaning.FLAGS if kind == "multi_label_classification" else task.meaning


def judged_outputs(
    task: Task, outputs: Mapping[str, NDArray[Any]], mask: NDArray[Any], pooling: str | None
) -> list[dict[str, NDArray[np.float32]]]:
    """What is compared with the reference, for each example of one batch.

    `outputs` are arrays by field name, `mask` says what is judged (see batches.judged_positions). Padding positions
    are left out, since runtimes differ there. Each value is float32 of [positions, features]; for sentence-similarity
    it is the one normalised sentence embedding. Vocabularies are large: of a long output, evenly spaced positions are
    kept.
    """
    return [
        {name: _example(outputs[name][index], axes, mask[index] != 0, pooling) for name, axes in task.outputs.items()}
        for index in range(len(mask))
    ]


def _example(
    output: NDArray[Any], axes: tuple[str, ...], valid: NDArray[np.bool_], pooling: str | None
) -> NDArray[np.float32]:
    output = np.asarray(output, dtype=np.float32)
    if axes == (BATCH, FEATURES):
        return np.asarray(output[None, :])
    if axes == (BATCH, SEQUENCE):
        return np.asarray(output[valid][None, :])
    tokens = output[valid]
    if pooling is not None:
        pooled = tokens[0] if pooling == "cls" else tokens.mean(axis=0)
        return np.asarray((pooled / max(float(np.linalg.norm(pooled)), 1e-12))[None, :], dtype=np.float32)
    return np.asarray(tokens[kept_positions(*tokens.shape)])
