"""The emitted folder's README.md: what it is, how it was proved, and how to run it with its runtime alone."""

from __future__ import annotations

from optimize.pipeline.contract import DEFAULT, Kind, Meaning
from optimize.pipeline.manifest import Report
from optimize.pipeline.measure import Speed
from optimize.pipeline.progress import accuracy_text
from optimize.pipeline.verdict import Candidate

LOCK = "toolchain.lock"  # in the emitted folder of what only a toolchain opens

TOKENIZE = """from transformers import AutoTokenizer

inputs = dict(AutoTokenizer.from_pretrained(".")(["Some text."], padding=True, return_tensors="{tensors}"))
"""

RUN = {
    Kind.CHECKPOINT: """import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained(".", dtype="auto").eval()
with torch.inference_mode():
    outputs = model(**inputs)
""",
    Kind.AOTI: """import torch

model = torch._inductor.aoti_load_package("model.pt2")  # torch {torch}, on a processor like this one
names = model.get_metadata()["inputs"].split(",")
with torch.inference_mode():
    outputs = model(**{{name: inputs[name] for name in names}})
""",
    Kind.TORCHSCRIPT: """import torch

extra = {{"inputs": ""}}
model = torch.jit.load("model.pt", _extra_files=extra)
with torch.no_grad():
    outputs = model(*(inputs[name] for name in extra["inputs"].decode().split(",")))
""",
    Kind.ONNX: """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = [port.name for port in session.get_outputs()]
outputs = dict(zip(names, session.run(None, {{port.name: inputs[port.name] for port in session.get_inputs()}})))
""",
    Kind.OPENVINO: """import json
import openvino

options = json.load(open("runtime.json"))  # without it OpenVINO picks another precision than was proved
model = openvino.Core().compile_model("openvino_model.xml", "CPU", options)
result = model({{port.any_name: inputs[port.any_name] for port in model.inputs}})
outputs = {{port.any_name: result[port] for port in model.outputs}}
""",
}

for engines in (Kind.TENSORRT, Kind.TENSORRT_RTX):
    RUN[engines] = "# engine.json names inputs and profiles; see the samples of {auto_class}'s runtime, TensorRT\n"
RUN[Kind.IPEX] = "import intel_extension_for_pytorch\n" + RUN[Kind.TORCHSCRIPT]
IMPORTS = {
    Kind.CHECKPOINT: ("torch",),
    Kind.AOTI: ("torch",),
    Kind.TORCHSCRIPT: ("torch",),
    Kind.ONNX: ("onnxruntime",),
    Kind.OPENVINO: ("openvino", "openvino-genai"),
    Kind.GGUF: ("xllamacpp",),
    Kind.OLLAMA: (),
    Kind.GENAI: ("onnxruntime-genai",),
}
NORMALIZE = "embeddings = embeddings / (embeddings**2).sum(-1)[:, None] ** 0.5\n"
POOL = {  # what was judged of a sentence
    "mean": """
mask = inputs["attention_mask"][..., None]
embeddings = (outputs["last_hidden_state"] * mask).sum(1) / mask.sum(1)
"""
    + NORMALIZE,
    "cls": """
embeddings = outputs["last_hidden_state"][:, 0]
"""
    + NORMALIZE,
}


GENERATE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".", dtype="auto")
{prepare}inputs = tokenizer("The harbour was", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32{options})[0]))
"""
PACK = """
import torch
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

for layer in model.modules():  # pack four-bit weights for this processor; without it the model runs too, but slowly
    weight = getattr(layer, "weight", None)
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.qdata.int() + 8, 1)
        scales = pack_tinygemm_scales_and_zeros(weight.scale, -weight.scale * weight.zero_point, weight.scale.dtype)
        packed = Int4OpaqueTensor(data, scales, list(weight.block_size), weight.shape)
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)

"""
COMPILE = """
import json
from transformers import CompileConfig

