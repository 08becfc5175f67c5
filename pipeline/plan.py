"""All recipes of a run with their keys: known, printable and refusable before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from optimize.pipeline.contract import Cell, Checkpoint, Form, Gates, Kind, Pass, Recipe, Target
from optimize.pipeline.errors import RequestError, ToolchainError
from optimize.pipeline.keys import checkpoint_key, step_key, tool_version
from optimize.pipeline.memory import (
    CUDA,
    DRIVER,
    GIB,
    MORE,
    Need,
    gib,
    what_would_fit,
    why_gpu_too_small,
    why_too_large,
)
from optimize.pipeline.recipe import UNCHANGED, parse, pass_text, recipe_text
from optimize.pipeline.store import Store
from optimize.pipeline.toolchains import Environment, Toolchains
from optimize.pipeline.workload import DEFAULT_WORKLOAD, parse_workload

IDLE = 2 << 30  # bytes of a GPU that its driver may hold for itself

# bytes that running an artifact of that kind takes; the checkpoint's weight_bytes are the artifact's
RunningMemory = Callable[[Kind, Checkpoint, Sequence[Cell]], int]
GpuMemory = Callable[[Kind, Checkpoint, Sequence[Cell], int], int]  # of each GPU; the last is how many share weights


@dataclass(frozen=True)
class Step:
    """One pass of one recipe with the key of what it makes and the text that leads there."""

    step: Pass
    key: str
    text: str  # the recipe that leads here
    memory: int = 0  # bytes that its worker has resident at most, by estimate

    @property
    def pass_text(self) -> str:
        return pass_text(self.step)


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe whose every step can run here."""

    recipe: Recipe
    steps: tuple[Step, ...]
    need: Need
    archived: str = ""  # why it is not emitted unless that is asked for: what it is made with is not maintained

    @property
    def key(self) -> str:
        return self.steps[-1].key if self.steps else ""

    @property
    def text(self) -> str:
        return recipe_text(self.recipe)


