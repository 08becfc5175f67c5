"""TensorRT-LLM's two lines against a stand-in that takes what they take, and no more."""

import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.models.encoding import load_tokenizer
from optimize.passes._limits import JUDGED, Limits, limits_of
from optimize.passes._tensorrt_llm import SERVE, has_engines, serve_settings
from optimize.passes.build_tensorrt_llm import BuildTensorrtLlm
from optimize.pipeline.batches import save_batches
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Kind, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.recipe import parse
from optimize.targets.cpu import probe
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.generating import write_until
from tests import tensorrt_llm_double as double
from tests.conftest import MakeCheckpoint

TASK = "text-generation"
CELLS = (Cell(1, 16, 8), Cell(4, 32, 16))
TEXT = "The harbour was quiet, and the ferry waited."


@pytest.fixture
def source(make_language_model: MakeCheckpoint) -> Artifact:
    return Artifact(Kind.CHECKPOINT, make_language_model("LlamaForCausalLM"), "", "")


@pytest.fixture
def line(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """TensorRT-LLM of that version, as far as anyone can tell."""
    chosen: str = request.param
    for name, module in double.modules(chosen).items():
        monkeypatch.setitem(sys.modules, name, module)
    if not has_engines(chosen):
        monkeypatch.setitem(sys.modules, "tensorrt_llm._tensorrt_engine", None)  # so that importing it fails
    real = importlib.metadata.version
    monkeypatch.setattr(
        "optimize.passes.build_tensorrt_llm.version", lambda name: chosen if name == "tensorrt-llm" else real(name)
    )
    double.made.clear()
    return chosen


@pytest.fixture
def context(source: Artifact, tmp_path: Path) -> Context:
    ids = load_tokenizer(source.path)(TEXT, return_tensors="np").input_ids[0]
    save_batches(tmp_path / "calibration.npz", [{"input_ids": ids}, {"input_ids": ids[:5]}])
    return Context(TASK, probe(), tmp_path / "calibration.npz", CELLS)


@pytest.mark.parametrize("line", ["1.2.1", "1.3.0"], indirect=True)
@pytest.mark.parametrize("quantization", ["none", "fp8", "int4_awq"])
def test_what_is_built_answers_as_the_checkpoint_does(
    line: str, quantization: Any, source: Artifact, context: Context, tmp_path: Path
) -> None:
    step, out = BuildTensorrtLlm(quantization=quantization, gpus=2), tmp_path / "out"
    out.mkdir()
    facts = step.run(source, context, out)
    step.ensures(out)
    assert facts["version"] == line and facts["engine"] == (line == "1.2.1") and facts["gpus"] == 2
    eager: Any = open_session(Kind.CHECKPOINT, source.path, TASK, 1)
    session: Any = open_session(Kind.TENSORRT_LLM, out, TASK, 1)
    prompts = [np.array(load_tokenizer(source.path)(text).input_ids) for text in (TEXT, "No.")]
    np.testing.assert_allclose(session.logits(prompts[0], 3), eager.logits(prompts[0], 3), atol=0.05)  # bfloat16
    made = session.generate(prompts, 6)
    assert made.tokens.shape == (2, 6) and len(made.seconds) == 6
    assert made.seconds == tuple(sorted(made.seconds)) and made.seconds[0] < made.seconds[-1]
    session.close()
    assert not any(model.open for model in double.made)
    assert double.made[-1].given["kv_cache_config"].enable_block_reuse is False


@pytest.mark.parametrize("line", ["1.2.1"], indirect=True)
def test_engines_are_built_for_the_workload_and_calibrated_on_its_text(
    line: str, source: Artifact, context: Context, tmp_path: Path
) -> None:
    BuildTensorrtLlm(quantization="fp8", gpus=2).run(source, context, tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())["build_config"]
    assert given["max_batch_size"] == 4 and given["gather_context_logits"] is True
    assert json.loads((tmp_path / "texts.json").read_text())[0] == TEXT
    (tmp_path / "rank1.engine").unlink()
    with pytest.raises(FileNotFoundError, match=r"rank1\.engine was not written"):
        BuildTensorrtLlm(gpus=2).ensures(tmp_path)


@pytest.mark.parametrize("line", ["1.3.0"], indirect=True)
def test_later_lines_get_a_configuration_that_a_server_reads(
    line: str, source: Artifact, context: Context, tmp_path: Path
) -> None:
    import yaml

    BuildTensorrtLlm(quantization="fp8").run(source, context, tmp_path)
    settings = yaml.safe_load((tmp_path / SERVE).read_text())
    assert settings.keys() == double.SERVED
    assert settings["kv_cache_config"]["enable_block_reuse"] is True  # a server's users gain by it
    assert json.loads((tmp_path / "hf_quant_config.json").read_text()) == "fp8"
    (tmp_path / SERVE).unlink()
    with pytest.raises(FileNotFoundError, match=SERVE):
        BuildTensorrtLlm().ensures(tmp_path)


@pytest.mark.parametrize("line", ["1.2.1"], indirect=True)
def test_no_calibration_is_no_quantization(line: str, source: Artifact, context: Context, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="needs calibration data"):
        BuildTensorrtLlm(quantization="fp8").run(source, replace(context, calibration=None), tmp_path)


@pytest.mark.parametrize("line", ["1.2.1"], indirect=True)
def test_a_text_that_ends_too_early_is_an_error(
    line: str, source: Artifact, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BuildTensorrtLlm().run(source, context, tmp_path)
    session: Any = open_session(Kind.TENSORRT_LLM, tmp_path, TASK, 1)
    monkeypatch.setattr("optimize.targets.runtimes.tensorrt_llm.stream", lambda *_: iter([[1], [1, 2]]))
    with pytest.raises(RuntimeError, match="generated 2 tokens of 5"):
        session.generate([np.array([1, 2])], 5)


def test_the_stand_in_takes_no_argument_that_was_not_read() -> None:
    with pytest.raises(TypeError, match="max_batch"):
        double.recorded("BuildConfig")(max_batch=4)
    assert all(where for _, where in double.READ.values())


def test_limits_hold_the_workload_and_what_judges_it() -> None:
    assert limits_of([Cell(1, 16, 8)], 8192, JUDGED) == Limits(3, 512, 4096, 4096)
    assert limits_of([Cell(64, 1000, 24), Cell(1, 6000, 100)], 8192, JUDGED) == Limits(64, 6000, 6100, 64000)
    assert limits_of([Cell(1, 16, 8)], 256, JUDGED) == Limits(3, 256, 256, 4096)
    assert serve_settings(2, Limits(3, 512, 4096, 4096))["cuda_graph_config"]["max_batch_size"] == 3


ENGINES = [("1.2.1", True), ("1.0.0rc4", True), ("1.3.0rc1", False), ("2.0", False)]


@pytest.mark.parametrize(("version", "engines"), ENGINES)
def test_which_lines_have_engines(version: str, engines: bool) -> None:
    assert has_engines(version) is engines


def test_an_answer_ends_where_it_is_over_whatever_is_generated_behind_it() -> None:
    class Session:
        def generate(self, prompts: Any, new: int) -> Any:
            return type("Made", (), {"tokens": np.array([[5, 9, 7, 8], [1, 2, 3, 4]])})

    assert write_until(Session(), [np.array([0])] * 2, 4, lambda tokens: tokens[-1] == 9) == [[5, 9], [1, 2, 3, 4]]


def test_it_is_left_out_where_no_gpu_is(tmp_path: Path) -> None:
    step = BuildTensorrtLlm()
    generating = Checkpoint("tiny", tmp_path, None, TASK, "LlamaForCausalLM", "bfloat16", 1000, 2000, 256, {})
    assert "here is none" in str(step.requires(generating, probe()))
    gpu = Target("gpu", "NVIDIA H100", "9.0", (), ("bfloat16",), 1, 80 << 30, 1)
    assert step.requires(generating, gpu) is None
    assert "language models" in str(step.requires(replace(generating, task="fill-mask"), gpu))
    with pytest.raises(RequestError, match="gpus=0 is not at least 1"):
        parse("build-tensorrt-llm{gpus=0}")
