"""Python that runs an emitted folder without this package: the lines that its README.md has, by kind."""

from __future__ import annotations

from pathlib import Path

from optimize.pipeline.contract import DEFAULT, Form, Kind
from optimize.pipeline.manifest import Report
from optimize.pipeline.toolchain_files import read_toolchain

LOCK = "toolchain.lock"  # in the emitted folder of what only a toolchain opens

TOKENIZE = """from transformers import AutoTokenizer

inputs = dict(AutoTokenizer.from_pretrained(".")(["Some text."], padding=True, return_tensors="{tensors}"))
"""

PROCESS = """from PIL import Image
from transformers import AutoImageProcessor

image = Image.open("image.png").convert("{mode}")
inputs = dict(AutoImageProcessor.from_pretrained(".", backend="pil")(images=[image], return_tensors="{tensors}"))
"""
# images are floats, and so in the dtype that the model computes in
CAST = {
    Kind.CHECKPOINT: "inputs = {name: value.to(model.dtype) for name, value in inputs.items()}\n",
    Kind.CUDA_GRAPHS: "inputs = {name: value.to(model.dtype) for name, value in inputs.items()}\n",
    Kind.AOTI: """dtype = getattr(torch, model.get_metadata()["dtype"])
inputs = {name: value.to(dtype) for name, value in inputs.items()}
""",
}

