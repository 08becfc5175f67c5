"""Sums of products of few rows with int8 weights, on a GPU: a kernel for Triton, which reads the weights as they are.

Weights become 16 bits in registers, exactly, and tensor cores add up in float32. The inputs of a row are split into
parts where there are too few outputs to keep the whole GPU busy.
Source: https://triton-lang.org/main/getting-started/tutorials/03-matrix-multiplication.html
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LEAST, MOST = 16, 128  # rows of a tile: tensor cores take no fewer
WIDE = 16384  # outputs from which on tiles are larger


@torch.library.custom_op("optimize::few_rows", mutates_args=(), device_types="cuda")  # type: ignore[untyped-decorator]
def few_rows(inputs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of [rows, K] in 16 bits and [outputs, K] in int8, both contiguous: [parts, rows, outputs] in float32, to be added
    up over the parts.
    """
    return launch(inputs, values, plan(len(inputs), *values.shape))


@few_rows.register_fake  # type: ignore[untyped-decorator]
def _(inputs: Any, values: Any) -> Any:
    parts = plan(len(inputs), *values.shape).parts
    return inputs.new_empty((parts, len(inputs), len(values)), dtype=torch.float32)


class Plan(NamedTuple):
    """Outputs of a tile, inputs of a step, and how the kernel is launched."""

    tile: int
    step: int
    warps: int
    stages: int
    parts: int


def plan(rows: int, outputs: int, length: int) -> Plan:
    """What was fast on an H100 (benchmarks/results/gpu-few-rows.json), and fits the shared memory of others, too."""
    few = rows <= LEAST
    tile, step = (32, 128) if few else (64 if outputs < WIDE else 128, 64)
    programs, parts = triton.cdiv(rows, MOST) * triton.cdiv(outputs, tile), 1
    while 2 * parts * programs <= (512 if few else 256) and length >= 8 * parts * step:
        parts *= 2
    return Plan(tile, step, 4, 4 if few else 3, parts)


def launch(inputs: torch.Tensor, values: torch.Tensor, how: Plan) -> torch.Tensor:
    """See few_rows."""
    (rows, length), outputs = inputs.shape, len(values)
    found = torch.empty((how.parts, rows, outputs), dtype=torch.float32, device=inputs.device)
    part = triton.cdiv(triton.cdiv(length, how.step), how.parts) * how.step
    high = min(MOST, max(LEAST, triton.next_power_of_2(rows)))
    _kernel[triton.cdiv(rows, high), triton.cdiv(outputs, how.tile), how.parts](
        inputs, values, found, rows, outputs, length, part, high, how.tile, how.step,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    inputs, values, found, rows, outputs, length, part,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile of rows and outputs, over one part of the inputs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    begin = tl.program_id(2) * part
    place = begin + tl.arange(0, STEP)
    total = tl.zeros((ROWS, TILE), tl.float32)
    for start in range(0, min(part, length - begin), STEP):
        at = start + place
        left = tl.load(
            inputs + row[:, None] * length + at[None, :],
            mask=(row < rows)[:, None] & (at < length)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            values + column[None, :].to(tl.int64) * length + at[:, None],
            mask=(column < outputs)[None, :] & (at < length)[:, None], other=0,
        )  # fmt: skip
        total = tl.dot(left, right.to(left.dtype), total)
    target = found + tl.program_id(2) * rows * outputs + row[:, None] * outputs + column[None, :]
    tl.store(target, total, mask=(row < rows)[:, None] & (column < outputs)[None, :])
