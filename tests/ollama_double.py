"""Stands in for `ollama`, which cannot be installed where this project is tested: the commands and endpoints that are
used, over the same GGUF in llama.cpp. DOUBLE_FAULT in the environment names what goes wrong.
"""

import json
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from optimize.targets.runtimes.llamacpp import LlamaCppSession

VERSION = "0.0.1-double"
FAULT = os.environ.get("DOUBLE_FAULT", "")
CONTROL = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "<s>", "</s>", "<|endoftext|>")  # they have no text
ENDS = ("<|im_end|>", "<|endoftext|>")
REPEATED = 30  # like pieces in a row, after which an answer is broken off without a last line
HOST, _, PORT = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").partition(":")


class Handler(BaseHTTPRequestHandler):
    """The endpoints. One model, one request at a time."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    session: LlamaCppSession | None = None

    def do_GET(self) -> None:
        self.reply([{"version": VERSION}])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = Path(os.environ["OLLAMA_MODELS"]) / f"{body['model']}.json"
        if self.path == "/api/create":
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(json.dumps(body))
            self.reply([{"status": "success"}])
        elif not name.is_file():
            self.reply([{"error": f"model '{body['model']}' not found"}], 404)
        elif self.path == "/api/show":
            self.reply([json.loads(name.read_text()) | {"capabilities": ["completion"]}])
        else:
            with self.lock:
                if Handler.session is None:
                    Handler.session = LlamaCppSession(Path(json.loads(name.read_text())["from"]), 2)
                self.reply(self.written(Handler.session, body))

    def written(self, session: LlamaCppSession, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of an answer: a piece of text for each token, or for those that make one character."""
        options = body["options"]
        assert body["raw"] and options["temperature"] == 0 and options["stop"] == [], body
        prompt = session.tokenize(body["prompt"], special=True)
        assert len(prompt) + options["num_predict"] <= options["num_ctx"], body
        tokens, told, reason = [], [], "length"
        logits = session.prefill([np.array(prompt)], options["num_predict"])[0]
        while len(tokens) < options["num_predict"]:
            tokens.append(int(logits.argmax()))
            told.append(float(logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()))
            if session.detokenize(tokens[-1:]).decode(errors="replace") in ENDS:
                reason = "stop"
                break
            logits = session.step(np.array(tokens[-1:]))[0]
        held, last, again = b"", "", 0
        for token, logprob in zip(tokens[:: -1 if FAULT == "reversed" else 1], told, strict=True):
            text = session.detokenize([token])
            held += b"" if text.decode(errors="replace") in CONTROL else text
            try:
                piece, held = held.decode(), b""
            except UnicodeDecodeError:
                continue
            again, last = (again + 1 if piece.strip() == last else 0), piece.strip()
            if again > REPEATED:
                return
            if piece:
                yield {"response": piece, "done": False} | (
                    {"logprobs": [{"token": piece, "logprob": logprob}]} if body["logprobs"] else {}
                )
            if FAULT == "dies":
                os._exit(7)
        yield {"response": "", "done": True, "done_reason": reason, "prompt_eval_count": len(prompt),
               "eval_count": len(tokens)}  # fmt: skip

    def reply(self, lines: Any, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = json.dumps(line).encode() + b"\n"
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


def serve() -> None:
    if FAULT == "ends":
        sys.exit(3)
    if FAULT == "silent":
        time.sleep(60)
    with ThreadingHTTPServer((HOST, int(PORT)), Handler) as server:
        server.serve_forever()


def create(name: str, modelfile: Path) -> None:
    text = modelfile.read_text()
    if FAULT == "refuses":
        sys.exit("\x1b[?25lError: unsupported architecture\x1b[?25h")
    body = {
        "model": name, "from": str((modelfile.parent / re.findall(r"^FROM (.+)$", text, re.M)[0]).resolve()),
        "template": re.findall(r'TEMPLATE """(.*?)"""', text, re.S)[0], "modelfile": text,
        "parameters": "\n".join(re.findall(r"^PARAMETER (.+)$", text, re.M)),
    }  # fmt: skip
    urllib.request.urlopen(f"http://{HOST}:{PORT}/api/create", json.dumps(body).encode()).read()


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "serve":
        serve()
    elif command == "create":
        create(rest[0], Path(rest[2]))
    elif command == "--version":
        print(f"Warning: could not connect to a running Ollama instance\nWarning: client version is {VERSION}")
    else:
        sys.exit(f"Error: unknown command {command!r}")
