"""A private Ollama server: its own port, models, home and settings, never those of the user; it ends with its parent.

Source: https://docs.ollama.com/api, https://docs.ollama.com/faq (environment)
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

EXECUTABLE = "ollama"
MODELFILE = "Modelfile"
NAME = "optimized"  # of the one model that the server has
STARTING = 60.0  # seconds until it answers: it looks for GPUs first
ENDING = 5.0  # seconds until it ends when asked to
POLL = 0.1  # seconds that it has to end in, once it does not answer
SILENCE = 600.0  # seconds without a byte of an answer
HIDDEN = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
WATCH = 'read -r line; kill -KILL "-$0"'  # until the pipe ends, which it does with the one who holds it
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(folder: Path, address: str, parallel: int) -> dict[str, str]:
    """For the server and its clients: nothing of the user's settings, models or keys; the processor alone, no network.

    llama.cpp's cache of whole prompts is off, so that the time to a first token is that of reading the prompt.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OLLAMA_", "LLAMA_ARG_"))}
    return own | dict.fromkeys(HIDDEN, "-1") | {
        "HOME": str(folder), "OLLAMA_MODELS": str(folder / "models"), "OLLAMA_HOST": address,
        "OLLAMA_NUM_PARALLEL": str(parallel), "OLLAMA_KEEP_ALIVE": "-1", "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_NO_CLOUD": "1", "LLAMA_ARG_CACHE_RAM": "0",
    }  # fmt: skip


def why_not() -> str | None:
    """Why nothing of Ollama's can run here, or None."""
    if shutil.which(EXECUTABLE) is None:
        return "ollama is not on this host (not run here): the GGUF is emitted without it"
    return None


class OllamaServer:
    """`ollama serve`, which runs from `start` to `close` and keeps its models in `folder`.

    What it prints goes where this process prints. A worker's server is in the worker's process group, and is stopped
    and killed with it; elsewhere it has a group of its own. A watching process kills that group when we are gone.
    """

    def __init__(self, folder: Path, *, parallel: int = 1, host: str = "127.0.0.1", port: int = 0) -> None:
        self.parallel, self.version = parallel, ""
        self._folder, self._host, self._port = folder, host, port
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        """Start it and wait until it answers. Raises RuntimeError if it ends before, or takes too long."""
        self._port, self.version = self._port or _free_port(self._host), ""
        command = [shutil.which(EXECUTABLE) or EXECUTABLE, "serve"]
        inside = os.getsid(0) == os.getpid()  # a worker leads its session: whoever kills it kills its whole group
        group_of_its_own: dict[str, Any] = {} if inside else {"process_group": 0}
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=self._environment(), **group_of_its_own)
        group = os.getpgrp() if inside else self._process.pid
        self._watch = subprocess.Popen(["sh", "-c", WATCH, str(group)], stdin=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + STARTING
        while not self.version:
            with suppress(OSError, http.client.HTTPException):  # nobody listens yet
                self.version = str(self.ask("GET", "/api/version")["version"])
            self._check("before it answered")  # if it ended, another server answered in its place
            if time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"ollama serve did not answer on {self.address} within {STARTING:.0f} s")

    def close(self) -> None:
        """End it, and what it started."""
        import psutil

        if self._watch is not None:
            self._watch.kill()
            self._watch.communicate()
        if self._process is not None and self._process.poll() is None:
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.terminate()  # it then ends its runners
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.kill()
            self._process.wait()
        self._process = self._watch = None

    def wait(self) -> None:
        """Until it ends."""
        if self._process is not None:
            self._process.wait()

    def create(self, folder: Path) -> None:
        """Make the model of a folder's Modelfile. Raises RuntimeError with what Ollama says against it."""
        done = subprocess.run(
            [shutil.which(EXECUTABLE) or EXECUTABLE, "create", NAME, "-f", str(folder / MODELFILE)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=self._environment(),
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            said = [line.strip() for line in COLOURS.sub("", done.stderr + done.stdout).splitlines() if line.strip()]
            raise RuntimeError(f"ollama create refused the folder: {said[-1] if said else f'code {done.returncode}'}")

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One answer that is a JSON object. Raises RuntimeError for an answer that is an error."""
        (found,) = self.stream(method, path, body)
        return found

    def last(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The end of an answer to a POST."""
        *_, found = self.stream("POST", path, body)
        return found

    def stream(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The JSON objects of an answer, as they come. Raises RuntimeError for an error, and when the server ends."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=SILENCE)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            for line in connection.getresponse():
                try:
                    found: dict[str, Any] = json.loads(line)
                except ValueError:
                    raise RuntimeError(f"Ollama answered {path} with {line[:80]!r}") from None
                if "error" in found:
                    raise RuntimeError(f"Ollama answered {path} with an error: {found['error']}")
                yield found
        except (OSError, http.client.HTTPException):
            self._check(f"during {path}")
            raise
        finally:
            connection.close()

    def __enter__(self) -> OllamaServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, when: str) -> None:
        """Raise RuntimeError if the server has ended: then that is why."""
        process = self._process
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL)
            raise RuntimeError(f"ollama serve ended with exit code {code} {when}")

    def _environment(self) -> dict[str, str]:
        return environment(self._folder, self.address, self.parallel)


def _free_port(host: str) -> int:
    with socket.socket() as listening:
        listening.bind((host, 0))
        return int(listening.getsockname()[1])
