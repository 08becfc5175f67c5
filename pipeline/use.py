"""`optimize run` and `optimize serve`: an emitted language model at work, in its own runtime."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from optimize.pipeline.errors import RequestError
from optimize.pipeline.manifest import read_manifest


def stream(folder: Path, prompt: str, most: int, *, sample: bool, raw: bool) -> None:
    """Print what the artifact in `folder` answers to `prompt`, or with `raw` how it goes on, as it comes.

    Raises RequestError for an artifact that does not generate, ArtifactError for a folder that is damaged.
    """
    task = read_manifest(folder).report.checkpoint.task
    if task != "text-generation":
        raise RequestError(f"{folder} is for {task}: it generates no text", hint="call it with optimize.load(FOLDER)")
    logging.disable(logging.WARNING)
    transformers = importlib.import_module("transformers")
    model = importlib.import_module("optimize").load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if raw or tokenizer.chat_template is None:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if not inputs["input_ids"].shape[1]:
        raise RequestError("the prompt is empty", hint="give some text")
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=most, do_sample=sample,
        streamer=streamer,
    )  # fmt: skip


def start_server(folder: Path, host: str, port: int) -> None:
    """Serve until interrupted. Raises RequestError where the artifact's runtime has no server here."""
    manifest = read_manifest(folder)
    runtimes = importlib.import_module("optimize.targets.runtimes")
    runtime = importlib.import_module(f"optimize.targets.runtimes.{runtimes.RUNTIMES[manifest.kind]}")
    if not hasattr(runtime, "serve"):
        raise RequestError(
            f"{manifest.kind} has no server of its own here",
            hint="emit a GGUF with --recipe gguf-q8_0, or use the artifact with optimize.load(FOLDER)",
        )
    runtime.serve(folder, host, port, manifest.report.host.target.cores)
