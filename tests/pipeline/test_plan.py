"""Plans: what is in a key and what is not, what is left out and why, what is refused, and one plan as a golden file."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from optimize.pipeline import keys
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Form, Gates, Kind, Pass, StepFacts, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.keys import checkpoint_key, step_key
from optimize.pipeline.plan import make_plan
from optimize.pipeline.recipe import parse
from optimize.pipeline.store import Store
from optimize.pipeline.toolchains import Environment, Toolchains
from optimize.pipeline.workload import parse_workload, shortened
from optimize.targets.cpu import recipes

GOLDEN = Path(__file__).parents[1] / "golden" / "minilm-cpu.plan"
REGENERATE = "# UPDATE_GOLDEN=1 pytest tests/pipeline/test_plan.py -k golden"


@dataclass(frozen=True)
class Widen(Pass):
    """A pass with one of everything that a key may hold."""

    name: ClassVar = "widen"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.ONNX
    version: ClassVar = 1
    tools: ClassVar = ("onnx", "torch")
    target_facts: ClassVar = ("features",)

    mode: Literal["plain", "calibrated"] = "plain"
    factor: int = 2

    @property
    def calibrated(self) -> bool:
        return self.mode == "calibrated"

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class WidenAgain(Widen):
    """The same pass after a change of its output."""

    version: ClassVar = 2


@dataclass(frozen=True)
class WidenMore(Widen):
    """The same pass with another default, its version forgotten."""

    factor: int = 3


@dataclass(frozen=True)
class WidenEverywhere(Widen):
    """The same pass, indifferent to the target."""

    target_facts: ClassVar = ()


CALIBRATED = Widen(mode="calibrated")


@pytest.fixture
def key(target: Target, versions: dict[str, str]) -> Callable[..., str]:
    """A step's key; what is not given is the same each time."""

    def make(step: Pass | None = None, **changed: Any) -> str:
        given = {"source_key": "s", "task": "fill-mask", "target": target, "calibration_digest": "d"} | changed
        return step_key(step=step or Widen(), **given)

    return make


def test_the_same_inputs_give_the_same_key(key: Callable[..., str]) -> None:
    assert key() == key(Widen(factor=2), calibration_digest="d")
    assert len(key()) == 64


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        (WidenAgain(), {}),
        (Widen(factor=3), {}),
        (CALIBRATED, {}),
        (None, {"source_key": "t"}),
        (None, {"task": "feature-extraction"}),
    ],
    ids=["version", "option", "choice", "source", "task"],
)
def test_a_key_changes_with(key: Callable[..., str], step: Pass | None, changed: dict[str, str]) -> None:
    assert key(step, **changed) != key()


def test_passes_of_different_names_have_different_keys(
    key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    monkeypatch.setattr(Widen, "name", "stretch")
    assert key() != before


def test_a_key_holds_the_values_of_options_left_at_their_defaults(key: Callable[..., str]) -> None:
    assert key(WidenMore()) != key(Widen())


@pytest.mark.parametrize(("tool", "named"), [("onnx", True), ("torch", True), ("openvino", False)])
def test_a_key_changes_with_the_versions_of_the_tools_that_the_pass_names(
    key: Callable[..., str], versions: dict[str, str], tool: str, named: bool
) -> None:
    before = key()
    versions[tool] = "99.0"
    assert (key() != before) is named


def test_calibration_enters_the_keys_of_calibrated_passes_alone(key: Callable[..., str]) -> None:
    assert key(calibration_digest="other") == key(calibration_digest=None) == key()
    assert key(CALIBRATED, calibration_digest="other") != key(CALIBRATED)


@pytest.mark.parametrize(
    ("fact", "value", "named"),
    [
        ("features", ("avx2",), True),
        ("memory", 1 << 30, False),
        ("cores", 64, False),
        ("device", "Other 1", False),
        ("dtypes", ("float32",), False),
    ],
)
def test_target_facts_enter_the_keys_of_passes_that_name_them_alone(
    key: Callable[..., str], target: Target, fact: str, value: object, named: bool
) -> None:
    other = dataclasses.replace(target, **{fact: value})
    assert (key(target=other) != key()) is named
    assert key(WidenEverywhere(), target=other) == key(WidenEverywhere())


def test_the_checkpoint_key_is_its_files_content_alone(checkpoint: Checkpoint) -> None:
    before = checkpoint_key(checkpoint)
    elsewhere = dataclasses.replace(
        checkpoint, model_id="other/name", folder=Path("/elsewhere"), revision=None,
        files=dict(reversed(checkpoint.files.items())),
    )  # fmt: skip
    assert checkpoint_key(elsewhere) == before
    for files in ({"config.json": "c1" * 32}, {"vocab.txt": "d0" * 32}):
        changed = dataclasses.replace(checkpoint, files=checkpoint.files | files)
        assert checkpoint_key(changed) != before


def test_a_changed_file_changes_every_key_of_the_plan(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str]
) -> None:
    changed = dataclasses.replace(checkpoint, files=checkpoint.files | {"config.json": "c1" * 32})
    texts = [parse("export-onnx,quantize-onnx"), parse("convert-openvino")]
    plans = [make_plan(each, target, texts) for each in (checkpoint, changed)]
    keys = [{step.key for planned in plan.recipes for step in planned.steps} for plan in plans]
    assert len(keys[0]) == 3
    assert not keys[0] & keys[1]


