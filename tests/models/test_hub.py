"""Fetching from a local hub. Each fetch runs in its own process: huggingface_hub reads its settings when imported."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from optimize.models import hub as hub_module
from optimize.pipeline.errors import CheckpointError, ExitCode
from tests.models.hub_server import HubServer

SOURCES = str(Path(__file__).parents[2] / "src")
WEIGHTS = "model-2.safetensors"
DRIVER = """
import json, logging, sys
from optimize.models import hub
from optimize.pipeline.errors import CheckpointError
logging.basicConfig(level="WARNING", format="%(name)s: %(message)s")
{prelude}
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        it = hub.fetch(*arguments)
        answers.append(dict(folder=str(it.folder), revision=it.revision, offline=it.offline, error="", hint=""))
    except CheckpointError as error:
        answers.append(dict(folder="", revision="", offline=None, error=error.message, hint=error.hint or ""))
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    folder: Path
    revision: str
    offline: bool | None
    error: str
    hint: str
    stderr: str = ""


def fetch_all(hub: HubServer, home: Path, calls: list[Any], prelude: str = "", **extra: str) -> list[Answer]:
    environment = hub.environment(home, PYTHONPATH=SOURCES, **extra)
    command = [sys.executable, "-c", DRIVER.format(prelude=prelude), json.dumps(calls)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answers = [answer | {"folder": Path(answer["folder"])} for answer in json.loads(done.stdout)]
    return [Answer(**answer, stderr=done.stderr) for answer in answers]


def fetch(hub: HubServer, home: Path, *call: str, **extra: str) -> Answer:
    return fetch_all(hub, home, [call or ("owner/name",)], **extra)[0]


def write(folder: Path, **changed: bytes | None) -> Path:
    """A sharded checkpoint with everything that must be left behind; None leaves a file out."""
    index = {"weight_map": {"a": "model-1.safetensors", "b": WEIGHTS}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"1" * 1000,
        WEIGHTS: b"2" * 2000,
        "1_Pooling/config.json": b'{"pooling": "mean"}',
        "tokenizer.json": b'{"tokens": []}',
        "tokenizer.model": b"sentencepiece",
        "vocab.txt": b"a",
        "merges.txt": b"a b",
        "chat_template.jinja": b"{{ x }}",
        "README.md": b"# Model",
        "LICENSE": b"Apache",
        **dict.fromkeys(UNWANTED, b"unwanted"),
    }
    for name, data in {**files, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(data)
    return folder


UNWANTED = ["pytorch_model.bin", "model.pt", "tokenizer.pkl", "m.ckpt", "w.pth", "tf_model.h5", "flax_model.msgpack"]
UNWANTED += ["q.gguf", "model.onnx", "modeling.py", "tokenizer.py", "onnx/config.json", "openvino/model.xml", "a.png"]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache that has owner/name whole, and its commit."""
    folder = tmp_path_factory.mktemp("seeded")
    with HubServer() as server:
        commit = server.add("owner/name", write(folder / "repo"))
        assert not fetch(server, folder / "home").error
    return folder / "home", commit


@pytest.fixture
def home(seeded: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the seeded cache."""
    return Path(shutil.copytree(seeded[0], tmp_path / "home", symlinks=True))


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_module_imports_nothing_heavy() -> None:
    code = "import sys, optimize.models.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SOURCES}, check=True)


def test_a_download_is_pinned_leaves_pickles_and_code_out_and_happens_once(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("owner/name", write(tmp_path / "repo"))
    first = fetch(hub, tmp_path / "home")
    assert (first.revision, first.offline, first.error) == (commit, False, "")
    assert first.folder.name == commit
    assert names(first.folder) == names(tmp_path / "repo") - set(UNWANTED)
    assert (first.folder / WEIGHTS).read_bytes() == b"2" * 2000
    assert not [line for line in hub.requests if any(line.endswith(f"/{name}") for name in UNWANTED)]
    assert first.stderr == ""  # no progress bar where stderr is no terminal

    hub.requests.clear()
    again, by_commit, short = fetch_all(
        hub, tmp_path / "home", [("owner/name",), ("owner/name", commit), ("owner/name",)]
    )
    assert again.folder == by_commit.folder == short.folder == first.folder
    assert not [line for line in hub.requests if "/resolve/" in line]


def test_a_branch_that_moved_gives_the_new_commit_and_keeps_the_old(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("owner/name", write(tmp_path / "repo"))
    assert fetch(hub, tmp_path / "home").revision == old
    new = hub.add("owner/name", write(tmp_path / "repo", **{WEIGHTS: b"3" * 2000}))
    hub.add("owner/name", write(tmp_path / "repo", **{WEIGHTS: b"4" * 2000}), branch="v1.0")
    hub.sent.clear()
    calls = [("owner/name",), ("owner/name", "v1.0"), ("owner/name", old)]
    moved, tagged, pinned = fetch_all(hub, tmp_path / "home", calls)
    assert moved.revision == new != old
    assert [(it.folder / WEIGHTS).read_bytes()[:1] for it in (moved, tagged, pinned)] == [b"3", b"4", b"2"]
    assert hub.sent == {WEIGHTS: 4000}  # what did not change is not sent again


def test_a_dropped_connection_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 24
    commit = hub.add("owner/name", write(tmp_path / "repo", **{WEIGHTS: data}))
    hub.drop_after[WEIGHTS] = 15 << 20
    answer = fetch(hub, tmp_path / "home")
    assert answer.error == ""
    assert (answer.folder / WEIGHTS).read_bytes() == data
    path = f"GET /owner/name/resolve/{commit}/{WEIGHTS}"
    assert [line for line in hub.requests if line.startswith(path)] == [path, f"{path} Range: bytes={10 << 20}-"]


def test_a_run_that_broke_off_keeps_its_files_and_does_not_move_the_branch(hub: HubServer, home: Path) -> None:
    old = hub.add("owner/name", write(home / "repo"))
    new = hub.add("owner/name", write(home / "repo", **{WEIGHTS: b"3" * 2000, "README.md": b"# New"}))
    hub.status[WEIGHTS] = 503
    quick = "import time; time.sleep = lambda seconds: None"
    broken = fetch_all(hub, home, [("owner/name",)], prelude=quick)[0]
    assert "broke off" in broken.error
    assert "503" in broken.error
    assert "again" in broken.hint
    assert fetch(hub, home, HF_HUB_OFFLINE="1").revision == old
    hub.status.clear()
    hub.sent.clear()
    assert fetch(hub, home).revision == new
    assert hub.sent == {WEIGHTS: 2000}


@pytest.mark.parametrize("how", ["refused", "503", "silent", "alien", "offline"])
def test_an_unreachable_hub(how: str, hub: HubServer, seeded: tuple[Path, str], home: Path) -> None:
    commit = hub.add("owner/name", write(home / "repo", **{WEIGHTS: b"newer"}))
    extra = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_HUB_ETAG_TIMEOUT": "1"}
    if how == "refused":
        hub.stop()
    hub.status = {"GET": int(how)} if how.isdigit() else {}
    hub.alien = {"main": b"<html>Log in", "pr/1": b'{"id": "a", "sha": "../main"}'} if how == "alien" else {}
    hub.stall = {"main": 3.0, "pr/1": 3.0} if how == "silent" else {}
    start = time.monotonic()
    used, missing = fetch_all(hub, home, [("owner/name",), ("owner/name", "refs/pr/1")], **extra)
    assert time.monotonic() - start < 6
    assert (used.offline, used.revision, used.error) == (True, seeded[1], "")
    assert used.revision != commit
    assert "optimize.models.hub: The hub at" in used.stderr
    assert "using the cached snapshot of owner/name@main" in used.stderr
    for text in (hub.url, "not reachable", "owner/name@refs/pr/1", str(home)):
        assert text in missing.error
    assert "HF_ENDPOINT" in missing.hint
    assert "local folder" in missing.hint
    assert len(hub.requests) == (0 if how in ("refused", "offline") else 2)  # asked once each


def test_the_wait_for_the_first_answer_has_a_deadline(hub: HubServer, tmp_path: Path) -> None:
    hub.stall["GET"] = 5.0
    answer = fetch_all(hub, tmp_path, [("owner/name",)], prelude="hub.FIRST_ANSWER = 0.2")[0]
    assert "not reachable (no answer within 0.2 s)" in answer.error


def test_a_silent_file_listing_does_not_hang(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/name", write(tmp_path / "repo"))
    hub.stall["/tree/"] = 30.0
    start = time.monotonic()
    assert fetch(hub, tmp_path / "home", HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1").error == ""
    assert time.monotonic() - start < 10


def test_an_incomplete_cache_is_not_used_offline(hub: HubServer, seeded: tuple[Path, str], home: Path) -> None:
    gone = ["config.json", WEIGHTS, "tokenizer.json", "model.safetensors.index.json"]
    bare = ["LICENSE", "config.json", WEIGHTS]  # of a cache without the listing: its index says what must be there
    for number, name in enumerate(gone + bare):
        cache = home / f"hub/models--owner--{number}"
        shutil.copytree(home / "hub/models--owner--name", cache, symlinks=True)
        (cache / "snapshots" / seeded[1] / name).unlink()
        if number >= len(gone):
            shutil.rmtree(cache / "trees")
    calls = [(f"owner/{number}",) for number in range(len(gone + bare))]
    answers = fetch_all(hub, home, [*calls, ("owner/0", seeded[1])], HF_HUB_OFFLINE="1")
    for answer, name in zip(answers, [*gone, *bare, gone[0]], strict=True):
        if name == "LICENSE":
            assert answer.offline
        else:
            assert "incomplete" in answer.error
            assert f"lacks {name}." in answer.error


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What fetch says of each model that it refuses."""
    folder = tmp_path_factory.mktemp("refused")
    pickles = {"model-1.safetensors": None, WEIGHTS: None, "model.safetensors.index.json": None}
    whole = write(folder / "whole")
    with HubServer() as hub:
        for name in ("gated", "private", "banned"):
            hub.add(f"owner/{name}", whole)
        hub.add("owner/known", whole)
        hub.add("owner/pickles", write(folder / "pickles", **pickles))
        hub.add("owner/pickles", whole, branch="refs/pr/1")
        hub.add("owner/none", write(folder / "none", **pickles, **{n: None for n in UNWANTED if n != "q.gguf"}))
        hub.add("owner/torn", write(folder / "torn", **{WEIGHTS: None}))
        hub.add("owner/adapter", write(folder / "adapter", **{"config.json": None}))
        hub.gated, hub.private, hub.status = {"owner/gated"}, {"owner/private"}, {"owner/banned": 403}
        calls = [
            "gated",
            "private",
            "banned",
            "unknown",
            "known@v9",
            "pickles",
            "none",
            "torn",
            "adapter",
            "pickles@refs/pr/1",
        ]
        answers = fetch_all(hub, folder / "home", [f"owner/{call}".split("@") for call in calls])
        for name in ("pickles", "none", "adapter"):
            files = f"/owner/{name}/resolve/{hub.repos[f'owner/{name}'].branches['main']}/"
            assert not [line for line in hub.requests if files in line]
        assert not answers[-1].error
        assert not fetch(hub, folder / "home", "owner/gated", HF_TOKEN="hf_x").error
        return dict(zip(calls, answers, strict=True))


@pytest.mark.parametrize(
    ("call", "said", "hinted"),
    [
        ("gated", "owner/gated is gated", "hf auth login` or set HF_TOKEN"),
        ("private", "no model owner/private", "hf auth login` or set HF_TOKEN"),
        ("banned", "refuses access to owner/banned (HTTP 403)", "hf auth login` or set HF_TOKEN"),
        ("unknown", "no model owner/unknown", "Check the spelling"),
        ("known@v9", "owner/known has no revision 'v9'", "a branch, a tag or a commit"),
        ("pickles", "owner/pickles@main has no safetensors weights: only pickles", "owner/pickles@refs/pr/1"),
        ("none", "owner/none@main has no safetensors weights: none", "safetensors"),
        ("torn", f"is incomplete on the hub: it lacks {WEIGHTS}.", ""),
        ("adapter", "owner/adapter@main has no config.json", "transformers"),
    ],
)
def test_what_cannot_be_fetched_is_refused(call: str, said: str, hinted: str, refused: dict[str, Answer]) -> None:
    assert said in refused[call].error
    assert hinted in refused[call].hint
    assert "weights_only=True" in refused["pickles"].hint


def test_a_damaged_download_is_refused_and_deleted(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/name", write(tmp_path / "repo"))
    home = tmp_path / "home"
    hub.corrupt = {WEIGHTS}
    for answer in fetch_all(hub, home, [("owner/name",)] * 2):  # the second time it comes anew, and is found again
        assert f"{WEIGHTS} was damaged" in answer.error
        assert "again" in answer.hint
        assert not list(home.rglob(WEIGHTS))
        assert b"2" * 1999 not in {path.read_bytes()[:1999] for path in home.rglob("blobs/*")}
    assert not list(home.rglob("refs/main"))  # so that offline it is not used either
    hub.corrupt = set()
    whole = fetch(hub, home)
    assert (whole.folder / WEIGHTS).read_bytes() == b"2" * 2000


def test_what_comes_after_a_verified_download_is_verified_too(hub: HubServer, home: Path) -> None:
    hub.add("owner/name", write(home / "repo"))
    link = next(home.rglob(f"snapshots/*/{WEIGHTS}"))
    link.resolve().unlink()
    link.unlink()
    hub.corrupt = {WEIGHTS}
    assert f"{WEIGHTS} was damaged" in fetch(hub, home).error


def test_a_full_disk_and_a_bad_cache_folder_name_the_path(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/name", write(tmp_path / "repo", **{WEIGHTS: b"2" * 200_000}))
    small = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    full = fetch_all(hub, tmp_path / "home", [("owner/name",)], prelude=small)[0]
    assert f"could not be written to {tmp_path / 'home'}" in full.error
    assert "Free space" in full.hint
    (tmp_path / "file").write_bytes(b"")
    blocked = fetch(hub, tmp_path / "file")
    assert f"could not be written to {tmp_path / 'file'}" in blocked.error


@pytest.mark.parametrize(
    "model_id", ["", "a/b/c", "a b", "--help", "-a/b", "a/", "/a", "a--b", "../a", "a.git", "x" * 97]
)
def test_a_bad_id_is_refused_without_asking(model_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hub_module, "_ask")
    with pytest.raises(CheckpointError, match="is not a model id") as caught:
        hub_module.fetch(model_id)
    assert repr(model_id) in caught.value.message
    assert "OWNER/NAME" in str(caught.value.hint)
    assert caught.value.exit_code == ExitCode.REFUSED


@pytest.mark.parametrize("revision", ["", " ", "a b", "--force", "../../x", "/etc"])
def test_a_bad_revision_is_refused_without_asking(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hub_module, "_ask")
    with pytest.raises(CheckpointError, match="is not a revision"):
        hub_module.fetch("owner/name", revision)


def test_a_terminal_sees_progress(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/name", write(tmp_path / "repo"))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 100))
    command = [sys.executable, "-c", DRIVER.format(prelude=""), '[["owner/name"]]']
    environment = hub.environment(tmp_path / "home", PYTHONPATH=SOURCES)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # EIO when the process has closed its end
            while data := os.read(ours, 4096):
                seen += data
    os.close(ours)
    assert process.returncode == 0
    assert b"Fetching 12 files" in seen
