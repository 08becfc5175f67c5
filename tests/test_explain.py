"""`optimize explain`: damage is put into a known layer by a known pass, and has to be found there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, Cli, MakeCheckpoint, Outcome

DAMAGE = """
from optimize.models.loading import copy_carried, load_model
from optimize.passes.export_onnx import ExportOnnx

@dataclass(frozen=True)
class Damage(Base):
    name: ClassVar = "damage"
    parameter: str = ""
    factor: float = 1.0
    def run(self, source, context, out):
        import torch
        model = load_model(source.path, context.task)
        weight = dict(model.named_parameters())[self.parameter]
        torch.manual_seed(0)
        with torch.no_grad():
            weight.copy_(self.factor * torch.randn_like(weight))
        copy_carried(source.path, out)
        model.save_pretrained(out)
        return {}

@dataclass(frozen=True)
class DamagedExport(ExportOnnx):
    name: ClassVar = "damaged-export"
    def run(self, source, context, out):
        import numpy, onnx
        facts = super().run(source, context, out)
        model = onnx.load(out / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.name == "encoder.layer.0.intermediate.dense.bias":
                noise = numpy.random.default_rng(0).normal(size=tensor.dims).astype("float32")
                tensor.CopyFrom(onnx.numpy_helper.from_array(noise, tensor.name))
        for path in out.iterdir():
            path.unlink()
        onnx.save(model, out / "model.onnx")
        return facts
"""
PARTS = ("attention.output.dense", "intermediate.dense", "output.dense")
PASSES = {"damage": "Damage", "damaged-export": "DamagedExport"}


def rejected(cli: Cli, folder: Path, recipe: str, out: Path, *options: str) -> tuple[Outcome, Path]:
    """A run whose only candidate is rejected, and its folder."""
    outcome = cli(folder, "--recipe", recipe, *QUICK, *options, "--out", out)
    assert outcome.code == 4, outcome.output
    named = re.search(r"optimize explain (\S+) ", outcome.output)
    assert named is not None, outcome.output
    return outcome, Path(named[1])


def explained(cli: Cli, run: Path, *options: str) -> dict[str, Any]:
    outcome = cli("explain", run, *options)
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    return outcome.report


def largest(report: dict[str, Any]) -> str:
    return str(max(report["layers"], key=lambda each: each["drop"])["layer"])


def above(report: dict[str, Any]) -> list[str]:
    return [each["layer"] for each in report["layers"] if each["drop"] > report["gate"]]


def test_the_pass_and_the_module_are_found(tiny: Path, cli: Cli, third_party: object, tmp_path: Path) -> None:
    third_party(DAMAGE, PASSES)  # type: ignore[operator]
    recipe = "damage{parameter=encoder.layer.1.output.dense.weight;factor=0.3},convert-openvino"
    _, run = rejected(cli, tiny, recipe, tmp_path / "out")
    found = explained(cli, run)
    assert [stage["reason"] is not None for stage in found["stages"]] == [False, True, True]
    assert found["culprit"] == 1
    assert found["stages"][1]["step"].startswith("damage{")
    assert above(found)[0] == "encoder.layer.1.output.dense"


def test_a_damaged_export_is_found_by_the_weights_that_follow(
    tiny: Path, cli: Cli, third_party: object, tmp_path: Path
) -> None:
    third_party(DAMAGE, PASSES)  # type: ignore[operator]
    _, run = rejected(cli, tiny, "damaged-export", tmp_path / "out")
    found = explained(cli, run)
    assert found["culprit"] == 1
    assert len(found["layers"]) == 13  # six products in each of two layers, and the pooler
    first = [each["layer"] for each in found["layers"]].index(above(found)[0])
    assert first == 4  # after query, key, value and the output of attention


def test_an_overflow_is_traced_to_its_module(tiny: Path, cli: Cli, third_party: object, tmp_path: Path) -> None:
    third_party(DAMAGE, PASSES)  # type: ignore[operator]
    recipe = "damage{parameter=encoder.layer.0.intermediate.dense.weight;factor=1e38},cast-dtype"
    _, run = rejected(cli, tiny, recipe, tmp_path / "out")
    found = explained(cli, run)
    assert found["stages"][-1]["drop"] is None
    assert "NaN" in found["stages"][-1]["reason"]
    assert "encoder.layer.0.intermediate.dense Linear" in found["remark"]


@pytest.mark.parametrize("recipe", ["convert-openvino,quantize-openvino", "export-onnx,quantize-onnx"])
def test_quantization_is_followed_from_layer_to_layer(recipe: str, tiny: Path, cli: Cli, tmp_path: Path) -> None:
    _, run = rejected(cli, tiny, recipe, tmp_path / "out", "--max-drop", "0.00001")
    found = explained(cli, run)
    assert found["culprit"] == 2
    assert found["stages"][1]["drop"] < 1e-6
    assert len(above(found)) >= 6
    assert all(each["drop"] < 0.2 for each in found["layers"])
    modules = [each["module"] for each in found["layers"]]
    order = [modules.index(f"encoder.layer.{layer}.{part}") for layer in (0, 1) for part in PARTS]
    assert order == sorted(order), "every product has the name of the checkpoint's module, in the order of execution"


def test_what_cannot_be_explained_is_refused(tiny: Path, cli: Cli, third_party: object, tmp_path: Path) -> None:
    third_party(DAMAGE, PASSES)  # type: ignore[operator]
    cache, out = tmp_path / "cache", tmp_path / "out"
    recipe = "damage{parameter=embeddings.LayerNorm.weight;factor=1}"
    outcome = cli(tiny, "--recipe", recipe, "--recipe", "cast-dtype", *QUICK, "--out", out, cache=cache)
    assert outcome.code == 0, outcome.output
    (run,) = (cache / "runs").iterdir()
    (empty := tmp_path / "empty-folder").mkdir()
    for folder, options, words in (
        (empty, (), "neither report.json nor optimize.json"),
        (run, ("--candidate", "nothing"), "there is no candidate 'nothing'"),
    ):
        found = cli("explain", folder, *options, cache=cache)
        assert found.code == 2, found.output
        assert words in found.output
    assert explained_from_emitted(cli, out, cache)["culprit"] == 1
    accurate = cli("explain", run, "--candidate", "cast-dtype", cache=cache)
    assert accurate.code == 0
    assert "every stage passes the gate" in accurate.output
    gone = cli("explain", run, "--cache", tmp_path / "empty")
    assert gone.code == 2
    assert "is not in the store" in gone.output
    report = json.loads((run / "report.json").read_text())
    report["candidates"] = []
    (run / "report.json").write_text(json.dumps(report))
    assert "no candidate of this run was rejected" in cli("explain", run, cache=cache).output


def explained_from_emitted(cli: Cli, out: Path, cache: Path) -> dict[str, Any]:
    outcome = cli("explain", out, cache=cache)
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    return outcome.report


def test_layers_are_those_of_the_task(make_checkpoint: MakeCheckpoint, cli: Cli, tmp_path: Path) -> None:
    folder = make_checkpoint("BertForSequenceClassification")
    _, run = rejected(cli, folder, "cast-dtype", tmp_path / "out", "--max-drop", "0.0000001")
    layers = [each["layer"] for each in explained(cli, run)["layers"]]
    assert layers[0].startswith("bert.embeddings")
    assert layers[-1] == "classifier"
