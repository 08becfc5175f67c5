"""`optimize run` and `optimize serve`: an emitted language model at work, in its own runtime."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from optimize.pipeline.errors import RequestError
from optimize.pipeline.manifest import Manifest, read_intact, read_manifest


def stream(folder: Path, prompt: str, most: int, *, sample: bool, raw: bool) -> None:
    """Print what the artifact in `folder` answers to `prompt`, or with `raw` how it goes on, as it comes.

    At most `most` new tokens, and no more than the model has positions for. Raises RequestError for an artifact that
    does not generate, or a prompt that it cannot take; ArtifactError for a folder that is damaged.
    """
    _continues_text(folder, read_manifest(folder))
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise RequestError("the prompt is not UTF-8", hint="encode it so")
    logging.disable(logging.WARNING)
    transformers = importlib.import_module("transformers")
    model = importlib.import_module("optimize").load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    as_it_is = raw or tokenizer.chat_template is None
    inputs = tokenizer(prompt, return_tensors="pt") if as_it_is else _chat(tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise RequestError("the prompt is empty", hint="give some text")
    if length >= model.longest:
        raise RequestError(f"the prompt has {length} tokens, and the model {model.longest} positions: give less text")
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=sample, streamer=streamer,
            max_new_tokens=min(most, model.longest - length), num_beams=1, num_return_sequences=1,
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(f"transformers refuses to generate: {error}", hint="see generation_config.json") from None


def start_server(folder: Path, host: str, port: int) -> None:
    """Serve until interrupted. Raises RequestError for an artifact that does not generate, where its runtime has no
    server here, or none that can listen there; ArtifactError for a folder that is damaged.
    """
    manifest = read_intact(folder)
    _continues_text(folder, manifest)
    runtimes = importlib.import_module("optimize.targets.runtimes")
    runtime = importlib.import_module(f"optimize.targets.runtimes.{runtimes.RUNTIMES[manifest.kind]}")
    if not hasattr(runtime, "serve"):
        raise RequestError(
            f"{manifest.kind} has no server of its own here",
            hint="emit a GGUF with --recipe gguf-q8_0, or use the artifact with optimize.load(FOLDER)",
        )
    runtime.serve(folder, host, port, manifest.report.host.target.cores)


def _continues_text(folder: Path, manifest: Manifest) -> None:
    """Raises RequestError for what does not."""
    task = manifest.report.checkpoint.task
    if task != "text-generation":
        raise RequestError(f"{folder} is for {task}: it continues no text", hint="call it with optimize.load(FOLDER)")


def _chat(tokenizer: Any, prompt: str) -> Any:
    """The prompt as a user's message. Raises RequestError where the checkpoint's own template fails."""
    messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # whatever that program raises
        raise RequestError(
            f"the chat template fails: {type(error).__name__}: {error}", hint="--raw continues the prompt without it"
        ) from None
