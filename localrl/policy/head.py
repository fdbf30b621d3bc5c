"""The chunked frozen head: what the model said of every token, without ever holding the logits.

A step of 16k tokens over a vocabulary of 152k would be 9.3 GiB of fp32 logits, five times over with an entropy and its gradient. Here
the vocabulary is walked in tiles under an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; the entropy rides along as one
more running sum), so no more than (chunk, tile) numbers exist at a time, and the backward pass walks them again instead of keeping
them: three matrix products where the plain formula has two. The log-probabilities are fp32 to the last bit of the product: logits
rounded to bf16 are wrong by up to 0.2 nats, which ratios and clipping amplify.

The head is frozen, so the only gradient is the hidden states'. Deliberately absent: a gradient for the weight, label smoothing,
reductions, and top-k.

Memory above inputs and outputs, in bytes, for `chunk` tokens and `tile` vocabulary columns: see `workspace`. 12 a logit of the tile at the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from localrl.settings import UserError

CHUNK = 1024
"""Tokens at a time: every chunk reads the whole weight once, so it is long enough for the product, not the reading, to cost."""
TILE = 4096
"""Vocabulary columns at a time."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What transformers' families do to their logits, by the name of the setting; first entry: the value multiplies, or divides.
TIMES = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
OVER = ("logits_scaling",)  # Granite; MiniCPM3 divides the hidden states, which is the same
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2 to 4, nanochat; RecurrentGemma; xLSTM
TIMES_DESPITE_NAME = ("hyperclovax",)  # its logits_scaling multiplies


class TokenReadout(NamedTuple):
    """(N,) each, fp32 (fp64 where the inputs are), nats."""

    logp: Tensor
    """log p(target)."""
    entropy: Tensor | None
    """Of the whole distribution; None: not asked for."""
    lse: Tensor
    """log sum exp of the logits."""


