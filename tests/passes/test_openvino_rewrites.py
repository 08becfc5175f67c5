"""Rewrites of OpenVINO's language models: the same answers, by fewer products, from smoother activations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from optimize.passes import quantize_openvino
from optimize.passes._openvino_rewrites import _by_input, _float_weights, _highest, shared_scale, smooth_activations
from optimize.passes.convert_openvino import IR, RUNTIME_OPTIONS, ConvertOpenvino
from optimize.passes.quantize_openvino import QuantizeOpenvino, is_matmul_of_weights
from optimize.pipeline.batches import save_batches
from optimize.pipeline.contract import Artifact, Context, Kind, Pass
from optimize.targets.cpu import probe
from tests.conftest import MakeCheckpoint

GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
Converted = tuple[Artifact, Context]


@pytest.fixture(scope="module")
def converted(make_language_model: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Two layers, 64 wide; one channel of the first norm is 200 times as large as it was."""
    from safetensors.numpy import load_file, save_file

    checkpoint = make_language_model()
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][7] *= 200
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    folder = tmp_path_factory.mktemp("ir")
    tokens = np.random.default_rng(0).integers(8, 500, (4, 48))
    save_batches(folder / "calibration.npz", [{"input_ids": row} for row in tokens])
    context = Context("text-generation", probe(), folder / "calibration.npz")
    ConvertOpenvino().run(Artifact(Kind.CHECKPOINT, checkpoint, "", ""), context, folder)
    return Artifact(Kind.OPENVINO, folder, "", ""), context


def test_products_of_one_input_are_merged_and_answer_the_same(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, context = converted
    merged, apart = tmp_path / "merged", tmp_path / "apart"
    facts = _made(merged, QuantizeOpenvino(mode="weights"), source, context)
    assert facts["merged"] == 4  # queries with keys and values, and a gate with what it gates, in two layers
    monkeypatch.setattr(quantize_openvino, "merge_products", lambda model: 0)
    _made(apart, QuantizeOpenvino(mode="weights"), source, context)
    models = [openvino.Core().read_model(folder / IR) for folder in (merged, apart)]
    assert [quantize_openvino._count(model, is_matmul_of_weights) for model in models] == [9, 15]
    np.testing.assert_allclose(*map(_logits, models), rtol=1e-4, atol=1e-4)


def test_smoothing_leaves_the_answers_and_takes_an_outlier_away(converted: Converted) -> None:
    source, context = converted
    plain, smooth = (openvino.Core().read_model(source.path / IR) for _ in range(2))
    feeds = quantize_openvino._feeds(plain, context.calibration)
    assert smooth_activations(smooth, feeds) == 7  # a norm of the head, and of two layers both norms and a gate
    np.testing.assert_allclose(_logits(plain), _logits(smooth), rtol=1e-3, atol=1e-3)
    outlying = [_outlying(model, feeds) for model in (plain, smooth)]
    assert outlying[0] > 50 and outlying[1] < outlying[0] / 5


def test_more_activations_share_a_scale_once_they_are_smooth(converted: Converted, tmp_path: Path) -> None:
    """The widest that divides 64 and 96."""
    source, context = converted
    found = {}
    for smooth in (True, False):
        out = tmp_path / str(smooth)
        _made(out, QuantizeOpenvino(mode="weights", smooth=smooth), source, context)
        found[smooth] = json.loads((out / RUNTIME_OPTIONS).read_text()).get(GROUP)
    assert found == {True: 32, False: None}
    assert shared_scale(openvino.Core().read_model(source.path / IR)) == 32


def test_a_model_with_no_channels_to_smooth_keeps_openvinos_own_scales(
    make_language_model: MakeCheckpoint, converted: Converted, tmp_path: Path
) -> None:
    """GPT-2's norms add a bias behind their weight."""
    _, context = converted
    ir, out = tmp_path / "ir", tmp_path / "out"
    checkpoint = Artifact(Kind.CHECKPOINT, make_language_model("GPT2LMHeadModel"), "", "")
    _made(ir, ConvertOpenvino(), checkpoint, context)
    source = Artifact(Kind.OPENVINO, ir, "", "")
    facts = _made(out, QuantizeOpenvino(mode="weights", smooth=True), source, context)
    assert facts["smoothed"] == 0 and GROUP not in json.loads((out / RUNTIME_OPTIONS).read_text())


def _made(out: Path, step: Pass, source: Artifact, context: Context) -> dict[str, Any]:
    out.mkdir()
    return step.run(source, context, out)


def _logits(model: Any) -> Any:
    """Of one text; activations as they are."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, GROUP: 0}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    ids = np.arange(10, 50)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(40)[None],
             "beam_idx": np.zeros(1, dtype=np.int32)}  # fmt: skip
    request.infer({port.any_name: feeds[port.any_name] for port in model.inputs})
    return np.array(request.get_tensor("logits").data)


def _outlying(model: Any, feeds: Any) -> float:
    """Of the first product's input: the largest channel over the middle one."""
    highest = _highest(model, _by_input(model, _float_weights), feeds)[0]
    return float(highest.max() / np.median(highest))
