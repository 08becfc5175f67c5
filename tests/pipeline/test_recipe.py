"""Recipe text: it round-trips, every mistake in it is named, and installed distributions may add passes."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from optimize.models.checkpoint import resolve
from optimize.pipeline.contract import Artifact, Context, Kind, Pass, Recipe
from optimize.pipeline.errors import RequestError
from optimize.pipeline.recipe import parse, parse_pass, pass_class, pass_names, pass_text, recipe_text
from optimize.targets import cpu
from optimize.targets.cpu import BY_NAME, GENERATING, GENERATING_BY_NAME, RECIPES
from tests.conftest import Install

OPTIONS = """
@dataclass(frozen=True)
class Options(Base):
    name: ClassVar = "options"
    whole: int = 3
    real: float = 0.5
    flag: bool = False
    word: str = "plain"
    choice: Literal["left", "right"] = "left"

    def run(self, source, context, out):
        return {}
"""


@pytest.fixture
def options(third_party: Install) -> type[Pass]:
    third_party(OPTIONS, {"options": "Options"})
    return pass_class("options")


@pytest.mark.parametrize(("recipes", "by_name"), [(RECIPES, BY_NAME), (GENERATING, GENERATING_BY_NAME)])
def test_what_is_tried_only_by_name_is_a_recipe_and_others_are_left(
    recipes: dict[str, str], by_name: frozenset[str]
) -> None:
    assert by_name < recipes.keys()


def test_what_is_best_for_an_encoder_on_some_host_is_tried(minilm: Path) -> None:
    """On a processor with AMX openvino-bf16 was emitted: benchmarks/results/minilm-gate-0.001.json."""
    tried = {each.name for each in cpu.recipes(resolve(str(minilm)), cpu.probe()) if each.default}
    assert tried >= {"eager-bf16", "aoti-bf16", "onnx-fused", "openvino", "openvino-bf16", "openvino-int8-weights"}
    assert not tried & {"torchscript", "optimum-onnx"}


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_round_trip_through_canonical_text(name: str) -> None:
    recipe = parse(RECIPES[name], name)
    assert recipe.name == name
    assert recipe.passes
    assert recipe_text(recipe) == RECIPES[name]
    assert parse(recipe_text(recipe)).passes == recipe.passes


@pytest.mark.parametrize("name", pass_names())
def test_every_pass_of_the_folder_is_found_by_its_own_name(name: str) -> None:
    cls = pass_class(name)
    assert cls.name == name
    assert pass_text(cls()) == name


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("whole", 8, "whole=8"),
        ("whole", -1, "whole=-1"),
        ("real", 1e-05, "real=1e-05"),
        ("real", 0.1 + 0.2, "real=0.30000000000000004"),
        ("flag", True, "flag=true"),
        ("word", "two words", "word=two words"),
        ("word", "a=b,c", "word=a=b,c"),
        ("word", "", "word="),
        ("choice", "right", "choice=right"),
    ],
)
def test_an_option_of_each_type_round_trips(options: type[Pass], field: str, value: object, text: str) -> None:
    step = dataclasses.replace(options(), **{field: value})
    assert pass_text(step) == f"options{{{text}}}"
    (again,) = parse(f"options{{{text}}},cast-dtype").passes[:1]
    assert again == step
    assert type(getattr(again, field)) is type(value)


def test_all_options_together_come_back_in_field_order(options: type[Pass]) -> None:
    step = parse_pass(" options { choice=right; flag = true ;real=2;whole=9;word=w } ")
    assert step == options(9, 2.0, True, "w", "right")
    assert pass_text(step) == "options{whole=9;real=2.0;flag=true;word=w;choice=right}"


def test_defaults_spelt_out_are_the_same_recipe() -> None:
    assert parse("export-onnx{opset=20;fused=false}").passes == parse("export-onnx").passes
    assert recipe_text(parse("export-onnx{opset=20}")) == "export-onnx"


def test_the_recipe_without_passes() -> None:
    recipe = parse(" checkpoint ")
    assert recipe == Recipe("checkpoint", ())
    assert recipe.produces is Kind.CHECKPOINT
    assert recipe_text(recipe) == "checkpoint"


def test_a_recipe_is_called_after_its_text_unless_named() -> None:
    assert parse(" export-onnx ").name == "export-onnx"
    assert parse("export-onnx", "plain").name == "plain"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("melt", "unknown pass 'melt'"),
        ("export_onnx", "cannot be read at 'export_onnx'"),
        ("export-onnx{depth=3}", "export-onnx: 'depth' is not an option"),
        ("export-onnx{opset}", "export-onnx: 'opset' has no value"),
        ("export-onnx{opset=18;opset=19}", "export-onnx: 'opset' is given twice"),
        ("export-onnx{opset=16}", "export-onnx: opset='16' is not one of 17, 18, 19"),
        ("export-onnx,use-provider{provider=tensorrt;graphs=false}", "graphs is for provider=cuda alone"),
        ("convert-openvino,quantize-openvino{mode=weights;group=64}", "group is for mode=int4 alone"),
        ("quantize-onnx{keep=new}", "quantize-onnx: keep='new' is not a whole number"),
        ("quantize-onnx{keep=1.5}", "quantize-onnx: keep='1.5' is not a whole number"),
        ("quantize-onnx{keep=}", "quantize-onnx: keep='' is not a whole number"),
        ("export-onnx{fused=yes}", "export-onnx: fused='yes' is not one of true, false"),
        ("export-onnx{fused=True}", "export-onnx: fused='True' is not one of true, false"),
        ("cast-dtype{dtype=int8}", "cast-dtype: dtype='int8' is not one of bfloat16, float16, float32"),
        ("quantize-onnx", "quantize-onnx reads onnx, but what is there is checkpoint"),
        ("export-onnx,hint-openvino", "hint-openvino reads openvino, but what is there is onnx"),
        ("export-onnx,", "cannot be read"),
        ("export-onnx, ", "cannot be read"),
        (",export-onnx", "cannot be read at ',export-onnx'"),
        ("export-onnx,,quantize-onnx", "cannot be read"),
        ("export-onnx quantize-onnx", "cannot be read"),
        ("export-onnx{opset=18", "cannot be read at 'export-onnx{opset=18'"),
        ("export-onnx{opset=18}}", "cannot be read"),
        ("export-onnx;quantize-onnx", "cannot be read"),
        ("../../etc", "cannot be read"),
        ("checkpoint,export-onnx", "unknown pass 'checkpoint'"),
        ("", "cannot be read at ''"),
        ("  ", "cannot be read"),
    ],
)
def test_a_mistake_is_named(text: str, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(text)
    assert message in raised.value.message


def test_what_separates_options_is_said_where_passes_are_separated_so() -> None:
    with pytest.raises(RequestError) as raised:
        parse("export-onnx,quantize-onnx{mode=static,samples=32}")
    assert raised.value.hint == "options of a pass are separated by ;"


def test_a_number_that_is_none(options: type[Pass]) -> None:
    with pytest.raises(RequestError, match="real='fast' is not a number"):
        parse("options{real=fast}")


def test_an_unknown_pass_lists_the_known_ones() -> None:
    with pytest.raises(RequestError) as raised:
        parse("melt")
    assert all(name in str(raised.value.hint) for name in pass_names())


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(RequestError) as raised:
        parse("quantize-onnx{bits=4}")
    assert raised.value.hint == "options of quantize-onnx: mode, per_channel, samples, keep"


def test_one_pass_is_not_two() -> None:
    with pytest.raises(RequestError):
        parse_pass("export-onnx,quantize-onnx")


def test_choices_may_be_numbers(third_party: Install) -> None:
    code = OPTIONS.replace('Literal["left", "right"] = "left"', "Literal[4, 8] = 4")
    third_party(code, {"options": "Options"})
    assert pass_text(parse_pass("options{choice=8}")) == "options{choice=8}"


def test_an_option_without_a_default_must_be_given(third_party: Install) -> None:
    third_party(OPTIONS.replace("whole: int = 3", "whole: int"), {"options": "Options"})
    with pytest.raises(RequestError, match="whole"):
        parse_pass("options{flag=true}")


def test_a_third_party_pass_is_listed_planned_and_shown(third_party: Install, tmp_path: Path) -> None:
    third_party(OPTIONS, {"options": "Options"})
    script = (
        "from optimize.pipeline.recipe import parse, pass_names, recipe_text\n"
        "assert 'options' in pass_names() and 'export-onnx' in pass_names()\n"
        "print(recipe_text(parse('options{flag=true},export-onnx{fused=true}')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "options{flag=true},export-onnx{fused=true}\n"


def test_a_third_party_pass_cannot_take_a_shipped_name(third_party: Install) -> None:
    third_party(OPTIONS.replace('"options"', '"export-onnx"'), {"export-onnx": "Options"})
    with pytest.raises(RequestError, match="export-onnx"):
        pass_class("export-onnx")


def test_a_third_party_pass_bears_the_name_of_its_entry_point(third_party: Install) -> None:
    third_party(OPTIONS, {"other": "Options"})
    with pytest.raises(RequestError, match="other"):
        parse("other{flag=true}")


def test_a_pass_that_is_not_in_the_folder_prints_as_text_all_the_same() -> None:
    @dataclass(frozen=True)
    class Local(Pass):
        name: ClassVar = "local"
        accepts: ClassVar = Kind.CHECKPOINT
        produces: ClassVar = Kind.ONNX
        depth: int = 1

        def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
            return {}

    recipe = Recipe("mine", (Local(depth=2),))
    assert recipe_text(recipe) == "local{depth=2}"
    assert recipe.produces is Kind.ONNX