compiling = CompileConfig(**json.load(open("compile.json")))
compiling._compile_all_devices = True  # else transformers compiles for accelerators alone

"""
LLM_PIPELINE = """import json
import openvino_genai

with open("runtime.json") as file:
    pipeline = openvino_genai.LLMPipeline(".", "CPU", **json.load(file))
print(pipeline.generate("The harbour was", max_new_tokens=32, do_sample=False, apply_chat_template=False))
"""
SERVE = """import xllamacpp  # or: llama-server -m model.gguf; ollama create NAME -f Modelfile

params = xllamacpp.CommonParams()
params.model.path = "model.gguf"
server = xllamacpp.Server(params)
answer = server.handle_completions({"prompt": "The harbour was", "max_tokens": 32, "temperature": 0})
print(answer["choices"][0]["text"])
"""
OLLAMA = """import json
import urllib.request

options = {"temperature": 0, "num_predict": 32}
asked = {"model": "NAME", "prompt": "The harbour was", "raw": True, "stream": False, "options": options}
request = urllib.request.Request("http://127.0.0.1:11434/api/generate", json.dumps(asked).encode())
print(json.load(urllib.request.urlopen(request))["response"])
"""
WITH_RUNTIME = """With its runtime and transformers' tokenizer, in this folder (`{install}`):

```python
{usage}```

Or with `import optimize; model = optimize.load(".")`, which drops into `transformers.pipeline`.
"""
WITH_TOOLCHAIN = """With its runtime and transformers' tokenizer, in this folder and an environment of its own ({apart};
`{install}`):

```python
{usage}```
"""
WITH_OLLAMA = """With Ollama, in this folder (proved with version {version}; it gives no logits, so it was judged by
tokens). Once, which copies the weights into Ollama's own store:

    ollama create NAME -f Modelfile

Then `ollama run NAME`, or over HTTP:

```python
{usage}```

Or with `optimize serve .`, an OpenAI-compatible endpoint of a private server. `model.gguf` also runs in llama.cpp.
"""
GENAI = """import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when the next line runs
import onnxruntime_genai

