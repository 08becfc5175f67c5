"""Rewrites of an OpenVINO language model that leave what it computes, and change how fast or how exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ATTENTION = "ScaledDotProductAttention"
SMOOTHING = 0.7  # how much of an outlying activation channel moves into the weights; SmolLM2 lost most at 0.5 and 0.85
TINY = 1e-5  # a channel's least magnitude
SHARED = range(32, 257, 32)  # how many activations OpenVINO may quantize by one scale: its own choice is the first


def spell_out_repeats(model: Any) -> int:
    """Repeat heads of keys and values, which several heads of queries share, by constants; how often that was done.

    The exporter computes the shapes of `expand` in the graph, where they hide how often a head is repeated: OpenVINO
    then spells attention out, with a copy of the cache at every step, in place of its one operation.
    """
    from openvino import opset13

    found = 0
    for attention in (node for node in model.get_ordered_ops() if node.get_type_name() == ATTENTION):
        for port in (attention.input(1), attention.input(2)):
            flat = producer(port)
            repeat = flat.input_value(0).get_node() if flat.get_type_name() == "Reshape" else flat
            if repeat.get_type_name() != "Broadcast":
                continue
            grouped = repeat.input_value(0)  # [batch, heads, 1, sequence, width]
            before, after = grouped.get_partial_shape(), flat.output(0).get_partial_shape()
            known = len(before) == 5 and all(each.is_static for each in (before[1], before[2], before[4], after[1]))
            if not known or before[2].get_length() != 1:
                continue
            heads, all_heads = before[1].get_length(), after[1].get_length()
            times = opset13.constant(np.array([1, 1, all_heads // heads, 1, 1]))
            shape = opset13.constant(np.array([0, all_heads, -1, before[4].get_length()]))
            repeated = opset13.broadcast(grouped, times, broadcast_spec="BIDIRECTIONAL")
            port.replace_source_output(opset13.reshape(repeated, shape, special_zero=True).output(0))
            found += 1
    model.validate_nodes_and_infer_types()
    return found


def smooth_activations(model: Any, feeds: Sequence[dict[str, NDArray[Any]]]) -> int:
    """Divide outlying channels of products' inputs by what their weights take instead; how many inputs that concerns.

    The divisor goes where the input is scaled anyway: into a norm's weight, or into the rows of the product that a
    gate multiplies. OpenVINO quantizes activations as they come, many by one scale, which outliers make coarse.
    `feeds` are calibration inputs of the model. Source: https://arxiv.org/abs/2211.10438 (section 4)
    """
    from openvino import opset13

    found = 0
    products = _by_input(model, _float_weights)
    for members, highest in zip(products, _highest(model, products, feeds), strict=True):
        source = members[0][0].input_value(0)
        scaled = _scaled_by(source)
        if scaled is None or len(source.get_target_inputs()) != len(members):
            continue
        port, shape = scaled
        widest = np.max([np.abs(weights).max(axis=0) for _, weights in members], axis=0)
        divisor = np.maximum(highest, TINY) ** SMOOTHING / np.maximum(widest, TINY) ** (1 - SMOOTHING)
        divisor = (divisor / np.exp(np.log(divisor).mean())).astype(np.float32)
        port.replace_source_output(opset13.constant(producer(port).data / divisor.reshape(shape)).output(0))
        for product, weights in members:
            product.input(1).replace_source_output(opset13.constant(weights * divisor).output(0))
        found += 1
    model.validate_nodes_and_infer_types()
    return found


def shared_scale(model: Any) -> int | None:
    """The most activations that one scale can be for in every product by weights; None where OpenVINO is to choose."""
    widths = {weights.shape[1] for members in _by_input(model, _float_weights) for _, weights in members}
    return max((count for count in SHARED if all(width % count == 0 for width in widths)), default=None)


def merge_products(model: Any) -> int:
    """Make one product of those that take the same input by int8 weights, as NNCF compresses them; how many are made.

    A step of one token is short: each product's start counts, and quantizing its input.
    """
    from openvino import Type, opset13

    found = 0
    for members in _by_input(model, _compressed_weights):
        if len(members) == 1:
            continue
        parts = [weights for _, weights in members]
        values, zeros, scales = (opset13.constant(np.concatenate(each)) for each in zip(*parts, strict=True))
        centred = opset13.subtract(opset13.convert(values, Type.f16), opset13.convert(zeros, Type.f16))
        weights = opset13.convert(opset13.multiply(centred, scales), Type.f32)
        merged = opset13.matmul(members[0][0].input_value(0), weights, False, True)
        rows = opset13.constant(np.array([len(part[0]) for part in parts]))
        split = opset13.variadic_split(merged, opset13.constant(np.array(-1)), rows)
        for index, (product, _) in enumerate(members):
            for follower in product.output(0).get_target_inputs():
                follower.replace_source_output(split.output(index))
        found += 1
    model.validate_nodes_and_infer_types()
    return found


def _by_input(model: Any, weights_of: Callable[[Any], Any]) -> list[list[tuple[Any, Any]]]:
    """Products x W^T with their weights, if `weights_of` finds any, together with all others of the same x."""
    groups = defaultdict(list)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and node.get_attributes()["transpose_b"]:
            weights = weights_of(node)
            if weights is not None:
                source = node.input_value(0)
                groups[source.get_node().get_friendly_name(), source.get_index()].append((node, weights))
    return list(groups.values())


def _float_weights(product: Any) -> NDArray[np.float32] | None:
    """[outputs, inputs], unless something else reads them too: embeddings, that a head shares."""
    source = product.input_value(1)
    found = source.get_node()
    ours = found.get_type_name() == "Constant" and len(source.get_target_inputs()) == 1
    return found.data if ours and found.data.ndim == 2 and found.data.dtype == np.float32 else None


def _compressed_weights(product: Any) -> tuple[NDArray[Any], ...] | None:
    """Values and zeros in 8 bits, and scales, each a row for an output."""
    path = [producer(product.input(1))]
    for kind in ("Convert", "Multiply", "Subtract"):
        if path[-1].get_type_name() != kind:
            return None
        path.append(producer(path[-1].input(0)))
    _, scaled, centred, values = path
    found = [producer(port) for port in (values.input(0), producer(centred.input(1)).input(0), scaled.input(1))]
    whole = all(node.get_type_name() == "Constant" and node.data.ndim == 2 for node in found)
    return tuple(node.data for node in found) if whole and found[0].data.dtype == np.uint8 else None


def _scaled_by(source: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The input port, a constant's, that every channel of `source` is a multiple of, and the shape of a divisor."""
    node, width = source.get_node(), source.get_partial_shape()[-1]
    if node.get_type_name() != "Multiply" or width.is_dynamic:
        return None
    for port in node.inputs():
        factor = producer(port)
        if factor.get_type_name() == "Constant" and factor.data.size == factor.data.shape[-1] == width.get_length():
            return port, (-1,)
        alone = len(factor.output(0).get_target_inputs()) == 1
        if factor.get_type_name() == "MatMul" and alone and _float_weights(factor) is not None:
            return factor.input(1), (-1, 1)
    return None


def _highest(
    model: Any, products: Sequence[list[tuple[Any, Any]]], feeds: Sequence[dict[str, NDArray[Any]]]
) -> list[NDArray[np.float32]]:
    """The largest magnitude of each channel of each input."""
    watched = model.clone()
    nodes = {node.get_friendly_name(): node for node in watched.get_ordered_ops()}
    first = len(watched.outputs)
    watched.add_outputs([nodes[members[0][0].get_friendly_name()].input_value(0) for members in products])
    compiled = compile_exactly(watched)
    found = [np.zeros(weights.shape[1], dtype=np.float32) for ((_, weights), *_) in products]
    for feed in feeds:
        request = compiled.create_infer_request()  # with an empty cache
        request.infer(feed)
        for index, highest in enumerate(found):
            channels = request.get_output_tensor(first + index).data.reshape(-1, highest.size)
            np.maximum(highest, np.abs(channels).max(axis=0), out=highest)
    return found


def producer(port: Any) -> Any:
    """The operation that an input comes from."""
    return port.get_source_output().get_node()


def compile_exactly(model: Any) -> Any:
    """For the CPU, in float32: to look at what a model computes."""
    import openvino

    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
