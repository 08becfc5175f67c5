"""The emitted folder's README.md: what it is, how it was proved, and how to run it with its runtime alone."""

from __future__ import annotations

from optimize.pipeline.contract import DEFAULT, Kind
from optimize.pipeline.manifest import Report
from optimize.pipeline.measure import Speed
from optimize.pipeline.progress import accuracy_text
from optimize.pipeline.usage import install, usage
from optimize.pipeline.verdict import Candidate

WITH_RUNTIME = """With its runtime and transformers' {reader}, in this folder (`{install}`):

```python
{usage}```

Or with `import optimize; model = optimize.load(".")`, which drops into `transformers.pipeline`.
"""
WITH_TOOLCHAIN = """With its runtime and transformers' {reader}, in this folder and an environment of its own ({apart};
`{install}`):

```python
{usage}```
"""
WITH_OLLAMA = """With Ollama, in this folder (proved with version {version}; it gives no logits, so it was judged by
tokens). Once, which copies the weights into Ollama's own store:

    ollama create NAME -f Modelfile

Then `ollama run NAME`, or over HTTP:

```python
{usage}```

Or with `optimize serve .`, an OpenAI-compatible endpoint of a private server. `model.gguf` also runs in llama.cpp.
"""


def _table(speed: Speed) -> str:
    rows = [f"| {cell.cell} | {1e3 * cell.baseline_seconds:.2f} | {1e3 * cell.seconds:.2f} | {cell.speedup} |"
            for cell in speed.cells]  # fmt: skip
    return "\n".join(
        [f"| {speed.cells[0].cell.form.words} | eager, ms | this, ms | speedup |", "|---|---|---|---|", *rows]
    )


def _generation_table(speed: Speed) -> str:
    form = speed.cells[0].cell.form.words
    rows = [f"| {form} | to the first token, ms | speedup | tokens/s after it | speedup | all | ",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for cell in speed.cells:
        assert cell.first is not None and cell.rest is not None
        rows.append(
            f"| {cell.cell} | {1e3 * cell.first.seconds:.0f} | {cell.first.speedup} | {cell.tokens_per_second:.1f} "
            f"| {cell.rest.speedup} | {cell.speedup} |"
        )
    return "\n".join(rows)


def model_card(report: Report, winner: Candidate) -> str:
    """README.md, as Markdown."""
    assert winner.speed is not None
    checkpoint, host = report.checkpoint, report.host
    base = f"base_model: {checkpoint.model_id}\n" if checkpoint.revision else ""  # a folder's name is no hub id
    gpus = report.baseline.gpus if report.baseline else 1
    over = f", its layers over {gpus} GPUs," if gpus > 1 else ""
    revision = f" at `{checkpoint.revision}`" if checkpoint.revision else ""
    asked = report.evaluation.questions  # of a language model, which then has metrics on other data than the text
    accuracy = accuracy_text(winner) if asked is None else str(winner.accuracy)
    metrics = winner.accuracy.metrics if winner.accuracy and asked else ()
    answers = "".join(f"- {metric}, on {metric.examples} {metric.unit} of {asked}\n" for metric in metrics)
    weights = f" of {', '.join(cell.weighted for cell in report.workload)}" if _are_weighted(report) else ""
    cells = _generation_table(winner.speed) if winner.speed.cells[0].rest else _table(winner.speed)
    return f"""---
{base}pipeline_tag: {checkpoint.task}
---

# {checkpoint.model_id}, optimized for {host.target.name}

Made by `optimize` from `{checkpoint.model_id}`{revision} ({checkpoint.architecture}, {checkpoint.dtype}) with

    {winner.recipe}

## What was proved

On {host.target.device} ({host.target.cores} cores), {report.created}:

- {accuracy}, against the float32 model on {winner.accuracy.examples if winner.accuracy else 0} examples
  of {report.evaluation.source}; the gate was a drop of at most {report.gates.max_drop:g}.
{answers}- {winner.speed.overall} times the speed of the eager {checkpoint.dtype} model{over} (99% interval, geometric
  mean{weights}), measured while {winner.speed.noise or "nothing was noted"}; other work of up to
  {report.gates.max_load:.0%} was allowed:

{cells}

`optimize verify .` repeats these checks here. The inputs, the reference's outputs and every raw timing are in
`evidence/`; `optimize.json` has all of it in one schema.

## How to run it

{_how_to_run(report, winner)}"""


def _are_weighted(report: Report) -> bool:
    return any(cell.weight > 1 for cell in report.workload)


def _how_to_run(report: Report, winner: Candidate) -> str:
    form = WITH_OLLAMA if winner.kind is Kind.OLLAMA else WITH_RUNTIME
    if winner.kind.toolchain != DEFAULT:
        form = WITH_TOOLCHAIN
    asked = (report, winner.kind, winner.recipe)
    return form.format(
        install=install(*asked), usage=usage(*asked), version=report.host.packages.get("ollama", "unknown"),
        apart=_toolchain_text(report, winner.kind), reader=report.workload[0].form.reader,
    )  # fmt: skip


def _toolchain_text(report: Report, kind: Kind) -> str:
    found = report.host.toolchains.get(kind.toolchain)
    if found is None:
        return ""
    named = ", proved in one that its maker named" if found.named else ""
    return f"toolchain {kind.toolchain}, Python {found.python}{named}"
