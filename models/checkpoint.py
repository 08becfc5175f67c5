"""Resolve a model id or local folder to a checkpoint: pinned, inspected and safe, before anything loads it."""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optimize.models.hub import fetch
from optimize.models.tasks import TASKS, infer_task, read_json
from optimize.models.weights import Weights, check_home, inspect_weights
from optimize.pipeline.contract import Checkpoint, Dimensions, Form
from optimize.pipeline.errors import CheckpointError
from optimize.pipeline.memory import DRIVER, GIB, MORE, gib, reference_memory
from optimize.pipeline.store import sha256_of

MAX_MODEL_LENGTH = 1024
# what may enter an artifact beside the weights: configuration, tokenizer, licence; nothing that can be executed
CARRIED = re.compile(r"[\w.-]+\.(json|txt|model|jinja)|LICENSE[\w.]*|\d_[A-Za-z]+/config\.json")
TOKENIZER = (("tokenizer.json", "vocab.txt", "vocab.json", "*.model"), "AutoTokenizer")
# what a checkpoint must bring to make inputs with: files, of which one is enough, and the class that writes them
BRINGS = {
    Form.TOKENS: TOKENIZER,
    Form.PROMPTS: TOKENIZER,
    Form.IMAGES: (("preprocessor_config.json",), "AutoImageProcessor"),
    Form.CLIPS: (("preprocessor_config.json",), "AutoFeatureExtractor"),
}
FLOATS = ("float64", "float32", "float16", "bfloat16")  # of weights as they were trained
IMAGE = 224  # pixels of a side, where a config does not say: as in ImageNet
# model types whose positions start at padding + 1
POSITION_OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet", "xmod",
                   "longformer", "data2vec-text", "ibert", "luke", "esm")  # fmt: skip


def resolve(model: str, task: str | None = None, *, memory: int | None = None) -> Checkpoint:
    """Find, inspect and pin the checkpoint `model`: a local folder, or a hub id with an optional @revision.

    `memory` is what the host has, in bytes: a checkpoint whose float32 reference cannot fit is refused before its
    bytes are read. Raises CheckpointError, whose text says what to do, for everything that cannot be used.
    """
    revision: str | None = None
    folder = Path(model).expanduser()
    if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
        if len(model) > MAX_MODEL_LENGTH:
            raise CheckpointError(f"{model[:40]}... is too long for a model id or a folder")
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            what = "is a file, not a folder" if folder.exists() else "is not there"
            raise CheckpointError(
                f"{model} {what}", hint="give a folder with config.json and *.safetensors, or a hub id"
            )
        model, _, wanted = model.partition("@")
        snapshot = fetch(model, wanted or None)
        folder, revision = snapshot.folder, snapshot.revision
    config = read_config(folder)
    architecture = _architecture(folder, config)
    if task is not None and task not in TASKS:
        raise CheckpointError(f"unknown task {task!r}", hint=f"tasks: {', '.join(TASKS)}")
    task = task or infer_task(folder, architecture)
    _check_form(folder, config, architecture, TASKS[task].form)
    check_generation(folder)
    weights = inspect_weights(folder)
    _check_plain(config, weights)
    check_fits(weights, memory)
    return Checkpoint(
        model_id=model if revision else folder.resolve().name,
        folder=folder.resolve() if revision is None else folder,
        revision=revision,
        task=task,
        architecture=architecture,
        dtype=weights.dtype,
        parameters=weights.parameters,
        weight_bytes=weights.bytes,
        max_length=max_length(folder, config),
        files={name: sha256_of(folder / name) for name in (*weights.files, *carried_files(folder))},
        largest=weights.largest,
        dimensions=dimensions(config),
    )


def _check_plain(config: Mapping[str, Any], weights: Weights) -> None:
    """Raise CheckpointError for weights that are quantized: what the model was before is what all is judged by."""
    method = quantization(config)
    if not method and weights.dtype in FLOATS:
        return
    how = f"by {method}, as config.json says" if method else f"most are {weights.dtype}; config.json does not say how"
    raise CheckpointError(
        f"the checkpoint's weights are quantized already ({how}): the model that all is judged by is not in it",
        hint="give the one that it was made from, in 16 or 32 bits; `optimize passes` lists what quantizes it here",
    )


