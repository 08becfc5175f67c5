"""One of several processes that compute a language model together: `python -m optimize.targets.runtimes.rank`.

Asked by ranks.py over a pipe; it ends when that is closed. Standard output and error are those of whoever asks.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from optimize.models.loading import load_model
from optimize.pipeline.errors import HostError, OptimizeError
from optimize.targets.runtimes.eager import EagerGenerator, end_nowhere
from optimize.targets.runtimes.ranks import TOLD


def open_shards(path: str, task: str, threads: int, device: str, store: str, limit: float) -> EagerGenerator:
    """This rank's part of the model, on its own GPU, or on the processor."""
    torch.set_num_threads(threads)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = torch.device("cuda", rank) if device == "cuda" else None
    if place is not None:
        if torch.cuda.device_count() < count:
            raise HostError(f"it is for {count} GPUs, and here are {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place is not None else "gloo", store=dist.FileStore(store, count), rank=rank, world_size=count,
        timeout=timedelta(seconds=limit), device_id=place,
    )  # fmt: skip
    model = load_model(Path(path), task, shards=count)
    end_nowhere(model)
    return EagerGenerator(model, str(place or "cpu"))


def serve(asked: Connection) -> None:
    """Open what the first request names, then answer the others: the first rank with what it found."""
    first = os.environ["RANK"] == "0"
    try:
        session = open_shards(*asked.recv())
        asked.send({"answer": None})
        while True:
            operation, arguments = asked.recv()
            answer = getattr(session, operation)(*arguments)
            asked.send({"answer": answer if first else None})
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        told = error if isinstance(error, OptimizeError) else f"{type(error).__name__}: {error}"
        asked.send({"error": told})
        raise


def main() -> None:
    """Ctrl-C is for whoever asks, and the signal that asks where this process is needs no thread of Python's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ["RANK"] != "0":
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    number = int(os.environ.pop("OPTIMIZE_RANK"))
    os.set_inheritable(number, False)
    with Path(os.environ.pop("OPTIMIZE_WHERE")).open("w") as where, Connection(number) as asked:
        faulthandler.register(TOLD, where, all_threads=False)
        serve(asked)
    os._exit(0)  # without a word to the others, who have ended or will


if __name__ == "__main__":
    main()
