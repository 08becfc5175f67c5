"""Attention of one token of each sequence to a cache, on a GPU: a kernel for Triton.

Heads that share keys are rows of one product. Where there are too few sequences to keep the GPU busy, a long cache is
read in parts, each with the logarithm of the sum that its shares were divided by.
Source: https://arxiv.org/abs/2205.14135 (FlashAttention), https://pytorch.org/blog/flash-decoding
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

LEAST: tl.constexpr = tl.constexpr(-1e30)  # a score that is not attended to: finite, so that nothing becomes NaN
TOKENS = 64  # that a program takes at once
PROGRAMS = 256  # that keep a GPU busy


def attended(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """Of a query of [batch, heads of keys, queries that share them, size] in 16 bits, keys and values of [batch, heads
    of keys, tokens, size] and a mask of [batch, 1, 1, tokens] (True: attended to) or None: as the query.
    """
    seen = None if mask is None else mask.expand(len(query), -1, -1, -1)
    key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (key, value))
    found, sums = attend(query.contiguous(), key, value, seen, scale)
    if len(found) == 1:
        return found[0]
    return (found * torch.softmax(sums, dim=0).unsqueeze(-1)).sum(dim=0).to(query.dtype)


@torch.library.custom_op("optimize::attend", mutates_args=(), device_types="cuda")  # type: ignore[untyped-decorator]
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attended` takes them, contiguous where an axis is the last, the query whole: the answers of each part of the
    cache, [parts, batch, heads of keys, queries, size], and [parts, batch, heads of keys, queries] to weigh them by.
    """
    batch, shared, group, size = query.shape
    length = key.shape[2]
    found, sums = _answers(query, length)
    wide = max(16, triton.next_power_of_2(size))
    step = TOKENS if wide <= 128 else TOKENS // 2
    _kernel[batch * shared, len(found)](
        query, key, value, key if mask is None else mask, found, sums, scale, shared, group, size, length,
        _part(query, length), *key.stride()[:3], *value.stride()[:3],
        *((0, 0) if mask is None else mask.stride()[::3]), max(16, triton.next_power_of_2(group)), wide, step,
        mask is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return found, sums


@attend.register_fake  # type: ignore[untyped-decorator]
def _(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    return _answers(query, key.shape[2])


def _answers(query: Any, length: int) -> tuple[Any, Any]:
    """Where answers go: in 16 bits if they are whole."""
    parts = triton.cdiv(length, _part(query, length))
    found = query.new_empty((parts, *query.shape), dtype=query.dtype if parts == 1 else torch.float32)
    return found, query.new_empty(found.shape[:-1], dtype=torch.float32)


def _part(query: Any, length: int) -> int:
    """Tokens that one program reads: as few as keep the GPU busy, and no fewer than it takes at once."""
    parts = max(1, min(PROGRAMS // (query.shape[0] * query.shape[1]), triton.cdiv(length, TOKENS)))
    return int(triton.cdiv(triton.cdiv(length, parts), TOKENS) * TOKENS)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    query, key, value, mask, found, sums, scale, shared, group, size, length, part,
    key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_token,
    GROUP: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The queries of one head of keys, over one part of the cache."""
    program, begin = tl.program_id(0), tl.program_id(1) * part
    batch, head = (program // shared).to(tl.int64), (program % shared).to(tl.int64)
    row, column = tl.arange(0, GROUP), tl.arange(0, SIZE)
    own = (row < group)[:, None] & (column < size)[None, :]
    place = (program * group + row)[:, None] * size + column[None, :]
    asked = tl.load(query + place, mask=own, other=0.0)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    most = tl.full((GROUP,), LEAST, tl.float32)
    total, answer = tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP, SIZE), tl.float32)
    for start in range(begin, min(begin + part, length), STEP):
        token = start + tl.arange(0, STEP)
        seen = token < length
        wanted = seen[:, None] & (column < size)[None, :]
        keys = tl.load(key + token[:, None].to(tl.int64) * key_token + column[None, :], mask=wanted, other=0.0)
        values = tl.load(value + token[:, None].to(tl.int64) * value_token + column[None, :], mask=wanted, other=0.0)
        if MASKED:
            seen = tl.load(mask + batch * mask_batch + token * mask_token, mask=seen, other=0) != 0
        score = tl.where(seen[None, :], tl.dot(asked, tl.trans(keys)) * scale, LEAST)
        higher = tl.maximum(most, tl.max(score, axis=1))
        share, before = tl.exp(score - higher[:, None]), tl.exp(most - higher)
        total = total * before + tl.sum(share, axis=1)
        answer = tl.dot(share.to(values.dtype), values, answer * before[:, None])
        most = higher
    rows = tl.num_programs(0) * group
    target = found + tl.program_id(1) * rows * size + place
    tl.store(target, (answer / total[:, None]).to(found.dtype.element_ty), mask=own)
    tl.store(sums + tl.program_id(1) * rows + program * group + row, most + tl.log(total), mask=row < group)