def _check_form(folder: Path, config: Mapping[str, Any], architecture: str, form: Form) -> None:
    """Raise CheckpointError for a model of another form than the task's, or without what makes its inputs."""
    if form in (Form.TOKENS, Form.PROMPTS) and (config.get("is_encoder_decoder") or "image_size" in config):
        raise CheckpointError(f"{architecture} is no text encoder: this version lowers text encoders only")
    wanted = {form.reader: BRINGS[form]} | ({"tokenizer": TOKENIZER} if form is Form.CLIPS else {})
    for name, (files, maker) in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in files):
            raise CheckpointError(
                f"{folder} has no {name} ({', '.join(files)})",
                hint=f"save it there: {maker}.from_pretrained(ID).save_pretrained(FOLDER)",
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises CheckpointError if it is missing, broken, or asks for remote code."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json", hint="give the folder that save_pretrained wrote")
    config = read_json(folder / "config.json")
    for name, settings in (("config.json", config), ("tokenizer_config.json", _tokenizer_config(folder))):
        if "auto_map" in settings:
            raise CheckpointError(
                f"{name} has auto_map: the checkpoint brings code of its own, which is never executed",
                hint="use a checkpoint of an architecture that transformers itself has",
            )
    if "transformers_weights" in config:
        raise CheckpointError(
            "config.json has transformers_weights: it would load other weights than those inspected",
            hint="remove the key, if model.safetensors is what you mean",
        )
    return config


def quantization(config: Mapping[str, Any]) -> str:
    """With what weights are quantized, as config.json says: transformers' word for it, or nothing."""
    name = "quantization_config" if config.get("quantization_config") is not None else "compression_config"
    settings = config.get(name)
    if settings is None:
        return ""
    if not isinstance(settings, Mapping) or not settings:
        raise CheckpointError(
            f"config.json: {name} is {str(settings)[:40]!r}, which says nothing of how weights are quantized",
            hint="remove it, if they are not",
        )
    old = "bitsandbytes" if settings.get("load_in_8bit") or settings.get("load_in_4bit") else "a method without a name"
    return " ".join(str(settings.get("quant_method") or old).split())[:40]


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def id2label(folder: Path) -> dict[int, str]:
    """The classes of a classifier, from its config; transformers' LABEL_0, LABEL_1 where it names none."""
    config = read_config(folder)
    named = config.get("id2label") or {}
    try:
        if named:
            return {int(index): str(name) for index, name in named.items()}
        return {index: f"LABEL_{index}" for index in range(int(config.get("num_labels", 2)))}
    except (AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: id2label or num_labels is not what it should be: {error}") from None


def max_length(folder: Path, config: Mapping[str, Any]) -> int:
    """The longest sequence that both the model's positions and its tokenizer take, in tokens."""
    try:
        named = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
        written = config.get("max_target_positions")  # of which a transcription's beginning takes four at most
        positions = int(next((each for each in named if each is not None), 512 if written is None else written - 4))
        if config.get("model_type") in POSITION_OFFSET:
            padding = config.get("pad_token_id")
            positions -= (1 if padding is None else int(padding)) + 1
        limit = _tokenizer_config(folder).get("model_max_length")
        longest = positions if limit in (None, math.inf) else min(positions, int(limit))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: max_position_embeddings or model_max_length is not a number: {error}"
        ) from None
    if longest < 1:
        raise CheckpointError(f"{folder}: max_position_embeddings or model_max_length leaves {longest} tokens")
    return longest


def check_generation(folder: Path) -> None:
    """Raise CheckpointError for a generation_config.json whose values no runtime could be told."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    settings = read_json(path)
    ends = settings.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and not (isinstance(end, int) and end >= 0):
            raise CheckpointError(f"{path}: eos_token_id has {end!r}, which is no token")
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if not isinstance(settings.get(name), int | float | None):
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}, not a number")


def carried_files(folder: Path) -> tuple[str, ...]:
    """Files beside the weights that an artifact carries along, relative to `folder`, sorted.

    Raises CheckpointError for a link that leads out of it: what lies there is nobody's to publish.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found = sorted(name for name in names if CARRIED.fullmatch(name) and not name.endswith(".index.json"))
    for name in found:
        check_home(folder / name, folder)
    return tuple(found)


