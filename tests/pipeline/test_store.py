"""The store: what is published comes back whole, damage is found, and no kill or rival leaves it invalid."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optimize.pipeline import store as store_module
from optimize.pipeline.contract import Kind, StepFacts
from optimize.pipeline.store import Damage, Entry, Store, digest_of, sha256_of

FACTS = StepFacts(2.5, 1 << 20, {"quantized": 3, "eligible": 4})
FILES = {"model.onnx": b"graph", "weights/model.onnx.data": bytes(range(256)) * 300}
KEY, OTHER = "a" * 64, "b" * 64

# builds KEY, once it is told to go on
BUILDER = """
import sys
from pathlib import Path
from optimize.pipeline.contract import Kind, StepFacts
from optimize.pipeline.store import Store
store, key = Store(Path(sys.argv[1])), sys.argv[2]
with store.lock(key, waiting=lambda: print("waiting", flush=True)):
    if store.get(key) is not None:
        print("cached", flush=True)
    else:
        with store.building(key) as data:
            print("building", flush=True)
            sys.stdin.readline()
            (data / "model.onnx").write_bytes(b"graph")
            store.publish(key, Kind.ONNX, data, "export-onnx", StepFacts(1.0, 1))
        print("built", flush=True)
"""

CHURN = """
import random, sys
from pathlib import Path
from optimize.pipeline.contract import Kind, StepFacts
from optimize.pipeline.store import Damage, Store
store, chance = Store(Path(sys.argv[1])), random.Random(int(sys.argv[2]))
for number in range(10**9):
    key = f"{chance.randrange(6):064d}"
    with store.lock(key):
        found = store.get(key)
        if isinstance(found, Damage):
            sys.exit(f"damaged: {found}")
        if found is not None:
            store.discard(key)
        with store.building(key) as data:
            for index in range(4):
                (data / f"{index}.bin").write_bytes(chance.randbytes(20_000))
            store.publish(key, Kind.ONNX, data, "export-onnx", StepFacts(0.0, 1))
    if number == 2:
        print("going", flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, key: str = KEY) -> Entry:
    with store.building(key) as data:
        for name, content in FILES.items():
            (data / name).parent.mkdir(exist_ok=True)
            (data / name).write_bytes(content)
        return store.publish(key, Kind.ONNX, data, "export-onnx,quantize-onnx", FACTS)


def building(store: Store) -> list[Path]:
    folder = store.root / "building"
    return sorted(folder.iterdir()) if folder.exists() else []


