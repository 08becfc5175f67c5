"""The command line. Importing this imports no ML framework: `optimize --help` answers in a blink."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click
from click_default_group import DefaultGroup

from optimize.pipeline import terminal
from optimize.pipeline.contract import DEFAULT
from optimize.pipeline.errors import ExitCode, RequestError
from optimize.pipeline.toolchain_cli import confirm_install, toolchain_group

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)


@click.group(cls=DefaultGroup, default="compile", default_if_no_args=False, context_settings={"max_content_width": 110})
@click.version_option(package_name="optimize")
def main_group() -> None:
    """Lower a Hugging Face checkpoint for a target, and emit only what is proved right and faster.

    `optimize MODEL` is short for `optimize compile MODEL`. Exit codes: 0 emitted, 2 refused, 3 nothing built,
    4 not accurate, 5 not faster, 6 inconclusive, 1 a bug, 130 interrupted.
    """


@main_group.command("compile")
@click.argument("model")
@click.option("--target", help="Where the artifact will run: cpu, gpu, multi-gpu. [default: cpu]")
@click.option("--task", help="What the checkpoint is for. [default: inferred from it]")
@click.option("--data", metavar="FILE", help="Your own data: .jsonl, .csv, .parquet, images by class, NAME:SPLIT.")
@click.option("--out", type=click.Path(path_type=Path), help="The emitted folder. [default: ./MODEL-TARGET]")
@click.option("--recipe", "recipes", multiple=True, metavar="NAME|TEXT", help="Only this recipe; may be repeated.")
@click.option("--max-drop", type=float, help="What may be lost. [default: 0.001 of fidelity, 1% of perplexity]")
@click.option("--min-speedup", type=float, default=1.05, show_default=True, help="What the speedup must be above.")
@click.option(
    "--max-load",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of the host that other work may take meanwhile.",
)
@click.option(
    "--workload",
    help="Cells: batch x tokens, batch x prompt+new, images, clips+new; *N to weigh one. [default: the task's]",
)
@click.option(
    "--budget", help="Time for measuring all candidates together. [default: 3m; for generation 10m, speech 5m]"
)
@click.option(
    "--objective", default="latency", show_default=True, help="Emit the best at: latency, throughput, memory, size."
)
@click.option("--memory", metavar="SIZE", help="What may be used, such as 6GiB (or 6). [default: what the host has]")
@click.option("--yes", is_flag=True, help="Install the toolchains that the given recipes need. [default: ask]")
@click.option("--allow-archived", is_flag=True, help="Emit also what is made with unmaintained software (IPEX).")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the report here too.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Store, runs. [default: $OPTIMIZE_CACHE, ~/.cache/optimize]"
)
@click.option("--verbose", is_flag=True, help="Say more of what goes on.")
def compile_command(dry_run: bool, json_file: Path | None, verbose: bool, **options: Any) -> int:
    """Lower MODEL (a local folder, or a hub id with an optional @revision) and emit what passes the gates.

    --data has a column `text`, or those that the task is labelled with, which its own metrics are then judged on: for a
    classifier `text` and `label`; for a language model `question`, `choices` and `answer`, or `question` and `target`.
    docs/support.md lists them all.
    """
    from optimize.pipeline.driver import Request, cache_folder
    from optimize.pipeline.progress import Lines, Live, NoteHandler

    console = terminal.console()
    logging.getLogger("optimize").addHandler(NoteHandler(Lines(console)))
    logging.getLogger("optimize").setLevel(logging.DEBUG if verbose else logging.WARNING)
    terminal.check_apart(json_file, *(Path(each) for each in (options["model"], options["data"]) if each))
    with terminal.errors_to(json_file):
        store = cache_folder(options["cache"]) / "store"
    terminal.check_outside(json_file, options["out"], store)
    with terminal.errors_to(json_file):
        if not dry_run:
            terminal.check_writable(json_file)
        ask = console.is_terminal and sys.stdin.isatty() and not dry_run
        planned = Request(**options).plan(confirm_install if ask else lambda _: False, install=not dry_run)
    terminal.check_outside(json_file, planned.out, store)
    with terminal.errors_to(json_file):
        if dry_run:
            console.print(planned.plan.describe(planned.store), markup=False, highlight=False, soft_wrap=True)
            return ExitCode.EMITTED
        report = planned.run(Live(console) if console.is_terminal and not verbose else Lines(console), json_file)
    from optimize.pipeline.report import print_report

    print_report(console, report, planned.out)
    terminal.write_result(json_file, type(report), report)
    return report.exit_code


@main_group.command()
@click.argument("folder", type=FOLDER)
@click.option("--budget", default="30s", show_default=True, help="Time for measuring.")
@click.option(
    "--max-load", type=click.FloatRange(0, 1), help="As for `optimize MODEL`. [default: what the folder states]"
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the result here too.")
def verify(folder: Path, budget: str, max_load: float | None, json_file: Path | None) -> int:
    """Check an emitted FOLDER: its digests, then the gates again in a clean process on this host."""
    from optimize.pipeline.driver import parse_budget
    from optimize.pipeline.verify import verify_folder

    terminal.check_apart(json_file, folder)
    with terminal.errors_to(json_file):
        terminal.check_writable(json_file)
        result = verify_folder(folder, parse_budget(budget), max_load)
    terminal.say(result.describe())
    terminal.write_result(json_file, type(result), result)
    return result.exit_code


@main_group.command()
@click.argument("folder", type=FOLDER)
@click.option("--candidate", metavar="NAME", help="Which one. [default: the first that was rejected for its outputs]")
@click.option("--cache", type=click.Path(path_type=Path), help="Where its artifacts are. [default: the run's own]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the result here too.")
def explain(folder: Path, candidate: str | None, cache: Path | None, json_file: Path | None) -> int:
    """Find the pass, then the layer, at which a candidate's outputs leave the reference.

    FOLDER is a run's folder (the run names it when it rejects a candidate) or an emitted one.
    """
    from optimize.pipeline.explain import Explanation
    from optimize.pipeline.explain import explain as explain_run

    terminal.check_apart(json_file, folder)
    with terminal.errors_to(json_file):
        terminal.check_writable(json_file)
        found = explain_run(folder, candidate, cache)
    terminal.say(found.describe())
    terminal.write_result(json_file, Explanation, found)
    return ExitCode.EMITTED


@main_group.command("run")
@click.argument("folder", type=FOLDER)
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--sample", is_flag=True, help="Draw tokens as the checkpoint says. [default: the likeliest]")
@click.option("--raw", is_flag=True, help="Continue PROMPT itself, without the chat template.")
def run_command(folder: Path, prompt: str, max_new_tokens: int, sample: bool, raw: bool) -> int:
    """Generate text with an emitted language model in FOLDER, token by token."""
    from optimize.pipeline.use import stream

    with terminal.ends_quietly():
        stream(folder, prompt, max_new_tokens, sample=sample, raw=raw)
    return ExitCode.EMITTED


@main_group.command()
@click.argument("folder", type=FOLDER)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
def serve(folder: Path, host: str, port: int) -> int:
    """Start the server that an emitted language model's own runtime has: an OpenAI-compatible endpoint."""
    from optimize.pipeline.use import start_server

    with terminal.ends_quietly():
        start_server(folder, host, port)
    return ExitCode.EMITTED