def test_recipes_that_share_a_prefix_share_its_keys(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str]
) -> None:
    texts = ("export-onnx", "export-onnx,quantize-onnx", "export-onnx{fused=true}")
    plain, quantized, fused = (each.steps for each in make_plan(checkpoint, target, map(parse, texts)).recipes)
    assert plain[0].key == quantized[0].key != fused[0].key
    assert quantized[1].key != quantized[0].key
    assert quantized[1].text == "export-onnx,quantize-onnx"
    assert quantized[0].text == "export-onnx"


@pytest.mark.parametrize(
    ("text", "changed", "reason"),
    [
        ("cast-dtype", {"dtypes": ("float32",)}, "cast-dtype: Example 9000 has no bfloat16 arithmetic"),
        ("convert-openvino,hint-openvino", {"dtypes": ("float32",)}, "hint-openvino: Example 9000 has no bfloat16"),
        ("export-onnx,quantize-onnx{mode=static}", {}, "quantize-onnx: no calibration data"),
    ],
)
def test_a_recipe_that_cannot_run_is_left_out_with_its_reason(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str], text: str, changed: dict[str, Any], reason: str
) -> None:
    host = dataclasses.replace(target, **changed)
    plan = make_plan(checkpoint, host, [parse(text, "lame"), parse("checkpoint")])
    assert [each.recipe.name for each in plan.recipes] == ["checkpoint"]
    (left,) = plan.left_out
    assert left.recipe.name == "lame"
    assert left.reason.startswith(reason)
    assert f"left out: lame: {left.reason}" in plan.describe()


def test_a_recipe_without_its_tool_is_left_out(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str]
) -> None:
    del versions["nncf"]
    texts = ("convert-openvino", "convert-openvino,quantize-openvino")
    plan = make_plan(checkpoint, target, map(parse, texts), calibration_digest="d")
    assert [each.text for each in plan.recipes] == ["convert-openvino"]
    assert plan.left_out[0].reason == "quantize-openvino needs nncf, which is not installed: pip install nncf"


def test_calibrated_passes_run_where_there_is_calibration_data(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str]
) -> None:
    plan = make_plan(checkpoint, target, [parse("export-onnx,quantize-onnx{mode=static}")], calibration_digest="d")
    assert not plan.left_out


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cast-dtype{dtype=float16}"], "no recipe can run here (cast-dtype{dtype=float16}: Example 9000"),
        ([], "there are no recipes"),
        (["export-onnx", "export-onnx{opset=20}"], "two recipes are the same"),
        (["checkpoint", "checkpoint"], "two recipes are the same"),
    ],
)
def test_a_plan_of_nothing_or_of_the_same_twice_is_refused(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str], texts: list[str], message: str
) -> None:
    with pytest.raises(RequestError) as raised:
        make_plan(checkpoint, target, map(parse, texts))
    assert message in raised.value.message