RUN = {
    Kind.CHECKPOINT: """import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained(".", dtype="auto").eval()
{cast}with torch.inference_mode():
    outputs = model(**inputs)
""",
    Kind.AOTI: """import torch

model = torch._inductor.aoti_load_package("model.pt2")  # torch {torch}, on a processor like this one
names = model.get_metadata()["inputs"].split(",")
{cast}with torch.inference_mode():
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

ENGINE = """import json
import numpy as np
import MODULE as trt
from cuda.bindings import runtime as cuda

engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(open("model.engine", "rb").read())
context, stream = engine.create_execution_context(), cuda.cudaStreamCreate()[1]
context.set_optimization_profile_async(0, stream)  # the one that takes every shape; engine.json lists them
cuda.cudaStreamSynchronize(stream)
names = json.load(open("engine.json"))["inputs"]
arrays = {{name: np.ascontiguousarray(inputs[name], trt.nptype(engine.get_tensor_dtype(name))) for name in names}}
for name in names:
    context.set_input_shape(name, arrays[name].shape)
every = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
outputs = {{name: np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
           for name in every if name not in names}}
memory = {{}}
for name, array in {{**arrays, **outputs}}.items():
    memory[name] = cuda.cudaMalloc(array.nbytes)[1]
    context.set_tensor_address(name, memory[name])
for name, array in arrays.items():
    cuda.cudaMemcpy(memory[name], array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
assert context.execute_async_v3(stream)
cuda.cudaStreamSynchronize(stream)
for name, array in outputs.items():
    cuda.cudaMemcpy(array.ctypes.data, memory[name], array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
"""
PROVIDED = """import json
import onnxruntime

onnxruntime.preload_dlls()
chosen = json.load(open("provider.json"))
{open}names = [port.name for port in session.get_outputs()]
outputs = dict(zip(names, session.run(None, {{port.name: inputs[port.name] for port in session.get_inputs()}})))
"""
BUILT_IN = """provider = (chosen["provider"], chosen["options"])
session = onnxruntime.InferenceSession("model.onnx", providers=[provider])
"""
PLUGGED_IN = """import onnxruntime_ep_nv_tensorrt_rtx as plugin

onnxruntime.register_execution_provider_library(chosen["provider"], plugin.get_library_path())
devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == chosen["provider"]]
options = onnxruntime.SessionOptions()
options.add_provider_for_devices(devices[:1], chosen["options"])
session = onnxruntime.InferenceSession("model.onnx", options)
"""
GRAPHED = """import json
import torch
from transformers import {auto_class}

settings = json.load(open("graphs.json"))
model = {auto_class}.from_pretrained(".", dtype="auto").eval().cuda()
call = torch.compile(model, dynamic=False, fullgraph=True) if settings["compile"] else model
{cast}inputs = {{name: value.cuda() for name, value in inputs.items()}}
with torch.inference_mode():
    for _ in range(3):
        call(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # of this shape: copy what else has it into these inputs, and replay
        outputs = call(**inputs)
graph.replay()
"""
ENGINE_MODULES = {Kind.TENSORRT: "tensorrt", Kind.TENSORRT_RTX: "tensorrt_rtx_bindings"}
for engines, module in ENGINE_MODULES.items():
    RUN[engines] = ENGINE.replace("MODULE", module)
RUN[Kind.ONNX_GPU] = PROVIDED
RUN[Kind.CUDA_GRAPHS] = GRAPHED
RUN[Kind.IPEX] = "import intel_extension_for_pytorch\n" + RUN[Kind.TORCHSCRIPT]
TENSORS = (Kind.CHECKPOINT, Kind.AOTI, Kind.TORCHSCRIPT, Kind.IPEX, Kind.CUDA_GRAPHS)  # fed with those of torch
IMPORTS = {
    Kind.CHECKPOINT: ("torch",),
    Kind.AOTI: ("torch",),
    Kind.CUDA_GRAPHS: ("torch",),
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
REPLAY = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".", dtype="auto").cuda()
inputs = tokenizer("The harbour was", return_tensors="pt").to("cuda")
written = model.generate(**inputs, max_new_tokens=32, cache_implementation="static")  # steps are captured
print(tokenizer.decode(written[0]))
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
TENSORRT_LLM = """import json

facts = json.load(open("tensorrt_llm.json"))
if facts["engine"]:
    from tensorrt_llm._tensorrt_engine import LLM
else:  # or: trtllm-serve . --config serve.yaml
    from tensorrt_llm import LLM
from tensorrt_llm.llmapi import SamplingParams

llm = LLM(model=".", tokenizer=".", tensor_parallel_size=facts["gpus"])
print(llm.generate("The harbour was", sampling_params=SamplingParams(max_tokens=32, top_k=1)).outputs[0].text)
"""
VLLM = """import json
from vllm import LLM, SamplingParams  # or: vllm serve . --config serve.yaml

options = {name.replace("-", "_"): value for name, value in json.load(open("serve.yaml")).items()}
if __name__ == "__main__":  # it may start processes of its own, which import this file
    asked = SamplingParams(temperature=0, max_tokens=32)
    print(LLM(model=".", **options).generate("The harbour was", asked)[0].outputs[0].text)
"""
GENERATES = {Kind.OPENVINO: LLM_PIPELINE, Kind.GGUF: SERVE, Kind.OLLAMA: OLLAMA, Kind.GENAI: GENAI,
             Kind.TENSORRT_LLM: TENSORRT_LLM, Kind.VLLM: VLLM, Kind.CUDA_GRAPHS: REPLAY}  # fmt: skip


HEAR = """import soundfile
from transformers import AutoFeatureExtractor, AutoTokenizer

samples, rate = soundfile.read("clip.wav", dtype="float32")  # one channel, at the rate that the extractor asks for
extractor, tokenizer = AutoFeatureExtractor.from_pretrained("."), AutoTokenizer.from_pretrained(".")
features = extractor(samples, sampling_rate=rate, return_tensors="{tensors}")["input_features"]
"""
TRANSCRIBES = {
    Kind.CHECKPOINT: HEAR.format(tensors="pt")
    + """
from transformers import AutoModelForSpeechSeq2Seq

model = AutoModelForSpeechSeq2Seq.from_pretrained(".", dtype="auto").eval()
print(tokenizer.decode(model.generate(features.to(model.dtype))[0], skip_special_tokens=True))
""",
    Kind.CUDA_GRAPHS: HEAR.format(tensors="pt")
    + """
from transformers import AutoModelForSpeechSeq2Seq

model = AutoModelForSpeechSeq2Seq.from_pretrained(".", dtype="auto").eval().cuda()
features = features.to("cuda", model.dtype)
written = model.generate(features, cache_implementation="static")  # steps are captured
print(tokenizer.decode(written[0], skip_special_tokens=True))
""",
    Kind.OPENVINO: HEAR.format(tensors="np")
    + """
import json
import numpy as np
import openvino

options, core = json.load(open("runtime.json")), openvino.Core()
encoder, decoder = (core.compile_model(name, "CPU", options).create_infer_request()
                    for name in ("openvino_encoder.xml", "openvino_model.xml"))
encoder.infer({{0: features}})
place = lambda state: (int(state.name.rsplit("layers.", 1)[1].split(".")[0]), state.name.endswith("values"))
crossed = sorted((state for state in decoder.query_state() if "cross_attention_cache" in state.name), key=place)
for index, state in enumerate(crossed):
    state.state = encoder.get_output_tensor(index)

def logits(token):
    decoder.infer({{"decoder_input_ids": np.array([[token]]), "beam_idx": np.zeros(1, np.int32)}})
    found = decoder.get_output_tensor(0).data[0, -1].copy()
    found[{never}] = -np.inf  # what the checkpoint never writes
    return found

for token in {prompt}:  # what every transcription begins with
    found = logits(token)
found[{never_first}] = -np.inf
tokens = [found.argmax()]
while tokens[-1] != {end} and len(tokens) < 128:
    tokens.append(logits(tokens[-1]).argmax())
print(tokenizer.decode(tokens, skip_special_tokens=True))
""",
}


def usage(report: Report, kind: Kind, recipe: str) -> str:
    """Python that runs the emitted folder without this package, from inside it."""
    from optimize.models.images import image_mode
    from optimize.models.speech import read_decoding
    from optimize.models.tasks import TASKS

    if report.workload[0].form is Form.CLIPS:
        said = read_decoding(Path(report.checkpoint.folder))
        return TRANSCRIBES[kind].format(
            prompt=list(said.prompt), end=said.end, never=list(said.never), never_first=list(said.never_first)
        )
    if TASKS[report.checkpoint.task].generates:
        compiles = "compile-generate" in recipe
        prepare = (PACK if "quantize-torchao{mode=int4}" in recipe else "") + (COMPILE if compiles else "")
        options = ", compile_config=compiling" if compiles else ""
        return GENERATES.get(kind) or GENERATE.format(prepare=prepare, options=options)
    task = TASKS[report.checkpoint.task]
    images = task.form is Form.IMAGES
    tensors, mode = "pt" if kind in TENSORS else "np", image_mode(Path(report.checkpoint.folder)) if images else ""
    given = (PROCESS if images else TOKENIZE).format(tensors=tensors, mode=mode)
    opened = PLUGGED_IN if "provider=tensorrt-rtx" in recipe else BUILT_IN
    run = RUN[kind].format(
        auto_class=task.auto_class, torch=report.host.packages.get("torch"), open=opened,
        cast=CAST.get(kind, "") if images else "",
    )  # fmt: skip
    pooled = POOL[report.evaluation.pooling] if report.evaluation.pooling else ""
    return given + "\n" + run + pooled


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
    quantizer = ("torchao",) if "quantize-torchao" in recipe else ()
    reader = {Form.IMAGES: ("pillow",), Form.CLIPS: ("soundfile",)}.get(report.workload[0].form, ())
    wanted = [name for name in ("transformers", *reader, *needed, *quantizer) if name in versions]
    named = [f"{name}=={versions[name].partition('+')[0]}" for name in wanted]  # without a build's own label
    return f"pip install {' '.join(named)}"