@dataclass(frozen=True, eq=False)
class Head:
    """The frozen output layer and what the model does to its logits: softcap(scale * (h W^T + b)).

    >>> Head(torch.zeros(5, 3)).logits(torch.ones(2, 3)).shape
    torch.Size([2, 5])
    """

    weight: Tensor
    """(V, H), any float type, without gradient: the live tensor, tied or not, never a copy."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    softcap: float | None = None
    """cap * tanh(logit / cap)."""

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.dtype not in FLOATS:
            raise ValueError(f"the weight must be (V, H) and fp16, bf16, fp32 or fp64, not {tuple(self.weight.shape)} {self.weight.dtype}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"the bias must be ({len(self.weight)},), not {tuple(self.bias.shape)}")
        if not (math.isfinite(self.scale) and self.scale > 0 and (self.softcap is None or 0 < self.softcap < math.inf)):
            raise ValueError(f"scale and softcap must be positive and finite, not {self.scale} and {self.softcap}")
        self.check_frozen()

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a live transformers causal language model, PEFT-wrapped or not. Shares its memory; call `verify` once after it.

        UserError: the model has no output layer of the plain kind, or it is quantised, adapted, trained or not in memory.
        """
        bare = bare_model(model)
        layer = bare.get_output_embeddings()
        if layer is None:
            raise UserError(f"{type(bare).__name__} has no output layer: choose a causal language model")
        if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
            raise UserError(f"the output layer carries an adapter ({type(layer).__name__}): leave lm_head out of the adapter's target modules")
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter, FakeTensor) or weight.dtype not in FLOATS:
            raise UserError(f"the output layer is quantised ({type(layer).__name__}): leave lm_head out of the quantisation (llm_int8_skip_modules)")
        if not isinstance(layer, nn.Linear):
            raise UserError(f"the output layer is a {type(layer).__name__} where localrl can only read a plain Linear: choose another model family")
        if weight.is_meta:
            raise UserError("the output layer is offloaded: load the model with the whole of it on one device")
        return cls(weight, layer.bias, *transforms(bare.config))

    def check_frozen(self) -> None:
        """UserError if a gradient to the head is wanted: this room does not compute one."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            raise UserError("the output layer is being trained and localrl keeps it frozen: leave lm_head and tied embeddings out of what is trained")

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits at once, as the model means them (no temperature), without gradient. (N, H) -> (N, V) fp32: for a handful of rows."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            parts = _Parts(self, hidden, 1.0, TILE)
            rows = parts.operand(hidden)
            return torch.cat([parts.logits(rows, parts.operand(self.weight[lo:hi]), lo, hi) for lo, hi in parts.tiles], dim=1)

    def verify(self, model: Any) -> float:
        """Reads eight tokens with the model and compares its logits with ours: a family that does something else to them is found here.

        Returns the largest difference as a share of the largest logit; UserError if it is more than the rounding of the model's own type.
        One forward pass in the model's present mode, without gradient.
        """
        bare, seen = bare_model(model), []
        embedding = bare.get_input_embeddings().weight
        tokens = torch.arange(8, device=embedding.device)[None] % len(embedding)
        handle = bare.get_decoder().register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            with torch.no_grad():
                theirs = bare(input_ids=tokens, use_cache=False).logits[0]
        finally:
            handle.remove()
        ours = self.logits(seen[0][0].to(self.weight.device))
        gap = math.inf
        if ours.shape == theirs.shape:
            gap = float((ours - theirs.to(ours)).abs().max() / theirs.abs().max().clamp(min=1e-30))
        limit = max(1e-4, 4 * torch.finfo(theirs.dtype).eps)
        if not gap <= limit:
            raise UserError(
                f"{bare.config.model_type} does something to its logits that localrl does not know (off by {gap:.1%} of the largest, "
                f"at most {limit:.1%} is rounding): choose another model family"
            )
        return gap


def bare_model(model: Any) -> Any:
    """The transformers model inside PEFT's wrapping, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def transforms(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that a transformers config asks of its logits.

    >>> from transformers import Gemma2Config, GraniteConfig
    >>> transforms(Gemma2Config()), transforms(GraniteConfig(logits_scaling=8.0))
    ((1.0, 30.0), (0.125, None))
    """
    text = config.get_text_config()
    scale = 1.0
    for name in TIMES + OVER:
        value = getattr(text, name, None)
        if value is not None:
            times = name in TIMES or text.model_type.startswith(TIMES_DESPITE_NAME)
            scale = scale * float(value) if times else scale / float(value)
    caps = [float(value) for name in CAPS if (value := getattr(text, name, None)) is not None]
    return scale, caps[0] if caps else None


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

    hidden (N, H), any float type and layout: what the decoder returned as its last hidden states; targets (N,) int64 in [0, V).
    Gradients flow to `hidden` from all three outputs; a second derivative is refused. `chunk` and `tile` bound the memory (see
    `workspace`) and change results by rounding only. Not affected by autocast.
    UserError: a target is no row of the head, or the head has begun to be trained. ValueError: shapes, types, devices or numbers that do not fit.

    >>> head = Head(torch.zeros(4, 2))
    >>> read_tokens(torch.ones(1, 2), torch.tensor([3]), head)
    TokenReadout(logp=tensor([-1.3863]), entropy=tensor([1.3863]), lse=tensor([1.3863]))
    """
    _check(hidden, targets, head, temperature, chunk, tile)
    return TokenReadout(*_ReadTokens.apply(hidden, targets, head, temperature, chunk, tile, want_entropy))


def workspace(head: Head, hidden: Tensor, *, chunk: int = CHUNK, tile: int = TILE, want_entropy: bool = True, backward: bool = True) -> int:
    """Bytes that `read_tokens` holds at its peak beside its inputs, its (N,) columns and the gradient it returns. An upper bound.

    A logit of the tile costs 4 bytes (read without entropy), 8 (with it, or with a softcap's backward), 12 (both). Beside that stand an fp32
    accumulator of (chunk, H), and either the tile of W and the chunk of h as fp32, or, where the device multiplies half precision into fp32,
    the tile's gradient in half precision.
    """
    parts = _Parts(head, hidden, 1.0, tile)
    size, rows, columns, width = parts.type.itemsize, min(chunk, len(hidden)), min(tile, len(head.weight)), hidden.shape[1]
    buffers = 1 + want_entropy + (backward and head.softcap is not None)
    casts = sum(n * size * (x.dtype != parts.type) for n, x in ((columns, head.weight), (rows, hidden))) * width * (not parts.mixed)
    if not backward:
        return rows * columns * buffers * size + casts + rows * 64
    products = rows * width * size * (1 + parts.mixed)
    return rows * columns * (buffers * size + 2 * parts.mixed) + casts + products + rows * 64


