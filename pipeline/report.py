"""The end of a run as a table: every recipe, what it cost, what it gained, and why it lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimize.pipeline.errors import ExitCode
from optimize.pipeline.manifest import Report
from optimize.pipeline.verdict import Candidate, Status

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {Status.PASSED: "green", Status.NOT_FASTER: "yellow", Status.INCONCLUSIVE: "yellow"}
OUTCOMES = {
    ExitCode.NOT_BUILT: "nothing could be built: every recipe failed",
    ExitCode.NOT_ACCURATE: "nothing is accurate enough",
    ExitCode.NOT_FASTER: "what is accurate is not faster than the gate demands",
    ExitCode.INCONCLUSIVE: "the noise on this host hides the difference: no verdict on speed",
}
NEXT = {
    ExitCode.NOT_BUILT: "each failure above names its log and the command that repeats the step alone",
    ExitCode.NOT_ACCURATE: "a looser --max-drop, other recipes (--recipe), or --data like your own text",
    ExitCode.NOT_FASTER: "another --workload, a looser --max-drop, or a lower --min-speedup",
    ExitCode.INCONCLUSIVE: "a larger --budget, a quieter host, or another --min-speedup",
}


def print_report(console: Console, report: Report, out: Path) -> None:
    """The table, the losers' reasons, and what to do with the winner, or next."""
    console.print(_table(report))
    for candidate in report.candidates:
        if candidate.reason:
            console.print(f"{candidate.name}: {candidate.reason}", markup=False, highlight=False, soft_wrap=True)
    for name, reason in report.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    console.print(f"time: {phases}", highlight=False)
    if report.emitted is None:
        code = ExitCode(report.exit_code)
        console.print(f"\nnothing emitted (exit code {code:d}): {OUTCOMES[code]}", style="bold red", highlight=False)
        console.print(f"what would help: {NEXT[code]}", highlight=False)
        return
    console.print(f"\nemitted [bold green]{report.emitted}[/] to {out}", highlight=False, soft_wrap=True)
    console.print(f"  use it:     import optimize; model = optimize.load({str(out)!r})", markup=False, soft_wrap=True)
    console.print(f"  without us: see {out}/README.md", markup=False, highlight=False, soft_wrap=True)
    console.print(f"  check it:   optimize verify {out}", markup=False, highlight=False, soft_wrap=True)


def _table(report: Report) -> object:
    from rich.box import SIMPLE
    from rich.table import Table

    gates = report.gates
    table = Table(
        box=SIMPLE, pad_edge=False, title_justify="left",
        caption=f"speedup over eager {report.checkpoint.dtype}, 99% intervals; gates: drop <= {gates.max_drop:g}, "
        f"speedup > {gates.min_speedup:g}", caption_justify="left",
    )  # fmt: skip
    table.add_column("recipe", no_wrap=True)
    for title in ("cosine", "worst", *map(str, report.workload)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("overall", justify="right", no_wrap=True)
    for title in ("mem\nMiB", "size\nMiB", "build\ns", "load\ns"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if report.baseline is not None:
        blanks = [""] * 2 + ["1"] * (len(report.workload) + 1)
        table.add_row("eager (baseline)", *blanks, _mib(report.baseline.peak_memory), "", "",
                      f"{report.baseline.load_seconds:.1f}", "")  # fmt: skip
    for candidate in sorted(report.candidates, key=_rank):
        style = "bold green" if candidate.name == report.emitted else STYLES.get(candidate.status, "red")
        verdict = "emitted" if candidate.name == report.emitted else str(candidate.status)
        table.add_row(candidate.name, *_cells(candidate, len(report.workload)), f"[{style}]{verdict}[/]")
    return table


def _rank(candidate: Candidate) -> tuple[int, float]:
    order = (Status.PASSED, Status.INCONCLUSIVE, Status.NOT_FASTER, Status.INACCURATE, Status.BROKEN, Status.NOT_BUILT)
    return order.index(candidate.status), -(candidate.speed.overall.low if candidate.speed else 0.0)


def _cells(candidate: Candidate, workload: int) -> list[str]:
    accuracy, speed = candidate.accuracy, candidate.speed
    return [
        "-" if accuracy is None else f"{1 - accuracy.drop.value:.5f}",
        "-" if accuracy is None else f"{1 - accuracy.worst_drop:.4f}",
        *(
            ["-"] * (workload + 1)
            if speed is None
            else [str(cell.speedup) for cell in speed.cells] + [str(speed.overall)]
        ),
        _mib(candidate.peak_memory),
        _mib(candidate.size),
        f"{candidate.build_seconds:.0f}" if candidate.steps else "-",
        "-" if candidate.load_seconds is None else f"{candidate.load_seconds:.1f}",
    ]


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"
