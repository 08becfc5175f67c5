"""An encoder captured into CUDA graphs, one for each shape that is listed, compiled by inductor before or as it is.

A shape is the axes that vary: [batch, sequence] of text, [batch] of images. A graph's inputs and outputs lie in fixed
buffers: inputs are copied in, and outputs out, at each call.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html (CUDA graphs)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from optimize.models.encoding import BATCH_SIZES, LONGEST
from optimize.models.loading import sample_inputs
from optimize.passes._compiled_calls import CompiledCalls
from optimize.passes._joint_linears import join_linears
from optimize.passes._masks import spare_masks
from optimize.passes._patch_products import patches_as_products
from optimize.pipeline.contract import Array, Batch, Cell

GRAPHS, COMPILED = "graphs.json", "compiled"
AS_TORCH_CHOOSES = "sdpa"  # of its kernels for attention
WARM = 3  # calls before capture, which set up what a capture may not
Shape = tuple[int, ...]
Work = Callable[[], None]


def shapes_of(workload: Sequence[Cell], longest: int) -> list[Shape]:
    """Each cell's, and one that takes every batch that is judged: of a model that takes `longest` tokens."""
    text = any(cell.sequence for cell in workload)
    cells = [(cell.batch, cell.sequence) if text else (cell.batch,) for cell in workload]
    judged = (max(BATCH_SIZES), min(LONGEST, longest)) if text else (max(BATCH_SIZES),)
    return list(dict.fromkeys([*cells, judged]))


def fitting(shapes: Iterable[Shape], given: Shape) -> Shape | None:
    """The smallest that takes such a batch, or None."""
    found = [shape for shape in shapes if all(most >= size for most, size in zip(shape, given, strict=False))]
    return min(found, key=lambda shape: int(np.prod(shape)), default=None)


def widened(batch: Batch, shape: Shape, fill: int) -> dict[str, Array]:
    """A batch padded to a shape: tokens that are masked, and rows that nobody looks at."""
    found = {}
    for name, array in batch.items():
        wide = np.full((*shape, *array.shape[len(shape) :]), fill if name == "input_ids" else 0, dtype=array.dtype)
        if name == "attention_mask":
            wide[len(array) :] = 1  # no row without any: its attention would not be a number
        wide[tuple(map(slice, array.shape))] = array
        found[name] = wide
    return found


def prepared(path: Path, settings: Mapping[str, Any], model: Any, inputs: dict[str, Any]) -> Any:
    """What computes as a folder's settings have it: the model, rewritten as it is called on `inputs` (patches, masks,
    linear layers), or what inductor makes of it, and has made of it in that folder.
    """
    from optimize.targets.runtimes.eight_bits import read_eight_bits

    patches_as_products(model)
    if "attention_mask" not in inputs:
        spare_masks(model)
    read_eight_bits(model)
    join_linears(model, inputs)
    return CompiledCalls(model, path / COMPILED, autotune=settings["autotune"]) if settings["compile"] else model


@contextmanager
def attending(settings: Mapping[str, Any]) -> Iterator[None]:
    """In which torch takes the kernel for attention that a folder's settings name, wherever that takes the inputs. What
    was compiled with another is not taken from torch's caches, whose keys would be the same.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.attention.sdpa_kernel.html
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if (wanted := settings.get("attention", AS_TORCH_CHOOSES)) == AS_TORCH_CHOOSES:
        yield
        return
    first = getattr(SDPBackend, f"{wanted.upper()}_ATTENTION")
    every = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    order = [first, *(each for each in every if each != first)]
    with torch.compiler.config.patch(cache_key_tag=wanted), sdpa_kernel(order, set_priority=True):
        yield


def read_settings(path: Path) -> dict[str, Any]:
    """Of a folder that is captured where it is opened."""
    found: dict[str, Any] = json.loads((path / GRAPHS).read_text())
    return found


class Captured:
    """A model on the GPU with its graphs."""

    def __init__(self, path: Path, model: Any, task: str) -> None:
        settings = read_settings(path)
        self.fill: int = settings["fill"]
        self.model = model
        self._sample = sample_inputs(path, task, str(model.dtype).removeprefix("torch."))
        self.call = prepared(path, settings, model, self._buffers((1,) * len(settings["shapes"][0])))
        with attending(settings):
            self._graphs = {tuple(shape): self._capture(tuple(shape)) for shape in settings["shapes"]}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._sample)

    def graph(self, batch: Batch) -> tuple[Shape, Work, Mapping[str, Any], Mapping[str, Any]] | None:
        """The smallest shape that takes such a batch, what replays it, its buffers for inputs and outputs; or None."""
        shape = fitting(self._graphs, batch[self.inputs[0]].shape)
        return None if shape is None else (shape, *self._graphs[shape])

    def _buffers(self, shape: Shape) -> dict[str, Any]:
        import torch

        return {
            name: torch.full(
                (*shape, *value.shape[len(shape) :]),
                int(name == "attention_mask"),
                dtype=value.dtype,
                device=self.model.device,
            )
            for name, value in self._sample.items()
        }

    def _capture(self, shape: Shape) -> tuple[Work, dict[str, Any], dict[str, Any]]:
        import torch

        buffers, outputs = self._buffers(shape), dict[str, Any]()

        def compute() -> None:
            found = self.call(**buffers)
            outputs.update({name: value for name, value in found.items() if isinstance(value, torch.Tensor)})

        (replay,) = captured([compute], None, self.model.device)
        return replay, buffers, outputs


def captured(works: Sequence[Work], pool: Any, device: Any) -> list[Work]:
    """What does each of some work again, captured in their order after some turns of them all. Raises ValueError where
    it cannot be captured.
    """
    import torch

    def uncaptured(work: Work) -> Work:
        def run() -> None:
            with torch.inference_mode():
                work()

        return run

    runs = [uncaptured(work) for work in works]
    if device.type != "cuda":
        for run in runs:
            run()
        return runs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            for run in runs:
                run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in runs]
    try:
        for graph, run in zip(graphs, runs, strict=True):
            with torch.cuda.graph(graph, pool=pool):
                run()
    except RuntimeError as error:
        cause = error.__context__ or error  # what ends a capture fails then, too
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        first = str(cause).partition("\n")[0]
        message = f"it could not be captured into a CUDA graph, which takes no waiting for the GPU, for one: {first}"
        raise ValueError(message) from error
    return [graph.replay for graph in graphs]
