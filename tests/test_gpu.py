"""The GPU target: what can be said of it without one, and with `-m gpu` what one does."""

import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pynvml
import pytest
import torch

from optimize.models.encoding import encode
from optimize.models.images import encode_sample
from optimize.passes._cuda_graphs import COMPILED, captured, fitting, shapes_of, widened
from optimize.passes.cast_dtype import CastDtype
from optimize.passes.compile_cuda import CompileCuda
from optimize.pipeline import gpus, keys
from optimize.pipeline.calls import call_of
from optimize.pipeline.contract import (
    SPREAD,
    Artifact,
    Cell,
    Checkpoint,
    Context,
    Dimensions,
    Form,
    Kind,
    Target,
)
from optimize.pipeline.doctor import findings
from optimize.pipeline.driver import Request
from optimize.pipeline.errors import ExitCode, HostError, RequestError
from optimize.pipeline.gpus import GpuMemory, GpuMeter
from optimize.pipeline.memory import CUDA, FRAMEWORKS
from optimize.pipeline.plan import make_plan
from optimize.pipeline.recipe import parse
from optimize.pipeline.toolchain_files import Toolchain
from optimize.pipeline.toolchains import Toolchains
from optimize.pipeline.workers import WorkerProcess
from optimize.targets import cpu, gpu, multi_gpu
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.memory import gpu_memory, running_memory
from tests.conftest import QUICK, Cli, MakeCheckpoint

TASK = "feature-extraction"
TEXTS = ("Yes.", "A text of some more words than that.", "One, two, three, four, five, six, seven.")
DTYPES = ("float32", "float16", "bfloat16")
# in every worker: a model in bfloat16 is left with so little of the GPU that only small batches fit
SHORT = """
import sys

if "optimize.pipeline.worker" in sys.orig_argv:
    import torch
    from optimize.targets.runtimes.eager import EagerSession as Eager

    def opened(self, model, device="cpu", init=Eager.__init__):
        init(self, model, device)
        if model.dtype is torch.bfloat16:
            torch.cuda.set_per_process_memory_fraction((96 << 20) / torch.cuda.get_device_properties(0).total_memory)

    Eager.__init__ = opened
"""
H100 = Target("gpu", "NVIDIA H100", "9.0", (), DTYPES, 16, 128 << 30, 1, 80 << 30, "580.159.04")
HERE = torch.cuda.is_available()
# recipes for memory: the least cosine of what they answer to what bfloat16 does, which wrong scales would break, and
# what they take of the GPU at most, as a share of what that does
FOR_MEMORY = {
    "torchao-int8": (0.995, 0.55), "torchao-fp8": (0.97, 0.55), "bitsandbytes-int8": (0.995, 0.55),
    "bitsandbytes-nf4": (0.92, 0.35), "torchao-int8-compiled": (0.995, math.inf),
    "torchao-int8-weights-compiled": (0.995, math.inf), "torchao-fp8-compiled": (0.97, math.inf),
}  # fmt: skip
LANGUAGE, ENCODERS = ([name for name in FOR_MEMORY if name in texts] for texts in (gpu.GENERATING, gpu.RECIPES))


def drive(
    monkeypatch: pytest.MonkeyPatch, *, count: int = 1, capability: tuple[int, int] = (9, 0), links: int = 0,
    names: tuple[str, ...] = ("NVIDIA Example",), processes: Mapping[int, Mapping[int, int | None]] = {},
) -> SimpleNamespace:  # fmt: skip
    """Have a driver tell of so many GPUs, of those names in turn, and of what `processes` hold: GPU -> pid -> bytes.

    Kernels run for a tenth of the time on the first, for two tenths on the second, and so on. Returns the memory that
    each of them has; what is used of it may be changed.
    """
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    memory = SimpleNamespace(total=24 << 30, used=1 << 30)
    monkeypatch.setattr(gpus, "RESTED", 0.0)

    def computing(device: int) -> list[SimpleNamespace]:
        held = processes.get(device, {})
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items()]

    answers: dict[str, Any] = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: count,
        "nvmlDeviceGetHandleByIndex": lambda index: index, "nvmlDeviceGetUUID": lambda index: f"GPU-{index}{index}",
        "nvmlDeviceGetCudaComputeCapability": lambda _: capability,
        "nvmlDeviceGetName": lambda index: names[index % len(names)], "nvmlDeviceGetMemoryInfo": lambda _: memory,
        "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
        "nvmlSystemGetDriverVersion": lambda: "580.1", "nvmlDeviceGetNvLinkState": lambda _, link: int(link < links),
        "nvmlDeviceGetComputeRunningProcesses": computing,
        "nvmlDeviceGetUtilizationRates": lambda index: SimpleNamespace(gpu=10 * (index + 1), memory=0),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    return memory


