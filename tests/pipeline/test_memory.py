"""What the plan says of memory: sizes as text, what is left out, what is refused and what is named then."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from optimize.pipeline.contract import Cell, Checkpoint, Dimensions, Form, Kind, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.memory import DRIVER, GIB, gib, parse_memory
from optimize.pipeline.plan import Plan, make_plan
from optimize.pipeline.recipe import parse
from optimize.targets.cpu import _cgroup_limit
from optimize.targets.runtimes.memory import running_memory

TEXTS = ("convert-openvino", "convert-openvino,quantize-openvino{mode=weights}", "cast-dtype")
MakePlan = Callable[..., Plan]


@pytest.fixture
def large(checkpoint: Checkpoint) -> Checkpoint:
    """A language model of a billion parameters in bfloat16: 2 GB."""
    return dataclasses.replace(
        checkpoint, task="text-generation", architecture="LlamaForCausalLM", dtype="bfloat16",
        parameters=1_000_000_000, weight_bytes=2_000_000_000, max_length=2048, largest=100_000_000,
        dimensions=Dimensions(hidden=2048, intermediate=8192, layers=16, vocabulary=49152, cache=16384),
    )  # fmt: skip


@pytest.fixture
def plan_in(large: Checkpoint, target: Target, versions: dict[str, str]) -> MakePlan:
    """The plan of the large checkpoint on a host of so many GiB."""

    def make(memory: float, *texts: str, others: tuple[str, ...] = ()) -> Plan:
        host = dataclasses.replace(target, memory=int(memory * GIB))
        recipes, more = map(parse, texts or TEXTS), map(parse, others)
        return make_plan(
            large, host, recipes, others=more, workload="1x32+4", form=Form.PROMPTS, running_memory=running_memory
        )

    return make


def least_gib(plan_in: MakePlan) -> float:
    """What the last of TEXTS, which needs least, fits into."""
    plan = plan_in(64)
    return float(gib(plan.recipes[-1].need.beside(plan.baseline_memory)))


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * GIB), ("1.5", 3 * GIB // 2), (" 2 g ", 2 * GIB), ("500MB", 500_000_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "6 tons", "-6GiB", "6e9", "1MiB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--memory"):
        parse_memory(text)


def test_what_is_needed_is_rounded_up() -> None:
    assert [gib(size) for size in (0, 1, GIB, GIB + 1)] == ["0.0", "0.1", "1.0", "1.1"]


def test_everything_fits_where_there_is_enough(plan_in: MakePlan) -> None:
    plan = plan_in(16)
    assert not plan.left_out
    assert plan.fits_beside_baseline(plan.recipes)
    openvino, quantized, cast = plan.recipes
    assert openvino.need.run > quantized.need.run
    assert openvino.need.build > 4 * 10**9 > cast.need.build
    assert quantized.need.build == max(step.memory for step in quantized.steps) > openvino.need.build
    described = plan.describe()
    for planned in plan.recipes:
        assert f"; {gib(planned.need.build)} GiB to build, {gib(planned.need.run)} to run" in described
    assert f"{gib(plan.reference_memory)} GiB for the reference" in described


def test_what_does_not_fit_is_left_out_with_its_bytes(plan_in: MakePlan) -> None:
    least = least_gib(plan_in)
    plan = plan_in(least)
    assert not plan_in(least, "cast-dtype").left_out
    reasons = {left.recipe.name: left.reason for left in plan.left_out}
    assert [each.text for each in plan.recipes] == ["cast-dtype"]
    assert reasons[TEXTS[0]].startswith("needs about 1")
    assert f"GiB to run beside the baseline; {least} may be used" in reasons[TEXTS[0]]
    quantized = plan_in(64).recipes[1].need
    too_little = (DRIVER + quantized.build) / GIB - 0.1
    with pytest.raises(RequestError, match=rf"GiB to build; {too_little:.1f} may be used"):
        plan_in(too_little, TEXTS[1])


def test_a_refusal_names_what_would_fit(plan_in: MakePlan) -> None:
    with pytest.raises(RequestError) as raised:
        plan_in(least_gib(plan_in), TEXTS[0], others=TEXTS)
    assert raised.value.exit_code == 2
    assert raised.value.message.startswith("no recipe can run here (convert-openvino: needs about 1")
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("cast-dtype needs least: about ")
    assert raised.value.hint.endswith("which fits: --recipe cast-dtype")


def test_a_refusal_names_what_needs_least(plan_in: MakePlan) -> None:
    with pytest.raises(RequestError) as raised:
        plan_in(least_gib(plan_in) - 0.1)
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("cast-dtype needs least: about ")
    assert "raise --memory" in raised.value.hint


def test_other_reasons_name_what_can_run(plan_in: MakePlan) -> None:
    with pytest.raises(RequestError) as raised:
        plan_in(64, "cast-dtype{dtype=float16}", others=TEXTS)
    assert raised.value.hint is not None and raised.value.hint.startswith("these can: ")
    with pytest.raises(RequestError) as raised:
        plan_in(64, "cast-dtype{dtype=float16}", others=())
    assert raised.value.hint is not None and "optimize doctor" in raised.value.hint


def test_without_a_reference_there_is_no_plan(plan_in: MakePlan) -> None:
    with pytest.raises(RequestError, match=r"float32 reference needs about \d\.\d GiB of memory, 4\.0 may be used"):
        plan_in(4)


def test_the_baseline_is_closed_where_building_needs_its_memory(plan_in: MakePlan) -> None:
    plan = plan_in(7.5, TEXTS[1])
    assert not plan.fits_beside_baseline(plan.recipes)


def test_a_workload_s_cache_and_logits_are_counted(large: Checkpoint) -> None:
    small, long, wide = (
        running_memory(Kind.GGUF, large, [cell]) for cell in (Cell(1, 32, 4), Cell(1, 2000, 40), Cell(64, 512, 4))
    )
    assert small < long < wide


def test_the_control_group_s_limit_is_found(tmp_path: Path) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    assert _cgroup_limit(root, own) > 1 << 60
    (root / "jobs" / "one").mkdir(parents=True)
    (root / "jobs" / "memory.max").write_text("5000\n")
    (root / "jobs" / "one" / "memory.max").write_text("max\n")
    own.write_text("0::/jobs/one\n")
    assert _cgroup_limit(root, own) == 5000
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text("4000\n")
    own.write_text("4:memory:/elsewhere\n3:cpu:/\n0::/\n")
    assert _cgroup_limit(root, own) == 4000
