"""A checkpoint as transformers 4 reads it: for toolchains that stay behind.

transformers 5 writes config.json and the tokenizer's settings in words of its own, which an older one skips in silence:
without rope_theta it takes 10000, and SmolLM2's perplexity goes from 30.9 to 33.8.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # of transformers 5 -> of transformers 4
LAYERS = {"full_attention": ("rope_theta", "rope_scaling"), "sliding_attention": ("rope_local_base_freq", "")}


@contextmanager
def readable_checkpoint(folder: Path) -> Iterator[Path]:
    """The checkpoint for the transformers that is installed here: itself, or a translation that lives that long.

    In a translation, weights are links, which our own loader refuses: it is for tools that load by themselves.
    Raises ValueError for a setting that transformers 4 has no word for.
    """
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.rglob("*"):
            copied = Path(scratch) / path.relative_to(folder)
            if path.is_file() and path.name not in (CONFIG, TOKENIZER):
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.symlink_to(path.resolve())
        for name, translate in ((CONFIG, older_config), (TOKENIZER, older_tokenizer)):
            if (folder / name).is_file():
                found = translate(json.loads((folder / name).read_text(encoding="utf-8")))
                (Path(scratch) / name).write_text(json.dumps(found, indent=1), encoding="utf-8")
        yield Path(scratch)


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json in transformers 4's words beside its own; those of parts of a model too. Raises ValueError."""
    found = {key: older_config(value) if isinstance(value, dict) and "model_type" in value else value
             for key, value in config.items()}  # fmt: skip
    if "dtype" in found:
        found.setdefault("torch_dtype", found["dtype"])
    rope = found.get("rope_parameters")
    if not isinstance(rope, dict):
        return found
    if "rope_theta" in rope or "rope_type" in rope:
        return found | _older_rope(rope, "rope_theta", "rope_scaling")
    for kind, parameters in rope.items():  # by the kind of a layer
        if kind not in LAYERS:
            raise ValueError(f"{CONFIG}: transformers 4 has no word for rope_parameters of {kind}")
        found |= _older_rope(parameters, *LAYERS[kind])
    return found


def _older_rope(parameters: dict[str, Any], theta: str, scaling: str) -> dict[str, Any]:
    rest = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    found = {theta: parameters["rope_theta"]} if "rope_theta" in parameters else {}
    if "partial_rotary_factor" in parameters:
        found["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if rest.get("rope_type", "default") == "default":
        return found
    if not scaling:
        raise ValueError(f"{CONFIG}: transformers 4 cannot scale the positions of sliding attention")
    return found | {scaling: rest}


def older_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in transformers 4's words."""
    found = dict(settings)
    if found.get("tokenizer_class") in CLASSES:
        found["tokenizer_class"] = CLASSES[found["tokenizer_class"]]
    if isinstance(found.get("extra_special_tokens"), list):  # there a dict of names
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    found.pop("backend", None)
    return found