def check_fits(weights: Weights, memory: int | None) -> None:
    """Refuse what no recipe can save: everything is judged by the float32 reference, which must run here.

    Raises CheckpointError with what it would need.
    """
    needed = DRIVER + reference_memory(weights.parameters)
    if memory is not None and needed > memory:
        raise CheckpointError(
            f"the checkpoint has {weights.parameters / 1e9:.1f} billion parameters: its float32 reference needs about "
            f"{gib(needed)} GiB of memory, {memory / GIB:.1f} may be used",
            hint=MORE,
        )


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """From config.json, by the names that most architectures have for them; 0 for what is not there."""

    def size(*names: str) -> int:
        found = (config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int)), 0)

    hidden, layers = size("hidden_size", "n_embd", "d_model", "dim"), size("num_hidden_layers", "n_layer", "n_layers")
    heads = size("num_attention_heads", "n_head", "n_heads")
    width = size("head_dim") or (hidden // heads if heads else 0)
    return Dimensions(
        hidden, size("intermediate_size", "n_inner", "hidden_dim", "ffn_dim") or 4 * hidden, layers,
        size("vocab_size"), 2 * layers * width * (size("num_key_value_heads") or heads),
        size("num_channels") * (size("image_size") or IMAGE) ** 2,
        2 * size("num_mel_bins") * size("max_source_positions"), heads * width,
    )  # fmt: skip


def _architecture(folder: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{folder / 'config.json'} names no architecture",
            hint='it needs "architectures": ["BertModel"] or the like',
        )
    if not _transformers_has(names[0], str(config.get("model_type", ""))):
        raise CheckpointError(
            f"architecture {names[0]} (model_type {config.get('model_type')!r}) is not in the installed transformers",
            hint="upgrade transformers, or check config.json for a misspelt name",
        )
    return names[0]


def compiles_whole(checkpoint: Checkpoint) -> bool:
    """Whether transformers says of its architecture that one step with a static cache compiles into one graph."""
    architecture, model_type = checkpoint.architecture, str(read_config(checkpoint.folder).get("model_type", ""))
    return any("_can_compile_fullgraph = True" in text for _, text in _definitions(architecture, model_type))


def parallel_plan(architecture: str, model_type: str) -> dict[str, str]:
    """Which layers transformers shares out over the processes of a group, and how, by their names in the model; empty
    for an architecture that it has no tensor parallel plan for.
    """
    for path, _ in _definitions(architecture, model_type):
        for beside in sorted(path.parent.glob("configuration_*.py")):
            for each in ast.parse(beside.read_text(encoding="utf-8")).body:
                found = _class_variables(each)
                named, plan = found.get("model_type"), found.get("base_model_tp_plan")
                if isinstance(named, ast.Constant) and named.value == model_type and isinstance(plan, ast.Dict):
                    pairs = zip(plan.keys, plan.values, strict=True)
                    return {str(key.value): str(how.value) for key, how in pairs
                            if isinstance(key, ast.Constant) and isinstance(how, ast.Constant)}  # fmt: skip
    return {}


def _class_variables(node: ast.stmt) -> dict[str, ast.expr]:
    body = node.body if isinstance(node, ast.ClassDef) else []
    given = (each for each in body if isinstance(each, ast.Assign))
    return {name.id: each.value for each in given for name in each.targets if isinstance(name, ast.Name)}


def _transformers_has(architecture: str, model_type: str) -> bool:
    return any(True for _ in _definitions(architecture, model_type))


def _definitions(architecture: str, model_type: str) -> Iterator[tuple[Path, str]]:
    """Transformers' files that define a class, with their text: importing it to ask would take seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise CheckpointError("transformers is not installed", hint="pip install transformers")
    models = Path(spec.origin).parent / "models"
    definition = re.compile(rf"^class {re.escape(architecture)}\(", re.MULTILINE)
    likely = sorted((models / model_type.replace("-", "_")).glob("modeling_*.py")) if model_type else []
    for path in (*likely, *models.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if definition.search(text) and not path.name.startswith(("modeling_tf_", "modeling_flax_")):
            yield path, text
