"""What resolve() finds, pins and refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optimize.models.checkpoint import carried_files, check_generation, id2label, max_length, resolve
from optimize.models.loading import load_model
from optimize.pipeline.errors import CheckpointError
from optimize.pipeline.store import sha256_of
from tests.models.hub_server import HubServer

MINILM_CARRIES = [
    "1_Pooling/config.json", "config.json", "config_sentence_transformers.json", "data_config.json", "modules.json",
    "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
]  # fmt: skip
RESOLVE = """
import dataclasses, json, sys
from optimize.models.checkpoint import resolve
for model in sys.argv[1:]:
    print(json.dumps(dataclasses.asdict(resolve(model)), default=str))
"""


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def configure(folder: Path, name: str = "config.json", **changed: Any) -> Path:
    """Change keys of a JSON file; a file that is not there is made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changed))
    return folder


def test_resolves_a_local_folder(minilm: Path) -> None:
    found = resolve(str(minilm))
    assert (found.model_id, found.revision, found.name) == (minilm.resolve().name, None, minilm.resolve().name)
    assert (found.task, found.architecture, found.dtype) == ("sentence-similarity", "BertModel", "float32")
    assert (found.parameters, found.max_length) == (22_713_216 + 512, 512)
    assert found.weight_bytes == 4 * 22_713_216 + 8 * 512  # its position ids are stored as integers
    assert sorted(found.files) == sorted([*MINILM_CARRIES, "model.safetensors"])
    assert all(found.files[name] == sha256_of(minilm / name) for name in found.files)


def test_resolves_a_folder_named_by_a_dot(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    assert resolve(".").name == "copy"


def test_resolves_a_hub_id_at_one_commit(copy: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "modeling_evil.py", "training_args.bin"):
        (copy / name).write_text("never")
    with HubServer() as hub:
        old = hub.add("owner/name", copy, branch="v1")
        new = hub.add("owner/name", configure(copy, "notes.json", a=1))
        command = [sys.executable, "-c", RESOLVE, "owner/name", "owner/name@v1", f"owner/name@{old}"]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        main, branch, commit = map(json.loads, done.stdout.splitlines())
    assert (main["revision"], branch["revision"], commit["revision"]) == (new, old, old)
    assert {each["model_id"] for each in (main, branch, commit)} == {"owner/name"}
    assert main["files"].keys() - branch["files"].keys() == {"notes.json"}
    assert branch["files"] == commit["files"]
    assert all(digest == sha256_of(copy / name) for name, digest in main["files"].items())
    assert Path(main["folder"]).name == new
    assert not [path for path in Path(main["folder"]).rglob("*") if path.suffix in (".bin", ".py")]


def test_carries_configuration_and_tokenizer_never_weights_or_code(tmp_path: Path) -> None:
    carried = ["LICENSE", "LICENSE.txt", "1_Pooling/config.json", "chat_template.jinja", "config.json", "merges.txt",
               "sentencepiece.bpe.model", "spiece.model", "tokenizer.json", "vocab.txt"]  # fmt: skip
    left = ["README.md", "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "modeling.py", "evil.pkl", "m.pt", "m.onnx", "m.gguf",
            "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "onnx/config.json", "1_Pooling/evil.py",
            "sub/1_Pooling/config.json", "a b.json", ".hidden/config.json", "evil.so", "run.sh"]  # fmt: skip
    for name in carried + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(carried_files(tmp_path)) == sorted(carried)


def test_refuses_a_carried_file_that_lies_elsewhere(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("nobody's to publish")
    (copy / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(CheckpointError, match="a link that leaves the checkpoint's folder"):
        resolve(str(copy))


def test_weights_are_loaded_in_their_own_dtype_whatever_the_configuration_says(tiny: Path, tmp_path: Path) -> None:
    import torch

    folder = shutil.copytree(tiny, tmp_path / "contradictory")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    assert resolve(str(folder)).dtype == "float32"
    assert load_model(folder, "feature-extraction").dtype is torch.float32


def test_refuses_a_configuration_that_names_other_weights(copy: Path) -> None:
    shutil.copyfile(copy / "model.safetensors", copy / "other.safetensors")
    with pytest.raises(CheckpointError, match="transformers_weights"):
        resolve(str(configure(copy, transformers_weights="other.safetensors")))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_refuses_code_of_the_checkpoint(copy: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="never executed"):
        resolve(str(configure(copy, name, auto_map={"AutoModel": "evil.Model"})))


def test_refuses_code_whose_key_is_escaped(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(r'{"auto\u005fmap": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    with pytest.raises(CheckpointError, match="never executed"):
        resolve(str(copy))


def test_refuses_what_does_not_fit_into_memory(tiny: Path) -> None:
    assert resolve(str(tiny), memory=2 << 30).parameters > 0
    with pytest.raises(CheckpointError, match=r"float32 reference needs about 0\.8 GiB of memory, 0\.5 may be used"):
        resolve(str(tiny), memory=1 << 29)


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, None, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": 128}, 128),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": int(1e30)}, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, {"model_max_length": None}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, None, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, {"model_max_length": 512}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, None, 1024),
        ({"model_type": "xlnet"}, None, 512),
        ({"model_type": "llama", "max_position_embeddings": 256}, {"model_max_length": float("inf")}, 256),
    ],
)
def test_max_length_is_what_model_and_tokenizer_take(
    config: dict[str, Any], tokenizer: dict[str, Any] | None, expected: int, tmp_path: Path
) -> None:
    if tokenizer is not None:
        configure(tmp_path, "tokenizer_config.json", **tokenizer)
    assert max_length(tmp_path, config) == expected


@pytest.mark.parametrize(("positions", "limit"), [(0, None), (-5, None), (256, -4)])
def test_refuses_a_length_that_nothing_fits_in(positions: int, limit: int | None, tmp_path: Path) -> None:
    configure(tmp_path, "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(CheckpointError, match="max_position_embeddings or model_max_length leaves"):
        max_length(tmp_path, {"model_type": "llama", "max_position_embeddings": positions})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eos_token_id": [2, -1]}, "eos_token_id has -1, which is no token"),
        ({"eos_token_id": "</s>"}, "eos_token_id has '</s>'"),
        ({"temperature": "hot"}, "temperature is 'hot', not a number"),
    ],
)
def test_refuses_settings_that_no_runtime_could_be_told(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    configure(tmp_path, "generation_config.json", **settings)
    with pytest.raises(CheckpointError, match=words):
        check_generation(tmp_path)
    configure(tmp_path, "generation_config.json", eos_token_id=[0, 511], temperature=None, top_p=1)
    check_generation(tmp_path)


def test_max_length_of_a_roberta_that_leaves_its_padding_at_the_default(tmp_path: Path) -> None:
    assert max_length(tmp_path, {"model_type": "roberta", "max_position_embeddings": 514}) == 512


def test_labels_are_the_configurations(tmp_path: Path) -> None:
    assert id2label(configure(tmp_path, id2label={"0": "bad", "1": "good"})) == {0: "bad", 1: "good"}
    assert id2label(configure(tmp_path, id2label=None, num_labels=3)) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
