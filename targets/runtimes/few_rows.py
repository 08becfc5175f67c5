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

FEW = 16  # rows up to which a tile of weights is the left factor: tensor cores then waste none of it on rows
WORK = 1 << 15  # outputs of all programs, times their parts, from which on a GPU is busy
PARTS = 4  # at most: who adds up more of them takes longer than they save


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
    """Rows, outputs and inputs of a tile, how the kernel is launched, and parts of the inputs."""

    rows: int
    tile: int
    step: int
    warps: int
    stages: int
    parts: int = 1


def plan(rows: int, outputs: int, length: int) -> Plan:
    """What was fast on an H200 (benchmarks/results/gpu-few-rows-orientations.json), and fits the shared memory of
    others, too.
    """
    if rows <= FEW:
        found = Plan(8 if rows <= 8 else FEW, 32, 128, warps=2, stages=4)
    elif rows <= 64:
        found = Plan(64, 64, 64, warps=4, stages=4)
    else:
        found = Plan(128, 128, 64, warps=4, stages=3)
    work, parts = triton.cdiv(rows, found.rows) * outputs, 1
    while parts < PARTS and 2 * parts * work <= WORK and length >= 8 * parts * found.step:
        parts *= 2
    return found._replace(parts=parts)


def launch(inputs: torch.Tensor, values: torch.Tensor, how: Plan) -> torch.Tensor:
    """See few_rows."""
    (rows, length), outputs = inputs.shape, len(values)
    found = torch.empty((how.parts, rows, outputs), dtype=torch.float32, device=inputs.device)
    part = triton.cdiv(triton.cdiv(length, how.step), how.parts) * how.step
    whole = outputs % how.tile == 0 and length % how.step == 0
    _kernel[triton.cdiv(rows, how.rows), triton.cdiv(outputs, how.tile), how.parts](
        inputs, values, found, rows, outputs, length, part, how.rows, how.tile, how.step, how.rows <= FEW, whole,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    inputs, values, found, rows, outputs, length, part,
    ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, LEFT: tl.constexpr, WHOLE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile of rows and outputs, over one part of the inputs. LEFT: weights are the left factor. WHOLE: all tiles
    of weights are.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    begin = tl.program_id(2) * part
    place = begin + tl.arange(0, STEP)
    total = tl.zeros((TILE, ROWS) if LEFT else (ROWS, TILE), tl.float32)
    for start in range(0, min(part, length - begin), STEP):
        at = start + place
        left = inputs + row[:, None] * length + at[None, :]
        right = values + column[:, None].to(tl.int64) * length + at[None, :]
        if WHOLE:
            factor = tl.load(left, mask=(row < rows)[:, None], other=0.0)
            weights = tl.load(right)
        else:
            inside = (at < length)[None, :]
            factor = tl.load(left, mask=(row < rows)[:, None] & inside, other=0.0)
            weights = tl.load(right, mask=(column < outputs)[:, None] & inside, other=0)
        if LEFT:
            total = tl.dot(weights.to(factor.dtype), tl.trans(factor), total)
        else:
            total = tl.dot(factor, tl.trans(weights).to(factor.dtype), total)
    target = found + tl.program_id(2) * rows * outputs
    kept = (row < rows)[:, None] & (column < outputs)[None, :]
    if LEFT:
        tl.store(target + row[None, :] * outputs + column[:, None], total, mask=tl.trans(kept))
    else:
        tl.store(target + row[:, None] * outputs + column[None, :], total, mask=kept)
