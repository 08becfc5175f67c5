"""quantize-openvino: the bias correction takes each product's mean error away; what is kept stays in float."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.models.checkpoint import resolve
from optimize.models.encoding import encode
from optimize.models.examples import read_examples
from optimize.models.tasks import TASKS
from optimize.passes import quantize_openvino
from optimize.passes.convert_openvino import IR, ConvertOpenvino
from optimize.passes.quantize_openvino import QuantizeOpenvino
from optimize.pipeline.batches import Encoded, load_batches, save_batches
from optimize.pipeline.contract import Artifact, Context, Kind
from optimize.pipeline.recipe import parse
from optimize.targets.cpu import probe
from tests.conftest import MakeCheckpoint

TASK = "feature-extraction"
FIRST_PRODUCT = "linear_0/aten.linear.default/MatMul"


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Context]:
    """The tiny checkpoint as an OpenVINO IR, and forty calibration texts."""
    folder = tmp_path_factory.mktemp("ir")
    calibration = folder / "calibration.npz"
    texts = read_examples(None, TASKS[TASK]).calibration[:40]
    save_batches(calibration, encode(tiny, texts, 64, (1,)))
    context = Context(TASK, probe(), calibration)
    out = folder / "ir"
    out.mkdir()
    ConvertOpenvino().run(Artifact(Kind.CHECKPOINT, tiny, "key", "digest"), context, out)
    return Artifact(Kind.OPENVINO, out, "key", "digest"), context


def test_rows_that_are_no_whole_groups_are_left_out_of_the_plan(
    make_language_model: MakeCheckpoint,
) -> None:
    folder = make_language_model(hidden_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=40)
    checkpoint = resolve(str(folder))
    text, groups = "convert-openvino,quantize-openvino{{mode=int4;group={}}}", (0, 16, 32, 96)
    reasons = {group: parse(text.format(group)).why_not(checkpoint, probe()) for group in groups}
    assert reasons[16] is None
    assert "rows of 160 weights are no whole groups of 96" in str(reasons[96])  # what attention's output takes
    assert parse(text.format(-1)).why_not(checkpoint, probe()) is None  # a scale for each row
    assert reasons[32] is None and "group=0 is not at least 1" in str(reasons[0])


def test_bias_correction_takes_the_mean_error_away(
    converted: tuple[Artifact, Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, context = converted
    corrected = _quantize(QuantizeOpenvino(), source, context, tmp_path / "corrected")
    monkeypatch.setattr(quantize_openvino, "_correct_bias", lambda *arguments: None)
    plain = _quantize(QuantizeOpenvino(), source, context, tmp_path / "plain")
    feeds = load_batches(context.calibration)  # type: ignore[arg-type]
    expected = _first_product(source.path, feeds)
    before = np.abs((_first_product(plain, feeds) - expected).mean(axis=0)).mean()
    after = np.abs((_first_product(corrected, feeds) - expected).mean(axis=0)).mean()
    assert after < 0.9 * before  # the rest comes in with its inputs: the embeddings are int8 too


def test_kept_products_stay_in_floating_point_and_are_named(
    converted: tuple[Artifact, Context], tmp_path: Path
) -> None:
    source, context = converted
    out = tmp_path / "out"
    out.mkdir()
    facts = QuantizeOpenvino(keep=2).run(source, context, out)
    assert facts["quantized"] == facts["eligible"] - 2
    assert len(set(facts["kept"])) == 2


def _quantize(step: QuantizeOpenvino, source: Artifact, context: Context, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    step.run(source, context, out)
    return out


def _first_product(folder: Path, feeds: list[Encoded]) -> Any:
    """The first matrix product by weights with its bias, over all tokens: [tokens, features]."""
    import openvino

    model = openvino.Core().read_model(folder / IR)
    product = next(node for node in model.get_ordered_ops() if node.get_friendly_name() == FIRST_PRODUCT)
    (following,) = product.output(0).get_target_inputs()
    node = following.get_node() if following.get_node().get_type_name() == "Add" else product
    probe = openvino.Model([node.output(0)], model.get_parameters(), "first product")
    compiled = openvino.Core().compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [port.any_name for port in compiled.inputs]
    found = [compiled({name: feed[name] for name in names})[0] for feed in feeds]
    return np.concatenate([array.reshape(-1, array.shape[-1]) for array in found])
