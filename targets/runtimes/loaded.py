"""`optimize.load`: an emitted folder as a callable with the manners of a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import modeling_outputs

from optimize.models.checkpoint import max_length, read_config
from optimize.models.images import PIXELS, encode_sample
from optimize.models.tasks import TASKS
from optimize.pipeline.contract import DEFAULT, Batch, Form
from optimize.pipeline.errors import RequestError
from optimize.pipeline.manifest import Manifest, read_intact
from optimize.targets.runtimes import TEXTUAL, open_session, token_ids
from optimize.targets.runtimes.loaded_generator import LoadedGenerator
from optimize.targets.runtimes.loaded_transcriber import LoadedTranscriber


class LoadedModel:
    """Takes what the tokenizer gives ([batch, sequence] tensors or arrays), returns outputs by the model's own names.

    It has what `transformers.pipeline` asks of a model: config, device, dtype, forward, can_generate, eval, to.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    framework = "pt"
    _is_stateful = False

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        checkpoint = manifest.report.checkpoint
        self.manifest, self._folder = manifest, folder
        self.config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.generation_config = None
        target = manifest.report.host.target
        self._session = open_session(manifest.kind, folder, checkpoint.task, target.cores, None, target.device_type)
        self._output_class = getattr(modeling_outputs, TASKS[checkpoint.task].output_class)
        self._longest = max_length(folder, read_config(folder))
        self._sizes = {
            "input_ids": getattr(self.config, "vocab_size", 1 << 62),
            "token_type_ids": getattr(self.config, "type_vocab_size", 1 << 62),
        }
        fields = inspect.signature(self._output_class).parameters
        self._fields = frozenset(fields)

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, **inputs: Any
    ) -> Any:
        """One forward pass. Raises ValueError for an input that is missing, does not fit, or that it cannot honour.

        token_type_ids and attention_mask have the defaults that the eager model gives them, and are left out where
        the model has none. With return_dict=False the outputs come as a tuple.
        """
        as_tuple = inputs.pop("return_dict", None) is False
        unknown = [name for name, value in inputs.items() if value is not None and value is not False]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: the artifact takes {', '.join(self._session.inputs)} alone")
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        batch = {name: token_ids.as_array(given[name]) for name in self._session.inputs if given.get(name) is not None}
        if "input_ids" not in batch:
            raise ValueError(f"input_ids is missing; the artifact takes {', '.join(self._session.inputs)}")
        for name, default in (("attention_mask", np.ones_like), ("token_type_ids", np.zeros_like)):
            if name in self._session.inputs and name not in batch:
                batch[name] = default(batch["input_ids"])
        token_ids.check(batch, self._sizes, self._longest)
        return self._answer(batch, as_tuple)

    def _answer(self, batch: Batch, as_tuple: bool) -> Any:
        outputs = self._session.run(batch)
        named = self._output_class(
            **{name: torch.from_numpy(array) for name, array in outputs.items() if name in self._fields}
        )
        return named.to_tuple() if as_tuple else named

    def forward(self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        """The same, with the arguments spelt out: `transformers.pipeline` reads this signature."""
        return self(input_ids, attention_mask, token_type_ids)

    def can_generate(self) -> bool:
        """No: these artifacts are encoders."""
        return False

    def eval(self) -> LoadedModel:
        """Nothing to switch: there is no training mode."""
        return self

    def to(self, device: Any = None, *args: Any, **options: Any) -> LoadedModel:
        """Stay. Raises ValueError for another device than the CPU."""
        if isinstance(device, (str, torch.device)) and torch.device(device).type != "cpu":
            raise ValueError(f"this artifact was emitted for the CPU and cannot move to {device}")
        return self


class LoadedImageModel(LoadedModel):
    """The same of images: it takes what the image processor gives, float [batch, channels, height, width]."""

    main_input_name = PIXELS

    def __call__(self, pixel_values: Any = None, **inputs: Any) -> Any:  # type: ignore[override]
        """One forward pass. Raises ValueError for an input that is missing, or of another size than the model's."""
        as_tuple = inputs.pop("return_dict", None) is False
        unknown = [name for name, value in inputs.items() if value is not None and value is not False]
        if unknown or pixel_values is None:
            raise ValueError(f"{', '.join(unknown) or f'no {PIXELS}'}: the artifact takes {PIXELS} alone")
        given = pixel_values.float().cpu().numpy() if isinstance(pixel_values, torch.Tensor) else pixel_values
        array = np.ascontiguousarray(given, dtype=np.float32)
        if array.shape[1:] != self._shape or not len(array):
            raise ValueError(f"{PIXELS} has shape {list(array.shape)}, not [batch, {', '.join(map(str, self._shape))}]")
        return self._answer({PIXELS: array}, as_tuple)

    def forward(self, pixel_values: Any = None) -> Any:  # type: ignore[override]
        """The same, with the argument spelt out."""
        return self(pixel_values)

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """Of one image, as the folder's image processor makes it: what it was proved with."""
        return encode_sample(self._folder)[PIXELS].shape[1:]


def load(folder: Path) -> LoadedModel | LoadedGenerator | LoadedTranscriber:
    """Open an emitted folder after checking every file that is used. Raises ArtifactError if one is damaged."""
    manifest = read_intact(folder)
    if manifest.kind in TEXTUAL:
        raise RequestError(
            f"{manifest.kind} gives text and no logits, which transformers' generate needs",
            hint=f"serve it with optimize serve {folder}, or see {folder}/README.md",
        )
    if manifest.kind.toolchain != DEFAULT:
        raise RequestError(
            f"{manifest.kind} runs in the toolchain {manifest.kind.toolchain} alone, not in this Python",
            hint=f"{folder}/README.md has the lines that run it there; optimize verify {folder} checks it",
        )
    return LOADED[TASKS[manifest.report.checkpoint.task].form](folder, manifest)


LOADED: dict[Form, Callable[[Path, Manifest], LoadedModel | LoadedGenerator | LoadedTranscriber]] = {
    Form.TOKENS: LoadedModel,
    Form.PROMPTS: LoadedGenerator,
    Form.IMAGES: LoadedImageModel,
    Form.CLIPS: LoadedTranscriber,
}
