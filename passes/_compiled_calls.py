"""A model's calls as inductor compiles them, each for the shapes that it is first called with, and kept in files.

What was kept is opened without a trace, which takes torch seconds for each call: a file has the kernels, and beside it
lie the names of the tensors that they take (the model's, its caches', the call's) and the places of the outputs. Only
the torch that wrote it opens it, on a like device; anywhere else calls are compiled again, and that is said.
Source: torch._inductor.standalone_compile (by torch's own words a prototype; vLLM keeps what it compiles with it, too)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.passes._fused_gelu import fuse

logger = logging.getLogger(__name__)
INDEX = "calls.json"  # of a folder of compiled calls, which tells what its other files are
MOST = 64  # calls of one model that may differ


class Outputs(dict[str, Any]):
    """Tensors by name, and as attributes: as transformers gives them."""

    __getattr__ = dict.__getitem__


@dataclass(frozen=True)
class Compiled:
    """What computes one call: of tensors by these names, with outputs at these places, or that are such a tensor."""

    compute: Any
    inputs: Sequence[str]
    outputs: Mapping[str, int | str]

    def __call__(self, tensors: Mapping[str, Any]) -> Outputs:
        found = self.compute(*(tensors[name] for name in self.inputs))
        return Outputs({
            name: tensors[place] if isinstance(place, str) else found[place] for name, place in self.outputs.items()
        })  # fmt: skip


class CompiledCalls:
    """Computes what a model does, called by keyword with tensors, plain values and static caches; of its outputs, those
    that are tensors. Of what a call changes, tensors alone are changed each time: what a cache's other attributes are
    to be, is for whoever calls.
    """

    def __init__(self, model: Any, folder: Path, *, autotune: bool) -> None:
        """What was kept in the folder, if it is there, is opened as it is called."""
        import torch

        if model.device.type == "cuda":  # kept graphs call operations of ours, which are known once they are imported
            from optimize.targets.runtimes import few_rows, one_query  # noqa: F401
        self._model, self._folder, self._autotune = model, folder, autotune
        self._kept = self._index()
        self._made: dict[str, Compiled] = {}
        self._ran: tuple[Any, Sequence[Any], Sequence[Any]] | None = None  # what was compiled, its inputs, its outputs
        self._traced = torch.compile(model, backend=self._compile, dynamic=False, fullgraph=True)

    def __call__(self, **given: Any) -> Any:
        form, tensors = form_of(given), named(self._model, given)
        if form in self._kept and form not in self._made:
            self._open(form, tensors)
        if form in self._made:
            return self._made[form](tensors)
        return self._trace(form, given, tensors)

    def save(self, folder: Path) -> None:
        """Write what was compiled to a new folder."""
        folder.mkdir()
        calls = {}
        for number, (form, call) in enumerate(self._made.items()):
            call.compute.save(path=str(folder / f"{number}.graph"))
            calls[form] = {"file": f"{number}.graph", "inputs": call.inputs, "outputs": call.outputs}
        (folder / INDEX).write_text(json.dumps({"device": self._device(), "calls": calls}, indent=1))

    def _device(self) -> str:
        import torch

        device = self._model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)

    def _index(self) -> dict[str, Any]:
        """What was kept, by the calls' forms."""
        if not self._folder.is_dir():
            return {}
        try:
            index = json.loads((self._folder / INDEX).read_text())
            device, calls = index["device"], dict(index["calls"])
        except Exception as error:  # whatever is wrong with the file
            return self._without(f"{type(error).__name__}: {error}")
        here = self._device()
        return calls if device == here else self._without(f"it is for {device}, and here is {here}")

    def _without(self, why: str) -> dict[str, Any]:
        logger.warning("%s: what was compiled is compiled again, since %s", self._folder, why)
        return {}

    def _open(self, form: str, tensors: Mapping[str, Any]) -> None:
        import torch

        try:
            call = self._kept[form]
            if unknown := sorted(set(call["inputs"]) - tensors.keys()):
                raise ValueError(f"there is no {unknown[0]}")
            compute = torch._inductor.CompiledArtifact.load(path=str(self._folder / call["file"]))
            self._made[form] = Compiled(compute, call["inputs"], call["outputs"])
        except AssertionError:  # all that torch says where another torch wrote it
            self._kept = self._without(f"torch {torch.__version__} did not write it")
        except Exception as error:  # whatever is wrong with the file
            self._kept = self._without(f"{type(error).__name__}: {error}")

    def _trace(self, form: str, given: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
        """The model's outputs; what computed them is there the next time."""
        import torch
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        with dynamo.patch(recompile_limit=MOST), inductor.patch(max_autotune=self._autotune):
            outputs = self._traced(**given)
        assert self._ran is not None
        (compute, took, gave), self._ran = self._ran, None
        names = {id(tensor): name for name, tensor in tensors.items()}
        places: dict[int, int | str] = names | {id(tensor): place for place, tensor in enumerate(gave)}
        told = {name: each for name, each in outputs.items() if isinstance(each, torch.Tensor)}
        if compute is not None and {*map(id, took)} <= names.keys() and {*map(id, told.values())} <= places.keys():
            inputs = [names[id(each)] for each in took]
            self._made[form] = Compiled(compute, inputs, {name: places[id(each)] for name, each in told.items()})
        else:
            logger.warning("a call of %s is compiled again wherever it is opened", type(self._model).__name__)
        return outputs

    def _compile(self, module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend of torch.compile."""
        import torch
        from torch._inductor.compile_fx import compile_fx

        fuse(module)
        try:
            kept = torch._inductor.standalone_compile(module, inputs, dynamic_shapes="from_example_inputs", aot=True)
        except RuntimeError as error:  # it may have what cannot be kept
            logger.warning("what was compiled cannot be kept: %s", error)
            kept = None
        compute = kept or compile_fx(module, inputs)

        def run(*took: Any) -> Any:
            gave = compute(*took)
            self._ran = kept, took, gave
            return gave

        return run


def form_of(given: Mapping[str, Any]) -> str:
    """What tells a call from others: the shapes and dtypes of its tensors, which of them are the same, and its plain
    values.
    """
    import torch

    words, first = list[str](), dict[int, str]()
    for name, value in _leaves(given):
        same = first.setdefault(id(value), name) if isinstance(value, torch.Tensor) else name
        if same != name:
            words.append(f"{name} is {same}")
        elif isinstance(value, torch.Tensor):
            words.append(f"{name}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
        else:
            words.append(f"{name}={value}")
    return ", ".join(words)


def named(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a model, and of what it is called with, by name."""
    import torch

    found = {f"model.{name}": each for name, each in model.named_parameters(remove_duplicate=False)}
    found |= {f"model.{name}": each for name, each in model.named_buffers(remove_duplicate=False)}
    return found | {name: each for name, each in _leaves(given) if isinstance(each, torch.Tensor)}


def _leaves(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Its values, those in tuples too, and the tensors of caches."""
    import torch

    for name, value in given.items():
        if isinstance(value, tuple):
            yield from _leaves({f"{name}.{index}": each for index, each in enumerate(value)})
        elif hasattr(value, "self_attention_cache"):
            parts = {"own": value.self_attention_cache, "cross": value.cross_attention_cache}
            yield from _leaves({f"{name}.{part}": each for part, each in parts.items()})
        elif hasattr(value, "layers"):
            for index, layer in enumerate(value.layers):
                tensors = {key: each for key, each in vars(layer).items() if isinstance(each, torch.Tensor)}
                yield from ((f"{name}.{index}.{key}", each) for key, each in tensors.items())
        else:
            yield name, value
