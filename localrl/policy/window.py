"""Causal attention over the last `window` tokens, block by block, keeping queries, keys and values alone.

Blocks overlap in the keys that they see, and fused kernels with a mask want keys and values repeated for every head: kept for the backward
pass, that would be several times the queries. Here a block is computed again when its gradient is wanted, and gradients are summed in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Each token sees itself and the window - 1 before it. (B, Hq, S, D), (B, Hkv, S, D) twice -> (B, Hq, S, D), laid out as (B, S, Hq, D)."""
    out = _Windowed.apply(q, k, v, scale, window)
    assert isinstance(out, Tensor)
    return out


def _blocks(count: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that they can see, of each block.

    >>> list(_blocks(5, 2))
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 4, None), slice(1, 4, None)), (slice(4, 5, None), slice(3, 5, None))]
    """
    for start in range(0, count, window):
        end = min(start + window, count)
        yield slice(start, end), slice(max(0, start - window + 1), end)


def _block(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Queries with all the keys that they can see, the last of which stand where the last queries do."""
    queries, keys = q.shape[2], k.shape[2]
    back = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < window), scale=scale)


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window = scale, window
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        for own, near in _blocks(q.shape[2], window):
            out[:, :, own] = _block(q[:, :, own], k[:, :, near], v[:, :, near], scale, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for own, near in _blocks(q.shape[2], ctx.window):
            with torch.enable_grad():
                queries, keys, values = (t[:, :, part].detach().requires_grad_() for t, part in ((q, own), (k, near), (v, near)))
                out = _block(queries, keys, values, ctx.scale, ctx.window)
                found = torch.autograd.grad(out, [queries, keys, values], dy[:, :, own])
            dq[:, :, own] = found[0]
            dk[:, :, near] += found[1]
            dv[:, :, near] += found[2]
        return dq, dk, dv, None, None
