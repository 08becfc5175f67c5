"""Milder int8 recipes: built where the one before is inaccurate, left out where it is accurate or hopeless."""

from pathlib import Path

import pytest

import optimize
from optimize.pipeline.contract import Gates, Kind
from optimize.pipeline.manifest import Report
from optimize.pipeline.statistics import Interval
from optimize.pipeline.verdict import Candidate, Status, why_not_recover
from optimize.targets import cpu
from tests.pipeline.test_accuracy import accuracy

INT8, MILDER = "onnx-int8-dynamic", "onnx-int8-dynamic-keep2"


def test_the_targets_chain_is_in_order_and_keeps_more_each_time() -> None:
    names = list(cpu.RECIPES)
    for name, before in cpu.RECOVERIES.items():
        assert names.index(before) < names.index(name)
        ours, theirs = cpu.RECIPES[name], cpu.RECIPES[before]
        assert ours.split("{keep=")[0] == theirs.split("{keep=")[0]
        assert _kept(ours) > _kept(theirs)


def _kept(text: str) -> int:
    return int(text.split("{keep=")[1].rstrip("}")) if "{keep=" in text else 0


@pytest.mark.parametrize(
    ("status", "drop", "words"),
    [
        (Status.INACCURATE, 0.0011, None),
        (Status.INACCURATE, 0.01, None),
        (Status.INACCURATE, 0.0101, "more than 10 times the gate"),
        (Status.PASSED, 0.0005, "is passed, not inaccurate"),
        (Status.NOT_FASTER, 0.0005, "is not faster, not inaccurate"),
        (Status.NOT_BUILT, None, "is not built"),
        (Status.INACCURATE, None, "wrong by themselves"),  # NaN: nothing was compared
    ],
)
def test_there_is_a_point_only_near_the_gate(status: Status, drop: float | None, words: str | None) -> None:
    candidate = Candidate("x", "export-onnx,quantize-onnx", Kind.ONNX, status)
    if drop is not None:
        candidate.accuracy = accuracy(drop=Interval(drop, drop, drop))
    found = why_not_recover(candidate, Gates(max_drop=0.001))
    assert (found is None) if words is None else (found is not None and words in found)


def test_a_milder_recipe_is_built_only_if_needed(tiny: Path, some_text: Path, shared_cache: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(cpu, "RECIPES", {name: cpu.RECIPES[name] for name in (INT8, MILDER)})

    def run(max_drop: float) -> Report:
        out = tmp_path / f"{max_drop}"
        return optimize.compile(
            str(tiny), data=str(some_text), max_drop=max_drop, min_speedup=0.0001, max_load=1, workload="1x8",
            budget="1s", cache=shared_cache, out=out,
        )  # fmt: skip

    accurate = run(0.5)
    assert [each.name for each in accurate.candidates] == [INT8]
    assert accurate.left_out == {MILDER: f"{INT8} is passed, not inaccurate"}
    assert accurate.candidates[0].accuracy is not None
    drop = accurate.candidates[0].accuracy.drop.value
    recovered = run(drop / 2)
    assert [each.name for each in recovered.candidates] == [INT8, MILDER]
    assert len(recovered.candidates[1].steps[-1].facts["kept"]) == 2
    assert recovered.candidates[1].accuracy is not None
    assert recovered.candidates[1].accuracy.drop.value < drop
    hopeless = run(drop / 20)
    assert hopeless.left_out == {MILDER: f"{INT8} drops by more than 10 times the gate"}