@pytest.mark.parametrize(
    ("gates", "option"),
    [
        (Gates(max_drop=0), "--max-drop 0"),
        (Gates(max_drop=-0.1), "--max-drop"),
        (Gates(max_drop=1.5), "--max-drop"),
        (Gates(max_drop=float("nan")), "--max-drop nan"),
        (Gates(min_speedup=0), "--min-speedup 0"),
        (Gates(min_speedup=1000), "--min-speedup"),
        (Gates(min_speedup=float("nan")), "--min-speedup nan"),
        (Gates(min_speedup=float("inf")), "--min-speedup inf"),
        (Gates(max_load=-0.1), "--max-load"),
        (Gates(max_load=1.1), "--max-load"),
        (Gates(max_load=float("nan")), "--max-load nan"),
    ],
)
def test_gates_that_mean_nothing_are_refused(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str], gates: Gates, option: str
) -> None:
    with pytest.raises(RequestError, match=option):
        make_plan(checkpoint, target, [parse("checkpoint")], gates=gates)


def test_gates_at_their_ends_are_taken(checkpoint: Checkpoint, target: Target, versions: dict[str, str]) -> None:
    gates = Gates(max_drop=1.0, min_speedup=0.5, max_load=0)
    assert make_plan(checkpoint, target, [parse("checkpoint")], gates=gates).gates == gates


@pytest.mark.parametrize(
    ("given", "expected"), [("1x32,1x128,8x128", "1x32,1x64,8x64"), ("1x32+32,1x512+16,1x64+16", "1x32+32,1x48+16")]
)
def test_a_workload_that_nobody_asked_for_is_shortened(given: str, expected: str) -> None:
    assert shortened(given, 64) == expected


def test_workload() -> None:
    assert parse_workload("1x32, 8x128 ,1x4", 128) == (Cell(1, 32), Cell(8, 128), Cell(1, 4))
    weighted = parse_workload("1x32*9,8x128", 128)
    assert weighted == (Cell(1, 32, weight=9), Cell(8, 128))
    assert [str(cell) for cell in weighted] == ["1x32", "8x128"] and weighted[0].weighted == "1x32*9"
    assert parse_workload("1x32+4*2", 128, Form.PROMPTS) == (Cell(1, 32, 4, 2),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not BATCHxTOKENS"),
        ("1x32,", "'' is not BATCHxTOKENS"),
        ("32", "'32' is not BATCHxTOKENS"),
        ("1x", "'1x' is not BATCHxTOKENS"),
        ("1X32", "'1X32' is not BATCHxTOKENS"),
        ("1x32x2", "is not BATCHxTOKENS"),
        ("-1x32", "is not BATCHxTOKENS"),
        ("1.5x32", "is not BATCHxTOKENS"),
        ("²x32", "is not BATCHxTOKENS"),
        ("0x32", "at least a batch of 1"),
        ("1x3", "at least a batch of 1 and 4 tokens"),
        ("1x129", "1x129 is longer than the model's limit of 128 tokens"),
        ("99999x128", "more than 1048576 tokens in one call"),
        ("1x32,01x32", "1x32 is given twice"),
        ("1x32*2,1x32", "1x32 is given twice"),
        ("1x32*0", "1x32*0: a weight is a whole number from 1 to 1000"),
        ("1x32*1.5", "is not BATCHxTOKENS"),
    ],
)
def test_a_workload_that_cannot_be_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse_workload(text, 128)
    assert message in raised.value.message


def test_a_workload_of_images_is_batches() -> None:
    cells = parse_workload("1, 8,32", 128, Form.IMAGES)
    assert cells == (Cell(1), Cell(8), Cell(32)) and ",".join(map(str, cells)) == "1,8,32"
    assert shortened("1,8,32", 16) == "1,8,32"


@pytest.mark.parametrize(
    ("text", "message"),
    [("1x224", "'1x224' is not BATCH"), ("0", "at least a batch of 1"), ("8,8", "8 is given twice"), ("8+2", "is not")],
)
def test_a_workload_of_images_that_cannot_be_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse_workload(text, 128, Form.IMAGES)
    assert message in raised.value.message and (message != "is not" or "1,8,32" in str(raised.value.hint))


