"""The table at the end of a run, of a report that was made up."""

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.manifest import Manifest, Report
from optimize.pipeline.report import print_report
from optimize.pipeline.roofline import Limit, Peaks, Roof
from optimize.pipeline.scaling import Scaling
from optimize.pipeline.statistics import Interval


def printed(report: Report) -> str:
    """What a wide terminal shows."""
    console = Console(file=io.StringIO(), width=200)
    print_report(console, report, Path("out"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_gpu_memory_has_a_column_where_there_is_a_gpu(manifest: Manifest) -> None:
    report = manifest.report
    assert "GPU" not in printed(report)
    target = dataclasses.replace(report.host.target, gpus=1)
    assert report.baseline is not None
    text = printed(
        dataclasses.replace(
            report,
            host=dataclasses.replace(report.host, target=target),
            baseline=dataclasses.replace(report.baseline, gpu_memory=GpuMemory(777 << 20)),
        )
    )
    (baseline,) = (line for line in text.splitlines() if "eager (baseline)" in line)
    (winner,) = (line for line in text.splitlines() if "onnx-int8-dynamic  " in line)
    assert "GPU" in text and " 777 " in baseline and " 3072 " in winner


def test_what_several_gpus_bring_is_said(manifest: Manifest) -> None:
    report = manifest.report
    winner, lost = report.candidates
    found = Scaling("alone", 2, Interval(0.9, 0.8, 1.0), (Interval(0.7, 0.6, 0.8), Interval(1.1, 1.0, 1.2)))
    text = printed(dataclasses.replace(report, candidates=(dataclasses.replace(winner, scaling=found), lost)))
    assert (
        "onnx-int8-dynamic: scaling efficiency on 2 GPUs 0.90 [0.80, 1.00] (0.70 [0.60, 0.80] at 1x32, "
        "1.10 [1.00, 1.20] at 8x128): its speedup over alone, divided by 2"
    ) in text


def test_what_was_timed_on_a_busy_host_is_marked(manifest: Manifest) -> None:
    report = manifest.report
    winner, lost = report.candidates
    assert winner.speed is not None and "busy host" not in printed(report)
    hurried = dataclasses.replace(winner, speed=dataclasses.replace(winner.speed, busy=True))
    text = printed(dataclasses.replace(report, candidates=(hurried, lost)))
    (line,) = (line for line in text.splitlines() if f"{winner.name}  " in line)
    assert f"? {winner.speed.overall}" in line and "?: measured on a busy host" in text


def test_shares_above_all_of_a_peak_are_explained(manifest: Manifest) -> None:
    report = manifest.report
    (winner, lost), peaks = report.candidates, Peaks({"float32": 1e11}, 1e10)
    roofed = [
        dataclasses.replace(report, peaks=peaks, candidates=(
            dataclasses.replace(winner, roofs=2 * (Roof(1.0, share, Limit.MEMORY),)), lost,
        ))
        for share in (0.9, 1.1)
    ]  # fmt: skip
    assert ["above 100%:" in printed(each) for each in roofed] == [False, True]
