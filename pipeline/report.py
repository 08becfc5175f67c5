"""The end of a run as a table: every recipe, what it cost, what it gained, and why it lost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optimize.pipeline.contract import DEFAULT, Cell, Form, Kind, Meaning
from optimize.pipeline.errors import ExitCode
from optimize.pipeline.language import LanguageAccuracy
from optimize.pipeline.manifest import Baseline, Report
from optimize.pipeline.scaling import Scaling
from optimize.pipeline.tokens import TokenAccuracy
from optimize.pipeline.verdict import Candidate, Status, pareto

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 180  # columns that the whole table takes
WIDE_TITLES = ("build\ns", "load\ns", "{rate}/s", "limit")
STYLES = {
    Status.PASSED: "green", Status.ARCHIVED: "yellow", Status.NOT_FASTER: "yellow", Status.INCONCLUSIVE: "yellow",
}  # fmt: skip
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
    ExitCode.INCONCLUSIVE: "a quieter host (or --max-load), a larger --budget, or another --min-speedup",
}


def print_report(console: Console, report: Report, out: Path) -> None:
    """The table, the losers' reasons, and what to do with the winner, or next."""
    console.print(_table(report, wide=console.width >= WIDE))
    for candidate in report.candidates:
        if candidate.reason:
            console.print(f"{candidate.name}: {candidate.reason}", markup=False, highlight=False, soft_wrap=True)
    for candidate in report.candidates:
        if candidate.scaling:
            words = _scaling_text(candidate.name, candidate.scaling, report.workload)
            console.print(words, markup=False, highlight=False, soft_wrap=True)
    metrics = [(each.name, metric) for each in report.candidates if each.accuracy for metric in each.accuracy.metrics]
    for name, metric in metrics:
        console.print(f"{name}: {metric}", markup=False, highlight=False, soft_wrap=True)
    if report.evaluation.questions:
        words = f"questions: {report.evaluation.questions}; perplexity and KL divergence: {report.evaluation.source}"
        console.print(words, markup=False, highlight=False, soft_wrap=True)
    if metrics:
        allowed, shown = report.gates.max_drop, report.emitted or metrics[0][0]
        gating = (metric for name, metric in metrics if name == shown and metric.gates)
        coarsest = max(gating, key=lambda each: each.needed(allowed))
        if unresolved := coarsest.what_it_leaves_open(allowed):
            console.print(unresolved, markup=False, highlight=False, soft_wrap=True)
    for name, reason in report.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    console.print(f"time: {phases}", highlight=False)
    if report.emitted is None:
        code = ExitCode(report.exit_code)
        outcome, help_ = OUTCOMES[code], NEXT[code]
        if code is ExitCode.NOT_ACCURATE and not any(each.status is Status.INACCURATE for each in report.candidates):
            outcome, help_ = "nothing that was built runs to its end", "the reasons above"
        if code is ExitCode.NOT_FASTER and any(each.status is Status.ARCHIVED for each in report.candidates):
            outcome, help_ = "what passes is made with what is not maintained any more", "--allow-archived"
        console.print(f"\nnothing emitted (exit code {code:d}): {outcome}", style="bold red", highlight=False)
        console.print(f"what would help: {help_}", highlight=False)
        return
    console.print(f"\nemitted [bold green]{report.emitted}[/] to {out}", highlight=False, soft_wrap=True)
    kind = next(each.kind for each in report.candidates if each.name == report.emitted)
    use = f"import optimize; model = optimize.load({str(out)!r})"
    if kind is Kind.OLLAMA:
        use = f"optimize serve {shlex.quote(str(out))}"
    elif kind.toolchain != DEFAULT:
        use = f"in its own environment, toolchain {kind.toolchain}: see {out}/README.md"
    console.print(f"  use it:     {use}", markup=False, soft_wrap=True)
    console.print(f"  without us: see {out}/README.md", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"  check it:   optimize verify {shlex.quote(str(out))}", markup=False, highlight=False, soft_wrap=True
    )