@pytest.mark.parametrize(
    ("dtype", "gpus", "expected"),
    [("float32", 0, None), ("bfloat16", 0, "cast-dtype{dtype=float32}"), ("float32", 1, None), ("bfloat16", 1, None)],
)
def test_the_reference_is_cast_where_the_checkpoint_is_not_float32(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str], dtype: str, gpus: int, expected: str | None
) -> None:
    host, width = dataclasses.replace(target, gpus=gpus, gpu_memory=80 << 30), 4 if dtype == "float32" else 2
    plan = make_plan(
        dataclasses.replace(checkpoint, dtype=dtype, weight_bytes=width * checkpoint.parameters), host,
        [parse("checkpoint")],
        running_memory=lambda kind, facts, cells: facts.weight_bytes,
        gpu_memory=lambda kind, facts, cells, shards: facts.weight_bytes,
    )  # fmt: skip
    assert (plan.reference.pass_text if plan.reference else None) == expected
    if gpus:  # where it is cast on its way to the GPU, the host holds no more than what is stored
        assert plan.reference_memory == plan.baseline_memory
        assert (plan.reference_gpu > plan.baseline_gpu) is (dtype == "bfloat16")


def test_a_plan_says_what_is_cached(
    checkpoint: Checkpoint, target: Target, versions: dict[str, str], tmp_path: Path
) -> None:
    plan = make_plan(checkpoint, target, [parse("export-onnx,quantize-onnx")])
    store, (first, second) = Store(tmp_path / "store"), plan.recipes[0].steps
    with store.building(first.key) as data:
        (data / "model.onnx").write_bytes(b"graph")
        store.publish(first.key, Kind.ONNX, data, first.text, StepFacts(1.0, 1))
    described = plan.describe(store)
    assert f"export-onnx [cached] {first.key[:10]} -> quantize-onnx [build] {second.key[:10]}" in described


def test_a_tool_that_is_not_installed_has_no_version() -> None:
    assert keys.installed_version("no-such-distribution") is None
    assert keys.installed_version("pytest") == pytest.__version__


def test_golden_plan(target: Target, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    checkpoint = Checkpoint(
        model_id="sentence-transformers/all-MiniLM-L6-v2", folder=Path("/models/minilm"), revision="c9745ed1d9f2" * 3,
        task="sentence-similarity", architecture="BertModel", dtype="float32", parameters=22_713_216,
        weight_bytes=90_852_864, max_length=256,
        files={"config.json": "01" * 32, "model.safetensors": "02" * 32, "tokenizer.json": "03" * 32},
    )  # fmt: skip
    plan = make_plan(
        checkpoint, target, (*recipes(checkpoint, target), parse("cast-dtype{dtype=float16}", "eager-f16")),
        evaluation="210 examples of shipped text, 105 others to calibrate", calibration_digest="04" * 32,
        toolchains=Toolchains(Path("/no/cache")),
    )  # fmt: skip
    found = f"{REGENERATE}\n{plan.describe()}\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()


def test_keys_hold_the_environment(checkpoint: Checkpoint, target: Target) -> None:
    step = parse("export-optimum").passes[0]
    packages = dict.fromkeys(step.tools, "1.0")
    first = Environment("optimum-onnx", Path("/a/python"), "3.11.7", packages, "digest")
    keys = {step_key("source", step, checkpoint.task, target, None, each)
            for each in (first, dataclasses.replace(first, digest="other"),
                         dataclasses.replace(first, packages=packages | {"onnx": "2.0"}))}  # fmt: skip
    assert len(keys) == 3
    elsewhere = dataclasses.replace(first, python=Path("/b/python"), version="3.12.0")
    assert step_key("source", step, checkpoint.task, target, None, elsewhere) in keys


def test_a_missing_toolchain_is_a_reason_in_the_plan(checkpoint: Checkpoint, target: Target, cache: Path) -> None:
    recipes = [parse("optimize-ipex", "ipex-bf16"), parse("checkpoint", "eager")]
    plan = make_plan(checkpoint, target, recipes, toolchains=Toolchains(cache))
    (left,) = plan.left_out
    assert left.reason == "toolchain ipex is not installed; run: optimize toolchain install ipex"
    assert "left out: ipex-bf16: toolchain ipex" in plan.describe()
