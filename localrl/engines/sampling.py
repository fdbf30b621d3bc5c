"""Random numbers with an address, and a sampler that asks for one of them a token.

Each rollout has a stream of its own: the number behind token t is a hash of (seed, step, prompt, sample, t). It does not matter, then,
who else is in the batch, in which order, or how many at a time, and a response that is continued goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localrl.batch import Request

Words = NDArray[np.uint64]
GOLDEN = 0x9E3779B97F4A7C15
BLOCK = 128
"""Probabilities that the sampler's upper level adds up into one."""
AT_ONCE = 2**22
"""Logits that the sampler works on at a time: its own copies of them take 32 MiB (96 where the tail is cut off, which sorts)."""


def _mix(words: Words) -> Words:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): every input bit flips every output bit with probability 1/2."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _words(values: Sequence[int]) -> Words:
    return np.array([value & 0xFFFFFFFFFFFFFFFF for value in values], dtype=np.uint64)


def stream_keys(seed: int, version: int, requests: Sequence[Request]) -> Words:
    """The name of each request's stream. -> (B,) uint64."""
    keys = np.zeros(len(requests), dtype=np.uint64)
    for part in ([seed], [version], [r.prompt.id for r in requests], [r.sample for r in requests]):
        keys = _mix(keys + np.uint64(GOLDEN) + _words(part))
    return keys


def uniforms(keys: Words, start: Sequence[int], count: int) -> NDArray[np.float64]:
    """`count` numbers of each stream from position `start` on, uniform on [0, 1). (B,), (B,) -> (count, B) float64.

    >>> whole = uniforms(np.array([7, 8], dtype=np.uint64), [0, 0], 5)
    >>> bool((uniforms(np.array([8], dtype=np.uint64), [2], 3) == whole[2:, 1:]).all())
    True
    """
    positions = np.arange(1, count + 1, dtype=np.uint64)[:, None] + _words(start)
    return (_mix(keys + positions * np.uint64(GOLDEN)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Sampler:
    """Logits and one uniform number a row become a token and its log-probability. `settings` has temperature, top_p and top_k."""

    def __init__(self, settings: Any) -> None:
        self.temperature, self.top_p, self.top_k = float(settings.temperature), float(settings.top_p), int(settings.top_k)

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(n, V) float32, (n,) float64 -> (n,) int64, (n,) float32.

        The log-probability is that of the tempered distribution before top-k and top-p, nats; at temperature 0, which takes the
        likeliest token, that of temperature 1. Rows are taken some at a time where the vocabulary is large: no second copy of all logits.
        """
        rows = max(1, AT_ONCE // logits.shape[1])
        if len(logits) <= rows:
            return self._some(logits, uniform)
        parts = [self._some(a, b) for a, b in zip(logits.split(rows), uniform.split(rows), strict=True)]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logp for _, logp in parts])

    def _some(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(logits if self.temperature in (0.0, 1.0) else logits / self.temperature, -1)
        if self.temperature == 0:
            token = p.argmax(-1, keepdim=True)
        elif self.top_k or self.top_p < 1:
            kept, index = p.topk(min(self.top_k, p.shape[1])) if self.top_k else p.sort(descending=True)
            if self.top_p < 1:
                likelier = kept.cumsum(-1) - kept                    # the mass of all that come before it
                kept = kept.masked_fill(likelier >= self.top_p * kept.sum(-1, keepdim=True), 0.0)
            token = index.gather(1, inverse_cdf(kept, uniform))
        else:
            token = inverse_cdf(p, uniform)
        return token.squeeze(1), p.gather(1, token).squeeze(1).log()


def inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the running sum of p passes uniform * total, in two levels. (n, V) float32, (n,) float64 -> (n, 1) int64.

    Sums of blocks find the block, a running sum inside it finds the index: one pass over p instead of a running sum over all of it,
    which costs several times as much, or of a draw of noise for every entry, which costs fifty times as much. An entry of 0 is never taken.

    >>> inverse_cdf(torch.tensor([[0.0, 0.25, 0.0, 0.75]] * 3), torch.tensor([0.0, 0.2, 0.25], dtype=torch.float64)).flatten().tolist()
    [1, 1, 3]
    """
    last, size = p.shape[1] - 1, BLOCK if p.shape[1] > 32 * BLOCK else 32
    if short := -p.shape[1] % size:
        p = torch.nn.functional.pad(p, (0, short))
    blocks = p.unflatten(1, (-1, size))                              # (n, V / size, size)
    upto = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    aim = uniform[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, aim, right=True).clamp_max_(blocks.shape[1] - 1)        # past the end only for NaN
    start = torch.where(block > 0, upto.gather(1, (block - 1).clamp_min(0)), 0.0)
    share = (aim - start) / (upto.gather(1, block) - start)          # within the block, [0, 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return block.mul_(size).add_(torch.searchsorted(inside, share * inside[:, -1:], right=True)).clamp_max_(last)