@dataclass(frozen=True)
class LeftOut:
    """A recipe that cannot run here, and why."""

    recipe: Recipe
    reason: str
    too_large: bool = False  # for the target's memory


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    checkpoint: Checkpoint
    checkpoint_key: str
    target: Target
    recipes: tuple[PlannedRecipe, ...]
    left_out: tuple[LeftOut, ...]
    workload: tuple[Cell, ...]
    gates: Gates
    budget: float  # seconds for measuring
    evaluation: str  # what accuracy is judged on, in words
    calibration_digest: str | None
    reference: Step | None  # what makes the float32 reference; nothing, where it is opened from the checkpoint
    reference_memory: int = 0  # bytes that the reference's worker has resident at most, by estimate
    baseline_memory: int = 0  # the same of the baseline's
    environments: Mapping[str, Environment] = field(default_factory=dict)  # by toolchain, of those that are used
    allow_archived: bool = False  # whether a recipe that is archived may be emitted
    reference_gpu: int = 0  # bytes of each GPU that the reference takes at most, by estimate
    baseline_gpu: int = 0  # the same of the baseline
    reference_gpus: int = 1  # over which the reference's layers lie: more where one does not hold it
    baseline_gpus: int = 1  # likewise

    def fits_beside_baseline(self, recipes: Iterable[PlannedRecipe]) -> bool:
        """Whether these can be built while the baseline is kept in memory."""
        building = max((planned.need.build for planned in recipes), default=0)
        return DRIVER + self.baseline_memory + building <= self.target.memory

    def _eager_on_gpus(self) -> str:
        """Of the line about memory."""
        eager = max(self.reference_gpu, self.baseline_gpu)
        if not eager:
            return ""
        gpus = {"the reference": self.reference_gpus, "the baseline": self.baseline_gpus}
        spread = " and ".join(name for name, count in gpus.items() if count > 1)
        each = f"; about {gib(eager)} GiB of {'a' if spread else 'the'} GPU for either"
        return f"{each}, the layers of {spread} over {self.target.gpus}" if spread else each

    def describe(self, store: Store | None = None) -> str:
        """The plan as text: what golden tests hold, and with a store, what is cached and what will be built."""
        checkpoint, gates = self.checkpoint, self.gates
        form = self.workload[0].form
        generates = form in (Form.PROMPTS, Form.CLIPS)
        drop = "perplexity up by" if generates else "drop"
        revision = f"@{checkpoint.revision[:12]}" if checkpoint.revision else ""
        lines = [
            f"checkpoint  {checkpoint.name}{revision} ({checkpoint.architecture}, {checkpoint.task}, "
            f"{checkpoint.parameters / 1e6:.1f} M parameters, {checkpoint.dtype})",
            f"target      {self.target.name}: {self.target.device}, {_what_it_has(self.target)}",
            f"workload    {', '.join(cell.weighted for cell in self.workload)} ({form.words}), "
            f"timed for about {self.budget:.0f} s, longer on a slow host",
            f"evaluation  {self.evaluation}",
            f"gates       {drop} at most {gates.max_drop:g}, speedup above {gates.min_speedup:g}, "
            f"foreign load at most {gates.max_load:g}",
            f"memory      about {gib(self.reference_memory)} GiB for the reference, {gib(self.baseline_memory)} for the"
            " baseline, which runs beside each candidate" + self._eager_on_gpus(),
            "",
        ]
        width = max((len(planned.recipe.name) for planned in self.recipes), default=0)
        for planned in self.recipes:
            steps = []
            for step in planned.steps:
                state = "" if store is None else " [cached]" if store.has(step.key) else " [build]"
                steps.append(f"{step.pass_text}{state} {step.key[:10]}")
            condition = f" (if {planned.recipe.after} is inaccurate)" if planned.recipe.after else ""
            if planned.archived and not self.allow_archived:
                condition += " (archived: measured, not emitted)"
            lines.append(
                f"{planned.recipe.name:<{width}}  {' -> '.join(steps) or 'the checkpoint as it is'}"
                f"; {gib(planned.need.build)} GiB to build, {gib(planned.need.run)} to run{_on_gpus(planned)}"
                f"{condition}"
            )
        lines += [
            f"toolchain {name}: {'named by the user: ' if each.named else ''}{each.python}, Python {each.version}"
            for name, each in sorted(self.environments.items())
        ]
        lines += [f"left out: {left.recipe.name}: {left.reason}" for left in self.left_out]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Planner:
    """What every recipe of a run is planned with."""

    checkpoint: Checkpoint
    target: Target
    cells: Sequence[Cell]
    calibration_digest: str | None
    running_memory: RunningMemory
    gpu_memory: GpuMemory
    toolchains: Toolchains | None

    @cached_property
    def source_key(self) -> str:
        return checkpoint_key(self.checkpoint)

    @property
    def free(self) -> int:
        """Bytes of each GPU."""
        return self.target.gpu_memory - self.target.gpu_used

    def plan(self, recipe: Recipe, shards: int | None = None) -> PlannedRecipe:
        """Its keys, and the memory that its steps and its artifact take, with its weights on so many GPUs."""
        environments = self.environments(recipe)
        steps: list[Step] = []
        cuda = CUDA if self.target.gpus else 0
        facts, more = self.checkpoint, cuda  # what is known of the weights after each step
        for step in recipe.passes:
            key = step_key(
                steps[-1].key if steps else self.source_key, step, self.checkpoint.task, self.target,
                self.calibration_digest, environments.get(step.toolchain), self.cells,
            )  # fmt: skip
            text = recipe_text(Recipe("", recipe.passes[: len(steps) + 1]))
            steps.append(Step(step, key, text, step.memory(facts) + cuda))
            more += step.extra_memory(facts)
            facts = replace(facts, weight_bytes=step.weight_bytes(facts), dtype=step.arithmetic or facts.dtype)
        running = self.running_memory(recipe.produces, facts, self.cells) + more
        archived = "; ".join(filter(None, (each.archived for each in environments.values())))
        shards = shards or recipe.placement.shards
        on_gpu = self.gpu_memory(recipe.produces, facts, self.cells, shards) if self.target.gpus else 0
        need = Need(max((step.memory for step in steps), default=0), running, on_gpu, shards)
        return PlannedRecipe(recipe, tuple(steps), need, archived)

    def eager(self, text: str) -> PlannedRecipe:
        """On one GPU; where that does not hold it, with its layers over all of them."""
        one = self.plan(parse(text))
        several = self.target.gpus > 1 and one.need.gpu > self.free
        return self.plan(parse(text), self.target.gpus) if several else one

    def why_not(self, recipe: Recipe) -> str | None:
        """Why it cannot run here, whatever memory there is; or None."""
        if (reason := recipe.why_not(self.checkpoint, self.target)) is not None:
            return reason
        try:
            environments = self.environments(recipe)
        except ToolchainError as error:
            return f"{error.message}; {error.hint}" if error.hint else error.message
        for step in recipe.passes:
            for tool in step.tools:
                if tool_version(tool, environments.get(step.toolchain)) is None:
                    return f"{step.name} needs {tool}, which is not installed: pip install {tool}"
            if step.calibrated and self.calibration_digest is None:
                return f"{step.name}: no calibration data (--data would give some)"
        return None

    def why_too_large(self, planned: PlannedRecipe, eager: Need) -> str | None:
        """Why it does not fit beside the eager baseline; or None."""
        large = why_too_large(planned.need, eager.run, self.target.memory)
        return large or why_gpu_too_small(planned.need, eager, self.free)

    def environments(self, recipe: Recipe) -> dict[str, Environment]:
        """By name, those that it needs beside this one. Raises ToolchainError for one that cannot be used."""
        if recipe.toolchains and self.toolchains is None:
            raise ToolchainError(f"toolchain {recipe.toolchains[0]} is not offered here")
        return self.toolchains.find_all(recipe.toolchains) if self.toolchains is not None else {}


