"""A small local hub: what huggingface_hub asks of the hub's HTTP API to fetch a model, with faults to switch on.

with HubServer() as hub:
    commit = hub.add("owner/name", folder)                  # a commit of that folder's files, and main points to it
    subprocess.run([...], env=hub.environment(cache))       # HF_ENDPOINT is read when huggingface_hub is imported
    hub.drop_after["model.safetensors"] = 1000              # the next GET of that file breaks off there, once

What it answers, from the library's source (hf_api.py, file_download.py, utils/_http.py):
GET  /api/models/ID/revision/REV?blobs=True  commit and files      (HfApi.model_info)
GET  /api/models/ID/tree/COMMIT              files, paged          (HfApi.list_repo_tree, in snapshot_download)
HEAD /ID/resolve/REV/PATH                    ETag, X-Repo-Commit, X-Linked-Etag, X-Linked-Size
GET  /ID/resolve/REV/PATH                    the bytes, with Range
"""

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".pt", ".onnx", ".h5", ".gguf", ".msgpack", ".model")
PAGE = 4  # files a page: a real hub pages by the thousand


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


class HubServer:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # "GET /path", with " Range: bytes=N-" where one was asked for
        self.sent: dict[str, int] = {}  # bytes of each file's body that were sent, by path in the repo
        self.status: dict[str, int] = {}  # text in the request's line -> the error to answer with
        self.alien: dict[str, bytes] = {}  # text in the request's line -> what a login portal answers instead
        self.gated: set[str] = set()  # the listing is public, the files need a token
        self.private: set[str] = set()  # nothing is public
        self.corrupt: set[str] = set()  # files whose bytes are wrong, at the right size
        self.drop_after: dict[str, int] = {}  # file -> bytes until the connection breaks, once
        self.stall: dict[str, float] = {}  # text in the request's line -> seconds until it is answered, once

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, model_id: str, folder: Path, branch: str = "main") -> str:
        """Commit the folder's files as they are now and point the branch there. Returns the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        commit = hashlib.sha1(json.dumps([model_id, content]).encode()).hexdigest()
        repo = self.repos.setdefault(model_id, Repo())
        repo.commits[commit] = files
        repo.branches[branch] = commit
        return commit

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a process that knows only this hub, and caches under home."""
        ours = re.compile(r"HF_|HUGGINGFACE_|TRANSFORMERS_OFFLINE|(https?|all)_proxy$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **extra}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms between its headers and its body

    def log_message(self, *_: Any) -> None:
        """Keep the tests' output quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        asked = self.headers.get("Range")
        hub.requests.append(f"{line} Range: {asked}" if asked else line)
        for text in [text for text in hub.stall if text in line]:
            time.sleep(hub.stall.pop(text, 0))
        for text, status in hub.status.items():
            if text in line:
                return self.fail(status, "", f"told to answer {status}")

        for text, body in hub.alien.items():
            if text in line:
                return self.answer(body)
        api = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", url.path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path)
        if not (match := api or file):
            return self.fail(404, "", "no such page")
        model_id, revision = match[1], unquote(match[3] if api else match[2])
        authorized = bool(self.headers.get("Authorization"))
        if model_id not in hub.repos or (model_id in hub.private and not authorized):
            return self.fail(401, "RepoNotFound", "Repository not found")  # 401 also for what does not exist
        repo = hub.repos[model_id]
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self.listing(model_id, commit, url)
        if model_id in hub.gated and not authorized:
            return self.fail(401, "GatedRepo", f"Access to model {model_id} is restricted")
        if (name := unquote(match[3])) not in repo.commits[commit]:
            return self.fail(404, "EntryNotFound", "Entry not found")
        return self.file(name, repo.commits[commit][name], commit)

    def listing(self, model_id: str, commit: str, url: Any) -> None:
        files = sorted(self.hub.repos[model_id].commits[commit].items())
        if "/tree/" not in url.path:
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": _sha1(data)}
                | ({"lfs": {"size": len(data), "sha256": _sha256(data), "pointerSize": 134}} if _lfs(name) else {})
                for name, data in files
            ]
            return self.answer({"_id": "0", "id": model_id, "modelId": model_id, "sha": commit, "siblings": siblings})
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        entries: list[dict[str, Any]] = [
            {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
            | ({"lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}} if _lfs(name) else {})
            for name, data in files
        ]
        entries += [
            {"type": "directory", "path": folder, "oid": "0" * 40}
            for folder in sorted({name.rpartition("/")[0] for name, _ in files} - {""})
        ]
        link = {}
        if start + PAGE < len(entries):
            link = {"Link": f'<{self.hub.url}{url.path}?recursive=True&cursor={start + PAGE}>; rel="next"'}
        return self.answer(entries[start : start + PAGE], link)

    def file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if _lfs(name):
            headers |= {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data)
        if name in self.hub.drop_after:
            end = self.hub.drop_after.pop(name)
            self.close_connection = True  # fewer bytes than Content-Length says
        self.wfile.write(data[start:end])
        self.hub.sent[name] = self.hub.sent.get(name, 0) + max(end - start, 0)

    def answer(self, content: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, headers, status)


def _lfs(name: str) -> bool:
    return name.endswith(LFS)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