def _check(hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk: int, tile: int) -> None:
    head.check_frozen()
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1] or hidden.dtype not in FLOATS:
        raise ValueError(f"hidden must be (N, {head.weight.shape[1]}) and float, not {tuple(hidden.shape)} {hidden.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({len(hidden)},) int64, not {tuple(targets.shape)} {targets.dtype}")
    if not hidden.device == targets.device == head.weight.device:
        raise ValueError(f"hidden, targets and head must share a device, not {hidden.device}, {targets.device}, {head.weight.device}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if chunk < 1 or tile < 1:
        raise ValueError(f"chunk and tile must be at least 1, not {chunk} and {tile}")
    if len(targets) and not isinstance(targets, FakeTensor):  # a simulated run has no values to check
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= len(head.weight):
            wrong = low if low < 0 else high
            raise UserError(f"token {wrong} is not among the model's {len(head.weight)}: use the tokenizer that belongs to the model")


class _Parts:
    """How one call multiplies: which types, which tiles."""

    def __init__(self, head: Head, hidden: Tensor, temperature: float, tile: int) -> None:
        self.head, self.temperature = head, temperature
        kinds = {hidden.dtype, head.weight.dtype}
        self.type = torch.float64 if torch.float64 in kinds else torch.float32
        # Half precision in, fp32 out, on the devices whose kernel does that (CUDA from torch 2.8); elsewhere the tile is copied to fp32.
        self.mixed = len(kinds) == 1 and hidden.dtype.itemsize == 2 and _multiplies_into_fp32(hidden.device.type)
        self.tiles = [(lo, min(lo + tile, len(head.weight))) for lo in range(0, len(head.weight), tile)]

    def operand(self, x: Tensor) -> Tensor:
        return x if self.mixed else x.to(self.type)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=self.type) if self.mixed else torch.mm(a, b)

    def logits(self, rows: Tensor, weight: Tensor, lo: int, hi: int) -> Tensor:
        """One tile of z, a fresh buffer. (n, H), (hi - lo, H) -> (n, hi - lo)."""
        head = self.head
        z = self.product(rows, weight.T)
        if head.bias is not None:
            z.add_(head.bias[lo:hi])
        if head.softcap is not None:
            return z.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / self.temperature)
        return z if head.scale == self.temperature else z.mul_(head.scale / self.temperature)