def make_plan(
    checkpoint: Checkpoint,
    target: Target,
    recipes: Iterable[Recipe],
    *,
    workload: str = DEFAULT_WORKLOAD,
    form: Form = Form.TOKENS,
    gates: Gates | None = None,
    budget: float = 180.0,
    evaluation: str = "",
    calibration_digest: str | None = None,
    others: Iterable[Recipe] = (),
    running_memory: RunningMemory = lambda *_: 0,
    gpu_memory: GpuMemory = lambda *_: 0,
    toolchains: Toolchains | None = None,
    allow_archived: bool = False,
) -> Plan:
    """Give every step its key and leave out what cannot run, or does not fit into the target's memory.

    Raises RequestError for a bad workload or gate, for two recipes that are the same, and when nothing is left. What
    then would fit, of the recipes and the `others` that the target has, is named in it.
    """
    gates = gates or Gates()
    if not 0 < gates.max_drop <= 1:
        raise RequestError(f"--max-drop {gates.max_drop:g} is not above 0 and at most 1")
    if not 0 < gates.min_speedup < 1000:
        raise RequestError(f"--min-speedup {gates.min_speedup:g} is not above 0 and below 1000")
    if not 0 <= gates.max_load <= 1:
        raise RequestError(f"--max-load {gates.max_load:g} is not between 0 and 1")
    cells = parse_workload(workload, checkpoint.max_length, form)
    planner = _Planner(checkpoint, target, cells, calibration_digest, running_memory, gpu_memory, toolchains)
    planned: list[PlannedRecipe] = []
    left_out: list[LeftOut] = []
    reference = planner.eager("cast-dtype{dtype=float32}" if checkpoint.dtype != "float32" else UNCHANGED)
    eager = planner.eager(UNCHANGED).need
    if target.gpus:  # weights are cast one by one on their way there
        reference = replace(reference, steps=(), need=replace(reference.need, build=0, run=eager.run))
    baseline = eager.run
    _check_reference_fits(reference.need, eager, target)
    for recipe in recipes:
        reason = planner.why_not(recipe)
        if reason is not None:
            left_out.append(LeftOut(recipe, reason))
            continue
        each = planner.plan(recipe)
        if large := planner.why_too_large(each, eager):
            left_out.append(LeftOut(recipe, large, too_large=True))
            continue
        planned.append(each)
    names = [each.recipe.name for each in planned]
    if len({each.key for each in planned}) < len(planned) or len(set(names)) < len(names):
        raise RequestError("two recipes are the same", hint=f"recipes: {'; '.join(names)}")
    if not planned:
        listed = "; ".join(f"{left.recipe.name}: {left.reason}" for left in left_out)
        able = [planner.plan(each) for each in others if planner.why_not(each) is None]
        can = ", ".join([each.recipe.name for each in able if planner.why_too_large(each, eager) is None][:3])
        hint = f"these can: {can}" if can else "`optimize doctor` tells what this host has"
        if too_large := [planner.plan(left.recipe) for left in left_out if left.too_large]:
            needs = {each.recipe.name: each.need for each in (*too_large, *able)}
            hint = what_would_fit(needs, baseline, target.memory)
        raise RequestError(f"no recipe can run here ({listed})" if listed else "there are no recipes", hint=hint)
    environments = {name: each for one in planned for name, each in planner.environments(one.recipe).items()}
    return Plan(
        checkpoint, planner.source_key, target, tuple(planned), tuple(left_out), cells, gates, budget, evaluation,
        calibration_digest, next(iter(reference.steps), None), reference.need.run, baseline, environments,
        allow_archived, reference.need.gpu, eager.gpu, reference.need.gpus, eager.gpus,
    )  # fmt: skip


