"""Look at a local checkpoint's weights before anything loads them.

Only names and headers are read, never tensor data, so the answer comes at once whatever the size. Pickled weights are
refused and never opened: unpickling runs code. The safetensors format, in short: 8 bytes, little-endian, give the
length of the header, a JSON object of tensor name -> dtype, shape, data_offsets; the tensors' data fills the rest of
the file without overlap or hole. Source: https://huggingface.co/docs/safetensors/index#format
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from optimize.pipeline.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer headers
NUMBER_LIMIT = 2**63 - 1  # torch counts elements and bytes in an int64
DTYPES = {  # safetensors dtype -> bits per element, torch dtype; F6_E2M3 and F6_E3M2 have no torch dtype
    "BOOL": (8, "bool"), "U8": (8, "uint8"), "U16": (16, "uint16"), "U32": (32, "uint32"), "U64": (64, "uint64"),
    "I8": (8, "int8"), "I16": (16, "int16"), "I32": (32, "int32"), "I64": (64, "int64"),
    "F16": (16, "float16"), "BF16": (16, "bfloat16"), "F32": (32, "float32"), "F64": (64, "float64"),
    "C64": (64, "complex64"), "F4": (4, "float4_e2m1fn_x2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
}  # fmt: skip
PICKLES = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = (
    "openvino_",
    "optimizer",
    "rng_state",
    "scaler",
    "scheduler",
    "training_args",
)  # though named *.bin, *.pt
CONVERT = (  # argv: output, inputs; clone() gives each tied tensor its own storage, which save_file demands
    "import sys, torch; from safetensors.torch import save_file; "
    "state = {name: tensor.contiguous().clone() for path in sys.argv[2:] "
    'for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()}; '
    'save_file(state, sys.argv[1], metadata={"format": "pt"})'
)


@dataclass(frozen=True)
class Weights:
    """What a checkpoint's headers say about its weights."""

    files: tuple[str, ...]  # names relative to the folder, sorted; the index file is not among them
    parameters: int  # number of tensor elements
    bytes: int  # tensor bytes as stored
    dtype: str  # the torch dtype that holds most elements: "float32", "bfloat16", ...
    largest: int  # elements of the largest tensor


@dataclass(frozen=True)
class _Tensor:
    dtype: str  # torch spelling
    elements: int
    begin: int  # bytes from the end of the header
    end: int


