"""A trace has to answer at other shapes, and with other masks, than it was made with."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from optimize.models.encoding import encode
from optimize.passes.torchscript import Torchscript
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Kind
from optimize.pipeline.recipe import parse
from optimize.targets.cpu import probe
from optimize.targets.runtimes import open_session

TASK = "feature-extraction"
TEXTS = ("Yes.", "A text of some more words than that.", "One, two, three, four, five, six.")
ROWS = [{"text": text} for text in TEXTS]


def test_a_trace_answers_as_eager_does(tiny: Path, tmp_path: Path) -> None:
    source = Artifact(Kind.CHECKPOINT, tiny, "", "")
    facts = Torchscript().run(source, Context(TASK, probe()), tmp_path)
    Torchscript().ensures(tmp_path)
    assert facts["operations"] > 50
    eager, traced = open_session(Kind.CHECKPOINT, tiny, TASK, 1), open_session(Kind.TORCHSCRIPT, tmp_path, TASK, 1)
    assert set(traced.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
    batches = [encode(tiny, ROWS, 64, (size,))[0] for size in (1, 3)]
    for batch in batches:
        expected, found = eager.run(batch), traced.run(batch)
        assert found.keys() == expected.keys()
        valid = batch["attention_mask"] != 0
        np.testing.assert_allclose(found["last_hidden_state"][valid], expected["last_hidden_state"][valid], atol=1e-4)
    assert batches[0]["input_ids"].shape != batches[1]["input_ids"].shape
    assert (batches[1]["attention_mask"] == 0).any()


def test_nothing_is_written_where_torch_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.pt"):
        Torchscript().ensures(tmp_path)


@pytest.mark.parametrize("text", ["torchscript", "optimize-ipex", "export-optimum"])
def test_language_models_are_left_out(text: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint("m", tmp_path, None, "text-generation", "LlamaForCausalLM", "float32", 1, 4, 128, {})
    assert parse(text).why_not(checkpoint, probe())
    checkpoint = Checkpoint(**asdict(checkpoint) | {"task": TASK, "dimensions": checkpoint.dimensions})
    assert parse("torchscript").why_not(checkpoint, probe()) is None
