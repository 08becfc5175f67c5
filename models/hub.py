"""Fetches a checkpoint from the hub at one exact commit: safetensors, configuration, tokenizer; never pickles or code.

All traffic and the cache layout are huggingface_hub's: HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they
mean there. A dropped connection resumes at the last whole chunk (10 MiB); a run that was stopped keeps complete files.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from optimize.pipeline.errors import CheckpointError
from optimize.pipeline.store import sha256_of

log = logging.getLogger(__name__)

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges*"]
WANTED += ["README.md", "LICENSE*"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
NEVER = [f"*{suffix}" for suffix in (*PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".py")]
NEVER += ["onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*"]
FIRST_ANSWER = 30.0  # seconds until a silent hub counts as unreachable


@dataclass(frozen=True)
class Snapshot:
    folder: Path  # the local snapshot folder, in huggingface_hub's cache
    revision: str  # the 40-hex commit that it is pinned to
    offline: bool  # the hub was not asked or not reachable: the cached snapshot was used


def fetch(model_id: str, revision: str | None = None) -> Snapshot:
    """Download what is missing of a model at a branch, tag or commit (default main), pinned to its commit.

    Raises CheckpointError for a bad, unknown or closed id, an unknown revision, weights that are not safetensors,
    damage in transit, a full disk, and a hub that is not reachable while the cache has no complete snapshot.
    """
    revision = "main" if revision is None else revision
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first imported
    from huggingface_hub import errors, snapshot_download, utils

    _check_names(model_id, revision)
    try:
        info = _within(FIRST_ANSWER, lambda: _ask(model_id, revision))
    except (errors.HTTPError, OSError, ValueError, LookupError, TypeError) as error:
        status = _status(error)  # no status and no errno: no answer, or not a hub's (a proxy's page)
        if status >= 500 or status in (408, 429) or not (status or getattr(error, "errno", None)):
            return _cached(model_id, revision, error)
        raise _refusal(error, model_id, revision) from error

    names = [file.rfilename for file in info.siblings or ()]
    wanted = set(utils.filter_repo_objects(names, allow_patterns=WANTED, ignore_patterns=NEVER))
    _check_listing(model_id, revision, names, wanted)
    try:
        with nullcontext() if sys.stderr.isatty() else utils.disable_progress_bars():
            path = snapshot_download(model_id, revision=info.sha, allow_patterns=WANTED, ignore_patterns=NEVER)
        folder = Path(path)
        marker = folder.parents[1] / ".optimize-verified" / folder.name
        _verify(folder, [file for file in info.siblings if file.rfilename in wanted and file.lfs], marker)
        if gaps := _gaps(folder, wanted):
            raise CheckpointError(f"{model_id} at commit {info.sha} is incomplete on the hub: it lacks {gaps}.")
        _remember(folder, revision, marker)
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _refusal(error, model_id, revision) from error
    return Snapshot(folder, info.sha, offline=False)


def _check_names(model_id: str, revision: str) -> None:
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(model_id)
    except errors.HFValidationError as error:
        hint = "A model id is NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'; a local folder must exist."
        raise CheckpointError(f"{model_id!r} is not a model id.", hint=hint) from error
    if not re.fullmatch(r"[^\s/-]\S*", revision) or ".." in revision:
        raise CheckpointError(f"{revision!r} is not a revision.", hint="Give a branch, a tag or a commit.")


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call with a deadline: connect timeouts count per address of a host, and name look-ups have none."""
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    if not wait([answer], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def _ask(model_id: str, revision: str) -> Any:
    """The commit and the files of a revision, in one request without retries: a hub that is down costs no minutes."""
    from huggingface_hub import HfApi, constants, utils

    if _limit_waits not in (hooks := utils.get_session().event_hooks["request"]):
        hooks.append(_limit_waits)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(model_id, revision=revision, files_metadata=True, timeout=timeout)
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
        raise ValueError(f"its answer names no commit: {info.sha}")
    return info


def _limit_waits(request: Any) -> None:
    """Bound what huggingface_hub leaves open or wide: it lists a repo's files without any timeout."""
    from huggingface_hub import constants

    limit = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    waits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {name: min(wait or limit, limit) for name, wait in waits.items()}


def _cached(model_id: str, revision: str, error: Exception) -> Snapshot:
    from huggingface_hub import constants, errors, get_cached_repo_tree, snapshot_download, utils

    down = f"The hub at {constants.ENDPOINT} is not reachable ({_reason(error)})"
    hint = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder instead of the id."
    try:  # an empty pattern list only looks the folder up: what must be in it is checked below, by name
        folder = Path(snapshot_download(model_id, revision=revision, local_files_only=True, allow_patterns=[]))
    except errors.LocalEntryNotFoundError:
        message = f"{down}, and the cache {constants.HF_HUB_CACHE} has no snapshot of {model_id}@{revision}."
        raise CheckpointError(message, hint=hint) from error
    try:
        listing = [file.path for file in get_cached_repo_tree(model_id, revision=revision)]
    except errors.CachedRepoTreeNotFoundError:  # another tool filled the cache: the configuration and the index must do
        listing = []
    if gaps := _gaps(folder, utils.filter_repo_objects(listing, allow_patterns=WANTED, ignore_patterns=NEVER)):
        message = f"{down}, and the cached snapshot of {model_id}@{revision} is incomplete: it lacks {gaps}."
        raise CheckpointError(message, hint=hint) from error
    log.warning("%s: using the cached snapshot of %s@%s, commit %s.", down, model_id, revision, folder.name)
    return Snapshot(folder, folder.name, offline=True)


def _check_listing(model_id: str, revision: str, names: list[str], wanted: set[str]) -> None:
    """Refuse before a byte of weights is downloaded."""
    if not any(name.endswith(".safetensors") for name in wanted):
        pickles = ", ".join(sorted(name for name in names if name.endswith(PICKLES))[:3])
        found = f"only pickles, which can run code when they are opened ({pickles})" if pickles else "none at all"
        hint = f"Name a revision that has them (often {model_id}@refs/pr/1), or convert the weights locally with"
        hint += " torch.load(..., weights_only=True) and safetensors.torch.save_file, and give that folder."
        raise CheckpointError(f"{model_id}@{revision} has no safetensors weights: {found}.", hint=hint)
    if "config.json" not in wanted:
        hint = "It is not a transformers checkpoint: give the id of one."
        raise CheckpointError(f"{model_id}@{revision} has no config.json.", hint=hint)


def _gaps(folder: Path, listing: Iterable[str]) -> str:
    """What a snapshot needs and this one lacks, as text: empty if it is complete."""
    needed = {"config.json", *listing}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            needed.update(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            needed.add(f"a readable {index.name}")
    if not any(path.is_file() for path in folder.rglob("*.safetensors")):
        needed.add("*.safetensors")
    return ", ".join(sorted(name for name in needed if not (folder / name).is_file()))


def _verify(folder: Path, files: list[Any], marker: Path) -> None:
    """Check size and sha256 of what came after the marker was written (huggingface_hub checks sizes only)."""
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    for file in files:
        path = folder / file.rfilename
        if not path.is_file() or path.stat().st_mtime_ns < since:
            continue  # _gaps names what is absent
        digest = sha256_of(path)
        if (path.stat().st_size, digest) != (file.lfs.size, file.lfs.sha256):
            for bad in {path, path.resolve()}:  # the link and its blob
                bad.unlink()
            message = f"{file.rfilename} was damaged in transit: its sha256 is {digest}, not {file.lfs.sha256}."
            raise CheckpointError(message, hint="The damaged file is deleted: run the same command again.")


def _remember(folder: Path, revision: str, marker: Path) -> None:
    """Record revision -> commit for offline use, and that the files are verified: only of a complete snapshot."""
    ref = folder.parents[1] / "refs" / revision
    try:
        if revision != folder.name:
            ref.parent.mkdir(parents=True, exist_ok=True)
            draft = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            draft.write_text(folder.name)
            draft.replace(ref)
        marker.parent.mkdir(exist_ok=True)
        marker.touch()
    except OSError as error:  # a read-only cache still serves
        log.warning("The cache could not record %s: %s", ref, error)


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _refusal(error: Exception, model_id: str, revision: str) -> CheckpointError:
    from huggingface_hub import constants, errors

    cause = (isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__) or error
    status, hub, login = _status(cause), constants.ENDPOINT, "log in with `hf auth login` or set HF_TOKEN."
    if isinstance(cause, errors.RevisionNotFoundError):
        message = f"{model_id} has no revision {revision!r} on {hub}."
        hint = "Give a branch, a tag or a commit that its page lists."
    elif isinstance(cause, errors.GatedRepoError):
        message = f"{model_id} is gated: its owner must grant access to its files."
        hint = f"Accept its terms on {hub}/{model_id}, then {login}"
    elif isinstance(cause, errors.RepositoryNotFoundError) or (status == 404 and error is cause):
        message = f"There is no model {model_id} on {hub}, or it is private."
        hint = f"Check the spelling and HF_ENDPOINT; if it is private, {login}"
    elif status in (401, 403):
        message = f"{hub} refuses access to {model_id} (HTTP {status})."
        hint = f"The token is missing, expired or without the right to read it: {login}"
    elif isinstance(cause, OSError) and cause.errno:
        message = f"{model_id} could not be written to {cause.filename or constants.HF_HUB_CACHE}: {cause.strerror}."
        hint = "Free space there, correct its permissions, or set HF_HOME to another place."
    else:
        message = f"The download of {model_id}@{revision} broke off: {_reason(cause)}."
        hint = "Run the same command again: files that are complete are kept."
    return CheckpointError(message, hint=hint)
