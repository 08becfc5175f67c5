"""quantize-openvino: int8 by NNCF, weights and activations on calibration text (static) or weights alone (weights)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from optimize.models.tasks import TASKS
from optimize.passes._groups import why_no_groups
from optimize.passes._openvino_rewrites import (
    compile_exactly,
    merge_products,
    producer,
    shared_scale,
    smooth_activations,
)
from optimize.passes._sensitivity import SAMPLES, check_options, noisiest
from optimize.passes.convert_openvino import EXACT_CACHE, IR, carry_along, graphs, write_runtime_options
from optimize.pipeline.batches import Encoded, load_batches
from optimize.pipeline.contract import Artifact, Checkpoint, Context, Form, Kind, Pass, Target
from optimize.pipeline.errors import RequestError
from optimize.pipeline.memory import FRAMEWORKS, MIB

NNCF = 500 * MIB  # what it imports, and holds of a small model
ROW = -1  # as group: NNCF's word for a whole one
# how much of an outlying activation channel moves into the weights: NNCF's own 0.95 leaves them too coarse
SMOOTHING = 0.85
PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")
WINDOWS = 16  # of calibration text that int4's scales are estimated on, and activations smoothed


@dataclass(frozen=True)
class QuantizeOpenvino(Pass):
    """Quantize an OpenVINO IR with NNCF: weights and activations, weights alone, or a language model's in four bits.

    Mode static smooths activations, and corrects biases in a way of our own (see `_correct_bias`). `keep` leaves that
    many matrix products in floating point: those whose inputs int8 represents worst. `smooth` is for int8 weights of
    language models: OpenVINO quantizes more activations by one scale then, which is faster.
    Raises RuntimeError when nothing was quantized.
    Source: https://docs.openvino.ai (NNCF post-training quantization, weight compression)
    """

    name: ClassVar = "quantize-openvino"
    accepts: ClassVar = Kind.OPENVINO
    produces: ClassVar = Kind.OPENVINO
    version: ClassVar = 4
    tools: ClassVar = ("openvino", "nncf")

    mode: Literal["static", "weights", "int4"] = "static"
    samples: int = 128
    keep: int = 0
    group: int = 32  # of mode int4: weights that share a scale; -1: those of a whole row
    smooth: bool = False  # of mode weights

    def __post_init__(self) -> None:
        if self.smooth and self.mode != "weights":
            raise RequestError(f"{self.name}: smooth is for mode=weights alone")
        if self.group != type(self).group and self.mode != "int4":
            raise RequestError(f"{self.name}: group is for mode=int4 alone")
        check_options(self.name, samples=self.samples, keep=self.keep, ranks=self.mode == "static")

    @property
    def calibrated(self) -> bool:
        return self.mode != "weights" or self.smooth

    @property
    def arithmetic(self) -> str | None:
        return "int8"  # of weights alone too: there OpenVINO quantizes activations as they come

    def requires(self, checkpoint: Checkpoint, target: Target) -> str | None:
        if self.mode == "static" and TASKS[checkpoint.task].generates:
            return "int8 activations of language and speech models are not written yet: mode=weights"
        if self.mode == "int4" and TASKS[checkpoint.task].form is Form.CLIPS:
            return "four bits are for language models"
        if self.smooth and TASKS[checkpoint.task].form is not Form.PROMPTS:
            return "smooth is for language models"
        if self.mode == "int4" and self.group != ROW:
            return why_no_groups(checkpoint, self.group)
        return None

    def memory(self, checkpoint: Checkpoint) -> int:
        # what is read is mapped, and compiled for the calibration; what is written is whole in memory
        speech = TASKS[checkpoint.task].form is Form.CLIPS  # two models, one after the other
        copies = {"weights": 3.6 if self.smooth or speech else 1.5, "int4": 3.0, "static": 4.0}[self.mode]
        return FRAMEWORKS + NNCF + int(copies * 4 * checkpoint.parameters)

    def weight_bytes(self, checkpoint: Checkpoint) -> int:
        sizes = checkpoint.dimensions
        if self.mode != "int4":
            return checkpoint.parameters
        looked_up = sizes.vocabulary * sizes.hidden  # embeddings, which stay in eight bits
        return looked_up + int(0.6 * (checkpoint.parameters - looked_up))

    def run(self, source: Artifact, context: Context, out: Path) -> dict[str, Any]:
        import nncf
        import openvino

        model = openvino.Core().read_model(source.path / IR)
        eligible = _count(model, is_product_of_weights)
        kept: list[str] = []
        facts: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if self.mode == "weights":
            if self.smooth:
                facts["smoothed"] = smooth_activations(model, _feeds(model, context.calibration)[:WINDOWS])
                count = shared_scale(model) if facts["smoothed"] else None
                options = {} if count is None else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": count}
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        elif self.mode == "int4":
            model = nncf.compress_weights(
                model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=self.group, ratio=1.0,
                dataset=nncf.Dataset(_feeds(model, context.calibration)[:WINDOWS]), scale_estimation=True,
            )  # fmt: skip
        else:
            feeds = _feeds(model, context.calibration)[: self.samples]
            kept = _noisiest(model, feeds[:SAMPLES], self.keep)
            source_model, model = model, nncf.quantize(
                model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=kept),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=SMOOTHING),
                    disable_bias_correction=True,
                ),
            )  # fmt: skip
            _correct_bias(model, source_model, feeds)
        quantized = _count(model, lambda node: is_product_of_weights(node) and _is_int8(node))
        if not quantized:
            raise RuntimeError(f"none of {eligible} matrix products was quantized")
        if self.mode == "weights" and TASKS[context.task].form is Form.PROMPTS:
            facts["merged"] = merge_products(model)
        openvino.save_model(model, out / IR, compress_to_fp16=False)
        for name in graphs(source.path)[1:]:  # of speech, whose weights alone are quantized
            beside = openvino.Core().read_model(source.path / name)
            eligible += _count(beside, is_product_of_weights)
            beside = nncf.compress_weights(beside, mode=nncf.CompressWeightsMode.INT8_ASYM)
            quantized += _count(beside, lambda node: is_product_of_weights(node) and _is_int8(node))
            openvino.save_model(beside, out / name, compress_to_fp16=False)
        if TASKS[context.task].form is Form.CLIPS:
            options |= EXACT_CACHE
        write_runtime_options(out, "f32", **options)
        carry_along(source.path, out)
        return {"quantized": quantized, "eligible": eligible, "kept": kept, **facts}


def _feeds(model: Any, calibration: Path | None) -> list[Encoded]:
    """The model's inputs of each calibration batch; a language model's windows are prompts of one row."""
    if calibration is None:
        raise RuntimeError("this mode needs calibration data")
    names = {port.any_name for port in model.inputs}
    feeds = []
    for batch in load_batches(calibration):
        if "beam_idx" in names:
            ids = batch["input_ids"][None]
            positions, beams = np.arange(ids.shape[1])[None], np.zeros(1, dtype=np.int32)
            batch = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": positions,
                "beam_idx": beams,
            }
        feeds.append({name: array for name, array in batch.items() if name in names})
    return feeds


def _noisiest(model: Any, feeds: list[Encoded], count: int) -> list[str]:
    """Names of the `count` matrix products by weights whose inputs int8 represents worst: see noisiest."""
    import openvino

    if count == 0:
        return []
    nodes = [node for node in model.get_ordered_ops() if is_matmul_of_weights(node)]
    compiled = compile_exactly(
        openvino.Model([node.input_value(0) for node in nodes], model.get_parameters(), "inputs")
    )
    runs = ([answer[index] for index in range(len(nodes))] for answer in map(compiled, feeds))
    return noisiest([node.get_friendly_name() for node in nodes], runs, count)


def _correct_bias(model: Any, source: Any, feeds: list[Encoded]) -> None:
    """Take each int8 product's mean error on the inputs that it has in `source` out of the bias.

    NNCF's own fast correction pushes one mean vector through the quantizer, not the inputs themselves, and leaves
    about twice the error on BERT's kin. Source: https://arxiv.org/abs/1906.04721 (section 4.2)
    """
    import openvino

    cut = model.clone()
    products = [node for node in cut.get_ordered_ops() if _is_matmul_of_int8(node)]
    originals = {node.get_friendly_name(): node for node in source.get_ordered_ops()}
    floats = [originals[node.get_friendly_name()] for node in products]
    entries: list[Any] = []  # new parameters of `cut`: what is fed to the products
    fed: list[Any] = []  # the same in `source`
    for product, original in zip(products, floats, strict=True):
        port = product.input(0)
        while (
            producer(port).get_type_name() == "FakeQuantize"
            or "nncf_smooth_quant" in producer(port).get_friendly_name()
        ):
            port = producer(port).input(0)
        if producer(port).get_type_name() != "Parameter":  # else an earlier product has the same input
            entries.append(openvino.opset13.parameter(port.get_partial_shape(), openvino.Type.f32))
            fed.append(original.input_value(0))
            port.replace_source_output(entries[-1].output(0))
    outputs = [node.output(0) for node in floats]
    expected = compile_exactly(openvino.Model([*outputs, *fed], source.get_parameters(), "expected"))
    found = compile_exactly(openvino.Model([node.output(0) for node in products], entries, "found"))
    errors = [np.zeros(output.partial_shape[-1].get_length()) for output in outputs]
    rows = np.zeros(len(outputs))
    for feed in feeds:
        arrays = expected(feed)
        answers = found([arrays[len(outputs) + index] for index in range(len(fed))])
        for index in range(len(outputs)):
            error = (answers[index] - arrays[index]).reshape(-1, errors[index].size)
            errors[index] += error.sum(axis=0, dtype=np.float64)
            rows[index] += len(error)
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    for product, total, count in zip(products, errors, rows, strict=True):
        _add_to_bias(nodes[product.get_friendly_name()], -total / count)


def _add_to_bias(product: Any, correction: Any) -> None:
    """Add to the constant that follows a product; where none does, put one there."""
    from openvino import opset13

    followers = list(product.output(0).get_target_inputs())
    add = followers[0].get_node()
    if len(followers) == 1 and add.get_type_name() == "Add" and producer(add.input(1)).get_type_name() == "Constant":
        bias = producer(add.input(1)).data
        corrected = (bias + correction.reshape(bias.shape)).astype(np.float32)
        add.input(1).replace_source_output(opset13.constant(corrected).output(0))
        return
    add = opset13.add(product, opset13.constant(correction.astype(np.float32)))
    for follower in followers:
        follower.replace_source_output(add.output(0))


def _count(model: Any, wanted: Callable[[Any], bool]) -> int:
    return sum(wanted(node) for node in model.get_ordered_ops())


def is_matmul_of_weights(node: Any) -> bool:
    """Whether an operation of an OpenVINO model is a product by a constant."""
    return bool(node.get_type_name() == "MatMul" and weight_of(node).get_type_name() == "Constant")


def is_product_of_weights(node: Any) -> bool:
    """The same, convolutions among them."""
    return bool(node.get_type_name() in PRODUCTS and weight_of(node).get_type_name() == "Constant")


def _is_matmul_of_int8(node: Any) -> bool:
    return is_matmul_of_weights(node) and _is_int8(node)


def _is_int8(product: Any) -> bool:
    return bool(weight_of(product).get_element_type().size == 1)


def weight_of(node: Any) -> Any:
    """What the second input of a matrix product is made of: through dequantization, back to the stored constant."""
    source = node.input_value(1).get_node()
    while source.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape", "Transpose", "FakeQuantize"):
        source = source.input_value(0).get_node()
    return source
