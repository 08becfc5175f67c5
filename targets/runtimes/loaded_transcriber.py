"""`optimize.load` of a speech model: `generate` of what the checkpoint's feature extractor gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimize.models.checkpoint import read_config
from optimize.models.speech import WRITTEN, read_decoding
from optimize.pipeline.manifest import Manifest
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.generating import write_until


class LoadedTranscriber:
    """Greedy transcriptions over the artifact's runtime, as they were judged: the language and the tokens that are
    never written are the checkpoint's own.
    """

    main_input_name = "input_features"

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        config, target = read_config(folder), manifest.report.host.target
        self.manifest = manifest
        self._decoding = read_decoding(folder)
        self._shape = (int(config["num_mel_bins"]), 2 * int(config["max_source_positions"]))
        self._longest = int(config["max_target_positions"]) - len(self._decoding.prompt)
        self._session: Any = open_session(
            manifest.kind, folder, manifest.report.checkpoint.task, target.cores, None, target.device_type
        )

    def generate(self, input_features: Any, max_new_tokens: int = WRITTEN) -> torch.Tensor:
        """Token ids of [batch, longest], each row up to its end, then filled with the token that ends it.

        Raises ValueError for features of another shape than [batch, mels, frames] of the checkpoint's extractor, and
        for more tokens than the model has positions for.
        """
        tensor = isinstance(input_features, torch.Tensor)
        array = np.ascontiguousarray(input_features.float().cpu() if tensor else input_features, dtype=np.float32)
        if array.shape[1:] != self._shape or not len(array):
            wanted = ", ".join(map(str, self._shape))
            raise ValueError(f"input_features has shape {list(array.shape)}, not [batch, {wanted}]")
        if not 0 < max_new_tokens <= self._longest:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, not between 1 and {self._longest}")
        end = self._decoding.end
        rows = write_until(self._session, list(array), max_new_tokens, lambda tokens: tokens[-1] == end)
        longest = max(map(len, rows))
        return torch.tensor([row + [end] * (longest - len(row)) for row in rows])