@pytest.mark.skipif(HERE, reason="here is a GPU")
def test_it_is_refused_where_no_gpu_is(tiny: Path, cli: Cli) -> None:
    outcome = cli(tiny, "--target", "gpu")
    assert outcome.code == ExitCode.REFUSED
    assert "this host has no NVIDIA GPU" in outcome.output and "--target cpu" in outcome.output
    assert "not here: this host has no NVIDIA GPU" in cli("targets").output


@pytest.mark.parametrize(
    ("capability", "has", "lacks"),
    [((9, 0), {"float8_e4m3fn", "bfloat16"}, set()), ((7, 5), {"float16", "int8"}, {"bfloat16", "float8_e4m3fn"})],
)
def test_what_a_gpu_has_is_what_its_driver_says(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: set[str], lacks: set[str]
) -> None:
    drive(monkeypatch, capability=capability)
    target = gpu.probe()
    assert (target.device, target.gpus, target.gpu_memory, target.gpu_used) == ("NVIDIA Example", 1, 24 << 30, 1 << 30)
    assert target.gpu_clock == 1980
    assert target.arch == f"{capability[0]}.{capability[1]}" and target.device_type == "cuda"
    assert has <= set(target.dtypes) and not lacks & set(target.dtypes)
    assert cpu.probe().device_type == "cpu"


