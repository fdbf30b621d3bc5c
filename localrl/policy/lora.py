"""The adapters' own step: one autograd function instead of PEFT's three products, for every base and every type.

PEFT computes base(x) + scaling * B(A(x)) in float32 whatever the activations are: a float32 copy of the input, an intermediate and two sums
for every layer, most of it kept for the backward pass. Here a layer keeps its input (one tensor, shared by all layers that read it) and,
in half precision, the r-wide u = x A^T; everything else is formed again, used and dropped. That is all that a layer's backward pass can
do with, so whoever recomputes or moves activations has nothing else to look after.

float32, where activations are float32: W + scaling * B A in a scratch matrix says the same in one product. A quantised base is
de-quantised into one anyway, for every pass, and the fold costs r / tokens of the product. The base and the adapter are read only.

Half precision, where the fold would round small deltas away: the base layer's own forward pass, as it rounds, plus scaling * (x A^T) B^T
with A and B cast to the activations' type. Backward, dx is formed in that type, dA and dB are summed in float32.

Several gradients at once: while a layer has a `collector`, its backward pass weighs the tokens of the micro-batch once for each direction
and hands the collector one dA and one dB a direction (see `localrl.policy.directions`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localrl.engines.weights import adapters_of, base_of, compute_dtype, dequantised
from localrl.policy.output_layer import multiplies_into_fp32


class Collector(Protocol):
    """Takes several gradients of one layer's adapter out of one backward pass."""

    adapter: str
    """The adapter whose gradients are wanted."""
    coefficients: Tensor
    """(N tokens of the micro-batch, D) float32."""

    def take(self, da: Tensor, db: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(D, r, in), (D, r, out) float32, its to keep or change -> what the ordinary gradients of A (r, in) and B (out, r) become."""
        ...


class Term(NamedTuple):
    """The one adapter that a call of a layer adds."""

    adapter: str
    a: Tensor
    """(r, in) float32."""
    b: Tensor
    """(out, r) float32."""
    scaling: float


def fold_adapters(model: nn.Module) -> int:
    """Let every plain LoRA layer of a model take the short way. Returns how many do.

    The layers keep their PEFT class as a base class: saving, loading and switching adapters are PEFT's.
    """
    count = 0
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and not isinstance(module, Folding) and compute_dtype(module, torch.float32) and adapters_of(module) is not None:
            module.__class__ = type(f"Folded{type(module).__name__}", (Folding, type(module)), {})
            count += 1
    return count


class Folding:
    """Mixed into a PEFT LoRA layer: its own forward pass, if exactly one plain adapter is on; PEFT's otherwise."""

    collector: Collector | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step = None if args or kwargs else Step.of(self, x)
        term = None if step is None else step.term
        out = super().forward(x, *args, **kwargs) if term is None else _Adapted.apply(x, term.a, term.b, step)  # type: ignore[misc]
        assert isinstance(out, Tensor)
        return out


class Step(NamedTuple):
    """What a call of a linear layer, adapted or not, does now, and its way back. Rows are flat: (N, in) -> (N, out)."""

    layer: Any
    kind: torch.dtype
    """In which the base multiplies."""
    term: Term | None

    @classmethod
    def of(cls, layer: Any, x: Tensor) -> Step | None:
        """None: it would do something else than W x + b and at most one plain adapter without dropout, or its input is not for that."""
        terms, kind = adapters_of(layer), compute_dtype(layer, x.dtype) if isinstance(layer, nn.Module) else None
        if terms is None or len(terms) > 1 or kind is None or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return None
        if not terms:
            return cls(layer, kind, None)
        name = next(name for name in layer.active_adapters if name in layer.lora_A)
        return cls(layer, kind, Term(name, *terms[0])) if isinstance(layer.lora_dropout[name], nn.Identity) else None

    def folds(self, x: Tensor) -> bool:
        """Whether base and adapter go as one float32 matrix."""
        return x.dtype == self.kind == torch.float32

    def low(self, x: Tensor) -> Tensor:
        """x A^T. (N, in) -> (N, r), in its type."""
        assert self.term is not None
        return x @ self.term.a.to(x.dtype).T

    def output(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, out). `u`: low(x), if it is at hand."""
        if self.term is None:
            return base_of(self.layer)(x)
        if self.folds(x):
            return F.linear(x, folded(self.layer, *self.term[1:]), base_of(self.layer).bias)
        out, u = base_of(self.layer)(x), self.low(x) if u is None else u
        return out.addmm_(u.to(out.dtype), self.term.b.to(out.dtype).T, alpha=self.term.scaling)

    def back(self, dy: Tensor) -> Tensor | None:
        """scaling * dy B, which both gradients begin with. (N, out) -> (N, r) float32."""
        return None if self.term is None else product(dy, self.term.b) * self.term.scaling

    def input_gradient(self, dy: Tensor, v: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(N, out), back(dy) -> (N, in) of the input's type."""
        if self.term is not None and dtype == self.kind == torch.float32:
            return dy @ folded(self.layer, *self.term[1:])
        weight = dequantised(self.layer, self.kind)
        dx = (dy.to(weight.dtype) @ weight).to(dtype)
        return dx if self.term is None or v is None else dx.addmm_(v.to(dtype), self.term.a.to(dtype))

    def collector(self, x: Tensor) -> Collector | None:
        """Who takes several gradients of this adapter, if anybody does. (N, in)."""
        collector: Collector | None = getattr(self.layer, "collector", None)
        if collector is None or self.term is None or collector.adapter != self.term.adapter:
            return None
        if len(x) != len(collector.coefficients):
            raise RuntimeError(f"{len(collector.coefficients)} tokens have coefficients, but a layer reads {len(x)}: it does not keep rows apart")
        return collector


def folded(layer: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A. (r, in), (out, r) -> (out, in) float32, never the live weight itself."""
    weight = dequantised(layer, torch.float32)
    if weight.untyped_storage()._cdata == base_of(layer).weight.untyped_storage()._cdata:
        return torch.addmm(weight, b, a, alpha=scaling)
    return weight.addmm_(b, a, alpha=scaling)


def low_rank_gradients(v: Tensor, x: Tensor, u: Tensor, dy: Tensor, coefficients: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, summed in float32; with coefficients one a direction, out of two products D * r wide.

    v = scaling * dy B (N, r), x (N, in), u = scaling * x A^T (N, r), dy (N, out), coefficients (N, D)
    -> dA (r, in), dB (out, r), or dA (D, r, in), dB (D, r, out).
    """
    if coefficients is None:
        return product(v.T, x), product(dy.T, u)
    rank = v.shape[1]
    da, db = (product(spread_out(coefficients, narrow).T, wide) for narrow, wide in ((v, x), (u, dy)))
    return da.view(-1, rank, x.shape[1]), db.view(-1, rank, dy.shape[1])


def spread_out(each: Tensor, narrow: Tensor) -> Tensor:
    """Every row once for each direction. (N, D), (N, r) -> (N, D * r)."""
    return (each[:, :, None] * narrow[:, None]).flatten(1)


def product(p: Tensor, q: Tensor) -> Tensor:
    """p q, summed and handed back in float32. If one factor is half and the other wider, the wider one is rounded for it where that saves a copy.

    float16 cannot hold what is below 6e-8, as gradients and fresh adapters are: the wider factor is divided by a power of two first.
    """
    kind = min(p.dtype, q.dtype, key=lambda dtype: dtype.itemsize)
    if kind.itemsize > 2 or not multiplies_into_fp32(p.device):
        kind = torch.promote_types(kind, torch.float32)
        return p.to(kind) @ q.to(kind)
    wide = q if p.dtype == kind else p
    if kind != torch.float16 or wide.dtype == kind or not wide.numel():
        return torch.mm(p.to(kind), q.to(kind), out_dtype=torch.float32)
    scale = torch.ldexp(torch.ones((), device=wide.device), torch.frexp(wide.abs().amax()).exponent)                    # stays on the device
    p, q = (m if m.dtype == kind else (m / scale).to(kind) for m in (p, q))
    return torch.mm(p, q, out_dtype=torch.float32).mul_(scale)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, step: Step) -> Tensor:
        rows, ctx.step = flat(x), step
        u = None if step.folds(x) else step.low(rows)
        ctx.save_for_backward(x, a, b, *([] if u is None else [u]))
        return step.output(rows, u).view(*x.shape[:-1], len(b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, _, *kept = ctx.saved_tensors
        step: Step = ctx.step
        rows, inputs = flat(dy), flat(x)
        v = step.back(rows)
        assert v is not None and step.term is not None
        dx = step.input_gradient(rows, v, x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:3]):
            return dx, None, None, None
        u = (kept[0] if kept else step.low(inputs)) * step.term.scaling
        collector = step.collector(inputs)
        if collector is None:
            return dx, *low_rank_gradients(v, inputs, u, rows, None), None
        return dx, *collector.take(*low_rank_gradients(v, inputs, u, rows, collector.coefficients)), None


def flat(x: Tensor) -> Tensor:
    """(..., n) -> (N, n)."""
    return x.reshape(-1, x.shape[-1])
