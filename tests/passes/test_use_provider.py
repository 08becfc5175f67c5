"""ONNX graphs for providers that run on GPUs: what is written for them, and what is said where they do not load."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from optimize.models.encoding import encode
from optimize.passes.export_onnx import ExportOnnx
from optimize.passes.use_provider import PROVIDER, UseProvider
from optimize.pipeline import versions
from optimize.pipeline.calls import call_of
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Kind, Target
from optimize.pipeline.errors import HostError
from optimize.pipeline.recipe import parse
from optimize.targets.cpu import probe
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.onnxruntime_gpu import OnnxGpuSession

TASK = "feature-extraction"
CELLS = (Cell(1, 32), Cell(8, 128))


@pytest.fixture(scope="module")
def graph(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("graph")
    ExportOnnx(dtype="float16").run(Artifact(Kind.CHECKPOINT, tiny, "", ""), Context(TASK, probe()), folder)
    return Artifact(Kind.ONNX, folder, "", "")


def test_engines_are_built_for_every_text_and_for_each_cell(graph: Artifact, tmp_path: Path) -> None:
    step = UseProvider(provider="tensorrt")
    step.run(graph, Context(TASK, probe(), None, CELLS), tmp_path)
    step.ensures(tmp_path)
    chosen = json.loads((tmp_path / PROVIDER).read_text())
    assert chosen["provider"] == "TensorrtExecutionProvider"
    shapes = {name: value.split(",") for name, value in chosen["options"].items()}
    assert shapes.keys() == {f"trt_profile_{which}_shapes" for which in ("min", "opt", "max")}
    inputs = {"input_ids", "token_type_ids", "attention_mask"}
    for each, wide in zip(("min", "opt", "max"), ("1x1", "8x128", "8x512"), strict=True):
        found = shapes[f"trt_profile_{each}_shapes"]
        assert {text.split(":")[0] for text in found} == inputs and len(found) == 9
        assert [text for text in found if text.startswith("input_ids:")] == [
            f"input_ids:{shape}" for shape in (wide, "1x32", "8x128")
        ]
    assert UseProvider(provider="tensorrt-rtx").shaped and not UseProvider().shaped


def test_a_provider_that_does_not_load_is_no_processor_in_disguise(graph: Artifact, tmp_path: Path) -> None:
    UseProvider().run(graph, Context(TASK, probe()), tmp_path)
    assert json.loads((tmp_path / PROVIDER).read_text())["options"] == {"use_tf32": "0"}
    with pytest.raises(HostError, match="CUDAExecutionProvider did not load"):
        open_session(Kind.ONNX_GPU, tmp_path, TASK, 1)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx was not written"):
        UseProvider().ensures(tmp_path)


def test_outputs_of_16_bits_are_widened(graph: Artifact, tiny: Path) -> None:
    batch = encode(tiny, [{"text": "The tide came in."}], 16, (1,))[0]
    assert open_session(Kind.ONNX, graph.path, TASK, 1).run(batch)["last_hidden_state"].dtype == "float32"


def test_what_is_timed_stays_where_it_is_computed(graph: Artifact, tiny: Path) -> None:
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(graph.path / "model.onnx", options, providers=["CPUExecutionProvider"])
    bound = OnnxGpuSession(session, "cpu")
    batch = encode(tiny, [{"text": "The tide came in."}, {"text": "It went."}], 16, (2,))[0]
    call = call_of(bound, batch)
    (seconds,) = call.timed()
    assert seconds > 0
    found = call.run().get_outputs()[0].numpy()
    np.testing.assert_array_equal(found.astype(np.float32), bound.run(batch)["last_hidden_state"])


def test_a_version_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = Checkpoint("tiny", tmp_path, None, TASK, "BertModel", "float32", 1000, 4000, 256, {})
    monkeypatch.setattr(versions, "installed_version", lambda _: "5.17.0")
    for text in ("export-onnx", "convert-openvino", "compile-aoti"):
        reason = str(parse(text).why_not(checkpoint, probe()))
        assert "needs transformers 5.23 or newer, and 5.17.0 is installed: pip install" in reason
    assert parse("cast-dtype").why_not(checkpoint, probe()) is None


def test_one_forward_pass_is_no_language_model(tmp_path: Path) -> None:
    writing = Checkpoint("m", tmp_path, None, "text-generation", "LlamaForCausalLM", "float32", 1000, 4000, 256, {})
    assert "build-genai is for language models" in str(parse("export-onnx").why_not(writing, probe()))
    assert "compile-generate is for language models" in str(parse("compile-aoti").why_not(writing, probe()))


def test_it_is_left_out_where_no_gpu_is(tmp_path: Path) -> None:
    checkpoint = Checkpoint("tiny", tmp_path, None, TASK, "BertModel", "float32", 1000, 4000, 256, {})
    recipe = parse("export-onnx,use-provider")
    assert recipe.toolchains == ("onnxruntime-gpu",)
    assert "here is none" in str(recipe.why_not(checkpoint, probe()))
    fused = parse("export-onnx{fused=true;provider=cuda}")
    assert "provider=cuda makes operators for NVIDIA GPUs" in str(fused.why_not(checkpoint, probe()))
    assert recipe.why_not(checkpoint, Target("gpu", "NVIDIA H100", "9.0", (), ("float16",), 1, 80 << 30, 1)) is None
