"""A checkpoint's tokenizer as GGUF metadata, from tokenizer.json.

llama.cpp has the ways of splitting text built in, by name: which name fits is looked up by the pattern itself, and a
tokenizer that fits none is refused. That both give the same tokens is tested where the artifact is judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.models.tasks import read_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# what splits text before byte-pair encoding -> llama.cpp's name for it
SPLITTERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (CONTRACTIONS + r"\p{N}{1,3}" + REST, "bytes"): "llama-bpe",
    (CONTRACTIONS + r"\p{N}" + REST, "bytes"): "qwen2",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the GGUF specification


def why_not(folder: Path) -> str | None:
    """Why the tokenizer of a checkpoint cannot be written, or None."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "it has no tokenizer.json: save it once more with AutoTokenizer"
    tokenizer = read_json(path)
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        return f"a tokenizer of type {model.get('type')} is not written yet"
    if not _from_sentencepiece(tokenizer) and _splitters(tokenizer) not in SPLITTERS:
        return f"llama.cpp has no name for how its tokenizer splits text: {' '.join(_splitters(tokenizer))[:80]}"
    return None


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Write tokens, their types, merges, special tokens and the chat template. `vocabulary` is the model's."""
    import gguf

    tokenizer = read_json(folder / "tokenizer.json")
    texts, types = _tokens(tokenizer, vocabulary)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]]
    special = gguf.SpecialVocab(folder, load_merges=not _from_sentencepiece(tokenizer), n_vocab=vocabulary)
    if _from_sentencepiece(tokenizer):
        # what SentencePiece calls a score only orders the merges, and tokenizer.json has them in that order
        ranks = {"".join(pair.split(" ", 1)): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
        lowest = -float(len(merges))
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([ranks.get(text, lowest) for text in texts])
        writer.add_add_space_prefix(_prefixes_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(SPLITTERS[_splitters(tokenizer)])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special.add_special_token.setdefault("bos", _adds_bos(tokenizer))
    special.add_to_gguf(writer, quiet=True)
    _add_end_of_turn(writer, folder, special.special_token_ids.get("eos"))


def _tokens(tokenizer: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Text and type of every token that the model has; ids without a text are padding."""
    texts, types = [f"[PAD{index}]" for index in range(vocabulary)], [UNUSED] * vocabulary
    for text, index in tokenizer["model"]["vocab"].items():
        if index < vocabulary:
            is_byte = _from_sentencepiece(tokenizer) and len(text) == 6 and text.startswith("<0x")
            texts[index], types[index] = text, BYTE if is_byte else NORMAL
    for token in tokenizer.get("added_tokens", []):
        if token["id"] < vocabulary:
            texts[token["id"]] = token["content"]
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = tokenizer["model"].get("unk_token")
    if _from_sentencepiece(tokenizer) and unknown in tokenizer["model"]["vocab"]:
        types[tokenizer["model"]["vocab"][unknown]] = UNKNOWN
    return texts, types


def _from_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    return bool(tokenizer["model"].get("byte_fallback"))


def _splitters(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """The steps of pre-tokenization: of a Split its pattern, of others their type; "bytes" is ByteLevel that splits
    nothing.
    """
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    names = []
    for step in steps:
        if step.get("type") == "Split":
            names.append(next(iter(step["pattern"].values())))
        elif step.get("type") == "ByteLevel" and not step.get("use_regex", True):
            names.append("bytes")
        else:
            names.append(str(step.get("type")))
    return tuple(names)


def _prefixes_space(tokenizer: Mapping[str, Any]) -> bool:
    return '"Prepend"' in json.dumps(tokenizer.get("normalizer")) or (
        (tokenizer.get("pre_tokenizer") or {}).get("prepend_scheme") in ("first", "always")
    )


def _adds_bos(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts anything before a text."""
    processor = tokenizer.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    return any(step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0] for step in steps)


def _add_end_of_turn(writer: Any, folder: Path, eos: int | None) -> None:
    """Other tokens that end an answer, from generation_config.json."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    others = [end for end in (ends if isinstance(ends, list) else []) if end != eos]
    if others:
        writer.add_eot_token_id(others[0])
