"""GGUF files, run by llama.cpp through its C functions: xllamacpp brings the library, and binds its server alone,
which gives no logits of a prompt.

Structures pass by value, so their layout matters. Of llama_context_params the first fields are written; they are
recognized by the values that llama.cpp gives them, and anything else is refused.
Source: https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from optimize.passes import _ggml
from optimize.passes.convert_gguf import MODEL
from optimize.pipeline.contract import Array
from optimize.pipeline.errors import RequestError

BATCH = 2048  # tokens in one call of llama_decode, at most
ROUND = 256  # contexts are made that much longer at a time, so that few are made


class _ModelParams(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint64 * 64)]  # longer than it is, which the ABI allows for a last argument


class _ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("opaque", ctypes.c_uint64 * 60),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_free": (None, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
}
_SILENT = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)


def library() -> Any:
    """llama.cpp's functions. Raises RuntimeError where its structures are not those above."""
    found = ctypes.CDLL(str(_ggml.library()))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    default = found.llama_context_default_params()
    seen = (default.n_ctx, default.n_batch, default.n_ubatch, default.n_seq_max)
    if seen != (512, 2048, 512, 1):
        raise RuntimeError(f"this xllamacpp has another llama.cpp than is known here ({seen}): pip install -U optimize")
    found.llama_log_set(ctypes.cast(_SILENT, c_void_p), None)
    found.llama_backend_init()
    return found


class LlamaCppSession:
    """A model and one context, which is made anew where a call needs a longer one."""

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, path: Path, cores: int) -> None:
        self._library, self._cores = library(), cores
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocab))
        self._context: int | None = None
        self._room = (0, 0)  # tokens of each sequence, and sequences, that the context has room for
        self._lengths: list[int] = []  # of the sequences that it holds

    def logits(self, tokens: Array, keep: int) -> Array:
        """Of the last `keep` positions of one sequence, int64 of [sequence]: float32 of [keep, vocabulary]."""
        self._open(len(tokens), 1)
        return self._decode([np.asarray(tokens)], keep)

    def prefill(self, prompts: Sequence[Array], room: int) -> Array:
        """Begin anew with these prompts, int64 of [sequence] each, and `room` tokens to come; see `step`."""
        self._open(max(map(len, prompts)) + room, len(prompts))
        return self._decode([np.asarray(prompt) for prompt in prompts])

    def step(self, tokens: Array) -> Array:
        """Append one token to each sequence: the logits of what comes next, float32 of [batch, vocabulary]."""
        return self._decode([np.asarray([token]) for token in tokens])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """As llama.cpp does it, `special` tokens inside the text being recognized or not; nothing is put around it."""
        data = text.encode()
        room = len(data) + 16
        buffer = (c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, room, False, special)
        return list(buffer[:count])

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens one after the other, as servers stream them; special ones are spelt out."""
        buffer = ctypes.create_string_buffer(1024)
        found = b""
        for token in tokens:
            count = self._library.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            found += buffer.raw[:count]
        return found

    def chat_template(self) -> str | None:
        """As it stands in the file."""
        found = self._library.llama_model_chat_template(self._model, None)
        return found.decode() if found is not None else None

    def _open(self, tokens: int, sequences: int) -> None:
        tokens = -(-tokens // ROUND) * ROUND
        if self._context is None or tokens > self._room[0] or sequences != self._room[1]:
            if self._context is not None:
                self._library.llama_free(self._context)
            params = self._library.llama_context_default_params()
            params.n_ctx, params.n_seq_max = tokens * sequences, sequences
            params.n_batch = BATCH
            self._context = self._library.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError(f"llama.cpp has no memory for {sequences} sequences of {tokens} tokens")
            self._library.llama_set_n_threads(self._context, self._cores, self._cores)
            self._room = (tokens, sequences)
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._lengths = [0] * sequences

    def _decode(self, parts: Sequence[Array], keep: int = 1) -> Array:
        """Append a part to each sequence; logits of the last `keep` positions of each part."""
        token = np.concatenate(parts).astype(np.int32)
        position = np.concatenate([start + np.arange(len(part)) for start, part in
                                   zip(self._lengths, parts, strict=True)]).astype(np.int32)  # fmt: skip
        sequence = np.concatenate([np.full(len(part), index) for index, part in enumerate(parts)]).astype(np.int32)
        wanted = np.concatenate([np.arange(len(part)) >= len(part) - keep for part in parts]).astype(np.int8)
        self._lengths = [start + len(part) for start, part in zip(self._lengths, parts, strict=True)]
        logits, found = np.empty((int(wanted.sum()), self.vocabulary), dtype=np.float32), 0
        for begin in range(0, len(token), BATCH):
            chunk = slice(begin, begin + BATCH)
            self._decode_chunk(token[chunk], position[chunk], sequence[chunk], wanted[chunk])
            for index in np.flatnonzero(wanted[chunk]):
                row = self._library.llama_get_logits_ith(self._context, int(index))
                logits[found] = np.ctypeslib.as_array(row, (self.vocabulary,))
                found += 1
        return logits

    def _decode_chunk(self, token: Array, position: Array, sequence: Array, wanted: Array) -> None:
        ones = np.ones(len(token), dtype=np.int32)
        sequence = np.ascontiguousarray(sequence)
        address, size = sequence.ctypes.data, sequence.itemsize
        pointers = (POINTER(c_int32) * len(token))(
            *(ctypes.cast(address + size * index, POINTER(c_int32)) for index in range(len(token)))
        )
        arrays = [np.ascontiguousarray(array) for array in (token, position, wanted)]
        batch = _Batch(
            len(token), arrays[0].ctypes.data_as(POINTER(c_int32)), None, arrays[1].ctypes.data_as(POINTER(c_int32)),
            ones.ctypes.data_as(POINTER(c_int32)), pointers, arrays[2].ctypes.data_as(POINTER(c_int8)),
        )  # fmt: skip
        code = self._library.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode failed with {code} on {len(token)} tokens")


def open_session(path: Path, task: str, cores: int) -> LlamaCppSession:
    return LlamaCppSession(path / MODEL, cores)


def serve(path: Path, host: str, port: int, cores: int) -> None:
    """llama.cpp's own server, until interrupted. Raises RequestError where it cannot listen, or does not start."""
    import signal
    import socket

    import xllamacpp

    try:
        with socket.create_server((host, port)):  # its own words for this are few
            pass
    except OSError as error:
        raise RequestError(f"cannot listen at {host}:{port}: {error}", hint="name others: --host, --port") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(path / MODEL)
    params.hostnames, params.port = [host], port
    params.cpuparams.n_threads = cores
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise RequestError(f"llama.cpp's server does not start: {error}", hint="its own words are above") from None
    print(f"{server.listening_address}/v1", flush=True)
    signal.pause()
