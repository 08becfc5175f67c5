"""Kills, hangs, noise and full disks: every failure is loud, has its exit code, and leaves the store valid."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import psutil
import pytest

from optimize.pipeline.errors import ArtifactError, RequestError
from optimize.pipeline.explain import explain
from optimize.pipeline.findings import GOING_ON
from optimize.pipeline.manifest import schema
from optimize.pipeline.store import Damage, Store
from optimize.pipeline.verify import verify_folder
from tests.conftest import QUICK, Cli, Install

FAULTS = """
@dataclass(frozen=True)
class Fault(Base):
    name: ClassVar = "fault"
    how: Literal["raise", "die", "hang", "fill", "empty", "nan"] = "raise"

    def run(self, source, context, out):
        print("about to", self.how)
        if self.how == "raise":
            raise ValueError("the compiler says no")
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "hang":
            time.sleep(600)
        if self.how == "fill":
            with open(out / "big", "wb") as file:
                while True:
                    file.write(bytes(1 << 20))
        if self.how == "nan":
            import torch, shutil
            from safetensors.torch import load_file, save_file
            shutil.copytree(source.path, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
            tensors = load_file(out / "model.safetensors")
            tensors["encoder.layer.0.output.dense.bias"][3] = float("nan")
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return {}

    def ensures(self, out):
        if self.how == "empty":
            raise FileNotFoundError("nothing was written")
"""


# in every worker, before anything else runs there: the eager model is short of a GPU's memory where CONDITION says so
RUNS_OUT = """
import sys

if "optimize.pipeline.worker" in sys.orig_argv:
    import torch
    from optimize.targets.runtimes.eager import EagerSession as Eager

    def run(self, batch, run=Eager.run):
        if CONDITION:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which "
                "3.25 GiB is free. Including non-PyTorch memory, this process has 75.9 GiB memory in use."
            )
        return run(self, batch)

    Eager.run = run
