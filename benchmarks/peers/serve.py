"""One artifact, open in a process of its own: started by compare.py in the environment of the tool that made it.

    python serve.py RUNTIME PATH INPUTS OPTIONS CORES

Obeys one command a line: `time CELL` answers with the seconds of five calls after two that warm up, `outputs FILE`
runs all held-out text and writes what came out to FILE. Shares no code with the product. Each artifact is opened by its
bare runtime, on as many threads as there are cores, with whatever else its tool sets (OPTIONS, as JSON). Every call
takes numpy arrays and gives a numpy array. It runs under any tool's versions, so it imports only what it needs.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

WARM, TIMED = 2, 5


def torch_model(path, options, cores):
    """Transformers' eager model, or torch.compile of it."""
    if options.get("freezing"):
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    import torch
    import transformers

    torch.set_num_threads(cores)
    dtype = getattr(torch, options.get("dtype", "float32"))
    model = getattr(transformers, options["auto_class"]).from_pretrained(path, dtype=dtype).eval()
    if "compile" in options:
        model = torch.compile(model, **options["compile"])

    def call(feed):
        with torch.inference_mode():
            return model(**feed)[options["output"]].float().numpy()

    return call, lambda batch: {name: torch.from_numpy(array) for name, array in batch.items()}


def aoti(path, options, cores):
    """An AOTInductor package, as the emitted model card says."""
    import torch

    torch.set_num_threads(cores)
    package = torch._inductor.aoti_load_package(path)
    names = package.get_metadata()["inputs"].split(",")

    def call(feed):
        with torch.inference_mode():
            return package(**feed)[options["output"]].float().numpy()

    return call, lambda batch: {name: torch.from_numpy(batch[name]) for name in names}


def onnxruntime(path, options, cores):
    """An ONNX graph; all graph optimizations are on by default."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = cores
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    types = {port.name: "int32" if "int32" in port.type else "int64" for port in session.get_inputs()}
    output = wanted([port.name for port in session.get_outputs()], options)

    def call(feed):
        return session.run([output], feed)[0]

    return call, lambda batch: {name: batch[name].astype(kind) for name, kind in types.items()}


def openvino(path, options, cores):
    """An OpenVINO IR with the properties that its tool compiles it with; ours lie beside it in runtime.json."""
    import openvino

    properties = {"INFERENCE_NUM_THREADS": cores} | options.get("properties", {})
    model = openvino.Core().compile_model(path, "CPU", properties)
    names = [port.any_name for port in model.inputs]
    output = wanted([port.any_name for port in model.outputs], options)

    def call(feed):
        return np.array(model(feed)[output])

    return call, lambda batch: {name: batch[name] for name in names}


def wanted(names, options):
    """The output that is compared; exporters that rename it leave it the first."""
    return options["output"] if options["output"] in names else names[0]


def read(path):
    """Batches that inputs.py wrote, in order."""
    batches = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            index, name = key.split("/", 1)
            batches.setdefault(int(index), {})[name] = file[key]
    return [batches[index] for index in sorted(batches)]


def answers(call, prepare, batch, pooled):
    """For each example: its logits, or its tokens' mean with length 1 (padding left out)."""
    found = np.asarray(call(prepare(batch)), dtype=np.float32)
    if not pooled:
        return found
    mask = batch["attention_mask"][..., None].astype(np.float32)
    means = (found * mask).sum(axis=1) / mask.sum(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def main():
    runtime, path, inputs, options, cores = sys.argv[1:]
    options = json.loads(options)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    opening = {"torch": torch_model, "aoti": aoti, "onnxruntime": onnxruntime, "openvino": openvino}[runtime]
    call, prepare = opening(path, options, int(cores))
    feeds = [prepare(batch) for batch in read(Path(inputs, "cells.npz"))]
    for feed in feeds:
        call(feed)
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        verb, _, argument = line.strip().partition(" ")
        if verb == "time":
            feed, seconds = feeds[int(argument)], []
            for _ in range(WARM + TIMED):
                start = time.perf_counter()
                call(feed)
                seconds.append(time.perf_counter() - start)
            print(json.dumps(seconds[WARM:]), file=replies, flush=True)
        elif verb == "outputs":
            pooled = options["output"] == "last_hidden_state"
            text = read(Path(inputs, "text.npz"))
            np.save(argument, np.concatenate([answers(call, prepare, batch, pooled) for batch in text]))
            print(json.dumps("done"), file=replies, flush=True)


if __name__ == "__main__":
    main()
