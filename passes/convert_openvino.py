"""convert-openvino: an OpenVINO IR with dynamic batch (and sequence, of text), through transformers' own exporter."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optimize.models.encoding import load_tokenizer
from optimize.models.loading import dynamic_shapes, load_model, sample_inputs
from optimize.models.tasks import TASKS
from optimize.passes._openvino_rewrites import spell_out_repeats
from optimize.passes._openvino_speech import ENCODER, save_speech_model
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Target
from optimize.pipeline.memory import FRAMEWORKS, MIB
from optimize.pipeline.versions import EXPORTERS, why_older

IR = "openvino_model.xml"
EXACT_CACHE = {"KV_CACHE_PRECISION": "f32"}  # of speech: OpenVINO's own choice moved logits by 0.3% of the largest
DECODING = ("config.json", "generation_config.json")  # what a speech model's tokens have to keep to
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
RUNTIME_OPTIONS = "runtime.json"  # properties that the runtime compiles the model with; OpenVINO has no place for them

LAYER = 8 * MIB  # of a traced layer's operations


@dataclass(frozen=True)
class ConvertOpenvino(Pass):
    """Trace the model into an OpenVINO IR with dynamic batch (and sequence, of text).

    A language model's has its own cache. Not by way of ONNX: there attention is spelt out, and int8 runs at half the
    speed.
    Source: https://huggingface.co/docs/transformers (exporters), https://docs.openvino.ai (model conversion)
    """

    name: ClassVar = "convert-openvino"
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 3
    tools: ClassVar = ("torch", "transformers", "openvino")

    @property
    def arithmetic(self) -> str | None:
        return "float32"

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        return why_older("transformers", EXPORTERS)

    def memory(self, checkpoint: Checkpoint) -> int:
        # the weights mapped: the traced program, the graph and the file that is written share them. Of one encoder of
        # 91 MB 609 to 1,758 MiB were seen, from run to run
        return 2 * FRAMEWORKS + int(4.2 * checkpoint.parameters) + LAYER * checkpoint.dimensions.layers

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        return 4 * checkpoint.parameters

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import openvino
        from transformers.exporters.configs import OpenVINOConfig
        from transformers.exporters.exporter_openvino import OpenVINOExporter
        from transformers.exporters.utils import decompose_for_generation

        model = load_model(source.path, context.task, "float32")
        inputs = sample_inputs(source.path, context.task)
        if TASKS[context.task].form is Form.CLIPS:
            operations = save_speech_model(model, inputs, out / ENCODER, out / IR)
            for name in DECODING:
                if (source.path / name).is_file():
                    shutil.copyfile(source.path / name, out / name)
            write_runtime_options(out, "f32", **EXACT_CACHE)
            return {"operations": operations}
        if TASKS[context.task].generates:
            # one program for prompts and steps alike, which keeps its KV cache itself: what openvino-genai runs
            prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            model, inputs = decompose_for_generation(model, prompts, multi_token_decode=True)["decode"]
            config = OpenVINOConfig(dynamic=True)
        else:
            config = OpenVINOConfig(dynamic=True, dynamic_shapes=dynamic_shapes(source.path, inputs))
        program = OpenVINOExporter().export(model, inputs, config=config).program
        if TASKS[context.task].form is Form.IMAGES:  # of which the exporter leaves the size open, too
            program.reshape({name: [-1, *value.shape[1:]] for name, value in inputs.items()})
        repeats = spell_out_repeats(program)
        openvino.save_model(program, out / IR, compress_to_fp16=False)
        write_runtime_options(out, "f32")
        if TASKS[context.task].generates:
            save_tokenizers(source.path, out)
        return {"operations": len(program.get_ordered_ops()), "repeated_heads": repeats}

    def ensures(self, out: Path) -> None:
        check_dynamic(out)


def check_dynamic(out: Path) -> None:
    """Raise ValueError for an input of the IR that takes one batch, or text of one length, alone."""
    import openvino

    for port in openvino.Core().read_model(out / IR).inputs:
        varies = list(port.partial_shape)[: 2 if len(port.partial_shape) == 2 else 1]
        if not all(dimension.is_dynamic for dimension in varies):
            raise ValueError(f"{port.any_name} has a fixed shape {port.partial_shape}")


def save_tokenizers(folder: Path, out: Path) -> None:
    """The checkpoint's tokenizer as two graphs, which openvino-genai runs."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    for name, graph in zip(TOKENIZERS, convert_tokenizer(load_tokenizer(folder), with_detokenizer=True), strict=True):
        openvino.save_model(graph, out / name, compress_to_fp16=False)


def graphs(folder: Path) -> list[str]:
    """The files of a folder's models: two of speech."""
    return [name for name in (IR, ENCODER) if (folder / name).is_file()]


def carry_along(folder: Path, out: Path) -> None:
    """Copy what lies beside the models: graphs of a tokenizer, and what a speech model keeps to."""
    beside = [each for name in TOKENIZERS for each in folder.glob(Path(name).stem + ".*")]
    for path in (*beside, *(folder / name for name in DECODING if (folder / name).is_file())):
        shutil.copyfile(path, out / path.name)


def write_runtime_options(out: Path, precision: str, **more: int | str) -> None:
    """Write down all that the gate runs it with, but for the number of threads; `precision` is "f32" or "bf16".

    Always: left to itself, OpenVINO runs a float32 model in bfloat16 wherever the processor can.
    """
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, **more}
    (out / RUNTIME_OPTIONS).write_text(json.dumps(options))
