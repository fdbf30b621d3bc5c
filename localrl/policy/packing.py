"""Rows of a micro-batch laid end to end: no layer computes a padding token, and no mask of S * S bytes a row exists.

Everything in a decoder but attention treats tokens one by one, so B rows become one row of N = sum of lengths tokens, each with its own
position. Attention is told where rows end, and takes rows of one length (or nearly one) together. It is registered with transformers as an
attention implementation of its own; for a name that it has no mask for, transformers builds none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface

from localrl.batch import Batch
from localrl.policy.window import windowed

NAME = "localrl_packed"
"""Of the attention implementation, in transformers' registry."""
CALL_TOKENS = 128
"""What one more call of the attention kernel costs, in tokens: rows that differ by less than that in all are padded and taken together."""

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Where everything of a micro-batch lies. Made and kept on the host: it decides shapes, and no device should be waited for."""

    context: tuple[int, ...]
    """Context tokens of each row."""
    response: tuple[int, ...]
    """Response tokens of each row."""
    tokens: Index
    """(N,) rows end to end, context before response."""
    sampled: NDArray[np.bool_]
    """(B, T) the batch's mask."""
    fresh: NDArray[np.bool_]
    """(B, T)."""

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Reads the batch's tensors; the only wait for a device."""
        with _disable_current_modes():                              # a look at numbers, whatever watches or pretends around it
            context, tokens, mask, fresh = (t.cpu().numpy().copy() for t in (batch.context, batch.tokens, batch.mask, batch.fresh))
            before, after = batch.context_length.tolist(), batch.response_length.tolist()
        rows = [part for b, (p, t) in enumerate(zip(before, after, strict=True)) for part in (context[b, :p], tokens[b, :t])]
        return cls(tuple(before), tuple(after), np.concatenate(rows), mask, fresh)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(p + t for p, t in zip(self.context, self.response, strict=True))

    @cached_property
    def positions(self) -> Index:
        """(N,) each token's place in its own row."""
        return np.concatenate([np.arange(length) for length in self.lengths])

    @cached_property
    def rows(self) -> Index:
        """(N,) each token's row."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def cells(self, only_fresh: bool) -> tuple[Index, Index]:
        """(row, column) of the response tokens that are read: fresh ones, or all that were sampled."""
        rows, columns = np.nonzero(self.fresh if only_fresh else self.sampled)
        return rows, columns

    def predicting(self, only_fresh: bool) -> Index:
        """(n,) the packed places of the states that predict those tokens: one before each. The only shift in the code base."""
        rows, columns = self.cells(only_fresh)
        starts = np.cumsum(self.lengths) - self.lengths
        return starts[rows] + np.array(self.context)[rows] + columns - 1

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(first row, one past the last): rows that attention takes together, cut where the order of lengths falls apart or padding would cost more."""
        lengths, runs, start = self.lengths, [], 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or lengths[end] > lengths[end - 1]:
                runs += [(start + a, start + b) for a, b in cheapest_cuts(lengths[start:end])]
                start = end
        return tuple(runs)


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


def current() -> Layout | None:
    """The layout that is being read; None: nobody reads packed rows now."""
    return _LAYOUT.get()


@contextmanager
def laid_out(config: Any, layout: Layout | None) -> Iterator[None]:
    """While it is open, the model of this transformers config reads rows laid out so. None: as it is."""
    if layout is None:
        yield
        return
    before, token = config._attn_implementation_internal, _LAYOUT.set(layout)
    config._attn_implementation_internal = NAME                     # the setter would ask all sub-configs, at every call
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        _LAYOUT.reset(token)


def can_pack(model: Any) -> bool:
    """Whether this transformers model asks the registry for its attention, so that rows can be laid end to end."""
    return bool(getattr(model, "_supports_attention_backend", False))


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within rows. (1, Hq, N, D), (1, Hkv, N, D) twice -> (1, N, Hq, D)."""
    layout = current()
    if layout is None:
        raise RuntimeError("packed attention outside of a reading: activations are computed again after their layout is gone")
    lengths, runs = layout.lengths, layout.runs
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if softcap is not None:
            return _squashed(q, k, v, scale, softcap, sliding_window)
        if sliding_window is not None and q.shape[2] > sliding_window:
            return windowed(q, k, v, scale, sliding_window)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    if len(runs) == 1 and len(set(lengths)) == 1:                   # (B, heads, S, D), without a copy
        q, k, v = (t[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for t in (query, key, value))
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)[None], None
    sizes = [sum(lengths[a:b]) for a, b in runs]
    pieces = zip(runs, *(t[0].split(sizes, 1) for t in (query, key, value)), strict=True)
    return torch.cat([_run(lengths[a:b], q, k, v, attend) for (a, b), q, k, v in pieces])[None], None


def _run(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, attend: Any) -> Tensor:
    """Rows of one run, padded to its longest where they differ. (heads, n, D) each -> (n, Hq, D)."""
    widest = max(lengths)
    if min(lengths) == widest:
        q, k, v = (t.unflatten(1, (len(lengths), -1)).transpose(0, 1) for t in (q, k, v))
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)
    inside = np.concatenate([np.arange(length) + b * widest for b, length in enumerate(lengths)])
    starts = np.cumsum(lengths) - np.array(lengths)
    spread = (starts[:, None] + np.minimum(np.arange(widest), np.array(lengths)[:, None] - 1)).flatten()      # past the end: the last token again
    spread_index, inside_index = (torch.from_numpy(i).to(q.device) for i in (spread, inside))
    q, k, v = (t.index_select(1, spread_index).unflatten(1, (len(lengths), widest)).transpose(0, 1) for t in (q, k, v))
    return attend(q, k, v).transpose(1, 2).flatten(0, 1).index_select(0, inside_index)


def _squashed(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: int | None) -> Tensor:
    """Scores pass through cap * tanh(score / cap), for which there is no fused kernel: (heads, S, S) of them exist."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    back = torch.arange(q.shape[2], device=q.device)
    back = back[:, None] - back
    hidden = (back < 0) | (back >= window) if window is not None else back < 0
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / cap)) * cap
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1, dtype=torch.float32).to(q.dtype) @ v


def cheapest_cuts(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive parts of `lengths` (falling), (start, end) each: the least sum of rows * longest + CALL_TOKENS over the parts.

    >>> cheapest_cuts([400, 380, 40, 40, 30]), cheapest_cuts([60, 50, 40])
    ([(0, 2), (2, 5)], [(0, 3)])
    """
    count = len(lengths)
    best, end_of = [0] * (count + 1), [0] * count                  # from a row to the end: cost, and where its part ends
    for start in reversed(range(count)):
        costs = ((end - start) * lengths[start] + CALL_TOKENS + best[end] for end in range(start + 1, count + 1))
        best[start], last = min((cost, -end) for end, cost in enumerate(costs, start + 1))
        end_of[start] = -last
    cuts, start = [], 0
    while start < count:
        cuts.append((start, end_of[start]))
        start = end_of[start]
    return cuts


AttentionInterface.register(NAME, packed_attention)
