"""Peak memory of real steps in real workers: what streams stays small, and what is measured is what was predicted."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from optimize.models.checkpoint import resolve
from optimize.models.weights import INDEX, inspect_weights
from optimize.pipeline.contract import Cell, Kind
from optimize.pipeline.recipe import parse_pass
from optimize.pipeline.workers import WorkerProcess
from optimize.targets.cpu import probe
from optimize.targets.runtimes.memory import running_memory
from tests.conftest import Cli, MakeCheckpoint

STREAMING = ("cast-dtype", "cast-dtype{dtype=float32}", "convert-gguf", "convert-gguf{type=bf16}")
CELLS = [(1, 8, 2)]
MOST = 3  # times what was measured: what is predicted for less would refuse what fits


@pytest.fixture(scope="module")
def folders(make_language_model: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two layers of a tiny model, and six of one of 80 MB in three shards or more."""
    import transformers

    tiny, whole = (
        make_language_model(),
        make_language_model(hidden_size=512, intermediate_size=1792, num_hidden_layers=6, num_attention_heads=8),
    )
    sharded = tmp_path_factory.mktemp("memory") / "sharded"
    transformers.LlamaForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="30MB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (whole / name).is_file():
            shutil.copyfile(whole / name, sharded / name)
    return tiny, sharded


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(tmp_path_factory.mktemp("worker") / "build.log") as process:
        yield process


def build(worker: WorkerProcess, step: str, folder: Path, out: Path) -> int:
    """Build one step: the worker's peak in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    source = {"kind": "checkpoint", "path": str(folder), "key": "", "digest": ""}
    made = worker.ask(
        "build", limit=300, step=step, source=source, task="text-generation", target=asdict(probe()),
        calibration=None, out=str(out),
    )  # fmt: skip
    peak: int = made["peak_memory"]
    return peak


@pytest.mark.parametrize("step", STREAMING)
def test_a_step_that_streams_holds_less_than_a_shard(
    step: str, worker: WorkerProcess, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    tiny, sharded = folders
    shards = [(sharded / name).stat().st_size for name in inspect_weights(sharded).files]
    assert len(shards) >= 3 and sum(shards) > 80e6
    before = build(worker, step, tiny, tmp_path / "out")
    peak = build(worker, step, sharded, tmp_path / "out")
    assert peak - before < max(shards), f"{peak - before:,} bytes more than for a tiny model"
    predicted = parse_pass(step).memory(resolve(str(sharded)))
    assert peak <= predicted <= MOST * peak
    if step == "cast-dtype":
        assert (tmp_path / "out" / INDEX).is_file()
        name = "model.layers.5.mlp.up_proj.weight"
        file = next(path for path in sorted(sharded.glob("*.safetensors")) if name in load_file(path))
        assert (load_file(tmp_path / "out" / file.name)[name] == load_file(file)[name].bfloat16()).all()


@pytest.mark.parametrize("kind", [Kind.CHECKPOINT, Kind.GGUF])
def test_running_takes_what_is_predicted(
    kind: Kind, worker: WorkerProcess, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    _, sharded = folders
    checkpoint = resolve(str(sharded))
    rows = [{"text": f"The harbour lay still under number {index} of the old stones."} for index in range(200)]
    worker.ask(
        "prepare", limit=300, folder=str(sharded), evaluation=rows, calibration=[], cells=CELLS,
        max_length=checkpoint.max_length, out=str(tmp_path), task="text-generation",
    )  # fmt: skip
    artifact = sharded
    if kind is Kind.GGUF:
        artifact = tmp_path / "gguf"
        build(worker, "convert-gguf{type=bf16}", sharded, artifact)
        checkpoint = replace(checkpoint, weight_bytes=(artifact / "model.gguf").stat().st_size)
    with WorkerProcess(tmp_path / "run.log") as runner:
        runner.ask(
            "open", limit=300, kind=kind, path=str(artifact), task="text-generation", cores=2,
            cells=str(tmp_path / "cells.npz"), tokenizer=str(sharded),
        )  # fmt: skip
        runner.ask("score", limit=300, windows=str(tmp_path / "evaluation.npz"), reference=None,
                   out=str(tmp_path / "scores.npz"), folder=str(sharded))  # fmt: skip
        peak = runner.ask("memory", limit=300)
    assert peak <= running_memory(kind, checkpoint, [Cell(*cell) for cell in CELLS]) <= MOST * peak


def test_what_does_not_fit_ends_with_exit_code_2(tiny: Path, cli: Cli) -> None:
    refused = cli(tiny, "--dry-run", "--memory", "900MiB")
    assert refused.code == 2
    assert "needs about" in refused.output and "; 0.9 may be used" in refused.output
    assert "needs least: about" in refused.output
    for size, message in (("400MiB", "its float32 reference needs about"), ("900TiB", "is not a size"),
                          ("900000GiB", "more than this host has")):  # fmt: skip
        outcome = cli(tiny, "--dry-run", "--memory", size)
        assert outcome.code == 2 and message in outcome.output, outcome.output
    planned = cli(tiny, "--dry-run", "--memory", "2GiB")
    assert planned.code == 0 and "GiB to build" in planned.output