@main_group.command()
def passes() -> int:
    """List the passes: what each reads, makes, and takes as options."""
    from optimize.pipeline.recipe import option_text, pass_class, pass_names

    table = terminal.table("pass", "reads", "makes", "options (defaults)", "what it does")
    for name in pass_names():
        cls = pass_class(name)
        options = ", ".join(f"{field.name}={option_text(field.default)}" for field in dataclasses.fields(cls))
        table.add_row(name, cls.accepts, cls.produces, options, (cls.__doc__ or "").strip().splitlines()[0])
    terminal.console().print(table)
    return ExitCode.EMITTED


@main_group.command()
def targets() -> int:
    """List the targets of this version, and what this host is."""
    from optimize.pipeline.driver import find_target, target_names

    table = terminal.table("target", "device", "cores", "memory", "dtypes", "features")
    for name in target_names():
        try:
            target, _ = find_target(name)
        except RequestError as error:
            table.add_row(name, f"not here: {error.message}", "", "", "", "")
            continue
        memory = f"{target.memory / 2**30:.0f} GiB"
        table.add_row(
            name, target.device, str(target.cores), memory, ", ".join(target.dtypes), ", ".join(target.features)
        )
    terminal.console().print(table)
    return ExitCode.EMITTED


@main_group.group()
def cache() -> None:
    """Look after the store of artifacts."""


CACHE = click.option("--cache", "cache_path", type=click.Path(path_type=Path), help="As for `optimize MODEL`.")


@cache.command("list")
@CACHE
def cache_list(cache_path: Path | None) -> int:
    """List the artifacts in the store."""
    from optimize.pipeline.store import Damage

    store = _store(cache_path)
    table = terminal.table("key", "kind", "MiB", "built in", "recipe")
    for key in store.keys():  # noqa: SIM118 (not a dict)
        entry = store.describe(key)
        if isinstance(entry, Damage):
            table.add_row(key[:10], "damaged", "", "", entry.reason)
        else:
            size, seconds = f"{entry.size / 2**20:.1f}", f"{entry.step.seconds:.1f} s"
            table.add_row(key[:10], entry.artifact.kind, size, seconds, entry.text)
    terminal.console().print(table)
    terminal.say(f"{len(store.keys())} artifacts in {store.root}")
    return ExitCode.EMITTED