def inspect_weights(folder: Path) -> Weights:
    """Check and count the weights of a local checkpoint folder, from headers alone.

    As in transformers, `model.safetensors` wins over `model.safetensors.index.json` and its shards. Raises
    CheckpointError, which names the file, what is wrong and what to do next, if the weights are absent, pickled,
    damaged or linked from outside the folder (links that the hub's cache makes are followed).
    """
    try:
        weight_map: dict[str, str] = {}
        files = [SINGLE]
        if not (folder / SINGLE).is_file():
            if not (folder / INDEX).is_file():
                raise _no_weights(folder)
            weight_map = _read_index(folder / INDEX)
            files = sorted(set(weight_map.values()))
        if missing := [name for name in files if not (folder / name).is_file()]:
            message = f"{folder / INDEX}: {len(missing)} of its {len(files)} shards are missing: {_some(missing)}"
            raise CheckpointError(message, hint=_download(folder))
        headers = {name: _read_header(folder / name) for name in files}
    except OSError as error:
        message = f"{error.filename or folder}: {error.strerror}"
        raise CheckpointError(message, hint="Check that it is there and readable.") from error

    for name, file in weight_map.items():
        if name not in headers[file]:
            raise _damaged(folder / INDEX, f"it lists tensor {_quote(name)} in {file}, which does not hold it")
    # Keyed by name, later files last: where two shards hold one name, transformers keeps the later one too.
    tensors = {name: tensor for file in files for name, tensor in headers[file].items()}.values()
    if not tensors:
        raise _damaged(folder / SINGLE, "it holds no tensors")

    elements: dict[str, int] = {}
    for tensor in tensors:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
    return Weights(
        files=tuple(files),
        parameters=sum(elements.values()),
        bytes=sum(tensor.end - tensor.begin for tensor in tensors),
        dtype=max(elements, key=lambda dtype: (elements[dtype], dtype)),  # a tie is decided by name, to be stable
        largest=max(tensor.elements for tensor in tensors),
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, each a plain file name."""
    check_home(path)
    with path.open("rb") as file:
        index = _parse_object(path, file.read(HEADER_LIMIT))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "it has no weight_map that gives each tensor's shard")
    if not isinstance(index.get("metadata"), dict):
        raise _damaged(path, 'it has no metadata object, and transformers needs one: "metadata": {} will do')
    for name in weight_map.values():
        # PureWindowsPath knows both separators and drive letters. Any other suffix would be opened as a pickle.
        plain = isinstance(name, str) and name.isprintable() and PureWindowsPath(name).parts == (name,)
        if not plain or not name.endswith(".safetensors"):
            raise _damaged(path, f"it names the shard {_quote(name)}; only plain *.safetensors names are allowed")
    return weight_map


def _read_header(path: Path) -> dict[str, _Tensor]:
    """Tensor name -> tensor, proved to cover the file's data exactly."""
    check_home(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            command = shlex.join(["git", "-C", str(path.parent), "lfs", "pull"])
            raise CheckpointError(f"{path}: a Git LFS pointer, not the weights", hint=f"Fetch the weights: {command}")
        if len(prefix) < 8:
            raise _damaged(path, f"it is {size} bytes long: empty or truncated")
        length = int.from_bytes(prefix, "little")
        if length > min(HEADER_LIMIT, size - 8):
            limits = f"{size - 8:,} follow and {HEADER_LIMIT:,} are allowed: truncated, or not safetensors"
            raise _damaged(path, f"it announces a header of {length:,} bytes, but {limits}")
        entries = _parse_object(path, file.read(length))

    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict | None) or not all(isinstance(value, str) for value in (metadata or {}).values()):
        raise _damaged(path, "its __metadata__ is not an object of strings")
    tensors = {name: _read_tensor(path, name, entry) for name, entry in entries.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            problem = "overlaps another tensor" if tensor.begin < position else "leaves a hole before it"
            raise _damaged(path, f"tensor {_quote(name)} {problem}: offset {tensor.begin:,}, expected {position:,}")
        position = tensor.end
    data = size - 8 - length
    if position != data:
        problem = "truncated" if position > data else "trailing bytes"
        raise _damaged(path, f"its header describes {position:,} bytes of data, the file holds {data:,}: {problem}")
    return tensors


def _read_tensor(path: Path, name: str, entry: Any) -> _Tensor:
    where = f"tensor {_quote(name)}"
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise _damaged(path, f"{where} lacks a dtype, a shape or two data_offsets")
    if dtype not in DTYPES:
        hint = f"Convert the checkpoint to one of: {', '.join(DTYPES)}."
        raise CheckpointError(f"{path}: {where} has dtype {_quote(dtype)}, unknown to torch", hint=hint)
    if not all(type(number) is int and 0 <= number <= NUMBER_LIMIT for number in (*shape, begin, end)):  # no bool
        raise _damaged(path, f"{where} has a shape or offset that is not an integer from 0 to 2**63 - 1")
    bits, torch_dtype = DTYPES[dtype]
    elements = 1
    for length in shape:
        elements *= length
        if elements > NUMBER_LIMIT:  # checked at each step: a long, absurd shape must not make a huge product
            raise _damaged(path, f"{where} has an absurd shape: 2**63 elements or more")
    if elements * bits != 8 * (end - begin):
        need = f"{dtype} x {_quote(shape)} needs {elements * bits / 8:,.15g}"
        raise _damaged(path, f"{where} has offsets for {end - begin:,} bytes, but {need}")
    return _Tensor(torch_dtype, elements, begin, end)


def _parse_object(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key, value in pairs:
            if key in members:
                raise ValueError(f"duplicate key {_quote(key)}")
            members[key] = value
        return members

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its JSON is broken: {error}") from error
    if not isinstance(value, dict):
        raise _damaged(path, "its JSON is not an object")
    return value


def check_home(path: Path, folder: Path | None = None) -> None:
    """A link may lead only to the checkpoint's folder (if not given, the file's own), or to where the hub's cache keeps
    the blobs of its repository. Raises CheckpointError for any other.
    """
    root, target = (folder or path.parent).resolve(), path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # <cache>/models--org--name/snapshots/<revision>
        repository = root.parent.parent
        homes.append(repository / "blobs")
        if repository.name.startswith("models--"):
            homes.append(repository.parent / "blobs")  # huggingface-hub 2 shares blobs between repositories
    if not any(target.is_relative_to(home) for home in homes):
        command = shlex.join(["cp", "--remove-destination", str(target), str(path)])
        message = f"{path}: a link that leaves the checkpoint's folder, to {target}"
        raise CheckpointError(message, hint=f"If you trust that file, copy it in: {command}")


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    if present := [name for name in (SINGLE, INDEX) if name in names]:
        return _damaged(folder / present[0], "it is not a file, or a link that leads nowhere")
    pickles = [name for name in names if name.endswith(PICKLES) and not name.startswith(NOT_WEIGHTS)]
    pickles = [name for name in pickles if name.startswith("pytorch_model")] or pickles
    if inputs := [str(folder / name) for name in pickles if not name.endswith(".json")]:
        command = shlex.join(["python", "-c", CONVERT, str(folder / SINGLE), *inputs])
        message = f"{folder}: only pickled weights ({_some(pickles)}), which are never loaded: they can run code"
        return CheckpointError(message, hint=f"Convert them without running their code: {command}")
    if foreign := [name for name in names if name.endswith((".h5", ".msgpack"))]:
        hint = "Convert them with transformers 4: from_pretrained(..., from_tf=True or from_flax=True), save_pretrained"
        return CheckpointError(f"{folder}: only TensorFlow or Flax weights ({_some(foreign)})", hint=hint)
    message = f"{folder}: no weights: neither {SINGLE} nor {INDEX}, but {_some(names) or 'nothing at all'}"
    return CheckpointError(message, hint=_download(folder))


def _damaged(path: Path, problem: str) -> CheckpointError:
    command = shlex.join(["hf", "download", "MODEL_ID", path.name, "--force-download"])
    return CheckpointError(f"{path}: {problem}", hint=f"Replace it with a good copy: {command}")


def _download(folder: Path) -> str:
    return f"Download what is missing: {shlex.join(['hf', 'download', 'MODEL_ID', '--local-dir', str(folder)])}"


def _some(names: list[str]) -> str:
    return ", ".join(map(_quote, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _quote(value: object) -> str:
    return f"{value!r:.100}"  # the checkpoint's own text: escaped, and cut to fit a line