def _check_reference_fits(reference: Need, baseline: Need, target: Target) -> None:
    """Raise RequestError where nothing could be judged or timed."""
    free = target.gpu_memory - target.gpu_used
    if max(reference.gpu, baseline.gpu) > free:
        raise RequestError(
            f"the float32 reference needs about {gib(reference.gpu)} GiB of GPU memory"
            f"{f' on each of {reference.gpus}' if reference.gpus > 1 else ''}, and the baseline "
            f"{gib(baseline.gpu)}; {free / GIB:.1f} are free",
            hint="run on a GPU with more, or give a smaller --workload or checkpoint: no recipe is judged without it",
        )
    needed = DRIVER + max(reference.build, reference.run, baseline.run)
    if needed > target.memory:
        raise RequestError(
            f"the float32 reference needs about {gib(needed)} GiB of memory, {target.memory / GIB:.1f} may be used",
            hint=f"{MORE}: no recipe is judged without it",
        )


def _on_gpus(planned: PlannedRecipe) -> str:
    """Of a recipe's line: what it takes of which GPUs."""
    place = planned.recipe.placement
    if not planned.need.gpu:
        return ""
    each = f", {gib(planned.need.gpu)} of {'the GPU' if place.gpus == 1 else f'each of {place.gpus} GPUs'}"
    return each + (f": {place.replicas} copies" if place.replicas > 1 else "")


def _what_it_has(target: Target) -> str:
    """Of the plan's line about the target."""
    host = f"{target.cores} cores, {target.memory / 2**30:.0f} GiB"
    if target.gpus:
        taken = f" ({gib(target.gpu_used)} of it held by others)" if target.gpu_used > IDLE else ""
        clock = f", up to {target.gpu_clock} MHz" if target.gpu_clock else ""
        memory = f"{target.gpu_memory / 2**30:.0f} GiB{taken}, compute capability {target.arch}{clock}"
        several = f"{target.gpus} of them over {target.links}, each " if target.gpus > 1 else ""
        return f"{several}{memory}, driver {target.driver}; {host} on its host"
    return f"{host}; {', '.join(target.features) or 'no vector extensions known'}"