def _multiplies_into_fp32(device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", device.upper())


class _ReadTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float, chunk: int, tile: int, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        parts = _Parts(head, hidden, temperature, tile)
        # Of every row: the largest logit, sum exp(z - top), sum exp(z - top) (z - top), the target's logit.
        top = hidden.new_full((len(hidden),), torch.finfo(parts.type).min, dtype=parts.type)
        total, tilt, chosen = (torch.zeros_like(top) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(len(hidden), chunk):
                rows = parts.operand(hidden[part])
                for lo, hi in parts.tiles:
                    z = parts.logits(rows, parts.operand(head.weight[lo:hi]), lo, hi)
                    place, inside = _place(targets[part], lo, hi)
                    chosen[part] += z.gather(1, place[:, None])[:, 0].where(inside, 0)
                    _fold(z, top[part], total[part], tilt[part] if want_entropy else None)
                    del z  # before the next tile is made, not after
        log_total = total.log_()
        logp, lse = chosen.sub_(top).sub_(log_total), top + log_total
        entropy = log_total - tilt.div_(log_total.exp()) if want_entropy else None
        ctx.head, ctx.temperature, ctx.chunk, ctx.tile = head, temperature, chunk, tile  # not saved tensors: offloading hooks must not move the weight
        ctx.save_for_backward(hidden, targets, top, log_total, entropy)
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if not ctx.needs_input_grad[0] or (g_logp is None and g_entropy is None and g_lse is None):
            return None, *nothing
        hidden, targets, top, log_total, entropy = ctx.saved_tensors
        head, parts = ctx.head, _Parts(ctx.head, hidden, ctx.temperature, ctx.tile)
        weights = _Weights.of(g_logp, g_entropy, g_lse, entropy, log_total)
        back = weights.size * (head.scale / ctx.temperature)
        grad = torch.empty_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(len(hidden), ctx.chunk):
                rows, mine = parts.operand(hidden[part]), weights.rows(part)
                total = torch.zeros(rows.shape, dtype=parts.type, device=rows.device)
                for lo, hi in parts.tiles:
                    weight = parts.operand(head.weight[lo:hi])
                    z = parts.logits(rows, weight, lo, hi)
                    slope = None if head.softcap is None else (z * (ctx.temperature / head.softcap)).square_().neg_().add_(1)
                    z = _gradient(z.sub_(top[part, None]), mine, targets[part], lo, hi)
                    if slope is not None:
                        z.mul_(slope)
                    if parts.mixed:
                        total += parts.product(z.to(hidden.dtype), weight)
                    else:
                        total.addmm_(z, weight)
                    del z, slope
                grad[part] = total.mul_(back[part, None])
        return grad, *nothing


class _Weights(NamedTuple):
    """dz = p (lse - logp - entropy (log p + H)) + logp onehot, of the incoming gradients, rearranged so that a tile costs two passes.

    With a = z - top and p = exp(a) / total it is `size` * (exp(a) * (base + bend * a) + onehot). `size`, the rows' magnitude, is taken out and
    put back into the small (n, H) result, so that no token's tiny weight falls below what half precision can hold.
    """

    size: Tensor
    base: Tensor
    bend: Tensor | None
    onehot: Tensor | None

    @staticmethod
    def of(g_logp: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, entropy: Tensor | None, log_total: Tensor) -> _Weights:
        size, base = torch.zeros_like(log_total), torch.zeros_like(log_total)
        if g_logp is not None:
            size, base = size + g_logp.abs(), base - g_logp
        if g_lse is not None:
            size, base = size + g_lse.abs(), base + g_lse
        if g_entropy is not None:
            assert entropy is not None
            size, base = size + g_entropy.abs() * (1 + entropy), base + g_entropy * (log_total - entropy)
        size = torch.where(size == 0, 1, size)
        each = torch.exp(-log_total) / size
        return _Weights(size, base * each, None if g_entropy is None else -g_entropy * each, None if g_logp is None else g_logp / size)

    def rows(self, part: slice) -> _Weights:
        return _Weights(*(None if x is None else x[part] for x in self))


def _gradient(a: Tensor, weights: _Weights, targets: Tensor, lo: int, hi: int) -> Tensor:
    """One tile of dz / size in the place of a = z - top; one more buffer while it runs if the entropy has a gradient. (n, width) -> (n, width)."""
    if weights.bend is None:
        a.exp_().mul_(weights.base[:, None])
    else:
        e = a.exp()
        a.mul_(weights.bend[:, None]).add_(weights.base[:, None]).mul_(e)
    if weights.onehot is not None:
        place, inside = _place(targets, lo, hi)
        a.scatter_add_(1, place[:, None], weights.onehot.where(inside, 0)[:, None])
    return a


def _fold(z: Tensor, top: Tensor, total: Tensor, tilt: Tensor | None) -> None:
    """Takes one more tile into the running sums of the rows, in place; z is used up. (n, width), (n,), (n,), (n,)."""
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


def _place(targets: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Each target's column in the tile (any, if it is elsewhere), and whether it is inside. No synchronisation with the device."""
    place = targets - lo
    inside = (place >= 0) & (place < hi - lo)
    return place.clamp_(0, hi - lo - 1), inside


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
