"""A compiler driver for Hugging Face checkpoints: emits only what it has proved right and faster.

`compile` is the command line as a function; `load` opens an emitted folder. Importing this imports no ML framework.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimize.pipeline.manifest import Report
    from optimize.targets.runtimes.loaded import LoadedModel
    from optimize.targets.runtimes.loaded_transcriber import LoadedTranscriber

__all__ = ["compile", "load"]


def load(folder: str | Path) -> LoadedModel | LoadedTranscriber:
    """Open an emitted folder: a callable that takes what the tokenizer gives and returns the model's own outputs.

    It drops into `transformers.pipeline(task, model=optimize.load(folder), tokenizer=folder)`; that of a speech model
    has `generate` alone. Raises
    optimize.pipeline.errors.ArtifactError for a folder that is damaged or was not emitted by optimize.
    """
    import logging

    logging.getLogger("torchao").setLevel(logging.ERROR)  # it lists what this host's torch has no use for
    from optimize.targets.runtimes.loaded import load as load_folder

    return load_folder(Path(folder))


def compile(model: str | Path, *, json: str | Path | None = None, **options: Any) -> Report:
    """`optimize MODEL` as a function, without a word while it works.

    Options are the fields of optimize.pipeline.driver.Request: target, task, data, out, recipes (one or a sequence),
    max_drop, min_speedup, max_load (numbers), workload, budget (text, or seconds), objective, memory (text), cache.
    Returns the report, whose `exit_code` is the command's; raises optimize.pipeline.errors.RequestError for what
    cannot be planned.
    """
    from optimize.pipeline.driver import Request
    from optimize.pipeline.manifest import to_json
    from optimize.pipeline.progress import Progress

    if isinstance(options.get("recipes"), str):
        options["recipes"] = [options["recipes"]]
    if isinstance(options.get("budget"), int | float):
        options["budget"] = f"{options['budget']}s"
    for name in ("out", "cache"):
        if options.get(name) is not None:
            options[name] = Path(options[name])
    planned = Request(str(model), **options).plan()
    if json is not None:
        Path(json).parent.mkdir(parents=True, exist_ok=True)  # before the run of minutes, not after it
    report = planned.run(Progress(), None if json is None else Path(json))
    if json is not None:
        Path(json).write_text(to_json(report))
    return report