def _table(report: Report, *, wide: bool) -> object:
    """The table; on a narrow terminal without every cell's interval, and without what matters least."""
    from rich.box import SIMPLE
    from rich.table import Table

    gates = report.gates
    table = Table(
        box=SIMPLE, pad_edge=False, title_justify="left",
        caption=f"speedup over eager {report.checkpoint.dtype}, 99% intervals; gates: drop <= {gates.max_drop:g}, "
        f"speedup > {gates.min_speedup:g}; best {report.objective} is emitted\n"
        "*: no other that passed is better in latency, throughput, memory or size without being worse in another"
        + _remarks(report, wide=wide),
        caption_justify="left",
    )  # fmt: skip
    workload = report.workload if wide or len(report.workload) > 1 else ()
    named = ("ppl", "KL") if report.evaluation.meaning is Meaning.NEXT else ("cosine", "worst")
    gpu = ["GPU\nMiB"] if report.host.target.gpus else []
    titles = [
        named[0],
        *([named[1]] if wide else []),
        *(cell.weighted for cell in workload),
        "overall",
        *gpu,
        "mem\nMiB",
        "size\nMiB",
    ]
    table.add_column("recipe", no_wrap=True)
    rate = "images" if report.workload[0].form is Form.IMAGES else "tokens"
    for title in (*titles, *(WIDE_TITLES if wide else [])):
        table.add_column(title.format(rate=rate), justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    if report.baseline is not None:
        side = report.baseline
        more = ["", f"{side.load_seconds:.1f}", *_limits(side, report.workload)]
        held = [_mib(side.gpu_memory.most if side.gpu_memory else None)] if gpu else []
        costs = [*held, _mib(side.peak_memory), "", *(more if wide else [])]
        blanks = ["", *([""] if wide else []), *["1"] * (len(workload) + 1)]
        table.add_row("eager (baseline)", *blanks, *costs, "")
    best = pareto(report.candidates)
    for candidate in sorted(report.candidates, key=_rank):
        style = "bold green" if candidate.name == report.emitted else STYLES.get(candidate.status, "red")
        verdict = "emitted" if candidate.name == report.emitted else str(candidate.status)
        verdict += " *" if candidate.name in best else ""
        table.add_row(candidate.name, *_cells(candidate, report, len(workload), wide), f"[{style}]{verdict}[/]")
    return table


def _remarks(report: Report, *, wide: bool) -> str:
    """Lines below the table, of what it has marks or columns for."""
    sides = [each for each in (report.baseline, *report.candidates) if each is not None and each.roofs]
    shown = [each.roofs[_most(report.workload)] for each in sides]
    lines = []
    if any(each.speed is not None and each.speed.busy for each in report.candidates):
        lines.append("?: measured on a busy host: it holds for no other")
    if wide and report.peaks:
        told = "limit: of the largest cell, and how much of its time it explains"
        lines.append(f"this host's peaks: {report.peaks}; {told}")
        if any(roof.share > 1 for roof in shown):
            lines.append("above 100%: peaks of a busier host, or a runtime that multiplies faster than torch")
    return "".join(f"\n{line}" for line in lines)


def _rank(candidate: Candidate) -> tuple[int, float]:
    order = (Status.PASSED, Status.ARCHIVED, Status.INCONCLUSIVE, Status.NOT_FASTER, Status.INACCURATE, Status.BROKEN,
             Status.NOT_BUILT)  # fmt: skip
    return order.index(candidate.status), -(candidate.speed.overall.low if candidate.speed else 0.0)


def _cells(candidate: Candidate, report: Report, workload: int, wide: bool) -> list[str]:
    accuracy, speed, held = candidate.accuracy, candidate.speed, candidate.gpu_memory
    near, far = "-", "-"
    if isinstance(accuracy, LanguageAccuracy):
        near, far = f"{accuracy.drop.value:+.2%}", f"{accuracy.divergence:.2g}"
    elif isinstance(accuracy, TokenAccuracy):
        near, far = f"{accuracy.drop.value:+.2%} by tokens", "-"
    elif accuracy is not None:
        near, far = f"{1 - accuracy.drop.value:.5f}", f"{1 - accuracy.worst_drop:.4f}"
    if speed is None:
        speeds = ["-"] * (workload + 1)
    else:
        ratios = [cell.speedup for cell in speed.cells[:workload]]
        speeds = [*(str(ratio) if wide else f"{ratio.value:.2f}" for ratio in ratios), str(speed.overall)]
        if speed.busy:
            speeds = [f"? {text}" for text in speeds]
    build = f"{candidate.build_seconds:.0f}" if candidate.steps else "-"
    load = "-" if candidate.load_seconds is None else f"{candidate.load_seconds:.1f}"
    costs = [
        *([_mib(held.most if held else None)] if report.host.target.gpus else []),
        _mib(candidate.peak_memory),
        _mib(candidate.size),
        *([build, load, *_limits(candidate, report.workload)] if wide else []),
    ]
    return [near, *([far] if wide else []), *speeds, *costs]


def _scaling_text(name: str, found: Scaling, workload: Sequence[Cell]) -> str:
    cells = ", ".join(f"{interval} at {cell}" for cell, interval in zip(workload, found.cells, strict=True))
    return (
        f"{name}: scaling efficiency on {found.gpus} GPUs {found.overall} ({cells}): "
        f"its speedup over {found.against}, divided by {found.gpus}"
    )


def _limits(side: Candidate | Baseline, cells: Sequence[Cell]) -> list[str]:
    """Throughput at saturation, and what limits the cell with the most tokens."""
    most = _most(cells)
    throughput = f"{side.throughput.tokens_per_second:,.0f}" if side.throughput else "-"
    return [throughput, str(side.roofs[most]) if side.roofs else "-"]


def _most(cells: Sequence[Cell]) -> int:
    """Which cell has the most tokens."""
    return max(range(len(cells)), key=lambda index: cells[index].tokens)


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"
