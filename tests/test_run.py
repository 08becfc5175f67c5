"""The main job on the real encoder: what is emitted, what is refused, and that nothing is built twice."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from optimize.pipeline.manifest import schema
from tests.conftest import QUICK, Cli, Install, Outcome, run_optimize

# one that is accurate, two that are not: which one is emitted does not hang on this host's noise
RECIPES = ("convert-openvino,hint-openvino", "convert-openvino,quantize-openvino", "export-onnx,quantize-onnx")
NOISE = """
from optimize.passes.quantize_openvino import QuantizeOpenvino
import numpy as np
from optimize.pipeline.batches import load_batches, save_batches
from dataclasses import replace

@dataclass(frozen=True)
class Noise(QuantizeOpenvino):
    name: ClassVar = "quantize-on-noise"
    def run(self, source, context, out):
        random = np.random.default_rng(0)
        batches = load_batches(context.calibration)
        for batch in batches:
            batch["input_ids"] = random.integers(0, 30522, batch["input_ids"].shape)
        path = out.parent / "noise.npz"
        save_batches(path, batches)
        return super().run(source, replace(context, calibration=path), out)
"""


@pytest.fixture(scope="module")
def emitted(
    minilm: Path, some_text: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """One real run of three recipes; the other tests look at what it left."""
    folder = tmp_path_factory.mktemp("emitted")
    options = [*(word for text in RECIPES for word in ("--recipe", text)), "--data", some_text, *QUICK]
    return folder / "minilm", run_optimize(folder, shared_cache, minilm, *options, "--out", folder / "minilm")


def test_the_run_emits_bf16_and_rejects_int8(emitted: tuple[Path, Outcome]) -> None:
    out, outcome = emitted
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    by_name = {candidate["name"]: candidate for candidate in outcome.report["candidates"]}
    assert outcome.report["emitted"] == RECIPES[0]
    assert by_name[RECIPES[1]]["status"] == "inaccurate"
    assert by_name[RECIPES[1]]["speed"] is not None
    assert by_name[RECIPES[2]]["status"] == "inaccurate"
    assert by_name[RECIPES[0]]["accuracy"]["worst_drop"] < 1e-3
    assert f"emitted {RECIPES[0]}" in outcome.output
    assert (out / "openvino_model.xml").is_file()


def test_the_manifest_is_valid_and_names_every_file(emitted: tuple[Path, Outcome]) -> None:
    out, _ = emitted
    manifest = json.loads((out / "optimize.json").read_text())
    jsonschema.validate(manifest, schema())
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == manifest["files"].keys() | {"optimize.json"}
    assert "tokenizer.json" in there
    assert "model.safetensors" not in there


def test_the_raw_samples_amount_to_the_reported_speed(emitted: tuple[Path, Outcome]) -> None:
    out, _ = emitted
    samples = json.loads((out / "evidence" / "samples.json").read_text())[RECIPES[0]]
    logs = []
    for quad in samples:
        cells = zip(*[[np.log(np.median(calls)) for calls in block] for block in quad], strict=True)
        logs.append(np.mean([(a - b - c + d) / 2 for a, b, c, d in cells]))
    manifest = json.loads((out / "optimize.json").read_text())
    pairs = [(first + second) / 2 for index, first in enumerate(logs) for second in logs[index:]]
    assert np.exp(np.median(pairs)) == pytest.approx(manifest["speed"]["overall"]["value"])
    assert manifest["speed"]["quads"] == len(samples) >= 8


def test_the_model_card_runs_without_this_package(emitted: tuple[Path, Outcome], minilm: Path) -> None:
    out, _ = emitted
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    blocked = "import sys; sys.modules['optimize'] = None\n" + code
    blocked += "\nimport numpy; numpy.save(sys.argv[1], outputs['last_hidden_state'])"
    saved = out.parent / "outputs.npy"
    subprocess.run([sys.executable, "-c", blocked, saved], cwd=out, check=True, timeout=120)
    assert _cosine(np.load(saved), _eager(minilm, ["Some text."])) > 0.999


def test_load_drops_into_transformers_pipeline(emitted: tuple[Path, Outcome], minilm: Path) -> None:
    from transformers import pipeline

    import optimize

    texts = ["A short one.", "Another, rather longer than the first, with more words in it."]
    model = optimize.load(emitted[0])
    found = pipeline("feature-extraction", model=model, tokenizer=str(emitted[0]))(texts)
    expected = pipeline("feature-extraction", model=str(minilm))(texts)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.shape(ours) == np.shape(theirs)
        assert _cosine(np.array(ours), np.array(theirs)) > 0.999


def test_load_fills_in_masks_and_names_bad_input(emitted: tuple[Path, Outcome], minilm: Path) -> None:
    import torch

    import optimize

    model = optimize.load(emitted[0])
    ids = torch.tensor([[101, 7592, 2088, 102]])
    assert torch.equal(model(ids).last_hidden_state, model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state)
    assert model(ids)[0].shape == (1, 4, 384)
    with pytest.raises(ValueError, match="input_ids is missing"):
        model(attention_mask=ids)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=ids[:, :2])
    with pytest.raises(ValueError, match="cannot move to cuda"):
        model.to("cuda")
    with pytest.raises(ValueError, match="input_ids has values outside of 0 to 30521"):
        model([[101, 30522]])
    with pytest.raises(ValueError, match="whole numbers"):
        model([[1.5]])
    with pytest.raises(ValueError, match="longer than the model's limit of"):
        model(torch.ones((1, 513), dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: the artifact takes"):
        model(ids, labels=ids)
    assert isinstance(model(ids, torch.ones_like(ids), return_dict=False), tuple)


def test_a_second_run_builds_nothing(
    emitted: tuple[Path, Outcome], minilm: Path, some_text: Path, cli: Cli, tmp_path: Path
) -> None:
    planned = cli(minilm, "--recipe", RECIPES[1], "--data", some_text, *QUICK, "--dry-run")
    assert "[cached]" in planned.output
    assert "[build]" not in planned.output
    outcome = cli(minilm, "--recipe", RECIPES[0], "--data", some_text, *QUICK, "--out", tmp_path / "again")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    assert all(step["cached"] for candidate in outcome.report["candidates"] for step in candidate["steps"])


def test_a_recipe_can_be_given_by_its_name(tiny: Path, cli: Cli) -> None:
    planned = cli(tiny, "--recipe", "openvino-int8-keep1", "--recipe", "cast-dtype", "--dry-run")
    assert planned.code == 0, planned.output
    assert "openvino-int8-keep1" in planned.output and "quantize-openvino{keep=1}" in planned.output
    assert "is inaccurate" not in planned.output, "asked for, it does not wait for another one to fail"


def test_an_encoder_has_no_text_to_serve(emitted: tuple[Path, Outcome], cli: Cli) -> None:
    outcome = cli("serve", emitted[0])
    assert outcome.code == 2 and "continues no text" in outcome.output and "optimize.load" in outcome.output


def test_verify_passes_then_finds_each_kind_of_damage(emitted: tuple[Path, Outcome], cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(emitted[0], copy)
    outcome = cli("verify", copy, "--budget", "1s")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    assert outcome.report["same_host"]
    weights = copy / "openvino_model.bin"
    damaged = bytearray(weights.read_bytes())
    damaged[1000] ^= 1
    weights.write_bytes(damaged)
    assert "openvino_model.bin is changed" in (found := cli("verify", copy)).output
    assert found.code == 2
    weights.unlink()
    assert "openvino_model.bin is missing" in cli("verify", copy).output
    shutil.copyfile(emitted[0] / weights.name, weights)
    (copy / "extra.txt").write_text("")
    assert "extra.txt is unexpected" in cli("verify", copy).output
    (copy / "extra.txt").unlink()
    manifest = json.loads((copy / "optimize.json").read_text())
    manifest["files"] = {name: digest for name, digest in manifest["files"].items() if "evidence" not in name}
    (copy / "optimize.json").write_text(json.dumps(manifest))
    shutil.rmtree(copy / "evidence")
    assert "nothing to repeat the gates with" in (found := cli("verify", copy)).output
    assert found.code == 2


def test_verify_on_another_host_does_not_judge_speed(emitted: tuple[Path, Outcome], cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(emitted[0], copy)
    manifest = json.loads((copy / "optimize.json").read_text())
    manifest["report"]["host"]["target"]["device"] = "Another processor"
    manifest["report"]["gates"]["min_speedup"] = 100.0
    manifest["report"]["checkpoint"]["folder"] = "/nowhere"
    (copy / "optimize.json").write_text(json.dumps(manifest))
    outcome = cli("verify", copy)
    assert outcome.code == 0, outcome.output
    assert "is not on this host" in outcome.output
    assert "speed does not decide" in outcome.output


@pytest.mark.parametrize(
    "recipe", ["convert-openvino,quantize-on-noise", "export-onnx,quantize-onnx{mode=static;samples=1}"]
)
def test_bad_calibration_is_rejected(
    recipe: str, minilm: Path, some_text: Path, cli: Cli, third_party: Install, tmp_path: Path
) -> None:
    third_party(NOISE, {"quantize-on-noise": "Noise"})
    options = ("--data", some_text, *QUICK, "--max-drop", "0.005")
    outcome = cli(minilm, "--recipe", recipe, *options, "--out", tmp_path / "out")
    assert outcome.code == 4, outcome.output
    assert outcome.report is not None
    (candidate,) = outcome.report["candidates"]
    assert candidate["accuracy"]["drop"]["low"] > 0.005
    assert not (tmp_path / "out").exists()


def _eager(folder: Path, texts: list[str]) -> np.ndarray:
    import torch
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).last_hidden_state.numpy()


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    return float((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))
