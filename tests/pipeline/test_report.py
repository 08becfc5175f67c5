"""The table at the end of a run, of a report that was made up."""

import dataclasses
import io
from pathlib import Path

from rich.console import Console

from optimize.pipeline.gpus import GpuMemory
from optimize.pipeline.manifest import Manifest, Report
from optimize.pipeline.report import print_report


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
