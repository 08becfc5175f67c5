"""Casting weights piece by piece: the same values as torch's, the same names and shards, and what stays in float32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimize.models import casting
from optimize.models.casting import ALIGNMENT, align_weights, cast_weights
from optimize.models.loading import cast_checkpoint, load_model
from optimize.models.weights import INDEX, inspect_weights
from tests.conftest import MakeCheckpoint

MIXED = {
    "odd": torch.randn(3, 5), "small": torch.randn(7).to(torch.float16), "steps": torch.arange(4),
    "empty": torch.zeros(0, 4), "wide": torch.randn(2, 2, dtype=torch.float64), "scalar": torch.tensor(1.5),
    "extreme": torch.tensor([1e38, -0.0, float("inf"), float("nan"), 1e-40]),
}  # fmt: skip


@pytest.mark.parametrize("piece", [2, 1 << 22], ids=["in pieces", "at once"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_are_those_of_torch(dtype: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casting, "PIECE", piece)
    (tmp_path / "out").mkdir()
    save_file(MIXED, tmp_path / "model.safetensors", metadata={"format": "pt", "made": "here"})
    assert cast_weights(tmp_path, tmp_path / "out", dtype, lambda name: name == "wide") == (5, 7)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in MIXED.items():
        wanted = tensor if name in ("wide", "steps") else tensor.to(getattr(torch, dtype))
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name].nan_to_num(0), wanted.nan_to_num(0)), name
        assert found[name].data_ptr() % found[name].itemsize == 0
    assert not (tmp_path / "out" / INDEX).exists()


def test_round_sizes_are_aligned_whatever_lies_between(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(MIXED | {"a": torch.ones(3, 64, dtype=torch.int8), "z": torch.ones(2, 32)}, path, metadata={"some": "x"})
    before = load_file(path)
    align_weights(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {"some": "x"} and sorted(tmp_path.iterdir()) == [path]
    assert all((8 + length + header[name]["data_offsets"][0]) % ALIGNMENT == 0 for name in ("a", "z", "empty"))
    found = load_file(path)
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].nan_to_num(0), tensor.nan_to_num(0))
        assert found[name].data_ptr() % found[name].itemsize == 0


def test_shards_stay_shards(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    whole = make_checkpoint()
    load_model(whole, "feature-extraction").save_pretrained(tmp_path / "shards", max_shard_size="3MB")
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "shards" / name).write_bytes((whole / name).read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    cast_checkpoint(tmp_path / "shards", out, "bfloat16", "feature-extraction")
    before, after = inspect_weights(tmp_path / "shards"), inspect_weights(out)
    assert len(after.files) > 1 and after.files == before.files
    assert (after.dtype, after.parameters, 2 * after.bytes) == ("bfloat16", before.parameters, before.bytes)
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == after.bytes
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "tokenizer.json").is_file()
    expected = load_model(whole, "feature-extraction").to(torch.bfloat16).state_dict()
    found = load_model(out, "feature-extraction").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # by a file, and as to any other device: on their way there
def test_a_model_of_another_dtype_is_the_checkpoint_s_own_values(make_checkpoint: MakeCheckpoint, device: str) -> None:
    folder = make_checkpoint(dtype="bfloat16")
    model = load_model(folder, "feature-extraction", "float32", device)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    stored = load_model(folder, "feature-extraction").state_dict()
    assert all(torch.equal(value.to(torch.bfloat16), stored[name]) for name, value in model.state_dict().items())


def test_what_transformers_computes_in_float32_stays_so(make_language_model: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_language_model(
        "DeepseekV3ForCausalLM", moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16,
        qk_nope_head_dim=8, num_key_value_heads=4,
    )  # fmt: skip
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.full_like(weights[name], 1.001)  # which bfloat16 does not have
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    cast_checkpoint(folder, tmp_path, "bfloat16", "text-generation")
    cast = load_file(tmp_path / "model.safetensors")
    assert {key for key, value in cast.items() if value.dtype is torch.float32} == {name}
    found = load_model(tmp_path, "text-generation").state_dict()
    assert torch.equal(found[name], weights[name])
