"""A gated MLP with its adapters as one function of its input, tile by tile.

Inside, `tile` tokens go at a time through the whole of it, forward and backward: what is wider than the residual stream exists for one tile,
and so does one matrix at a time of a quantised base. The adapters' gradients are summed over tiles in float32.

Its keeping is a step of its own, before its computing. With gradient checkpointing, a layer is computed again in its backward pass up to the
last tensor that it keeps: where nothing after the MLP keeps anything (Llama, Qwen, Mistral), its output is not computed again. Without
checkpointing and in one tile, gate and up are kept and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from localrl.pieces import slices
from localrl.policy.lora import Step, flat, low_rank_gradients


class Activation(NamedTuple):
    """An activation and its way back, each of which may write over its first argument."""

    over: Callable[[Tensor], Tensor]
    of: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    """(gradient of the output, written over; input) -> gradient of the input."""


SILU = Activation(torch.ops.aten.silu_, F.silu, lambda d, x: torch.ops.aten.silu_backward.grad_input(d, x, grad_input=d))


def _gelu(approximate: str) -> Activation:
    back = torch.ops.aten.gelu_backward.grad_input
    return Activation(
        lambda x: torch.ops.aten.gelu_(x, approximate=approximate), lambda x: F.gelu(x, approximate=approximate),
        lambda d, x: back(d, x, approximate=approximate, grad_input=d),
    )  # fmt: skip


ACTIVATIONS = {"SiLUActivation": SILU, "SiLU": SILU, "GELUTanh": _gelu("tanh"), "GELUActivation": _gelu("none")}


def activation(module: Any) -> Activation | None:
    """What a transformers activation module computes, if it is known here."""
    in_python = "python" in getattr(getattr(module, "act", None), "__name__", "")
    return None if in_python else ACTIVATIONS.get(type(module).__name__)


class LeanMLP:
    """Mixed into a transformers gated MLP."""

    tile: int = 0
    parent: tuple[Any] = (None,)
    """The decoder layer around it, hidden from nn.Module."""

    def forward(self, x: Tensor) -> Tensor:
        mlp = Gated.of(self, x)
        if mlp is None:
            out = super().forward(x)  # type: ignore[misc]
            assert isinstance(out, Tensor)
            return out
        low_rank = [matrix for step in mlp.steps if step.term is not None for matrix in (step.term.a, step.term.b)]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *low_rank)):
            return mlp.output(x)
        again = self.parent[0] is not None and self.parent[0].gradient_checkpointing and self.parent[0].training
        out = _Now.apply(_Later.apply(x, mlp, *low_rank), x.detach(), mlp) if self.tile or again else _Kept.apply(x, mlp, *low_rank)
        assert isinstance(out, Tensor)
        return out


class Gated(NamedTuple):
    """down(act(gate(x)) * up(x)), as a call of it works now."""

    front: tuple[Step, ...]
    """gate and up, or one layer whose output is both."""
    down: Step
    act: Activation
    tile: int

    @classmethod
    def of(cls, module: Any, x: Tensor) -> Gated | None:
        """None: one of its layers does something else than usual."""
        names = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
        act = activation(module.activation_fn if len(names) == 1 else module.act_fn)
        front, down = [Step.of(getattr(module, name), x) for name in names], Step.of(module.down_proj, x)
        known = [step for step in front if step is not None]
        return cls(tuple(known), down, act, module.tile) if len(known) == len(names) and down is not None and act is not None else None

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its layers, in order."""
        return *self.front, self.down

    def wide(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What the front layers say. (N, H) -> (N, I) each, or one (N, 2 I)."""
        return tuple(step.output(rows) for step in self.front)

    def output(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H), tile by tile."""
        rows, outs = flat(x), Tiles(len(flat(x)))
        for part in slices("tile", len(rows), self.tile):
            gate, up = halves(self.wide(rows[part]))
            self.act.over(gate).mul_(up)
            del up
            outs.put(part, self.down.output(gate))
        return outs.whole(x).view(x.shape)

    def gradients(self, x: Tensor, dy: Tensor, kept: tuple[Tensor, ...] | None) -> tuple[Tensor, list[Tensor | None]]:
        """dx (..., H), and dA and dB of each layer that has an adapter; `kept`: what `wide` said, never written over."""
        rows, dys, dxs = flat(x), flat(dy), Tiles(len(flat(x)))
        sums = [Sum(step, rows) for step in self.steps]
        for part in slices("tile, back", len(rows), self.tile):
            wide = self.wide(rows[part]) if kept is None else kept
            gate, up = halves(wide)
            act = self.act.of(gate)
            middle = act * up
            v = sums[-1].learn(middle, dys[part], part)
            del middle
            d = self.down.input_gradient(dys[part], v, up.dtype)
            act.mul_(d)                                              # of up
            self.act.back(d.mul_(up), gate)                          # of gate
            del wide, gate, up
            pair = (d, act) if len(self.front) == 2 else (torch.cat([d, act], -1),)
            del d, act
            vs = [total.learn(rows[part], dy, part) for total, dy in zip(sums[:-1], pair, strict=True)]
            found = [step.input_gradient(dy, v, x.dtype) for step, dy, v in zip(self.front, pair, vs, strict=True)]
            dxs.put(part, found[0] if len(found) == 1 else found[0].add_(found[1]))
            del pair
        return dxs.whole(x).view(x.shape), [gradient for total in sums for gradient in total.taken()]


class Sum:
    """One adapter's gradients, tile after tile."""

    def __init__(self, step: Step, rows: Tensor) -> None:
        """`rows` (N, *): of all tiles."""
        self.step, self.collector = step, step.collector(rows)
        self.total: tuple[Tensor, Tensor] | None = None

    def learn(self, x: Tensor, dy: Tensor, part: slice) -> Tensor | None:
        """Add the tokens in `part`. (n, in), (n, out) -> what `Step.back` made of dy."""
        v = self.step.back(dy)
        if self.step.term is not None and v is not None:
            coefficients = None if self.collector is None else self.collector.coefficients[part]
            found = low_rank_gradients(v, x, self.step.low(x) * self.step.term.scaling, dy, coefficients)
            self.total = found if self.total is None else (self.total[0].add_(found[0]), self.total[1].add_(found[1]))
        return v

    def taken(self) -> Sequence[Tensor | None]:
        """dA, dB; nothing without an adapter."""
        if self.total is None:
            return ()
        return self.total if self.collector is None else self.collector.take(*self.total)


class Tiles:
    """A matrix that arrives in parts; one part that is all of it is not copied."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.matrix: Tensor | None = None

    def put(self, part: slice, rows: Tensor) -> None:
        if part == slice(0, self.count):
            self.matrix = rows
            return
        if self.matrix is None:
            self.matrix = rows.new_empty(self.count, rows.shape[1])
        self.matrix[part] = rows

    def whole(self, like: Tensor) -> Tensor:
        return like.new_empty(0, like.shape[-1]) if self.matrix is None else self.matrix


def halves(wide: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """gate, up (N, I)."""
    gate, up = wide if len(wide) == 2 else wide[0].chunk(2, -1)
    return gate, up


class _Later(torch.autograd.Function):
    """Keeps what the MLP's backward pass needs, and promises an output of that shape (one number, expanded)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Gated, *low_rank: Tensor) -> Tensor:
        ctx.save_for_backward(x, *low_rank)
        ctx.mlp = mlp
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, low_rank = ctx.mlp.gradients(ctx.saved_tensors[0], dy, None)
        return dx, None, *low_rank


class _Now(torch.autograd.Function):
    """Makes the promise true."""

    @staticmethod
    def forward(ctx: Any, promise: Tensor, x: Tensor, mlp: Gated) -> Tensor:
        return mlp.output(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None


class _Kept(torch.autograd.Function):
    """All at once, nothing twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Gated, *low_rank: Tensor) -> Tensor:
        wide = mlp.wide(flat(x))
        gate, up = halves(wide)
        ctx.save_for_backward(x, *wide, *low_rank)
        ctx.mlp = mlp
        return mlp.down.output(mlp.act.of(gate).mul_(up)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        dx, low_rank = ctx.mlp.gradients(x, dy, tuple(rest[: len(ctx.mlp.front)]))
        return dx, None, *low_rank
