"""A request, from words to a plan and a run: what the command line and `optimize.compile` share."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import pkgutil
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from optimize.pipeline.contract import Checkpoint, Gates, Labelling, Objective, Recipe, Target
from optimize.pipeline.emit import check_out
from optimize.pipeline.errors import OptimizeError, RequestError
from optimize.pipeline.installing import install_missing
from optimize.pipeline.manifest import Report
from optimize.pipeline.memory import GIB, parse_memory
from optimize.pipeline.plan import Plan, make_plan
from optimize.pipeline.prepare import Texts
from optimize.pipeline.progress import Progress
from optimize.pipeline.recipe import parse
from optimize.pipeline.run import Run, new_run_folder
from optimize.pipeline.store import Store
from optimize.pipeline.toolchain_files import Toolchain
from optimize.pipeline.toolchains import Toolchains
from optimize.pipeline.workload import shortened

logger = logging.getLogger(__name__)
LIVE = "live.lock"  # in a run's folder: held by the process that runs it
_UNITS = {"s": 1, "m": 60, "h": 3600, "": 1}


@dataclass(frozen=True)
class Request:
    """What a user asks for, as given. `run` and `plan` raise RequestError for what cannot be done."""

    model: str
    target: str | None = None
    task: str | None = None
    data: str | None = None
    out: Path | None = None
    recipes: Sequence[str] = ()
    max_drop: float | None = None  # the task's own
    min_speedup: float = Gates.min_speedup
    max_load: float = Gates.max_load
    workload: str | None = None  # the task's own
    budget: str | None = None  # the task's own
    objective: str = Objective.LATENCY
    memory: str | None = None  # what the host has
    cache: Path | None = None
    allow_archived: bool = False
    yes: bool = False

    def plan(self, confirm: Callable[[Toolchain], bool] = lambda _: False, *, install: bool = True) -> Planned:
        """Resolve the checkpoint, read the data, give every step its key. Nothing is built, nothing is written.

        But with `install`, a toolchain that a recipe needs which was asked for is installed, where `yes` or what
        `confirm` returns for it says so.
        """
        # lazily and by name: these are the layers above pipeline/, and only a request reaches up to them
        checkpoints = importlib.import_module("optimize.models.checkpoint")
        examples = importlib.import_module("optimize.models.examples")
        tasks = importlib.import_module("optimize.models.tasks")
        memory = importlib.import_module("optimize.targets.runtimes.memory")
        objective = _objective(self.objective)
        if self.budget is not None:
            parse_budget(self.budget)  # what is wrong in the request itself comes first
        target, defaults = find_target(self.target)
        target = _within(target, self.memory)
        cache = cache_folder(self.cache)
        held = None if target.gpus else target.memory  # the reference is on the GPU, if there is one
        checkpoint = cast(Checkpoint, checkpoints.resolve(self.model, self.task, memory=held))
        out = self.out if self.out is not None else Path(f"{checkpoint.name}-{target.name}")
        check_out(out, cache)
        task = tasks.TASKS[checkpoint.task]
        meaning = tasks.output_meaning(task, checkpoints.read_config(checkpoint.folder))
        if meaning is not task.meaning:
            task = replace(task, labelled=())  # scores and several classes at once have no metric here yet
        named = any(form.kind.names_classes for form in task.labelled)
        classes = checkpoints.id2label(checkpoint.folder) if named else None
        read = examples.read_examples(self.data, task, classes)
        offered = defaults.recipes(checkpoint, target)
        recipes, toolchains = self._recipes(offered), Toolchains(cache, self.cache)
        if self.recipes and install:
            able = [recipe for recipe in recipes if recipe.why_not(checkpoint, target) is None]
            needed = {name for recipe in able for name in recipe.toolchains}
            install_missing(toolchains, sorted(needed), lambda each: self.yes or confirm(each), logger.warning)
        plan = make_plan(
            checkpoint, target, recipes, others=offered,
            workload=self.workload or shortened(task.workload, checkpoint.max_length),
            form=task.form, budget=parse_budget(self.budget or task.budget),
            gates=Gates(task.max_drop if self.max_drop is None else self.max_drop, self.min_speedup, self.max_load),
            evaluation=f"{len(read.evaluation)} examples of {read.source}, "
            f"{len(read.calibration) or 'no'} others to calibrate"
            + (f"; {len(read.questions)} questions of {self.data}" if read.questions else ""),
            calibration_digest=read.calibration_digest if read.calibration else None,
            running_memory=memory.running_memory, gpu_memory=memory.gpu_memory, toolchains=toolchains,
            allow_archived=self.allow_archived,
        )  # fmt: skip
        pooling = tasks.sentence_pooling(checkpoint.folder) if task.name == "sentence-similarity" else None
        labelling = Labelling(read.kind, read.labels, classes) if read.kind is not None else None
        texts = Texts(
            read.source, read.evaluation, read.calibration, labelling, pooling, meaning, read.questions,
            self.data if read.questions else None,
        )  # fmt: skip
        return Planned(plan, texts, Store(cache / "store"), cache, out, objective)

    def _recipes(self, offered: Sequence[Recipe]) -> Sequence[Recipe]:
        """Those that were asked for, by the target's names or as text; else the target's defaults."""
        named = {recipe.name: replace(recipe, after="") for recipe in offered}
        try:
            asked = [named.get(text) or parse(text) for text in self.recipes]
        except RequestError as error:
            known = f"recipes of this target: {', '.join(named)}"
            unknown = [text for text in self.recipes if re.fullmatch(r"[\w.-]+", text) and text not in named]
            for text in unknown:
                if targets := [target for target in target_names() if text in _offered(target)]:
                    here = (self.target or "cpu") in targets
                    whose = "for other tasks" if here else f"of --target {' and '.join(targets)}"
                    more = "" if here else f"give --target {targets[0]}, or one of these; "
                    raise RequestError(f"{text!r} is a recipe {whose}", hint=more + known) from None
            close = [name for text in unknown for name in difflib.get_close_matches(text, named, 3)]
            hint = f"did you mean {' or '.join(close)}?" if close else error.hint
            hint = f"{hint or 'see optimize passes'}; {known}" if unknown and not close else hint
            raise RequestError(error.message, hint=hint) from None
        return asked or [recipe for recipe in offered if recipe.default]


@dataclass(frozen=True)
class Planned:
    """A request that can be run."""

    plan: Plan
    texts: Texts
    store: Store
    cache: Path
    out: Path
    objective: Objective

    def run(self, progress: Progress, json_file: Path | None = None) -> Report:
        """Run the plan. Raises OptimizeError when the run itself cannot go on; see Report.exit_code otherwise.

        Of a run that is broken off after candidates were tried, an unfinished report is written to `json_file`.
        """
        try:
            folder = new_run_folder(self.cache)
            lock = FileLock(folder / LIVE, timeout=0)
        except OSError as error:
            raise RequestError(
                f"the cache {self.cache} cannot be written: {error}", hint="name another with --cache"
            ) from None
        try:
            with lock:  # for as long as the run lives, however it ends: `prune` looks at it
                run = Run(
                    self.plan, self.texts, self.store, folder, progress, self.objective, json_file=json_file
                )  # fmt: skip
                return run.execute(self.out)
        except (OSError, OptimizeError) as error:
            if folder.exists():
                raise
            raise OptimizeError(
                f"the run's folder {folder} was removed while it was going on", hint="run the same command again"
            ) from error
        finally:
            progress.close()


def prune(cache: Path, days: int) -> tuple[int, int]:
    """Remove artifacts and runs that were not used for `days`, and what killed runs left. Returns how many of each.

    What a live run has used or made since it began is kept, and so is that run's folder.
    """
    before = time.time() - days * 86400
    folders = [folder for folder in (cache / "runs").glob("*") if folder.is_dir()]
    old = []
    for folder in folders:
        plan = folder / "plan.txt"  # the first thing that a run writes
        began = (plan if plan.exists() else folder).stat().st_mtime
        try:
            with FileLock(folder / LIVE, timeout=0):
                old.append((folder, began))
        except Timeout:
            before = min(before, began - 60)
    removed = [folder for folder, began in old if began < before]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return Store(cache / "store").prune(before), len(removed)


def cache_folder(cache: Path | None) -> Path:
    """--cache, or $OPTIMIZE_CACHE, or the user's cache folder."""
    import platformdirs

    named = cache or os.environ.get("OPTIMIZE_CACHE") or platformdirs.user_cache_dir("optimize")
    folder = Path(named).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"the cache {folder} is a file", hint="name a folder with --cache")
    return folder