model = onnxruntime_genai.Model(".")
tokenizer = onnxruntime_genai.Tokenizer(model)
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = onnxruntime_genai.Generator(model, params)
generator.append_tokens(tokenizer.encode("The harbour was"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
GENERATES = {Kind.OPENVINO: LLM_PIPELINE, Kind.GGUF: SERVE, Kind.OLLAMA: OLLAMA, Kind.GENAI: GENAI}


def usage(report: Report, kind: Kind, recipe: str) -> str:
    """Python that runs the emitted folder without this package, from inside it."""
    from optimize.models.tasks import TASKS

    if TASKS[report.checkpoint.task].generates:
        compiles = "compile-generate" in recipe
        prepare = (PACK if "quantize-torchao{mode=int4}" in recipe else "") + (COMPILE if compiles else "")
        options = ", compile_config=compiling" if compiles else ""
        return GENERATES.get(kind) or GENERATE.format(prepare=prepare, options=options)
    tensors = "pt" if kind in (Kind.CHECKPOINT, Kind.AOTI, Kind.TORCHSCRIPT, Kind.IPEX) else "np"
    auto_class = TASKS[report.checkpoint.task].auto_class
    run = RUN[kind].format(auto_class=auto_class, torch=report.host.packages.get("torch"))
    pooled = POOL[report.evaluation.pooling] if report.evaluation.pooling else ""
    return TOKENIZE.format(tensors=tensors) + "\n" + run + pooled


def install(report: Report, kind: Kind, recipe: str) -> str:
    """The command that installs what `usage` imports, in the versions that it was proved with."""
    if kind.toolchain != DEFAULT:
        return f"pip install --require-hashes --no-deps -r {LOCK}"
    versions = report.host.packages
    needed = [name for name in IMPORTS[kind] if name != "openvino-genai" or report.evaluation.meaning is Meaning.NEXT]
    quantizer = ("torchao",) if "quantize-torchao" in recipe else ()
    wanted = [name for name in ("transformers", *needed, *quantizer) if name in versions]
    named = [f"{name}=={versions[name].partition('+')[0]}" for name in wanted]  # without a build's own label
    return f"pip install {' '.join(named)}"


def _table(speed: Speed) -> str:
    rows = [f"| {cell.cell} | {1e3 * cell.baseline_seconds:.2f} | {1e3 * cell.seconds:.2f} | {cell.speedup} |"
            for cell in speed.cells]  # fmt: skip
    return "\n".join(["| batch x tokens | eager, ms | this, ms | speedup |", "|---|---|---|---|", *rows])


def _generation_table(speed: Speed) -> str:
    rows = ["| batch x prompt+new | to the first token, ms | speedup | tokens/s after it | speedup | all | ",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for cell in speed.cells:
        assert cell.first is not None and cell.rest is not None
        rows.append(
            f"| {cell.cell} | {1e3 * cell.first.seconds:.0f} | {cell.first.speedup} | {cell.tokens_per_second:.1f} "
            f"| {cell.rest.speedup} | {cell.speedup} |"
        )
    return "\n".join(rows)


def model_card(report: Report, winner: Candidate) -> str:
    """README.md, as Markdown."""
    assert winner.speed is not None
    checkpoint, host = report.checkpoint, report.host
    base = f"base_model: {checkpoint.model_id}\n" if checkpoint.revision else ""  # a folder's name is no hub id
    revision = f" at `{checkpoint.revision}`" if checkpoint.revision else ""
    asked = report.evaluation.questions  # of a language model, which then has metrics on other data than the text
    accuracy = accuracy_text(winner) if asked is None else str(winner.accuracy)
    metrics = winner.accuracy.metrics if winner.accuracy and asked else ()
    answers = "".join(f"- {metric}, on {metric.examples} {metric.unit} of {asked}\n" for metric in metrics)
    cells = _generation_table(winner.speed) if winner.speed.cells[0].rest else _table(winner.speed)
    return f"""---
{base}pipeline_tag: {checkpoint.task}
---

# {checkpoint.model_id}, optimized for {host.target.name}

Made by `optimize` from `{checkpoint.model_id}`{revision} ({checkpoint.architecture}, {checkpoint.dtype}) with

    {winner.recipe}

## What was proved

On {host.target.device} ({host.target.cores} cores), {report.created}:

- {accuracy}, against the float32 model on {winner.accuracy.examples if winner.accuracy else 0} examples
  of {report.evaluation.source}; the gate was a drop of at most {report.gates.max_drop:g}.
{answers}- {winner.speed.overall} times the speed of the eager {checkpoint.dtype} model (99% interval, geometric
  mean), measured while {winner.speed.noise or "nothing was noted"}; other work of up to {report.gates.max_load:.0%} was
  allowed:

{cells}

`optimize verify .` repeats these checks here. The inputs, the reference's outputs and every raw timing are in
`evidence/`; `optimize.json` has all of it in one schema.

## How to run it

{_how_to_run(report, winner)}"""


def _how_to_run(report: Report, winner: Candidate) -> str:
    form = WITH_OLLAMA if winner.kind is Kind.OLLAMA else WITH_RUNTIME
    if winner.kind.toolchain != DEFAULT:
        form = WITH_TOOLCHAIN
    asked = (report, winner.kind, winner.recipe)
    return form.format(
        install=install(*asked), usage=usage(*asked), version=report.host.packages.get("ollama", "unknown"),
        apart=_toolchain_text(report, winner.kind),
    )  # fmt: skip


def _toolchain_text(report: Report, kind: Kind) -> str:
    found = report.host.toolchains.get(kind.toolchain)
    if found is None:
        return ""
    named = ", proved in one that its maker named" if found.named else ""
    return f"toolchain {kind.toolchain}, Python {found.python}{named}"
