"""The chunked frozen head: what a model said of every token, without ever holding its logits.

A step of 16k tokens over a vocabulary of 152k has 9.3 GiB of fp32 logits, and the plain formula holds them five times over when the
entropy has a gradient too. Here the vocabulary is walked in tiles under an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867),
the entropy riding along as one more running sum: no more than (chunk, tile) numbers exist at a time, and the backward pass walks the
tiles again instead of keeping them, three matrix products in place of two. Logits are fp32 as the product's accumulator had them; rounded
to bf16 they would put log-probabilities wrong by up to 0.2 nats, which ratios and clipping amplify.

The head is frozen, so the hidden states alone have a gradient. Deliberately absent: a gradient for the weight, reductions, top-k.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from localrl.pieces import slices
from localrl.policy.output_layer import FLOATS, Head, Product
from localrl.settings import UserError

__all__ = ["CHUNK", "TILE", "Head", "TokenReadout", "read_tokens", "workspace"]

CHUNK = 1024
"""Tokens at a time. Every chunk reads (on a CPU: converts) the whole weight once, so it is long enough for multiplying to be what costs."""
TILE = 4096
"""Vocabulary columns at a time."""


class TokenReadout(NamedTuple):
    """(N,) each, fp32 (fp64 where an input is), nats."""

    logp: Tensor
    """log p(target)."""
    entropy: Tensor | None
    """Of the whole distribution; None: not asked for."""
    lse: Tensor
    """log sum exp of the logits."""


def read_tokens(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    tile: int = TILE,
    want_entropy: bool = True,
) -> TokenReadout:
    """Log-probability, entropy and log-sum-exp of every token, all of z = softcap(scale * (h W^T + b)) / temperature.

    hidden (N, H), any float type and layout: the decoder's last hidden states; targets (N,) int64 in [0, V). Gradients flow to `hidden`
    from all three (never to the head; a second derivative is refused); they come in its type, summed in fp32. `chunk` and `tile` bound
    the memory (`workspace`) and change nothing but rounding. Autocast does not reach inside.
    UserError: a target is no row of the head, or the head is being trained. ValueError: shapes, types, devices, numbers out of range.

    >>> head = Head(torch.zeros(4, 2))
    >>> read_tokens(torch.ones(1, 2), torch.tensor([3]), head)
    TokenReadout(logp=tensor([-1.3863]), entropy=tensor([1.3863]), lse=tensor([1.3863]))
    """
    _check(hidden, targets, head, temperature, chunk, tile)
    return TokenReadout(*_ReadTokens.apply(hidden, targets, head, temperature, chunk, tile, want_entropy))


def workspace(
    tokens: int,
    vocabulary: int,
    width: int,
    *,
    weight: torch.dtype = torch.bfloat16,
    hidden: torch.dtype = torch.bfloat16,
    mixed: bool = True,
    softcap: bool = False,
    chunk: int = CHUNK,
    tile: int = TILE,
    want_entropy: bool = True,
    backward: bool = True,
) -> int:
    """Bytes that `read_tokens` holds at its peak, an upper bound; its inputs and the gradient that it returns are not among them.

    A logit of the tile costs 4 bytes; 4 more with the entropy; 4 more for the way back through a softcap. `mixed`: half precision is
    multiplied into fp32 as it is (`Product`), which costs the tile's gradient in half precision; without it, fp32 copies of the weight's
    tile and of the chunk's hidden states. The way back sums in an fp32 (chunk, width).

    >>> workspace(4096, 151_936, 4096) / 2**20  # a Qwen3-8B, where its logits alone would be 2374 MiB
    72.390625
    """
    size = 8 if torch.float64 in (weight, hidden) else 4
    mixed &= weight == hidden and weight.itemsize == 2
    rows, columns = min(tokens, chunk), min(vocabulary, tile)
    logit = size * (1 + want_entropy + (backward and softcap)) + 2 * (backward and mixed)
    casts = 0 if mixed else size * width * (columns * (weight.itemsize != size) + rows * (hidden.itemsize != size))
    sums = size * width * rows * (1 + mixed) * backward
    return rows * columns * logit + casts + sums + 100 * tokens


def _check(hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk: int, tile: int) -> None:
    head.check_frozen()
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1] or hidden.dtype not in FLOATS:
        raise ValueError(f"hidden must be a float (N, {head.weight.shape[1]}), not {tuple(hidden.shape)} {hidden.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({len(hidden)},) int64, not {tuple(targets.shape)} {targets.dtype}")
    if not hidden.device == targets.device == head.weight.device:
        raise ValueError(f"hidden, targets and head must share a device, not {hidden.device}, {targets.device}, {head.weight.device}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if chunk < 1 or tile < 1:
        raise ValueError(f"chunk and tile must be at least 1, not {chunk} and {tile}")
    if len(targets) and not isinstance(targets, FakeTensor):  # a simulated run has no values to look at
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= len(head.weight):
            wrong = low if low < 0 else high
            raise UserError(f"token {wrong} is not among the model's {len(head.weight)}: use the tokenizer that belongs to the model")


class _ReadTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk: int, tile: int, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        product = Product(hidden, head.weight)
        # Of every row: the largest logit; sum exp(z - top); sum exp(z - top) (z - top); the target's logit.
        top = hidden.new_full((len(hidden),), torch.finfo(product.type).min, dtype=product.type)
        total, tilt, chosen = (torch.zeros_like(top) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in slices("tokens of the head", len(hidden), chunk):
                rows = product.operand(hidden[part])
                for columns in slices("rows of the head", len(head.weight), tile):
                    z = head.bend(product(rows, product.operand(head.weight[columns]).T), columns, temperature)
                    place, inside = _place(targets[part], columns)
                    chosen[part] += z.gather(1, place)[:, 0].where(inside, 0)
                    _fold(z, top[part], total[part], tilt[part] if want_entropy else None)
                    del z  # before the next tile is made, not after
        log_total = total.log()
        # In this order no large logits cancel: each term is exact to its own size, and the entropy is a sum of two that are not negative.
        logp, lse = chosen - top - log_total, top + log_total
        entropy = log_total - tilt / total if want_entropy else None
        ctx.save_for_backward(hidden, targets, top, log_total, entropy)
        ctx.frozen = head, temperature, chunk, tile  # not a saved tensor: hooks that offload those must not carry the weight about
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would miss it where the incoming gradient is a constant
            raise RuntimeError("read_tokens has no second derivative: take its gradient without create_graph")
        others = (None,) * 6
        if g_logp is None and g_entropy is None and g_lse is None:
            return None, *others
        hidden, targets, top, log_total, entropy = ctx.saved_tensors
        head, temperature, chunk, tile = ctx.frozen
        product, pull = Product(hidden, head.weight), _Pull.of(g_logp, g_entropy, g_lse, entropy, log_total)
        grad = torch.empty_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in slices("tokens of the head, back", len(hidden), chunk):
                rows, mine = product.operand(hidden[part]), pull.rows(part)
                sums = torch.zeros(rows.shape, dtype=product.type, device=rows.device)
                for columns in slices("rows of the head", len(head.weight), tile):
                    weight = product.operand(head.weight[columns])
                    z = head.bend(product(rows, weight.T), columns, temperature)
                    slope = None if head.softcap is None else (z * (temperature / head.softcap)).square_().neg_().add_(1)
                    mine.through_softmax(z.sub_(top[part, None]), *_place(targets[part], columns))
                    if slope is not None:
                        z.mul_(slope)
                    if product.mixed:
                        sums += product(z.to(hidden.dtype), weight)
                    else:
                        sums.addmm_(z, weight)
                    del z, slope, weight
                grad[part] = sums.mul_((mine.size * (head.scale / temperature))[:, None])
        return grad, *others


class _Pull(NamedTuple):
    """The gradients that come in, (N,) each, rearranged so that a tile of logits costs few passes.

    dz = p (lse - logp - entropy (log p + H)) + logp onehot, in the incoming gradients of those names. With a = z - top and
    p = exp(a - log_total) that is size * (exp(a) (base + bend a) + onehot). `size`, a row's magnitude, goes back in after the product:
    loss weights of 1e-6 a token would otherwise leave half precision's range.
    """

    size: Tensor
    base: Tensor
    bend: Tensor | None
    onehot: Tensor | None

    @classmethod
    def of(cls, logp: Tensor | None, entropy: Tensor | None, lse: Tensor | None, level: Tensor | None, log_total: Tensor) -> _Pull:
        """`level` is the entropy itself, H."""
        size, base = torch.zeros_like(log_total), torch.zeros_like(log_total)
        if logp is not None:
            size, base = size + logp.abs(), base - logp
        if lse is not None:
            size, base = size + lse.abs(), base + lse
        if entropy is not None and level is not None:
            size, base = size + entropy.abs() * (1 + level), base + entropy * (log_total - level)
        size = torch.where(size == 0, 1, size)
        each = torch.exp(-log_total) / size
        return cls(size, base * each, None if entropy is None else -entropy * each, None if logp is None else logp / size)

    def rows(self, part: slice) -> _Pull:
        bend, onehot = (None if x is None else x[part] for x in (self.bend, self.onehot))
        return _Pull(self.size[part], self.base[part], bend, onehot)

    def through_softmax(self, a: Tensor, place: Tensor, inside: Tensor) -> None:
        """One tile's dz / size in the place of a = z - top, in place. (n, width); (n, 1) and (n,): where the targets are."""
        if self.bend is None:
            a.exp_().mul_(self.base[:, None])
        else:
            e = a.exp()
            a.mul_(self.bend[:, None]).add_(self.base[:, None]).mul_(e)
        if self.onehot is not None:
            a.scatter_add_(1, place, self.onehot.where(inside, 0)[:, None])


def _fold(z: Tensor, top: Tensor, total: Tensor, tilt: Tensor | None) -> None:
    """Takes one more tile into the rows' running sums, in place; uses z up. (n, width), (n,), (n,), (n,)."""
    peak = torch.maximum(top, z.amax(1))
    shift = top - peak
    growth = shift.exp()
    z.sub_(peak[:, None])
    if tilt is None:
        total.mul_(growth).add_(z.exp_().sum(1))
    else:
        e = z.exp()
        tilt.addcmul_(shift, total).mul_(growth).add_(z.mul_(e).sum(1))
        total.mul_(growth).add_(e.sum(1))
    top.copy_(peak)


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the tile (n, 1), any where it is elsewhere, and whether it is inside (n,). Never waits for the device."""
    place = targets - columns.start
    inside = (place >= 0) & (place < columns.stop - columns.start)
    return place.clamp_(0, columns.stop - columns.start - 1)[:, None], inside
