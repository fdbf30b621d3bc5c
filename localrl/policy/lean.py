"""The rest of a decoder layer on a diet: norms that keep their input alone, and gated MLPs that keep theirs alone and go tile by tile.

As transformers writes them, an RMSNorm leaves two float32 copies of its input to the backward pass, and an MLP five matrices as wide as its
inside. Here

- a norm keeps its input, which the residual stream keeps as well, and one float32 a row; what it needs on the way, it needs for a few
  thousand tokens at a time;
- an MLP with its adapters is one function of its input (`localrl.policy.gated`).

Every operation rounds where transformers' own does. Modules keep their class as a base class, and whatever is not known here stays as it was.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer

from localrl.pieces import slices
from localrl.policy.gated import LeanMLP, activation

TOKENS = 512
"""Tokens of its input that a norm holds in float32 at a time."""

NORMS = {
    "variance_epsilon": ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm", "Phi3RMSNorm"),
    "eps": ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"),
}
"""By what they call their epsilon: w * round(x / rms), and Gemma's round((1 + w) * x / rms)."""
MLPS = {
    "act_fn": ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP"),
    "activation_fn": ("Phi3MLP",),
}
"""By what they call their activation: gate_proj and up_proj, and Phi 3's two in one gate_up_proj."""


def make_lean(model: nn.Module, tile: int = 0) -> int:
    """Let every norm and gated MLP that is known take the lean way, MLPs `tile` tokens at a time (0: all at once). Returns how many do.

    Follows `fold_adapters`. To be called again for another tile.
    """
    if tile < 0:
        raise ValueError(f"a tile of {tile} tokens")
    parents = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    parent_of = {module: layer for layer in parents for module in layer.modules()}
    count = 0
    for module in list(model.modules()):
        lean = _lean_class(module)
        if lean is None:
            continue
        if not isinstance(module, lean):
            module.__class__ = type(f"Lean{type(module).__name__}", (lean, type(module)), {})
        if isinstance(module, LeanMLP):
            module.tile, module.parent = tile, (parent_of.get(module),)
        count += 1
    return count


def _lean_class(module: nn.Module) -> type[LeanNorm] | type[LeanMLP] | None:
    """None: not known, or not as this family has it."""
    if isinstance(module, LeanNorm | LeanMLP):
        return LeanNorm if isinstance(module, LeanNorm) else LeanMLP
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or "forward" in vars(module):
        return None
    if any(kind.__name__ in names and hasattr(module, eps) for eps, names in NORMS.items()):
        return LeanNorm
    if any(kind.__name__ in names and activation(getattr(module, act, None)) is not None for act, names in MLPS.items()):
        return LeanMLP
    return None


class LeanNorm:
    """Mixed into a transformers RMSNorm."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        gemma = not hasattr(self, "variance_epsilon")
        if self.weight.requires_grad or not (gemma or self.weight.dtype == x.dtype) or torch.is_autocast_enabled(x.device.type):
            out = super().forward(x)  # type: ignore[misc]
        else:
            out = _Norm.apply(x, self.weight, self.eps if gemma else self.variance_epsilon, gemma)  # type: ignore[attr-defined]
        assert isinstance(out, Tensor)
        return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
        out, order = torch.empty_like(x), _order(x)
        rows, outs = _rows(x, order), out.permute(order).view(-1, x.shape[-1])
        scales = torch.empty(len(rows), 1, device=x.device)                                                              # 1 / rms
        for part in slices("norm", len(rows), TOKENS * prod(x.shape[2:-1])):
            wide = rows[part].float()
            torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps), out=scales[part])
            wide = wide * scales[part]
            outs[part] = wide.mul_(1.0 + weight.float()) if gemma else wide.to(x.dtype).mul_(weight)
        ctx.save_for_backward(x, scales)
        ctx.weight, ctx.gemma = weight, gemma
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        dx, order = torch.empty_like(x), _order(x)
        rows, dxs, dys = _rows(x, order), dx.permute(order).view(-1, x.shape[-1]), _rows(dy, order)
        for part in slices("norm, back", len(rows), TOKENS * prod(x.shape[2:-1])):
            normal = rows[part].float() * scales[part]
            g = dys[part].float() * (1.0 + ctx.weight.float()) if ctx.gemma else (dys[part] * ctx.weight).float()
            normal.mul_((g * normal).mean(-1, keepdim=True))
            dxs[part] = torch.sub(g, normal, out=normal).mul_(scales[part])
        return dx, None, None, None


def _order(x: Tensor) -> list[int]:
    """Its dimensions as they lie in memory, and the last one last."""
    return [*sorted(range(x.dim() - 1), key=lambda d: -x.stride()[d]), x.dim() - 1]


def _rows(x: Tensor, order: list[int]) -> Tensor:
    """(..., n) -> (rows, n), without a copy if they lie in that order."""
    return x.permute(order).reshape(-1, x.shape[-1])
