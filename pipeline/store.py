"""The content-addressed folder of artifacts. A kill at any moment leaves it valid; two processes may share it.

    STORE/artifacts/KEY/          one artifact, read-only: `data/` is the pass's output, `artifact.json` describes it
    STORE/building/KEY.XXXX/      being filled by a worker; renamed into artifacts/ when it is whole
    STORE/locks/KEY.lock          held by the process that builds KEY, released by the system when that process dies

Published folders are renamed into place as a whole, so what is under artifacts/ was complete. Its files are checked
against their digests each time they are about to be used, so what was damaged later is found, reported and rebuilt.
One process reads a file once, links to it too, for as long as it keeps its inode, size and modification time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from optimize.pipeline.contract import Artifact, Kind, StepFacts
from optimize.pipeline.errors import ArtifactError

TICK, SECOND = 50_000_000, 1_000_000_000  # nanoseconds that a file system's clock may stand still, and some more
_digests: dict[tuple[int, ...], str] = {}  # by stamp_of


@dataclass(frozen=True)
class Entry:
    """One artifact in the store with what is known of how it was built."""

    artifact: Artifact
    text: str  # the recipe that leads to it
    step: StepFacts
    size: int  # bytes of data/
    files: dict[str, str]  # relative path -> sha256


@dataclass(frozen=True)
class Damage:
    """An artifact that must not be used, and why."""

    key: str
    reason: str


def sha256_of(path: Path) -> str:
    """Hex digest of one file. What this process has read before, under whatever name, is not read again."""
    with path.open("rb", buffering=0) as file:
        stamp, now = stamp_of(os.fstat(file.fileno())), time.time_ns()
        if (known := _digests.get(stamp)) is not None:
            return known
        digest = _read(file)
        still = TICK if stamp[-1] % SECOND else 2 * SECOND  # of one that has whole seconds alone
        unchanged = stamp_of(os.fstat(file.fileno())) == stamp
        if unchanged and now - stamp[-1] > still:  # else it may be written to once more at the same time
            _digests[stamp] = digest
    return digest


def stamp_of(stat: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another, and from itself after it was written to."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(file: FileIO) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
    return digest.hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 for every file under `folder`, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def digest_of(files: dict[str, str]) -> str:
    """One digest for a folder: over its paths and their digests."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def compare_digests(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """The first file that is missing, unexpected or changed, in words; or None."""
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            return (
                f"{path} is {'missing' if path not in found else 'unexpected' if path not in expected else 'changed'}"
            )
    return None


def check_files(folder: Path, expected: dict[str, str]) -> None:
    """Raise ArtifactError unless `folder` has these files with these digests; others may lie there too."""
    found = {name: sha256_of(folder / name) for name in expected if (folder / name).is_file()}
    if (difference := compare_digests(expected, found)) is not None:
        raise ArtifactError(f"{folder}: {difference}", hint="emit it again, or copy it again from where it is whole")


class Store:
    """Artifacts under one folder, which is made when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._artifacts = root / "artifacts"
        self._building = root / "building"
        self._locks = root / "locks"

    def has(self, key: str) -> bool:
        """Whether `key` was published. Cheap: for plans; `get` also checks that it is undamaged."""
        return (self._artifacts / key / "artifact.json").is_file()

    def get(self, key: str) -> Entry | Damage | None:
        """The artifact, after checking every file; why it is unusable; or None when it is not there."""
        entry = self.describe(key)
        if not isinstance(entry, Entry):
            return entry if (self._artifacts / key).exists() else None
        difference = compare_digests(entry.files, digest_files(entry.artifact.path))
        return Damage(key, f"data/{difference}") if difference else entry

    def describe(self, key: str) -> Entry | Damage:
        """What is recorded of an artifact, without looking at its files."""
        folder = self._artifacts / key
        try:
            record = json.loads((folder / "artifact.json").read_bytes())
            entry = _entry(folder, key, record)
            if record["key"] != key:
                return Damage(key, f"it is {record['key'][:10]} by its own record")
            return entry
        except FileNotFoundError:
            return Damage(key, "artifact.json is missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Damage(key, f"artifact.json cannot be read ({error})")

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the right to build `key`. Calls `waiting` once if another process holds it."""
        from filelock import FileLock, Timeout

        self._locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """An empty folder to build `key` in. Removed at the end, unless it was published."""
        self._building.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self._building))
        (folder / "data").mkdir()
        try:
            yield folder / "data"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, key: str, kind: Kind, data: Path, text: str, step: StepFacts) -> Entry:
        """Rename what was built (the folder that `building` gave) into place, with its digests."""
        files = digest_files(data)
        size = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
        record = {"kind": kind, "key": key, "text": text, "files": files, "size": size, "step": asdict(step)}
        for path in data.rglob("*"):
            if path.is_file():
                path.chmod(0o444)
                _sync(path)
        description = data.parent / "artifact.json"
        description.write_text(json.dumps(record, indent=1))
        _sync(description)
        self._artifacts.mkdir(parents=True, exist_ok=True)
        data.parent.rename(self._artifacts / key)
        _sync(self._artifacts)
        return _entry(self._artifacts / key, key, record)

    def discard(self, key: str) -> None:
        """Remove one artifact: first out of sight, so that nobody sees half of it."""
        folder = self._artifacts / key
        if folder.exists():
            self._building.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix="discard.", dir=self._building))
            folder.rename(aside / "artifact")
            shutil.rmtree(aside, ignore_errors=True)

    def keys(self) -> tuple[str, ...]:
        """Every published key."""
        return tuple(sorted(path.name for path in self._artifacts.iterdir())) if self._artifacts.exists() else ()

    def touch(self, key: str) -> None:
        """Note that the artifact was used, so that `prune` spares it."""
        os.utime(self._artifacts / key / "artifact.json")

    def prune(self, before: float) -> int:
        """Remove artifacts that are damaged or were last used before that Unix time, and abandoned build folders.

        What another process is building or about to use is left alone. Returns how many artifacts were removed.
        """
        removed = 0
        for key in self.keys():
            with self._try_lock(key) as mine:
                if mine and (self._last_used(key) < before or isinstance(self.get(key), Damage)):
                    self.discard(key)
                    removed += 1
        for folder in list(self._building.iterdir()) if self._building.exists() else ():
            with self._try_lock(folder.name.rpartition(".")[0]) as mine:
                if mine:
                    shutil.rmtree(folder, ignore_errors=True)
        return removed

    def _last_used(self, key: str) -> float:
        path = self._artifacts / key / "artifact.json"
        return path.stat().st_mtime if path.exists() else 0.0

    @contextmanager
    def _try_lock(self, key: str) -> Iterator[bool]:
        from filelock import FileLock, Timeout

        self._locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._locks / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _entry(folder: Path, key: str, record: dict[str, Any]) -> Entry:
    artifact = Artifact(Kind(record["kind"]), folder / "data", key, digest_of(record["files"]))
    return Entry(artifact, record["text"], StepFacts(**record["step"]), record["size"], record["files"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
