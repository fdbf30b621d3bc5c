"""The adapters' own step: one product instead of three, for float32.

PEFT computes base(x) + scaling * B(A(x)) with a copy of the input, an intermediate and two sums for every layer. Where activations are
float32, W + scaling * B A in a scratch matrix says the same: a quantised base is de-quantised into one anyway, for every pass, and the fold
costs r / tokens of the product. The scratch matrix dies with the call; the base and the adapter are read only. In half precision the fold
would round small deltas away, so there PEFT's own forward stays.

The backward pass keeps the layer's input alone (shared by layers that read the same one) and forms dA, dB and dx from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localrl.engines.weights import adapters_of, base_of, compute_dtype, dequantised


def fold_adapters(model: nn.Module) -> int:
    """Let every LoRA layer of a model that computes in float32 take the short way. Returns how many do.

    The layers keep their PEFT class as a base class: saving, loading and switching adapters are PEFT's.
    """
    count = 0
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and not isinstance(module, Folding) and compute_dtype(module, torch.float32) == torch.float32:
            module.__class__ = type(f"Folded{type(module).__name__}", (Folding, type(module)), {})
            count += 1
    return count


class Folding:
    """Mixed into a PEFT LoRA layer: its forward pass as one product, if exactly one plain adapter is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        terms = adapters_of(self)
        if args or kwargs or x.dtype != torch.float32 or terms is None or len(terms) != 1:
            out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            assert isinstance(out, Tensor)
            return out
        a, b, scaling = terms[0]
        out = _Folded.apply(x, a, b, scaling, self)
        assert isinstance(out, Tensor)
        return out


def folded(layer: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A. (r, in), (out, r) -> (out, in) float32, never the live weight itself."""
    weight = dequantised(layer, torch.float32)
    if weight.data_ptr() == base_of(layer).weight.data_ptr():
        return torch.addmm(weight, b, a, alpha=scaling)
    return weight.addmm_(b, a, alpha=scaling)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, layer: Any) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.layer = scaling, layer
        return F.linear(x, folded(layer, a, b, scaling), base_of(layer).bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (rows @ folded(ctx.layer, a, b, ctx.scaling)).reshape(x.shape) if ctx.needs_input_grad[0] else None
        da = (rows @ b).T @ inputs * ctx.scaling if ctx.needs_input_grad[1] else None
        db = rows.T @ (inputs @ a.T) * ctx.scaling if ctx.needs_input_grad[2] else None
        return dx, da, db, None, None
