"""ONNX graphs for providers that run on GPUs: what is written for them, and what is said where they do not load."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from optimize.models.encoding import encode
from optimize.models.images import encode_sample
from optimize.passes._onnx import read_graph
from optimize.passes.export_onnx import ExportOnnx
from optimize.passes.use_provider import CAPTURES, PROVIDER, UseProvider
from optimize.pipeline import versions
from optimize.pipeline.calls import call_of
from optimize.pipeline.contract import Artifact, Cell, Checkpoint, Context, Kind, Target
from optimize.pipeline.errors import HostError
from optimize.pipeline.recipe import parse
from optimize.pipeline.usage import by_provider
from optimize.targets.cpu import probe
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.onnxruntime_gpu import GRAPHS, OnnxGpuSession
from tests.conftest import QUICK, Cli, MakeCheckpoint

TASK = "feature-extraction"
TOOLCHAIN = "OPTIMIZE_TOOLCHAIN_ONNXRUNTIME_GPU"
FUSED = "export-onnx{fused=true;provider=cuda;dtype=float16}"
CELLS = (Cell(1, 32), Cell(8, 128))


@pytest.fixture(scope="module")
def graph(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("graph")
    step = ExportOnnx(dtype="float16", provider="cuda")
    step.run(Artifact(Kind.CHECKPOINT, tiny, "", ""), Context(TASK, probe()), folder)
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
    assert json.loads((tmp_path / PROVIDER).read_text())["options"] == {"use_tf32": "0", CAPTURES: "1"}
    with pytest.raises(HostError, match="CUDAExecutionProvider did not load"):
        open_session(Kind.ONNX_GPU, tmp_path, TASK, 1)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx was not written"):
        UseProvider().ensures(tmp_path)


def test_outputs_of_16_bits_are_widened(graph: Artifact, tiny: Path) -> None:
    batch = encode(tiny, [{"text": "The tide came in."}], 16, (1,))[0]
    assert open_session(Kind.ONNX, graph.path, TASK, 1).run(batch)["last_hidden_state"].dtype == "float32"


def bound(graph: Artifact, *, captures: bool) -> OnnxGpuSession:
    """As on a GPU, on the processor: its provider captures nothing, and computes each time."""
    session = onnxruntime.InferenceSession(graph.path / "model.onnx", providers=["CPUExecutionProvider"])
    return OnnxGpuSession(session, "cpu", captures=captures)


@pytest.mark.parametrize("captures", [False, True])
def test_what_is_timed_stays_where_it_is_computed(graph: Artifact, tiny: Path, captures: bool) -> None:
    session, uncaptured = bound(graph, captures=captures), open_session(Kind.ONNX, graph.path, TASK, 1)
    texts = ("The tide came in.", "It went.", "A new moon.")
    batches = [encode(tiny, [{"text": text}, {"text": "It went."}], 16, (2,))[0] for text in texts]
    batches += [batch | {"input_ids": np.flip(batch["input_ids"], axis=-1).copy()} for batch in batches]
    answers = [uncaptured.run(batch)["last_hidden_state"] for batch in batches]
    calls = [call_of(session, batch) for batch in batches]  # of shapes that come again: each has its own inputs
    for call, answer in zip(calls, answers, strict=True):
        (seconds,) = call.timed()
        assert seconds > 0
        found = call.run()[0]
        np.testing.assert_array_equal(found.numpy().astype(np.float32), answer)
    for batch, answer in zip(batches * 3, answers * 3, strict=True):
        np.testing.assert_array_equal(session.run(batch)["last_hidden_state"], answer)


def test_shapes_that_come_again_are_captured_up_to_a_number(graph: Artifact, tiny: Path) -> None:
    session, captured = bound(graph, captures=True), list[int]()
    capture = session._capture
    session._capture = lambda arrays: captured.append(arrays[0].shape[0]) or capture(arrays)
    (one,) = encode(tiny, [{"text": "The tide came in."}], 16, (1,))
    sizes = range(1, GRAPHS + 3)
    for _ in range(3):
        for size in sizes:
            session.run({name: np.repeat(array, size, axis=0) for name, array in one.items()})
    assert captured == list(sizes)[:GRAPHS]
    session.prepare({name: np.repeat(array, 99, axis=0) for name, array in one.items()})
    assert captured[GRAPHS:] == [99]


@pytest.mark.parametrize(("opset", "attention"), [(20, "MultiHeadAttention"), (23, "Attention")])
def test_a_graph_for_cuda_counts_no_positions_and_answers_as_the_model_does(
    tiny: Path, tmp_path: Path, opset: Any, attention: str
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    step = ExportOnnx(opset, fused=True, provider="cuda")
    step.run(Artifact(Kind.CHECKPOINT, tiny, "", ""), Context(TASK, probe()), folder)
    operators = [node.op_type for node in read_graph(folder).node]
    assert attention in operators
    assert not {"Range", "GatherND"} & set(operators)  # which the provider would have to fetch from the processor
    texts = [{"text": "The tide came in, and with it the boats."}, {"text": "It went."}]
    batch = encode(tiny, texts, 16, (2,))[0]
    kept = batch["attention_mask"] == 1
    assert not kept.all()
    found, expected = (
        open_session(kind, path, TASK, 1).run(batch)["last_hidden_state"][kept]
        for kind, path in ((Kind.ONNX, folder), (Kind.CHECKPOINT, tiny))
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "captures"), [("Roberta", "1"), ("MPNet", "0")]
)  # the latter counts positions for its own attention
def test_what_counts_positions_is_not_captured(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, captures: str
) -> None:
    folder, out = tmp_path / "graph", tmp_path / "out"
    for each in (folder, out):
        each.mkdir()
    context = Context(TASK, probe())
    source = Artifact(Kind.CHECKPOINT, make_checkpoint(f"{family}Model", f"{family}Config"), "", "")
    ExportOnnx(provider="cuda").run(source, context, folder)
    facts = UseProvider().run(Artifact(Kind.ONNX, folder, "", ""), context, out)
    assert facts["options"][CAPTURES] == captures


@pytest.mark.parametrize("captures", ["1", "0"])
@pytest.mark.parametrize("options", ["", "{graphs=false}", "{provider=tensorrt}"])
def test_the_card_runs_what_it_is_given(
    graph: Artifact, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, captures: str
) -> None:
    UseProvider().run(graph, Context(TASK, probe()), tmp_path)
    chosen = {"provider": "CPUExecutionProvider", "options": {CAPTURES: captures}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / PROVIDER).write_text(json.dumps(chosen))
    batch = encode(tiny, [{"text": "The tide came in."}], 16, (1,))[0]
    expected = open_session(Kind.ONNX, graph.path, TASK, 1).run(batch)["last_hidden_state"]
    session, given = onnxruntime.InferenceSession, list[object]()

    def opened(path: str, providers: list[object]) -> onnxruntime.InferenceSession:
        given.extend(providers)
        return session(path, providers=["CPUExecutionProvider"])  # which has no such option

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    lines = by_provider(f"{FUSED},use-provider{options}", images=False)
    assert ("gpu_graph_id" in lines) == (options != "{provider=tensorrt}")
    names: dict[str, Any] = {"inputs": batch}
    exec(lines.replace('"cuda"', '"cpu"'), names)
    np.testing.assert_array_equal(names["outputs"]["last_hidden_state"].astype(np.float32), expected)
    assert given == [(chosen["provider"], chosen["options"])]


def test_images_are_narrowed_to_what_the_graph_takes(
    make_image_classifier: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, task = make_image_classifier(), "image-classification"
    source = Artifact(Kind.CHECKPOINT, looking, "", "")
    ExportOnnx(dtype="float16").run(source, Context(task, probe()), tmp_path)
    made = Artifact(Kind.ONNX, tmp_path, "", "")
    batch = encode_sample(looking)
    expected = open_session(Kind.CHECKPOINT, looking, task, 1).run(batch)["logits"]
    for session in (open_session(Kind.ONNX, tmp_path, task, 1), bound(made, captures=True)):
        np.testing.assert_allclose(session.run(batch)["logits"], expected, atol=0.05 * np.abs(expected).max())
    (tmp_path / PROVIDER).write_text(json.dumps({"provider": "CPUExecutionProvider", "options": {CAPTURES: "0"}}))
    monkeypatch.chdir(tmp_path)
    lines = by_provider(f"{FUSED},use-provider{{graphs=false}}", images=True)
    lines = lines.replace("providers=[provider]", "providers=['CPUExecutionProvider']").replace('"cuda"', '"cpu"')
    names: dict[str, Any] = {"inputs": batch}
    exec(lines, names)
    np.testing.assert_allclose(names["outputs"]["logits"], expected, atol=0.05 * np.abs(expected).max())


def test_what_is_refused_to_be_captured_is_told_with_what_takes_it(
    graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise Fail("This session cannot use the graph capture feature as requested by the user")

    UseProvider().run(graph, Context(TASK, probe()), tmp_path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ValueError, match=r"use-provider\{graphs=false\} takes it: This session cannot"):
        open_session(Kind.ONNX_GPU, tmp_path, TASK, 1)


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


@pytest.mark.gpu
@pytest.mark.skipif(TOOLCHAIN not in os.environ, reason=f"{TOOLCHAIN} names no Python that has onnxruntime-gpu")
@pytest.mark.parametrize("options", ["", "{graphs=false}"])
def test_on_a_gpu_it_is_judged_emitted_and_run_by_its_card(tiny: Path, cli: Cli, tmp_path: Path, options: str) -> None:
    recipe = f"{FUSED},use-provider{options}"
    outcome = cli(tiny, "--target", "gpu", "--recipe", recipe, *QUICK, "--out", tmp_path / "emitted")
    assert outcome.code == 0, outcome.output
    lines = re.search(r"```python\n(.*?)```", (tmp_path / "emitted" / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    chosen = json.loads((tmp_path / "emitted" / PROVIDER).read_text())
    assert (chosen["options"][CAPTURES] == "1") == (not options)
    words = [os.environ[TOOLCHAIN], "-c", lines[1] + "\nassert outputs"]
    done = subprocess.run(words, cwd=tmp_path / "emitted", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