"""


@pytest.fixture
def run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have workers run out of a GPU's memory where a condition on `self` and `batch` holds."""

    def when(condition: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(RUNS_OUT.replace("CONDITION", condition))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return when


def test_failing_steps_are_named_and_cost_only_themselves(
    tiny: Path, cli: Cli, third_party: Install, tmp_path: Path
) -> None:
    third_party(FAULTS, {"fault": "Fault"})
    faults = [word for how in ("raise", "die", "hang", "empty", "nan") for word in ("--recipe", f"fault{{how={how}}}")]
    outcome = cli(
        tiny, *faults, "--recipe", "convert-openvino", *QUICK, "--out", tmp_path / "out",
        env={"OPTIMIZE_STEP_LIMIT": "30"},
    )  # fmt: skip
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    found = [candidate["status"] for candidate in outcome.report["candidates"]]
    assert found == ["not built"] * 4 + ["inaccurate", "passed"]
    for words in (
        "the compiler says no", "optimize repeat", "about to raise",
        "was killed by SIGSEGV during build",
        "took longer than its limit of 30 s",
        "nothing was written",
        "last_hidden_state has", "NaN or infinite",
    ):  # fmt: skip
        assert words in outcome.output


def test_nothing_built_exits_with_3_and_repeat_shows_the_failure(
    tiny: Path, cli: Cli, third_party: Install, tmp_path: Path
) -> None:
    third_party(FAULTS, {"fault": "Fault"})
    outcome = cli(tiny, "--recipe", "fault", *QUICK, "--out", tmp_path / "out")
    assert outcome.code == 3
    assert not (tmp_path / "out").exists()
    command = outcome.output.split("optimize repeat ")[1].split()[0]
    process = subprocess.run(
        [sys.executable, "-m", "optimize.pipeline.cli", "repeat", command], capture_output=True, text=True, check=False
    )
    assert "ValueError: the compiler says no" in process.stderr
    assert process.returncode == 1


def test_what_is_not_fast_enough_exits_with_5(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    slow = cli(tiny, "--recipe", "checkpoint", *QUICK, "--min-speedup", "50", "--out", tmp_path / "out")
    assert slow.code == 5, slow.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_and_leaves_a_valid_store(
    tiny: Path, cli: Cli, third_party: Install, tmp_path: Path
) -> None:
    third_party(FAULTS, {"fault": "Fault"})
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", small], check=False).returncode == 0
    if not mounted:
        pytest.skip("this host lets nobody mount")
    try:
        outcome = cli(tiny, "--recipe", "fault{how=fill}", *QUICK, "--out", tmp_path / "out", cache=small / "cache")
        assert outcome.code == 3, outcome.output
        assert "No space left on device" in outcome.output
        assert _damaged(small / "cache") == []
        assert list((small / "cache" / "store" / "building").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_damaged_artifact_is_reported_and_built_again(tiny: Path, cli: Cli, cache: Path, tmp_path: Path) -> None:
    arguments = (tiny, "--recipe", "cast-dtype", *QUICK)
    first = cli(*arguments, "--out", tmp_path / "first", cache=cache)
    assert first.code in (0, 4, 6), first.output  # bfloat16 lies near the accuracy gate on this checkpoint
    (weights,) = (cache / "store" / "artifacts").glob("*/data/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert cli("cache", "verify", cache=cache).code == 1
    again = cli(*arguments, "--out", tmp_path / "second", cache=cache)
    assert "data/model.safetensors is changed" in again.output
    assert cli("cache", "verify", cache=cache).code == 0


def test_two_runs_share_one_cache(tiny: Path, cache: Path, tmp_path: Path) -> None:
    runs = [_start(tiny, cache, tmp_path / f"out{index}", "export-onnx") for index in range(2)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sum("export-onnx built" in output for output in outputs) == 1
    assert _damaged(cache) == []


@pytest.mark.parametrize("victim", ["run", "builder", "session"])
def test_a_kill_at_a_random_moment_leaves_a_valid_store(victim: str, tiny: Path, cache: Path, tmp_path: Path) -> None:
    """benchmarks/kills.py does this sixty times; here once for each victim, with a seed of its own."""
    run = _start(tiny, cache, tmp_path / "out", "export-onnx")
    log = {"builder": "build.log", "session": "export-onnx.log"}.get(victim, "build.log")
    _wait_for(run, cache, f"runs/*/logs/{log}")
    time.sleep(random.Random(victim).uniform(0.2, 3))
    parent = psutil.Process(run.pid)
    workers = parent.children()
    (parent if victim == "run" or not workers else random.Random(victim).choice(workers)).kill()
    output, _ = run.communicate(timeout=300)
    assert run.returncode in (-signal.SIGKILL, 0, 1, 2, 3, 4), output
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert _damaged(cache) == []
    if victim == "run":  # the others' runs have gone on
        after = _start(tiny, cache, tmp_path / "after", "export-onnx")
        output, _ = after.communicate(timeout=300)
        assert after.returncode == 0, output


def test_pruning_spares_what_a_live_run_uses(tiny: Path, cli: Cli, cache: Path, tmp_path: Path) -> None:
    run = _start(tiny, cache, tmp_path / "out", "cast-dtype,export-onnx")
    _wait_for(run, cache, "store/artifacts/*")
    assert "removed 0 artifacts and 0 runs" in cli("cache", "prune", "--days", "0", cache=cache).output
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert "removed 2 artifacts and 1 runs" in cli("cache", "prune", "--days", "0", cache=cache).output


def test_ctrl_c_kills_the_workers_and_keeps_the_store(tiny: Path, cache: Path, tmp_path: Path) -> None:
    run = _start(tiny, cache, tmp_path / "out", "export-onnx")
    _wait_for(run, cache, "store/building/*/data")
    workers = psutil.Process(run.pid).children()
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert workers
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert list(cache.glob("store/building/*")) == []


def test_a_gpu_that_runs_out_costs_one_candidate_and_what_is_broken_off_leaves_a_report(
    tiny: Path, cache: Path, run_out: Callable[[str], None], tmp_path: Path
) -> None:
    run_out("self.model.dtype is torch.bfloat16 and batch['input_ids'].shape == (2, 16)")
    recipes = ("cast-dtype", "checkpoint", "cast-dtype{dtype=float32}")
    run = _start(tiny, cache, tmp_path / "out", *recipes, json_file=tmp_path / "report.json")
    _wait_for(run, cache, f"runs/*/logs/{recipes[-1]}.log")
    (folder,) = (cache / "runs").iterdir()
    killed = json.loads((folder / "report.json").read_text())  # what SIGKILL would leave
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 130 and str(folder / "report.json") in output, output
    assert not (tmp_path / "out").exists()
    asked, kept = (json.loads((at / "report.json").read_text()) for at in (tmp_path, folder))
    assert asked == kept
    assert (killed["unfinished"], kept["unfinished"]) == (GOING_ON, "interrupted")
    for report in (killed, kept):
        jsonschema.validate(report, {"$ref": "#/$defs/Report", "$defs": schema()["$defs"]})
        assert report["exit_code"] == 130 and report["emitted"] is None and report["baseline"]["load_seconds"] > 0
        broken, passed = report["candidates"]
        assert (broken["status"], passed["status"]) == ("broken", "passed") and passed["speed"]["quads"] >= 8
        assert report["left_out"] == {recipes[-1]: f"not tried to its end: {report['unfinished']}"}
    assert broken["reason"] == (
        "out of GPU memory at cell 2x16: 20.00 GiB were to be allocated, 3.25 GiB were free; what would help: "
        "a smaller --workload, nothing else on the GPU (see nvidia-smi), or other recipes (--recipe)"
    )
    assert "Traceback" not in output
    with pytest.raises(RequestError, match="was left out: not tried to its end: interrupted"):
        explain(folder, recipes[-1], None)
    with pytest.raises(ArtifactError, match="did not come to its end: interrupted"):
        verify_folder(folder, 1.0)


def test_a_checkpoint_that_changes_meanwhile_poisons_nothing(tiny: Path, cli: Cli, cache: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    run = _start(model, cache, tmp_path / "out", "export-onnx")
    _wait_for(run, cache, "store/building/*/data")
    os.utime(model / "model.safetensors")  # as if other weights had been copied over them
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 2, output
    assert "was changed while the run was going on: model.safetensors" in output
    assert not (tmp_path / "out").exists()
    assert not Store(cache / "store").keys()


@pytest.mark.parametrize(("what", "code", "words"), [
    ("cache", 1, "was removed while it was going on"),
    ("out", 2, "is not empty any more: nothing is overwritten"),
    ("reader", 0, ""),
])  # fmt: skip
def test_what_is_taken_away_under_a_run_is_said(
    what: str, code: int, words: str, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = _start(tiny, cache, out, "export-onnx")
    _wait_for(run, cache, "runs/*/logs/export-onnx.log")
    if what == "cache":
        shutil.rmtree(cache)
    if what == "out":
        out.mkdir()
        (out / "theirs").write_text("theirs")
    if what == "reader":
        assert run.stdout is not None
        run.stdout.close()
        assert run.wait(timeout=300) == code
        assert (out / "optimize.json").exists()
        return
    output, _ = run.communicate(timeout=300)
    assert run.returncode == code, output
    assert words in output
    assert "Traceback" not in output
    assert what != "out" or [path.name for path in out.iterdir()] == ["theirs"]


def test_closed_descriptors_do_not_become_a_workers_pipe(tiny: Path, cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "optimize.pipeline.cli", str(tiny), "--recipe", "export-onnx", *QUICK]
    line = f"{shlex.join([*command, '--out', str(tmp_path / 'out')])} <&- >&- 2>&-"
    environment = os.environ | {"OPTIMIZE_CACHE": str(cache)}
    assert subprocess.run(["bash", "-c", line], env=environment, timeout=300, check=False).returncode == 0


def test_a_hangup_ends_a_run_like_ctrl_c(tiny: Path, cache: Path, tmp_path: Path) -> None:
    run = _start(tiny, cache, tmp_path / "out", "export-onnx")
    _wait_for(run, cache, "store/building/*/data")
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGINT)  # a second signal does not break off what the first one set going
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 130, output
    assert list(cache.glob("store/building/*")) == []


def test_nothing_is_proved_on_a_busy_host(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    out, spin = tmp_path / "out", "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
    hogs = [subprocess.Popen([sys.executable, "-c", spin, str(os.getpid())]) for _ in range(os.cpu_count() or 1)]
    try:
        outcome = cli(tiny, "--recipe", "export-onnx", *QUICK, "--max-load", "0.1", "--out", out)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert outcome.code == 6, outcome.output
    assert "busy host" in outcome.output and "other processes took" in outcome.output and "--max-load" in outcome.output
    assert not out.exists()


def _start(model: Path, cache: Path, out: Path, *recipes: str, json_file: Path | None = None) -> subprocess.Popen[str]:
    asked = [word for recipe in recipes for word in ("--recipe", recipe)]
    written = ["--json", json_file] if json_file else []
    return subprocess.Popen(
        [sys.executable, "-m", "optimize.pipeline.cli", model, *asked, *QUICK, "--out", out, *written],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OPTIMIZE_CACHE": str(cache)},
        preexec_fn=_heed_signals,
    )  # fmt: skip


def _wait_for(run: subprocess.Popen[str], cache: Path, pattern: str) -> None:
    """Until the run has made a file of that pattern in its cache."""
    while not list(cache.glob(pattern)):
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)


def _heed_signals() -> None:
    """As in a terminal: what runs the tests in the background may ignore these, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _damaged(cache: Path) -> list[str]:
    store = Store(cache / "store")
    return [found.reason for found in map(store.get, store.keys()) if isinstance(found, Damage)]
