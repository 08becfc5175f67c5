"""The roofline: what limits a call, what is counted, and what is remembered of a host."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from optimize.pipeline.contract import Cell, Kind
from optimize.pipeline.noise import NoiseMeter
from optimize.pipeline.prepare import find_peaks
from optimize.pipeline.recipe import parse
from optimize.pipeline.report import _limits
from optimize.pipeline.roofline import Limit, Peaks, Work, known_peaks, measure_peaks, roof, roofs
from optimize.pipeline.verdict import Candidate, Status
from optimize.targets import cpu
from optimize.targets.cpu import probe

PEAKS = Peaks({"float32": 100e9, "bfloat16": 200e9}, 10e9)


@pytest.mark.parametrize(
    ("work", "measured", "arithmetic", "limit", "share"),
    [
        (Work(10**9, 10**6, 0), 0.0125, "float32", Limit.ARITHMETIC, 0.8),  # 10 ms of arithmetic, 0.4 of reading
        (Work(10**9, 10**6, 0), 0.0125, "bfloat16", Limit.OVERHEAD, 0.4),
        (Work(10**7, 25 * 10**6, 0), 0.0125, "float32", Limit.MEMORY, 0.8),  # 100 MB in 10 ms
        (Work(10**7, 25 * 10**6, 0), 0.0125, "bfloat16", Limit.OVERHEAD, 0.4),  # read in two bytes each
        (Work(10**7, 0, 10**8), 0.0125, "float32", Limit.MEMORY, 0.8),  # a vocabulary's worth of outputs
        (Work(10**9, 10**6, 0), 0.1, "float32", Limit.OVERHEAD, 0.1),
    ],
)
def test_a_call_is_limited_by_the_larger_of_the_two_or_by_neither(
    work: Work, measured: float, arithmetic: str, limit: Limit, share: float
) -> None:
    found = roof(work, measured, arithmetic, 4.0, PEAKS)
    assert found.limit is limit
    assert found.share == pytest.approx(share)
    assert found.seconds == pytest.approx(share * measured)


def test_weights_that_are_stored_smaller_are_read_faster() -> None:
    work = Work(1, 10**9, 0)
    assert roof(work, 1.0, "float32", 1.0, PEAKS).seconds == pytest.approx(0.1)
    assert roof(work, 1.0, "float32", 4.3, PEAKS).seconds == pytest.approx(0.4)  # tables that are only looked up in


def test_there_is_no_roof_without_a_peak() -> None:
    assert roofs([Work(1, 1, 1)], [1.0], "int8", 1.0, PEAKS) == ()
    assert roofs([Work(1, 1, 1)], [1.0], "float32", 1.0, None) == ()


def test_the_best_that_was_seen_is_remembered_for_each_host(tmp_path: Path) -> None:
    target = probe()
    other = dataclasses.replace(target, cores=target.cores + 1)
    assert known_peaks(tmp_path, target) is None
    measure_peaks(tmp_path, target, lambda: {"operations": {"float32": 5.0, "int8": 1.0}, "bandwidth": 3.0})
    found = measure_peaks(tmp_path, target, lambda: {"operations": {"float32": 4.0, "int8": 2.0}, "bandwidth": 7.0})
    assert found == known_peaks(tmp_path, target) == Peaks({"float32": 5.0, "int8": 2.0}, 7.0)
    assert known_peaks(tmp_path, other) is None
    assert known_peaks(tmp_path, dataclasses.replace(target, gpu_used=1 << 30)) == found
    low = {"operations": {"float32": 9.0, "int8": 1.0}, "bandwidth": 3.0}
    busy = measure_peaks(tmp_path, target, lambda: low, disturbed=lambda: True)
    assert busy == Peaks({"float32": 9.0, "int8": 2.0}, 7.0) and known_peaks(tmp_path, target) == found
    for path in (tmp_path / "peaks").iterdir():
        path.write_text("{}")
    assert known_peaks(tmp_path, target) is None


@pytest.mark.parametrize(("others", "kept"), [(0.01, True), (0.4, False)])
def test_what_is_measured_beside_others_is_not_kept(
    others: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, worker = probe(), Mock(pid=os.getpid())
    worker.ask.return_value = {"operations": {"float32": 5.0}, "bandwidth": 3.0}
    builder = Mock(folder=tmp_path / "runs" / "a", target=target)
    builder.worker.return_value = worker
    monkeypatch.setattr(NoiseMeter, "shares", lambda self: (others, 0.0))
    assert find_peaks(builder) == Peaks({"float32": 5.0}, 3.0)
    assert (known_peaks(tmp_path, target) is not None) is kept
    said = [call.args[0] for call in builder.progress.note.call_args_list]
    assert not said if kept else "other processes took 40% of the processors" in said[0]


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        ("checkpoint", "bfloat16"),
        ("cast-dtype,compile-aoti", "bfloat16"),
        ("compile-aoti", "bfloat16"),
        ("convert-openvino", "float32"),
        ("convert-openvino,hint-openvino", "bfloat16"),
        ("convert-openvino,quantize-openvino", "int8"),
        ("convert-openvino,quantize-openvino{mode=weights}", "int8"),
        ("export-onnx,quantize-onnx", "int8"),
        ("cast-dtype,quantize-llm-compressor{mode=int8},serve-vllm", "int8"),
        ("cast-dtype,quantize-llm-compressor{mode=int4},serve-vllm{dtype=float16}", "float16"),
    ],
)
def test_a_recipe_knows_what_it_computes_in(recipe: str, dtype: str) -> None:
    assert parse(recipe).arithmetic("bfloat16") == dtype


def test_the_operations_of_a_known_model_are_counted(tiny: Path) -> None:
    from optimize.targets.runtimes.eager import open_session

    session = open_session(tiny, "feature-extraction", 2)
    batch, tokens, hidden, inner, layers = 3, 16, 64, 128, 2
    ids = np.ones((batch, tokens), dtype=np.int64)
    found = session.work({"input_ids": ids, "attention_mask": ids})
    weights = layers * (4 * hidden * hidden + 2 * hidden * inner)
    products = 2 * batch * tokens * weights
    attention = layers * 2 * 2 * batch * tokens * tokens * hidden
    pooler = hidden * hidden
    assert found["weights"] == weights + pooler
    assert found["operations"] == products + attention + 2 * batch * pooler
    assert found["arrays"] == 2 * ids.nbytes + 4 * batch * (tokens + 1) * hidden


def test_the_table_shows_the_cell_with_the_most_tokens() -> None:
    few, many = (roof(Work(10**9, 0, 0), seconds, "float32", 4.0, PEAKS) for seconds in (1.0, 0.0125))
    candidate = Candidate("x", "export-onnx", Kind.ONNX, Status.PASSED, roofs=(few, many))
    assert _limits(candidate, [Cell(1, 32), Cell(8, 128)]) == ["-", "arithmetic 80%"]


def test_this_hosts_peaks_are_numbers() -> None:
    found = cpu.peaks(probe())
    assert set(found["operations"]) == {*probe().dtypes, "int8"}
    assert all(1e8 < peak < 1e16 for peak in found["operations"].values())
    assert 1e8 < found["bandwidth"] < 1e14


def test_each_dtypes_product_is_called_and_its_operations_counted() -> None:
    def one_second(call: Callable[[], Any]) -> float:
        call()
        return 1.0

    dtypes = ("float32", "float8_e4m3fn", "int8")  # processors take minutes for a large product of float8
    found = cpu.reached(dtypes, 64, 1 << 12, "cpu", one_second)
    assert found == {"operations": dict.fromkeys(dtypes, 2 * 64**3), "bandwidth": 1 << 12}