@pytest.mark.parametrize(
    ("visible", "left"), [("1", [1]), ("2,0", [2, 0]), ("GPU-1", [1]), ("0,7,1", [0]), ("0,GPU-2", [0, 2])]
)
def test_gpus_are_those_that_cuda_would_see(monkeypatch: pytest.MonkeyPatch, visible: str, left: list[int]) -> None:
    drive(monkeypatch, count=3, names=("0", "1", "2"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [int(each.name) for each in gpu.devices()] == left
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RequestError, match="leaves none"):
        gpu.probe()


def test_doctor_tells_of_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drive(monkeypatch, count=2, links=1)
    (found,) = (each for each in findings(tmp_path) if each.what == "GPU")
    assert found.found == "NVIDIA Example" and found.good
    assert found.meaning == (
        "2 like ones over NVLink; 24 GiB, compute capability 9.0, driver 580.1: --target multi-gpu"
    )
    drive(monkeypatch, count=2, names=("NVIDIA Example", "NVIDIA Other"))
    (found,) = (each for each in findings(tmp_path) if each.what == "GPU")
    assert found.meaning.endswith("--target gpu")


def test_peaks_are_measured_without_tf32_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    products = torch.backends.cuda.matmul
    seen = []
    monkeypatch.setattr(cpu, "reached", lambda *_: seen.append(products.fp32_precision))
    try:
        for before in ("tf32", "none"):
            products.fp32_precision = before
            gpu.peaks(H100)
            assert products.fp32_precision == before
    finally:
        products.fp32_precision = "none"
    assert seen == ["ieee", "ieee"]


def test_several_gpus_are_one_target_if_they_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drive(monkeypatch, count=2, links=18)
    target = multi_gpu.probe()
    assert (target.name, target.gpus, target.links) == ("multi-gpu", 2, "NVLink")
    drive(monkeypatch, count=2)
    assert multi_gpu.probe().links == "PCIe"
    for count, names, problem in ((1, ("A",), "one NVIDIA GPU"), (2, ("A", "B"), "unlike: A, B")):
        drive(monkeypatch, count=count, names=names)
        with pytest.raises(RequestError, match=problem):
            multi_gpu.probe()


def test_what_a_worker_holds_is_that_of_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        ours = {os.getpid(): 2 << 30, child.pid: 1 << 30, 1: 9 << 30}  # and what others hold
        drive(monkeypatch, count=3, processes={0: {os.getpid(): 1 << 30}, 1: ours, 2: {child.pid: 8 << 30}})
        assert GpuMeter(2).read(os.getpid()) == GpuMemory(3 << 30)  # the third is not of this target
        child.kill()


def test_a_worker_is_asked_about_by_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held: dict[int, int | None] = {}
    drive(monkeypatch, processes={0: held})
    with WorkerProcess(tmp_path / "worker.log", gpus=1) as worker, WorkerProcess(tmp_path / "other.log") as other:
        assert worker.gpu_memory() is None
        held |= {worker.pid: 5 << 30, other.pid: 6 << 30}
        assert worker.gpu_memory() == GpuMemory(5 << 30)
        assert other.gpu_memory() is None  # it computes on the processor


def test_where_no_process_is_named_the_growth_of_what_is_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for named in ({}, {1: 9 << 30}, {os.getpid(): None}):
        memory = drive(monkeypatch, processes={0: named})
        meter = GpuMeter(1)
        assert meter.free == 23 << 30
        memory.used = 5 << 30
        assert meter.read(os.getpid()) == GpuMemory(4 << 30, by_process=False)
        memory.used = 1 << 20  # somebody else has let go of more
        assert meter.read(os.getpid()) is None


def test_work_of_others_is_that_of_the_busiest_of_the_targets_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drive(monkeypatch, count=3)
    assert (GpuMeter(1).others(), GpuMeter(2).others()) == (0.1, 0.2)
    with WorkerProcess(tmp_path / "worker.log", gpus=3) as worker, WorkerProcess(tmp_path / "other.log") as other:
        assert (worker.others_on_gpu(), other.others_on_gpu()) == (0.3, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert GpuMeter(1).others() is None


def test_a_driver_that_tells_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    memory = drive(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", refuse)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refuse)
    meter = GpuMeter(1)
    memory.used = 2 << 30
    assert meter.read(os.getpid()) == GpuMemory(1 << 30, by_process=False)
    assert meter.others() is None
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert meter.read(os.getpid()) is None and GpuMeter(1).free is None


def test_a_plan_spreads_a_model_over_as_many_gpus_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_TOOLCHAIN_VLLM", sys.executable)
    monkeypatch.setattr(Toolchain, "lacks", lambda *_: "")
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "num_attention_heads": 32}')
    sizes = Dimensions(hidden=4096, intermediate=14336, layers=32, vocabulary=32000, cache=65536)
    seven = Checkpoint(
        "seven", tmp_path, None, "text-generation", "MistralForCausalLM", "bfloat16", 7 * 10**9, 14 * 10**9, 4096,
        {"config.json": "c"}, dimensions=sizes,
    )  # fmt: skip
    h200 = replace(
        H100, name="multi-gpu", device="NVIDIA H200", memory=1 << 40, gpus=4, gpu_memory=140 << 30, links="NVLink"
    )

    def planned(target: Target) -> Any:
        return make_plan(
            seven, target, [each for each in multi_gpu.recipes(seven, target) if each.default], workload="1x128+64",
            form=Form.PROMPTS, running_memory=running_memory, gpu_memory=gpu_memory,
            toolchains=Toolchains(tmp_path, None),
        )  # fmt: skip

    plan = planned(h200)
    assert {each.need.build for each in plan.recipes} == {FRAMEWORKS + CUDA}  # nothing but copies and casts is built
    names = ["vllm-bf16", "vllm-bf16-x4", "vllm-bf16-tp2", "vllm-bf16-tp2-x2", "vllm-bf16-tp4",
             "eager-bf16-tp2", "eager-bf16-tp4"]  # fmt: skip
    assert [each.recipe.name for each in plan.recipes] == names
    text = plan.describe()
    assert "4 of them over NVLink, each 140 GiB" in text and "of each of 4 GPUs: 2 copies" in text
    needs = {each.recipe.name: each.need.gpu for each in plan.recipes}
    assert needs["vllm-bf16"] == needs["vllm-bf16-x4"] > needs["vllm-bf16-tp2"] > needs["vllm-bf16-tp4"]
    assert 7 * 10**9 * 2 < needs["vllm-bf16"] < 24 << 30
    smaller = planned(replace(h200, gpu_memory=34 << 30))  # the reference takes 28 GB and the baseline 17 GiB of it
    assert [each.recipe.name for each in smaller.recipes] == names[2:]
    reasons = {each.recipe.name: each.reason for each in smaller.left_out}
    assert "GiB of each of its GPUs" in reasons["vllm-bf16"] and "34.0 are free" in reasons["vllm-bf16"]
    divided = planned(replace(h200, gpu_memory=24 << 30))  # the reference lies on all of them
    assert (divided.reference_gpus, divided.baseline_gpus) == (4, 1) and (plan.reference_gpus, plan.baseline_gpus) == (
        1,
        1,
    )
    assert "GiB of a GPU for either, the layers of the reference over 4" in divided.describe()
    assert [each.recipe.name for each in divided.recipes] == ["eager-bf16-tp4"]
    least = planned(replace(h200, gpu_memory=15 << 30))
    assert (least.reference_gpus, least.baseline_gpus) == (4, 4)
    assert "the layers of the reference and the baseline over 4" in least.describe()
    with pytest.raises(RequestError, match=r"float32 reference needs about .* GiB of GPU memory on each of 4, and"):
        planned(replace(h200, gpu_memory=8 << 30))
    with pytest.raises(RequestError, match=r"float32 reference needs about .* GiB of GPU memory, and the baseline"):
        planned(replace(h200, gpu_memory=24 << 30, gpus=1))
    shared = planned(replace(h200, gpu_used=106 << 30))  # another process is on the card
    assert [each.recipe.name for each in shared.recipes] == names[2:]
    assert "140 GiB (106.0 of it held by others)" in shared.describe()


def test_the_plan_names_the_gpu_and_what_cannot_run_on_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint("tiny", tmp_path, None, TASK, "BertModel", "float32", 1000, 4000, 256, {"config.json": "c"})
    able = [each for each in gpu.recipes(checkpoint, H100) if not each.toolchains]
    text = make_plan(checkpoint, H100, able, workload="1x32").describe()
    assert "gpu: NVIDIA H100, 80 GiB, compute capability 9.0, driver 580.159.04; 16 cores, 128 GiB on its host" in text
    assert "compiled-fp16" in text
    turing = replace(H100, dtypes=("float32", "float16"))
    left_out = {each.name for each in gpu.recipes(checkpoint, turing) if each.why_not(checkpoint, turing)}
    assert left_out == {"eager-bf16", "compiled-bf16", *ENCODERS}
    with pytest.raises(RequestError, match="it is for NVIDIA GPUs, and here is none"):
        make_plan(checkpoint, cpu.probe(), [each for each in able if "compiled" in each.name], workload="1x32")


def test_each_captured_generation_has_a_cache_of_its_own(tmp_path: Path) -> None:
    sizes = Dimensions(hidden=2048, intermediate=8192, layers=16, vocabulary=32000, cache=16384)
    one = Checkpoint(
        "one",
        tmp_path,
        None,
        "text-generation",
        "LlamaForCausalLM",
        "bfloat16",
        10**9,
        2 * 10**9,
        4096,
        {},
        dimensions=sizes,
    )
    small, large = Cell(8, 64, 16), Cell(256, 64, 16)
    both, alone = (gpu_memory(Kind.CUDA_GRAPHS, one, cells) for cells in ((small, large), (large,)))
    assert both - alone == 2 * 16384 * 8 * 80
    assert gpu_memory(Kind.CHECKPOINT, one, (small, large)) == gpu_memory(Kind.CHECKPOINT, one, (large,))


def test_every_text_has_a_shape_and_the_smallest_is_taken() -> None:
    shapes = shapes_of([Cell(1, 32), Cell(32, 128), Cell(1, 32)], 512)
    assert shapes == [(1, 32), (32, 128), (8, 512)]
    assert fitting(shapes, (1, 20)) == (1, 32)
    assert fitting(shapes, (2, 20)) == (32, 128)
    assert fitting(shapes, (8, 500)) == (8, 512)
    assert fitting(shapes, (9, 500)) is None
    assert shapes_of([Cell(1, 32)], 64)[-1] == (8, 64)


def test_every_batch_of_images_has_a_shape() -> None:
    shapes = shapes_of([Cell(1), Cell(32)], 0)
    assert shapes == [(1,), (32,), (8,)]
    assert fitting(shapes, (3, 3, 224, 224)) == (8,) and fitting(shapes, (33, 3, 224, 224)) is None
    wide = widened({"pixel_values": np.ones((3, 3, 4, 4), np.float32)}, (8,), 0)["pixel_values"]
    assert wide.shape == (8, 3, 4, 4) and wide.dtype == np.float32 and wide[3:].max() == 0


def test_a_batch_is_padded_with_what_is_masked() -> None:
    batch = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    wide = widened(batch, (2, 4), fill=9)
    assert wide["input_ids"].tolist() == [[5, 6, 7, 9], [9, 9, 9, 9]]
    assert wide["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]  # a row without any would be NaN


def test_what_a_device_times_is_its_own() -> None:
    class Session:
        inputs = ("input_ids",)

        def prepare(self, batch: Any) -> Any:
            return lambda: {"answer": batch["input_ids"] + 1}

        def seconds(self, call: Any) -> float:
            call()
            return 0.25

    call = call_of(Session(), {"input_ids": np.array([[1]]), "other": np.array([[2]])})
    assert call.timed() == (0.25,)
    assert call.run()["answer"].tolist() == [[2]]


@pytest.mark.skipif(HERE, reason="here is a GPU")
def test_what_gpus_do_not_hold_is_not_put_elsewhere(tiny: Path) -> None:
    with pytest.raises(HostError, match="do not hold the model"):
        open_session(Kind.CHECKPOINT, tiny, TASK, 1, device=SPREAD)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="here are no two GPUs")
def test_layers_over_all_gpus_answer_as_on_one(make_language_model: MakeCheckpoint) -> None:
    model, prompts = make_language_model(num_hidden_layers=8), [np.arange(3, 9), np.arange(5, 8)]
    one: Any = open_session(Kind.CHECKPOINT, model, "text-generation", 1, device="cuda")
    all_of_them: Any = open_session(Kind.CHECKPOINT, model, "text-generation", 1, device=SPREAD)
    assert len({weight.device for weight in all_of_them.model.parameters()}) > 1
    np.testing.assert_allclose(all_of_them.logits(prompts[0], 3), one.logits(prompts[0], 3), atol=1e-3)
    np.testing.assert_array_equal(all_of_them.generate(prompts, 5).tokens, one.generate(prompts, 5).tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_captured_answers_as_eager_does_at_every_shape(tiny: Path, tmp_path: Path, compiled: bool) -> None:
    step, out = CompileCuda(compile=compiled), tmp_path / "out"
    out.mkdir()
    context = Context(TASK, H100, None, (Cell(1, 8), Cell(4, 16)))
    facts = step.run(Artifact(Kind.CHECKPOINT, tiny, "", ""), context, out)
    step.ensures(out)
    assert facts["shapes"][:2] == [(1, 8), (4, 16)]
    eager = open_session(Kind.CHECKPOINT, tiny, TASK, 1, device="cuda")
    captured = open_session(Kind.CUDA_GRAPHS, out, TASK, 1)
    for rows in ([TEXTS[0]], list(TEXTS), [TEXTS[2] * 3] * 7):
        batch = encode(tiny, [{"text": text} for text in rows], 64, (len(rows),))[0]
        expected, found = eager.run(batch), captured.run(batch)
        valid = batch["attention_mask"] != 0
        np.testing.assert_allclose(found["last_hidden_state"][valid], expected["last_hidden_state"][valid], atol=1e-3)
        assert found["last_hidden_state"].shape == expected["last_hidden_state"].shape
    first = captured.run(batch)["last_hidden_state"]
    kept = first.copy()
    captured.run(encode(tiny, [{"text": "Something else."}], 64, (1,))[0])
    np.testing.assert_array_equal(first, kept)
    assert call_of(captured, batch).timed()[0] > 0
    wide = {name: np.repeat(array, 9, axis=0) for name, array in batch.items()}  # more than any shape takes
    expected, found = eager.run(wide), captured.run(wide)
    np.testing.assert_allclose(found["last_hidden_state"], expected["last_hidden_state"], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_what_waits_for_the_gpu_is_not_captured_and_that_is_said() -> None:
    with pytest.raises(ValueError, match="could not be captured into a CUDA graph"):
        captured([lambda: print(torch.ones(1, device="cuda").item())], None, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_logits_of_each_token_are_cut_back_to_the_text(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    asking, out = make_checkpoint("BertForQuestionAnswering"), tmp_path / "out"
    out.mkdir()
    context = Context("question-answering", H100, None, (Cell(1, 32),))
    CompileCuda(compile=False).run(Artifact(Kind.CHECKPOINT, asking, "", ""), context, out)
    batch = encode(asking, [{"question": TEXTS[0], "context": TEXTS[1]}], 64, (1,))[0]
    expected = open_session(Kind.CHECKPOINT, asking, context.task, 1, device="cuda").run(batch)
    found = open_session(Kind.CUDA_GRAPHS, out, context.task, 1).run(batch)
    np.testing.assert_allclose(found["start_logits"], expected["start_logits"], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_images_are_captured_too(make_image_classifier: MakeCheckpoint, tmp_path: Path) -> None:
    looking, out, task = make_image_classifier(), tmp_path / "out", "image-classification"
    out.mkdir()
    context = Context(task, H100, None, (Cell(1), Cell(4)))
    CompileCuda(compile=False).run(Artifact(Kind.CHECKPOINT, looking, "", ""), context, out)
    batch = {name: np.repeat(array, 3, axis=0) for name, array in encode_sample(looking).items()}
    expected = open_session(Kind.CHECKPOINT, looking, task, 1, device="cuda").run(batch)
    found = open_session(Kind.CUDA_GRAPHS, out, task, 1).run(batch)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_attention_is_by_the_kernel_that_was_asked_for(make_image_classifier: MakeCheckpoint, tmp_path: Path) -> None:
    looking, half, task = make_image_classifier(hidden_size=64), tmp_path / "half", "image-classification"
    # with heads of 16: those of 12 are taken by "flash" alone
    half.mkdir()
    context = Context(task, H100, None, (Cell(2),))
    CastDtype("float16").run(Artifact(Kind.CHECKPOINT, looking, "", ""), context, half)
    for attention in ("efficient", "flash", "cudnn"):  # one after the other, with torch's caches of compiled graphs
        out = tmp_path / attention
        out.mkdir()
        CompileCuda(attention=attention).run(Artifact(Kind.CHECKPOINT, half, "", ""), context, out)
        kept = b"".join(path.read_bytes() for path in (out / COMPILED).glob("*.graph"))
        named = re.findall(rb"_scaled_dot_product_([a-z]+)_attention", kept)
        assert set(named) == {attention.encode()}


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_a_checkpoint_is_lowered_judged_and_emitted_on_a_gpu(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    asked = ("--recipe", "graphs-fp16", "--recipe", "compiled-fp16", *QUICK)
    outcome = cli(tiny, "--target", "gpu", *asked, "--out", tmp_path / "emitted", cache=tmp_path / "cache")
    assert outcome.code == 0, outcome.output
    logs = "\n".join(each.read_text(errors="replace") for each in tmp_path.glob("cache/runs/*/logs/*.log"))
    assert "compiled again" not in logs and logs, "what was built is not found where it is opened"
    manifest = json.loads((tmp_path / "emitted" / "optimize.json").read_text())
    assert manifest["kind"] == "cuda-graphs" and manifest["report"]["host"]["target"]["gpus"] == 1
    baseline, candidates = manifest["report"]["baseline"], manifest["report"]["candidates"]
    for held, predicted in [
        (baseline["gpu_memory"], baseline["predicted_gpu_memory"]),
        *((each["judged_gpu_memory"], each["predicted_gpu_memory"]) for each in candidates),
    ]:
        assert 1 << 20 < held["most"] <= predicted, outcome.output


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_a_candidate_that_runs_out_of_gpu_memory_is_broken_and_the_others_go_on(
    tiny: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHORT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    asked = ("--recipe", "cast-dtype", "--recipe", "checkpoint", *QUICK, "--workload", "1x8,2000x128")
    outcome = cli(tiny, "--target", "gpu", *asked, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    broken, passed = outcome.report["candidates"]
    assert (broken["status"], passed["status"]) == ("broken", "passed"), outcome.output
    assert broken["reason"].startswith("out of GPU memory at cell 2000x128: "), broken["reason"]
    for words in (
        "were to be allocated",
        "free before it was opened",
        "the plan had estimated",
        "a smaller --workload",
    ):
        assert words in broken["reason"]
    assert "Traceback" not in outcome.output


LODGER = """
import torch
held = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
factor = torch.ones(4096, 4096, device="cuda")
print("there", flush=True)
while True:
    factor @ factor
    torch.cuda.synchronize()
"""


@contextmanager
def lodger() -> Iterator[None]:
    """Somebody else on the GPU, who takes 2 GiB and computes all the time."""
    with subprocess.Popen([sys.executable, "-c", LODGER], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"there\n"
            yield
        finally:
            process.kill()


def used() -> int:
    """Bytes of the GPU, by whatever process."""
    with gpus.visible() as (device, *_):
        return int(pynvml.nvmlDeviceGetMemoryInfo(device).used)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_who_else_computes_on_the_gpu_is_told_and_nothing_is_emitted(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    asked = ("--target", "gpu", "--recipe", "eager-fp16", *QUICK[:-1], "0.3", "--out", tmp_path / "emitted")
    with lodger():
        outcome = cli(tiny, *asked)
    assert outcome.code == ExitCode.INCONCLUSIVE and not (tmp_path / "emitted").exists(), outcome.output
    assert "of it held by others" in " ".join(outcome.output.split())
    assert outcome.report is not None
    (candidate,) = outcome.report["candidates"]
    assert "other processes computed on the GPU" in candidate["reason"]
    assert candidate["speed"]["noise"]["gpu"] > 0.3
    alone = cli(tiny, *asked[:-2], "--out", tmp_path / "alone")
    assert alone.report is not None
    (candidate,) = alone.report["candidates"]
    assert candidate["speed"]["noise"]["gpu"] < 0.3, "its own work is not another's"


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_a_run_that_is_killed_leaves_nothing_on_the_gpu(tiny: Path, shared_cache: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "optimize.pipeline.cli", tiny, "--target", "gpu", "--recipe", "graphs-fp16", *QUICK]
    words += ["--budget", "60s", "--out", tmp_path / "emitted", "--cache", shared_cache]
    before, log = used(), tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(words, stdout=output, stderr=output) as run:
        try:
            # the baseline's context and the candidate's
            wait_until(lambda: run.poll() is not None or used() > before + (600 << 20), 120)
            assert run.poll() is None, log.read_text()
        finally:
            run.kill()
    wait_until(lambda: used() < before + (100 << 20), 10)
    assert not (tmp_path / "emitted").exists()


def wait_until(reached: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fixture", "planned"),
    [
        ("make_checkpoint", {"graphs-fp16", "compiled-fp16", "compiled-bf16"}),
        ("make_image_classifier", {"graphs-fp16", "compiled-fp16", "compiled-bf16"}),
        ("make_language_model", {"compiled-bf16", "torchao-int8-weights-compiled", "vllm-bf16", "vllm-fp8"}),
        ("make_speech_model", {"speech-fp16", "graphs-fp16", "compiled-fp16", "compiled-bf16"}),
    ],
)
def test_every_form_of_model_has_a_plan_on_a_gpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fixture: str, planned: set[str]
) -> None:
    drive(monkeypatch)
    monkeypatch.setenv("OPTIMIZE_TOOLCHAIN_VLLM", sys.executable)
    monkeypatch.setattr(Toolchain, "lacks", lambda *_: "")
    asked = Request(str(request.getfixturevalue(fixture)()), target="gpu", cache=tmp_path)
    plan = asked.plan(install=False).plan
    assert {each.recipe.name for each in plan.recipes} >= planned
    assert all(each.need.gpu for each in plan.recipes)


@pytest.mark.parametrize(
    ("fixture", "name"),
    [*(("make_checkpoint", name) for name in ENCODERS), *(("make_language_model", name) for name in LANGUAGE)],
)
def test_recipes_for_memory_are_planned_where_they_are_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fixture: str, name: str
) -> None:
    drive(monkeypatch)
    checkpoint = str(request.getfixturevalue(fixture)())
    asked = Request(checkpoint, target="gpu", recipes=(name,), objective="memory", min_speedup=0.5, cache=tmp_path)
    (planned,) = asked.plan(install=False).plan.recipes
    assert planned.recipe.name == name and planned.need.gpu


def test_recipes_for_memory_take_less_of_the_gpu_by_the_plan_too(tmp_path: Path) -> None:
    sizes = Dimensions(hidden=4096, intermediate=14336, layers=32, vocabulary=32000, cache=65536)
    seven = Checkpoint(
        "seven", tmp_path, None, "text-generation", "MistralForCausalLM", "bfloat16", 7 * 10**9, 14 * 10**9, 4096,
        {"config.json": "c"}, dimensions=sizes,
    )  # fmt: skip
    ada = replace(H100, dtypes=(*DTYPES, "int8", "float8_e4m3fn"))
    small = {name for name, (_, most) in FOR_MEMORY.items() if most < 1}
    asked = [each for each in gpu.recipes(seven, ada) if each.name in {"eager-bf16", *small}]
    plan = make_plan(
        seven, ada, asked, workload="1x128+64", form=Form.PROMPTS, running_memory=running_memory, gpu_memory=gpu_memory
    )
    needs = {each.recipe.name: each.need.gpu - (3 << 30) for each in plan.recipes}  # beside what all take
    assert 13e9 < needs.pop("eager-bf16") < 15e9
    assert 3.5e9 < needs.pop("bitsandbytes-nf4") < 5e9
    assert all(7e9 < need < 9e9 for need in needs.values()) and len(needs) == 3


@pytest.mark.parametrize(
    ("capability", "text", "reason"),
    [
        ((8, 0), "torchao-fp8", "quantize-torchao: NVIDIA Example has no float8_e4m3fn arithmetic"),
        ((9, 0), "cast-dtype,quantize-torchao{mode=int4}", "its four-bit weights are packed for processors"),
        ((7, 0), "bitsandbytes-int8", "quantize-bitsandbytes: NVIDIA Example has no int8 arithmetic"),
        ((9, 0), "bitsandbytes-nf4", "needs bitsandbytes, which is not installed: pip install bitsandbytes"),
    ],
)
def test_why_a_recipe_for_memory_is_left_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], text: str, reason: str
) -> None:
    drive(monkeypatch, capability=capability)
    if "not installed" in reason:
        there = keys.installed_version
        monkeypatch.setattr(keys, "installed_version", lambda name: None if name == "bitsandbytes" else there(name))
    with pytest.raises(RequestError, match=re.escape(reason)):
        Request(str(tiny), target="gpu", recipes=(text,), cache=tmp_path).plan(install=False)


def lowered(recipe: str, source: Path, task: str, folder: Path, cells: tuple[Cell, ...]) -> tuple[Kind, Path]:
    """What the recipe's passes make on this host's GPU."""
    context = Context(task, gpu.probe(), None, cells)
    kind = Kind.CHECKPOINT
    for index, step in enumerate(parse(recipe).passes):
        out = folder / f"{index}-{step.name}"
        out.mkdir(parents=True)
        step.run(Artifact(kind, source, "", ""), context, out)
        step.ensures(out)
        kind, source = step.produces, out
    return kind, source


def likeness(found: Any, expected: Any) -> float:
    """Cosine over the last axis, on average."""
    pair = (torch.from_numpy(np.asarray(each)) for each in (found, expected))
    return float(torch.nn.functional.cosine_similarity(*pair, dim=-1).mean())


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_quantized_language_model_takes_less_of_the_gpu_and_answers_alike(
    name: str, make_language_model: MakeCheckpoint, tmp_path: Path
) -> None:
    task, tokens = "text-generation", np.random.default_rng(0).integers(5, 500, 48)
    source = make_language_model(
        hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, initializer_range=0.005
    )
    answers, taken = {}, {}
    for each in ("eager-bf16", name):
        kind, folder = lowered(gpu.GENERATING[each], source, task, tmp_path / each, (Cell(2, 32, 4),))
        gc.collect()
        before = torch.cuda.memory_allocated()
        session: Any = open_session(kind, folder, task, 1, device="cuda")
        taken[each] = torch.cuda.memory_allocated() - before
        answers[each] = session.logits(tokens, len(tokens))
        step = session.prefill([tokens[:20], tokens[:10]], 4)
        assert np.isfinite(step).all() and likeness(step[0], answers[each][19]) > 0.99
        assert session.generate([tokens[:5]], 4).tokens.shape == (1, 4)
        del session
    least, most = FOR_MEMORY[name]
    assert likeness(answers[name], answers["eager-bf16"]) > least
    assert taken[name] < most * taken["eager-bf16"]


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
@pytest.mark.parametrize("name", ENCODERS)
def test_a_quantized_encoder_answers_alike_on_a_gpu(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, answers = make_checkpoint(), {}
    batch = encode(source, [{"text": text * 4} for text in TEXTS], 64, (len(TEXTS),))[0]
    for each in ("eager-bf16", name):
        kind, folder = lowered(gpu.RECIPES[each], source, TASK, tmp_path / each, (Cell(1, 32), Cell(4, 64)))
        session = open_session(kind, folder, TASK, 1, device="cuda")
        answers[each] = session.run(batch)["last_hidden_state"][batch["attention_mask"] != 0]
    assert likeness(answers[name], answers["eager-bf16"]) > FOR_MEMORY[name][0]


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="here is no GPU")
def test_who_asks_for_memory_gets_what_takes_least_of_the_gpu(
    make_language_model: MakeCheckpoint, cli: Cli, tmp_path: Path
) -> None:
    source = make_language_model(
        hidden_size=2048, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=16,
        num_hidden_layers=4, initializer_range=0.0035,
    )  # fmt: skip
    outcome = cli(
        source, "--target", "gpu", "--recipe", "eager-bf16", "--recipe", "bitsandbytes-nf4", "--objective", "memory",
        "--workload", "1x8+4", "--budget", "1s", "--max-drop", "0.9", "--min-speedup", "0.0001", "--max-load", "1",
        "--out", tmp_path / "emitted",
    )  # fmt: skip
    assert outcome.code == 0, outcome.output
    manifest = json.loads((tmp_path / "emitted" / "optimize.json").read_text())
    taken = {each["name"]: each["gpu_memory"]["most"] for each in manifest["report"]["candidates"]}
    assert manifest["report"]["emitted"] == "bitsandbytes-nf4" and taken["bitsandbytes-nf4"] < taken["eager-bf16"]
    lines = re.search(r"```python\n(.*?)```", (tmp_path / "emitted" / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    done = subprocess.run([sys.executable, "-c", lines[1]], cwd=tmp_path / "emitted", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
