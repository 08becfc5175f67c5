"""convert-openvino: what OpenVINO makes of the graph, where the numbers alone would not tell."""

from collections import Counter
from pathlib import Path

import openvino
import pytest

from optimize.passes.convert_openvino import IR, ConvertOpenvino
from optimize.pipeline.contract import Artifact, Context, Kind
from optimize.targets.cpu import probe
from tests.conftest import MakeCheckpoint


@pytest.mark.parametrize(("heads", "repeats"), [(2, 4), (4, 0)], ids=["heads share keys", "each has its own"])
def test_attention_over_the_cache_is_one_operation(
    heads: int, repeats: int, make_language_model: MakeCheckpoint, tmp_path: Path
) -> None:
    """Two layers; otherwise the cache is copied at every step, at half the speed."""
    source = Artifact(Kind.CHECKPOINT, make_language_model(num_key_value_heads=heads), "", "")
    facts = ConvertOpenvino().run(source, Context("text-generation", probe()), tmp_path)
    assert facts["repeated_heads"] == repeats
    # without a number of threads, OpenVINO 2026.4 divides by zero in a process that has one core
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / IR, "CPU", options)
    operations = compiled.get_runtime_model().get_ordered_ops()
    kinds = Counter(each.get_rt_info()["layerType"].astype(str) for each in operations)
    assert (kinds["ScaledDotProductAttention"], kinds["Softmax"]) == (2, 0)