@contextmanager
def child(script: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_is_published_comes_back(store: Store) -> None:
    entry = publish(store)
    assert store.get(KEY) == store.describe(KEY) == entry
    assert store.has(KEY)
    assert store.keys() == (KEY,)
    assert {name: (entry.artifact.path / name).read_bytes() for name in entry.files} == FILES
    assert (entry.artifact.kind, entry.artifact.key, entry.text) == (Kind.ONNX, KEY, "export-onnx,quantize-onnx")
    assert (entry.step, entry.size) == (FACTS, sum(map(len, FILES.values())))
    assert entry.artifact.digest == digest_of(entry.files)
    assert building(store) == []


def test_published_files_are_read_only(store: Store) -> None:
    path = publish(store).artifact.path
    assert {(path / name).stat().st_mode & 0o222 for name in FILES} == {0}


def test_the_digest_is_of_the_content_and_not_of_the_key(store: Store) -> None:
    assert publish(store).artifact.digest == publish(store, OTHER).artifact.digest


def test_an_empty_store(store: Store) -> None:
    assert store.get(KEY) is None
    assert not store.has(KEY)
    assert store.keys() == ()
    assert store.prune(time.time()) == 0
    assert Damage(KEY, "artifact.json is missing") == store.describe(KEY)


def test_what_is_not_published_is_removed(store: Store) -> None:
    with pytest.raises(RuntimeError, match="compiler"), store.building(KEY) as data:
        (data / "half.bin").write_bytes(b"half")
        raise RuntimeError("compiler")
    assert store.get(KEY) is None
    assert building(store) == []


def test_a_build_folder_is_empty_and_its_own(store: Store) -> None:
    with store.building(KEY) as one, store.building(KEY) as two:
        assert one != two
        assert list(one.iterdir()) == list(two.iterdir()) == []


def flip(data: Path) -> None:
    path = data / "weights/model.onnx.data"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(data: Path) -> None:
    description = data.parent / "artifact.json"
    description.write_text(description.read_text()[:-40])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte flipped": (flip, "data/weights/model.onnx.data is changed"),
    "file missing": (lambda data: (data / "model.onnx").unlink(), "data/model.onnx is missing"),
    "extra file": (lambda data: (data / "new.bin").write_bytes(b""), "data/new.bin is unexpected"),
    "data missing": (lambda data: shutil.rmtree(data), "data/model.onnx is missing"),
    "description missing": (lambda data: (data.parent / "artifact.json").unlink(), "artifact.json is missing"),
    "description truncated": (truncate, "artifact.json cannot be read (Unterminated"),
    "description empty": (lambda data: (data.parent / "artifact.json").write_bytes(b""), "artifact.json cannot be"),
    "description not text": (lambda data: (data.parent / "artifact.json").write_bytes(b"\xff\xfe\xfd"), "artifact.js"),
    "description of another thing": (lambda data: (data.parent / "artifact.json").write_text("[]"), "artifact.json ca"),
    "unknown kind": (
        lambda data: (data.parent / "artifact.json").write_text('{"kind": "clay", "files": {}}'),
        "artifact.json cannot be read ('clay'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_described_and_mended(store: Store, damage: str) -> None:
    act, reason = DAMAGE[damage]
    entry, whole = publish(store), publish(store, OTHER)
    act(entry.artifact.path)
    found = store.get(KEY)
    assert isinstance(found, Damage)
    assert found.key == KEY
    assert found.reason.startswith(reason)
    assert store.get(OTHER) == whole
    store.discard(KEY)
    assert store.get(KEY) is None
    assert publish(store) == store.get(KEY)


def test_an_artifact_under_anothers_key_is_damaged(store: Store) -> None:
    publish(store)
    (store.root / "artifacts" / KEY).rename(store.root / "artifacts" / OTHER)
    assert isinstance(store.get(OTHER), Damage)


def test_a_stray_file_among_the_artifacts_is_damage(store: Store) -> None:
    publish(store)
    (store.root / "artifacts" / ".DS_Store").write_bytes(b"")
    assert [isinstance(store.get(key), Entry) for key in store.keys()] == [False, True]  # noqa: SIM118


def test_discarding_what_is_not_there(store: Store) -> None:
    store.discard(KEY)
    assert building(store) == []


def test_discarding_leaves_nothing(store: Store) -> None:
    publish(store)
    store.discard(KEY)
    assert (store.keys(), building(store)) == ((), [])


def test_publishing_over_an_artifact_is_refused_and_leaves_it(store: Store) -> None:
    entry = publish(store)
    with pytest.raises(OSError, match="not empty"):
        publish(store)
    assert store.get(KEY) == entry
    assert building(store) == []


def test_prune_removes_what_is_old_or_damaged(store: Store) -> None:
    old, damaged, used, fresh = ("0" * 64, "1" * 64, "2" * 64, "3" * 64)
    entries = {key: publish(store, key) for key in (old, damaged, used, fresh)}
    for key in (old, used):
        os.utime(store.root / "artifacts" / key / "artifact.json", (1e9, 1e9))
    store.touch(used)
    flip(entries[damaged].artifact.path)
    assert store.prune(before=time.time() - 3600) == 2
    assert store.keys() == (used, fresh)


def test_prune_removes_abandoned_build_folders(store: Store) -> None:
    abandoned = store.root / "building" / f"{KEY}.x1y2z3"
    (abandoned / "data").mkdir(parents=True)
    (abandoned / "data" / "half.bin").write_bytes(b"half")
    assert store.prune(before=0.0) == 0
    assert building(store) == []


def test_prune_spares_what_another_process_holds(store: Store) -> None:
    publish(store, OTHER)
    with child(BUILDER, store.root, KEY) as builder:
        assert line_of(builder) == "building"
        assert store.prune(before=time.time() + 3600) == 1
        (folder,) = building(store)
        assert folder.name.startswith(KEY)
        builder.kill()
        builder.wait()
        assert store.prune(before=0.0) == 0
        assert building(store) == []


def test_prune_spares_an_old_artifact_whose_lock_is_held(store: Store) -> None:
    entry = publish(store)
    holder = """
    import sys
    from pathlib import Path
    from optimize.pipeline.store import Store
    with Store(Path(sys.argv[1])).lock(sys.argv[2]):
        print("held", flush=True)
        sys.stdin.readline()
    """
    with child(holder, store.root, KEY) as process:
        assert line_of(process) == "held"
        assert store.prune(before=time.time() + 3600) == 0
        assert store.get(KEY) == entry
    assert store.prune(before=time.time() + 3600) == 1


def test_of_two_processes_that_build_one_key_one_waits(store: Store) -> None:
    with child(BUILDER, store.root, KEY) as first:
        assert line_of(first) == "building"
        with child(BUILDER, store.root, KEY) as second:
            assert line_of(second) == "waiting"
            assert first.communicate("\n", timeout=20)[0].split() == ["built"]
            assert second.communicate(timeout=20)[0].split() == ["cached"]
    assert isinstance(store.get(KEY), Entry)


def test_the_one_that_waits_builds_when_the_other_is_killed(store: Store) -> None:
    with child(BUILDER, store.root, KEY) as first:
        assert line_of(first) == "building"
        with child(BUILDER, store.root, KEY) as second:
            assert line_of(second) == "waiting"
            first.kill()
            assert second.communicate("\n", timeout=20)[0].split() == ["building", "built"]
    assert isinstance(store.get(KEY), Entry)


def test_a_different_key_does_not_wait(store: Store) -> None:
    with child(BUILDER, store.root, KEY) as first:
        assert line_of(first) == "building"
        waited: list[bool] = []
        with store.lock(OTHER, waiting=lambda: waited.append(True)):
            assert not waited


def test_kills_at_any_moment_leave_every_artifact_whole(store: Store) -> None:
    chance = random.Random(7)
    for seed in range(20):
        with child(CHURN, store.root, seed) as process:
            assert line_of(process) == "going", process.communicate()[1]
            time.sleep(chance.uniform(0.0, 0.12))
            assert process.poll() is None, process.communicate()[1]
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert store.keys()
        assert [found for found in map(store.get, store.keys()) if not isinstance(found, Entry)] == []
    assert building(store), "no kill fell into a build: the test has lost its sense"
    before = store.keys()
    assert store.prune(before=0.0) == 0
    assert (store.keys(), building(store)) == (before, [])


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link, reads = tmp_path / "weights", tmp_path / "link", list[object]()
    read = store_module._read
    monkeypatch.setattr(store_module, "_read", lambda file: reads.append(file) or read(file))
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    os.link(path, link)
    assert sha256_of(path) == sha256_of(link) == hashlib.sha256(b"abc").hexdigest() and len(reads) == 1
    for content in (b"abd", b"abe"):  # just written: another that is as long may follow at the same time
        path.write_bytes(content)
        assert sha256_of(link) == hashlib.sha256(content).hexdigest()
    assert len(reads) == 3


def test_the_record_on_disk_is_readable_json(store: Store) -> None:
    entry = publish(store)
    record = json.loads((entry.artifact.path.parent / "artifact.json").read_text())
    assert (record["kind"], record["files"]) == ("onnx", entry.files)
