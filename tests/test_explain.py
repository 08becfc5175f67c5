"""`optimize explain`: damage is put into a known layer by a known pass, and has to be found there."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUICK, Cli, MakeCheckpoint, Outcome, run_optimize, write_passes

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
MOVED = "damage{parameter=encoder.layer.1.output.dense.weight;factor=0.3},convert-openvino"
OVERFLOW = "damage{parameter=encoder.layer.0.intermediate.dense.weight;factor=1e38},cast-dtype"
EXPORTED, ACCURATE = "damaged-export", "convert-openvino"
QUANTIZED = ("convert-openvino,quantize-openvino", "export-onnx,quantize-onnx")


@dataclass(frozen=True)
class Rejected:
    """One run of all the recipes above: every one but ACCURATE is rejected."""

    folder: Path  # of the run
    out: Path  # the emitted folder
    ask: Callable[..., Outcome]  # the command line, where the damaging passes are installed

    def explain(self, *options: object) -> dict[str, Any]:
        return explained(self.ask("explain", self.folder, *options))


@pytest.fixture(scope="module")
def rejected(tiny: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rejected:
    folder = tmp_path_factory.mktemp("rejected")
    site = write_passes(folder / "site", DAMAGE, PASSES)
    ask = partial(run_optimize, folder, shared_cache, env={"PYTHONPATH": str(site)})
    recipes = (MOVED, EXPORTED, OVERFLOW, *QUANTIZED, ACCURATE)
    options = [word for recipe in recipes for word in ("--recipe", recipe)]
    outcome = ask(tiny, *options, *QUICK, "--max-drop", "0.00001", "--out", folder / "out")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    assert [each["status"] for each in outcome.report["candidates"]].count("passed") == 1
    return Rejected(run_of(outcome), folder / "out", ask)


def run_of(outcome: Outcome) -> Path:
    """The run's folder, which is named where something was rejected."""
    named = re.search(r"optimize explain (\S+) ", outcome.output)
    assert named is not None, outcome.output
    return Path(named[1])


def explained(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    return outcome.report


def above(report: dict[str, Any]) -> list[str]:
    return [each["layer"] for each in report["layers"] if each["drop"] > report["gate"]]


def test_the_pass_and_the_module_are_found(rejected: Rejected) -> None:
    found = rejected.explain()  # of the first that was rejected
    assert [stage["reason"] is not None for stage in found["stages"]] == [False, True, True]
    assert found["culprit"] == 1
    assert found["stages"][1]["step"].startswith("damage{")
    assert above(found)[0] == "encoder.layer.1.output.dense"


def test_a_damaged_export_is_found_by_the_weights_that_follow(rejected: Rejected) -> None:
    found = rejected.explain("--candidate", EXPORTED)
    assert found["culprit"] == 1
    assert len(found["layers"]) == 13  # six products in each of two layers, and the pooler
    first = [each["layer"] for each in found["layers"]].index(above(found)[0])
    assert first == 4  # after query, key, value and the output of attention


def test_an_overflow_is_traced_to_its_module(rejected: Rejected) -> None:
    found = rejected.explain("--candidate", OVERFLOW)
    assert found["stages"][-1]["drop"] is None
    assert "NaN" in found["stages"][-1]["reason"]
    assert "encoder.layer.0.intermediate.dense Linear" in found["remark"]


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_quantization_is_followed_from_layer_to_layer(recipe: str, rejected: Rejected) -> None:
    found = rejected.explain("--candidate", recipe)
    assert found["culprit"] == 2
    assert found["stages"][1]["drop"] < 1e-6
    assert len(above(found)) >= 6
    assert all(each["drop"] < 0.2 for each in found["layers"])
    modules = [each["module"] for each in found["layers"]]
    order = [modules.index(f"encoder.layer.{layer}.{part}") for layer in (0, 1) for part in PARTS]
    assert order == sorted(order), "every product has the name of the checkpoint's module, in the order of execution"


def test_what_passed_is_said_to_pass_also_from_the_emitted_folder(rejected: Rejected) -> None:
    accurate = rejected.ask("explain", rejected.out, "--candidate", ACCURATE)
    assert explained(accurate)["culprit"] is None
    assert "every stage passes the gate" in accurate.output


def test_what_cannot_be_explained_is_refused(rejected: Rejected, tmp_path: Path) -> None:
    (empty := tmp_path / "empty-folder").mkdir()
    without = tmp_path / "without"
    shutil.copytree(rejected.folder, without)
    report = json.loads((without / "report.json").read_text())
    (without / "report.json").write_text(json.dumps(report | {"candidates": []}))
    unbuilt = shutil.copytree(rejected.folder, tmp_path / "unbuilt")
    report["candidates"][0]["status"] = "not built"
    (unbuilt / "report.json").write_text(json.dumps(report))
    damaged = shutil.copytree(rejected.out, tmp_path / "damaged")
    (damaged / "evidence" / "reference.cells.npz").write_bytes(b"")
    cut = shutil.copytree(rejected.folder, tmp_path / "cut")
    (cut / "reference.cells.npz").write_bytes(b"")
    for folder, options, words in (
        (empty, (), "neither report.json nor optimize.json"),
        (rejected.folder, ("--candidate", "nothing"), "there is no candidate 'nothing'"),
        (rejected.folder, ("--cache", empty), "is not in the store"),
        (without, (), "no candidate of this run was rejected"),
        (unbuilt, ("--candidate", MOVED), "was not built"),
        (damaged, (), "evidence/reference.cells.npz is changed"),
        (cut, (), "has no batches of arrays"),
    ):
        found = rejected.ask("explain", folder, *options)
        assert found.code == 2, found.output
        assert words in found.output


def test_layers_are_those_of_the_task(make_checkpoint: MakeCheckpoint, cli: Cli, tmp_path: Path) -> None:
    folder = make_checkpoint("BertForSequenceClassification")
    outcome = cli(folder, "--recipe", "cast-dtype", *QUICK, "--max-drop", "0.0000001", "--out", tmp_path / "out")
    assert outcome.code == 4, outcome.output
    layers = [each["layer"] for each in explained(cli("explain", run_of(outcome)))["layers"]]
    assert layers[0].startswith("bert.embeddings")
    assert layers[-1] == "classifier"