def target_names() -> tuple[str, ...]:
    """The targets of this version: the files of targets/."""
    package = importlib.import_module("optimize.targets")
    return tuple(
        sorted(each.name.replace("_", "-") for each in pkgutil.iter_modules(package.__path__) if not each.ispkg)
    )


def _offered(target: str) -> set[str]:
    """Names of a target's recipes, whatever the checkpoint."""
    module = _module(target)
    return {name for table in ("RECIPES", "GENERATING", "TRANSCRIBING") for name in getattr(module, table, ())}


def _module(target: str) -> Any:
    return importlib.import_module(f"optimize.targets.{target.replace('-', '_')}")


def find_target(name: str | None) -> tuple[Target, TargetModule]:
    """Probe the named target; without a name, the processor. Raises RequestError where this host is none."""
    names = target_names()
    wanted = name or "cpu"
    if wanted not in names:
        raise RequestError(f"target {wanted!r} is not in this version", hint=f"targets: {', '.join(names)}")
    module = cast(TargetModule, _module(wanted))
    return module.probe(), module


def _within(target: Target, memory: str | None) -> Target:
    """The target with no more memory than was asked for. Raises RequestError for more than there is."""
    if memory is None:
        return target
    size = parse_memory(memory)
    if size > target.memory:
        raise RequestError(
            f"--memory {memory} is more than this host has: {target.memory / GIB:.1f} GiB",
            hint="it says that less may be used, on a host that others use too",
        )
    return replace(target, memory=size)


class TargetModule:
    """What a file in targets/ has."""

    def probe(self) -> Target:
        """Facts of this host. Raises RequestError when the host is no such target."""
        raise NotImplementedError

    def recipes(self, checkpoint: Checkpoint, target: Target) -> tuple[Recipe, ...]:
        """The candidates for a checkpoint."""
        raise NotImplementedError


def _objective(text: str) -> Objective:
    try:
        return Objective(text)
    except ValueError:
        raise RequestError(f"--objective {text!r} is none of {', '.join(Objective)}") from None


def parse_budget(text: str) -> float:
    """Seconds of `90`, `90s`, `5m` or `1h`. Raises RequestError for anything else, and below 1 s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise RequestError(f"--budget {text!r} is not a time", hint="for example 90s, 5m or 1h")
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 1 <= seconds <= 24 * 3600:
        raise RequestError(f"--budget {text!r} is not between 1 second and 24 hours")
    return seconds
