"""Python that runs an emitted folder without this package: the lines that its README.md has.

They lie in cards/, a file for each kind by what its model does: run (one forward pass), generate, transcribe. What
comes before one is in inputs/, what comes after a forward pass in pool/, what only some recipes need in parts/.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

from optimize.pipeline.contract import DEFAULT, Form, Kind
from optimize.pipeline.manifest import Report
from optimize.pipeline.recipe import parse
from optimize.pipeline.toolchain_files import read_toolchain

LOCK = "toolchain.lock"  # in the emitted folder of what only a toolchain opens
CARDS = Path(__file__).parent / "cards"
ENGINES = {Kind.TENSORRT: "tensorrt", Kind.TENSORRT_RTX: "tensorrt_rtx_bindings"}  # the module that runs such a kind's
# images are floats, and so in the dtype that the model computes in
CASTS = {Kind.CHECKPOINT: "parts/cast", Kind.CUDA_GRAPHS: "parts/cast", Kind.AOTI: "parts/cast-aoti"}
IMPORTS = {
    Kind.CHECKPOINT: ("torch",),
    Kind.AOTI: ("torch",),
    Kind.CUDA_GRAPHS: ("torch",),
    Kind.TENSOR_PARALLEL: ("torch",),
    Kind.TORCHSCRIPT: ("torch",),
    Kind.ONNX: ("onnxruntime",),
    Kind.OPENVINO: ("openvino", "openvino-genai"),
    Kind.GGUF: ("xllamacpp",),
    Kind.OLLAMA: (),
    Kind.GENAI: ("onnxruntime-genai",),
}
TENSORS = (Kind.CHECKPOINT, Kind.AOTI, Kind.TORCHSCRIPT, Kind.IPEX, Kind.CUDA_GRAPHS)  # fed with those of torch


def usage(report: Report, kind: Kind, recipe: str) -> str:
    """Python that runs the emitted folder without this package, from inside it."""
    from optimize.models.tasks import TASKS

    if report.workload[0].form is Form.CLIPS:
        return _transcribing(report, kind)
    if TASKS[report.checkpoint.task].generates:
        return _generating(report, kind, recipe)
    return _running(report, kind, recipe)


def _running(report: Report, kind: Kind, recipe: str) -> str:
    from optimize.models.images import image_mode
    from optimize.models.tasks import TASKS

    task, folder = TASKS[report.checkpoint.task], Path(report.checkpoint.folder)
    images, tensors = task.form is Form.IMAGES, _tensors(kind)
    if images:
        given = _card("inputs/images", tensors=tensors, mode=image_mode(folder))
    else:
        given = _card("inputs/tokens", tensors=tensors)
    if kind in ENGINES:
        run = _card("run/engine", module=ENGINES[kind])
    elif kind is Kind.IPEX:
        run = "import intel_extension_for_pytorch\n" + _card("run/torchscript")
    elif kind is Kind.ONNX_GPU:
        run = by_provider(recipe, images=images)
    else:
        cast = _card(CASTS[kind]) if images and kind in CASTS else ""
        cast += _card("parts/on-gpu") if kind is Kind.CHECKPOINT and report.host.target.gpus else ""
        torch, placed = report.host.packages.get("torch"), _placed(report, recipe)
        run = _card(f"run/{kind}", auto_class=task.auto_class, torch=torch, cast=cast, placed=placed)
    pooling = report.evaluation.pooling  # what was judged of a sentence
    return f"{given}\n{run}" + (_card(f"pool/{pooling}") if pooling else "")


def by_provider(recipe: str, *, images: bool) -> str:
    """What runs a graph by the provider that a recipe chose."""
    chosen = recipe.rpartition("use-provider")[2]
    opened = _card("parts/plugged-in" if "tensorrt-rtx" in chosen else "parts/built-in")
    run = _card("parts/run-onnx" if "tensorrt" in chosen else "parts/captured-onnx")
    return _card("run/onnxruntime-gpu", open=opened, cast=_card("parts/cast-onnx") if images else "", run=run)


def _generating(report: Report, kind: Kind, recipe: str) -> str:
    if kind is not Kind.CHECKPOINT:
        return _card(f"generate/{kind}", ranks=parse(recipe).placement.shards)
    compiles = "compile-generate" in recipe
    prepare = [_card("parts/pack")] if "quantize-torchao{mode=int4}" in recipe else []
    prepare += [_card("parts/compile")] if compiles else []
    options = ", compile_config=compiling" if compiles else ""
    given = ".to(model.device)" if report.host.target.gpus else ""
    return _card(
        "generate/checkpoint", prepare="".join(prepare), options=options, placed=_placed(report, recipe), given=given
    )


def _transcribing(report: Report, kind: Kind) -> str:
    from optimize.models.speech import read_decoding

    said = read_decoding(Path(report.checkpoint.folder))
    return _card("inputs/clips", tensors=_tensors(kind)) + _card(
        f"transcribe/{kind}", prompt=list(said.prompt), end=said.end, never=list(said.never),
        never_first=list(said.never_first),
    )  # fmt: skip


def _placed(report: Report, recipe: str) -> str:
    """What puts a model that was just loaded where it was proved; bitsandbytes has it there."""
    return ".cuda()" if report.host.target.gpus and "quantize-bitsandbytes" not in recipe else ""


def _tensors(kind: Kind) -> str:
    return "pt" if kind in TENSORS else "np"


def _card(name: str, **values: object) -> str:
    return Template((CARDS / f"{name}.txt").read_text(encoding="utf-8")).substitute(values)


def install(report: Report, kind: Kind, recipe: str) -> str:
    """The command that installs what `usage` imports, in the versions that it was proved with."""
    if kind.toolchain != DEFAULT:
        toolchain = read_toolchain(kind.toolchain)
        if toolchain.lock:
            return f"pip install --require-hashes --no-deps -r {LOCK}"
        had = report.host.toolchains[kind.toolchain].packages
        return f"pip install {' '.join(f'{name}=={had[name]}' for name in toolchain.provides if name in had)}"
    versions = report.host.packages
    prompts = report.workload[0].form is Form.PROMPTS
    needed = [name for name in IMPORTS[kind] if name != "openvino-genai" or prompts]
    quantizer = ["torchao"] if "quantize-torchao" in recipe else []
    quantizer += ["bitsandbytes", "accelerate"] if "quantize-bitsandbytes" in recipe else []
    reader = {Form.IMAGES: ("pillow",), Form.CLIPS: ("soundfile",)}.get(report.workload[0].form, ())
    wanted = [name for name in ("transformers", *reader, *needed, *quantizer) if name in versions]
    named = [f"{name}=={versions[name].partition('+')[0]}" for name in wanted]  # without a build's own label
    return f"pip install {' '.join(named)}"