@cache.command("verify")
@CACHE
def cache_verify(cache_path: Path | None) -> int:
    """Check every byte of every artifact in the store."""
    from optimize.pipeline.store import Damage

    store = _store(cache_path)
    damaged = [found for found in map(store.get, store.keys()) if isinstance(found, Damage)]
    for damage in damaged:
        terminal.say(f"damaged: {damage.key[:10]}: {damage.reason}")
    terminal.say(f"{len(store.keys())} artifacts, {len(damaged)} damaged (a run rebuilds them)")
    return ExitCode.BUG if damaged else ExitCode.EMITTED


@cache.command("prune")
@CACHE
@click.option("--days", type=click.IntRange(min=0), default=30, show_default=True, help="Keep what was used since.")
def cache_prune(cache_path: Path | None, days: int) -> int:
    """Remove old artifacts and runs, damaged artifacts, and what killed runs left behind."""
    from optimize.pipeline.driver import cache_folder, prune

    artifacts, runs = prune(cache_folder(cache_path), days)
    terminal.say(f"removed {artifacts} artifacts and {runs} runs")
    return ExitCode.EMITTED


@main_group.command()
@click.option("--self-test", is_flag=True, help="Measure known differences: what can this host tell apart?")
@click.option("--budget", default="15s", show_default=True, help="Time for each of the self-test's two measurements.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the self-test here too."
)
@CACHE
def doctor(self_test: bool, budget: str, json_file: Path | None, cache_path: Path | None) -> int:
    """Say what this host has of what the passes and runtimes need; with --self-test, what it can measure."""
    if self_test:
        return _self_test(budget, json_file)
    if json_file is not None:
        raise RequestError("--json is for the self-test's result", hint="add --self-test")
    from optimize.pipeline.doctor import findings, peaks
    from optimize.pipeline.driver import cache_folder

    table = terminal.table("what", "found", "what it means")
    cache = cache_folder(cache_path)
    rows = [*findings(cache), peaks(cache)]
    for row in rows:
        table.add_row(row.what, ("" if row.good else "[red]") + row.found, row.meaning)
    terminal.console().print(table)
    return ExitCode.EMITTED if all(row.good for row in rows) else ExitCode.BUG


def _self_test(budget: str, json_file: Path | None) -> int:
    from optimize.pipeline.driver import parse_budget
    from optimize.pipeline.selftest import SelfTest, self_test

    with terminal.errors_to(json_file):
        terminal.check_writable(json_file)
        result = self_test(parse_budget(budget))
    terminal.say(result.describe())
    terminal.write_result(json_file, SelfTest, result)
    return result.exit_code


@main_group.command()
@click.argument("request", type=click.Path(path_type=Path, dir_okay=False, exists=True))
def repeat(request: Path) -> int:
    """Repeat one failed build step from the REQUEST file that its error named, with its log on the screen."""
    from optimize.pipeline.worker import Worker

    try:
        arguments = json.loads(request.read_text())
        toolchain = arguments.pop("toolchain")
        inspect.signature(Worker.build).bind(None, **arguments, out="")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError(
            f"{request} is not a step's request: {error}", hint="give the file that the error named"
        ) from None
    out = tempfile.mkdtemp(prefix="optimize-repeat-")
    try:
        if toolchain == DEFAULT:
            facts = Worker().build(**arguments, out=out)
        else:
            facts = _repeat_apart(toolchain, request, arguments | {"out": out})
    finally:
        with suppress(OSError):
            Path(out).rmdir()  # where nothing was built
    terminal.say(f"built into {out}: {facts}")
    return ExitCode.EMITTED


def _repeat_apart(toolchain: str, request: Path, arguments: dict[str, Any]) -> Any:
    from optimize.pipeline.driver import cache_folder
    from optimize.pipeline.toolchains import Toolchains
    from optimize.pipeline.workers import STEP_LIMIT, WorkerProcess

    run = request.resolve().parents[1]  # RUN/steps/REQUEST
    cache = run.parents[1] if run.parent.name == "runs" else cache_folder(None)
    environment = Toolchains(cache).find(toolchain)
    with tempfile.TemporaryDirectory() as scratch, WorkerProcess(Path(scratch) / "log", environment) as worker:
        try:
            return worker.ask("build", limit=STEP_LIMIT, **arguments)
        finally:
            terminal.say(worker.log.read_text(errors="replace"))


main_group.add_command(toolchain_group)


def main() -> NoReturn:
    """The console script."""
    terminal.exit_with(lambda: main_group.main(standalone_mode=False))


def _store(cache_path: Path | None) -> Any:
    from optimize.pipeline.driver import cache_folder
    from optimize.pipeline.store import Store

    return Store(cache_folder(cache_path) / "store")


if __name__ == "__main__":
    main()
