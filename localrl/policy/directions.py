"""One backward pass, D gradients of the adapter.

A loss that is linear in its rows' advantages has, for D rewards, D gradients that differ only in how much each row counts. The layers of
`localrl.policy.lora` hold all that is needed for each of them at the moment of their backward pass, so D gradients cost one pass and two
products D * r wide a layer instead of D passes. A step goes

    backward(seeds)         once a micro-batch
    gram()                  the D gradients' inner products, from which the caller decides on weights
    combine(weights)        parameter.grad is the update's gradient, what was kept is gone; turn() tells this update from the one before
    backward(seeds)         only if `passes` is 2: the same rows once more, and only now parameter.grad is the update's gradient

or ends, at any point, in drop(). What is kept between the calls is the kind:

    kind       kept, for P adapter parameters     the update's gradient
    float32    4 D P bytes                        sum of weights[d] * gradient[d]
    bfloat16   2 D P                              the same, gradients rounded
    int8       1.01 D P                           the same, rounded to 8 bits with a scale for every 256
    two_pass   a table of D x 16384               exact for weights found from tables: a second forward and backward pass
    lagged     the same table                     exact for the weights that the step before found

The tables are count sketches: random signs and places keep inner products, up to about 1.6 % of the two lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from localrl.batch import Seed
from localrl.policy.atomic import Ledger
from localrl.policy.lora import Folding
from localrl.settings import UserError

DirectionKind = Literal["float32", "bfloat16", "int8", "two_pass", "lagged"]
WIDTH = 2**14
"""Places of a sketch."""
BLOCK = 256
"""Numbers that share one scale in int8."""
COLUMNS = 2**18
"""Numbers of a gradient that are turned into float64 at a time."""


class Directions:
    """D gradients of one adapter at a time. What it holds between steps is one sketch (and, if lagged, D weights)."""

    def __init__(self, model: nn.Module, adapter: str, count: int, kind: DirectionKind, weights: Sequence[float] | None = None) -> None:
        """`weights`: of the first step, if lagged (1 each if not given). Raises UserError for an adapter on something else than a plain linear layer."""
        if kind not in get_args(DirectionKind) or count < 1 or (weights is not None and len(weights) != count):
            raise ValueError(f"kind = {kind!r}, count = {count}, weights = {weights}")
        self.kind, self.count = kind, count
        self.passes = 2 if kind == "two_pass" else 1
        """Forward and backward passes over every micro-batch of a step."""
        self._layers = [_Layer(self, module, 2 * i, adapter) for i, module in enumerate(_adapted(model, adapter))]
        self._parameters = [parameter for layer in self._layers for parameter in layer.parameters]
        self._device = self._parameters[0].device
        self._weights = self._vector(weights or [1.0] * count)
        self._kept: dict[int, Whole | Blocks] = {}
        self._table = torch.zeros(count, WIDTH, device=self._device) if kind in ("two_pass", "lagged") else None
        self._seen = self._left = 0                                  # rows of the first pass; of them, those that the second one has yet to see
        self._update: Tensor | None = None
        self._summed: Tensor | None = None                           # the next update's sketch, as far as it is added up
        self._ledger = Ledger(())
        self._turn = torch.full((), math.nan)

    # -- gathering ------------------------------------------------------------------------------------------------------------

    def backward(self, seeds: Sequence[Seed], rows_of_tokens: Tensor, ledger: Ledger | None = None) -> None:
        """One backward pass a seed, over one micro-batch; what comes adds to what there is. Touches the adapter's parameters alone.

        `rows_of_tokens` (N,) int64: the row of each of the tokens that the layers read. `ledger`: what a pass over the same rows, which was
        broken off, has added already is not added again.
        """
        second = self._left > 0
        self._ledger = ledger = ledger or Ledger(())
        for number, seed in enumerate(seeds, 1):
            ledger.pass_number = number
            if not ledger.owes("everything"):
                continue
            coefficients = seed.coefficients.to(self._device, torch.float32)
            if coefficients.dim() != 2 or coefficients.shape[1] != self.count:
                raise ValueError(f"coefficients of shape {tuple(coefficients.shape)} for {self.count} directions")
            coefficients = coefficients @ self._weights[:, None] if second else coefficients
            with self._collecting(coefficients.index_select(0, rows_of_tokens)):
                torch.autograd.backward(seed.value, retain_graph=number < len(seeds), inputs=self._parameters)
            ledger.pay("everything")
        rows = sum(len(seed.coefficients) for seed in seeds)
        if second and rows > self._left:
            raise RuntimeError(f"the second pass has {rows - self._left} rows more than the first")
        self._seen, self._left = (self._seen, self._left - rows) if second else (self._seen + rows, 0)
        if second and not self._left:
            self._end()

    @contextmanager
    def _collecting(self, coefficients: Tensor) -> Iterator[None]:
        for layer in self._layers:
            layer.coefficients, layer.module.collector = coefficients, layer
        try:
            yield
        finally:
            for layer in self._layers:
                layer.module.collector = None
                del layer.coefficients
        for layer in self._layers:
            if not layer.spoke and any(parameter.grad is not None for parameter in layer.parameters):
                raise RuntimeError("a layer with the adapter has a gradient of another making: clear gradients first, and let one adapter at a time be on")

    def take(self, number: int, parts: tuple[Tensor, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """A layer's gradients, (D, r, in) and (D, r, out), on their way: kept or sketched. Returns the ordinary ones of A and B, if there are any."""
        if self._left:
            return self._owed(number, parts[0][0], parts[1][0].T)
        mine: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.kind == "lagged":
            mine = torch.tensordot(self._weights, parts[0], 1), torch.tensordot(self._weights, parts[1], 1).T
        for i, part in enumerate(parts, number):
            if not self._ledger.owes(("kept", i)):
                continue
            if self._table is not None:
                self._table += sketch(part.flatten(1), i)
            else:
                self._kept[i] = encode(decode(self._kept[i]).add_(part.flatten(1)) if i in self._kept else part.flatten(1), self.kind)
            self._ledger.pay(("kept", i))                                      # the line before it adds all or nothing: its last allocation comes first
        return self._owed(number, *mine)

    def _owed(self, number: int, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of a layer's two ordinary gradients those that its parameters have not got yet."""
        one, other = (self._ledger.owes(id(parameter)) for parameter in self._parameters[number : number + 2])
        return a if one else None, b if other else None

    # -- deciding -------------------------------------------------------------------------------------------------------------

    def gram(self) -> Tensor:
        """The inner products of the step's gradients so far. -> (D, D) float64, on the CPU."""
        self._between("gram")
        parts = [self._table] if self._table is not None else (decode(kept) for kept in self._kept.values())
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self._device)
        for part in parts:
            for some in part.split(COLUMNS, 1):
                total += some.double() @ some.double().T
        return total.cpu()

    def combine(self, weights: Sequence[float]) -> None:
        """Leave the update's gradient in every parameter's `grad` and forget the rest.

        Two passes: it will be there when as many rows as before have gone through `backward` again. Lagged: these weights are the next step's.
        """
        self._between("combine")
        new = self._vector(weights)
        update = self._sum_up(new) if self._table is None else (self._weights if self.kind == "lagged" else new) @ self._table
        if self._update is not None:
            self._turn = F.cosine_similarity(update.double(), self._update.double(), 0, eps=0.0)
        self._update, self._weights, self._summed = update, new, None
        seen = self._seen
        self._end()
        self._left = seen if self.passes == 2 else 0

    def _sum_up(self, weights: Tensor) -> Tensor:
        """Parameter by parameter, letting go of what was kept of it. Where memory runs out, the next call goes on from there."""
        if self._summed is None:
            self._summed = torch.zeros(WIDTH, device=self._device)
        for i, parameter in enumerate(self._parameters):
            if i in self._kept:
                gradient = weights @ decode(self._kept[i])
                shape = parameter.shape if i % 2 == 0 else parameter.shape[::-1]
                ordinary = gradient.view(shape) if i % 2 == 0 else gradient.view(shape).T.contiguous()
                self._summed += sketch(gradient[None], i)[0]         # the last line that allocates, and it does so before it adds
                parameter.grad = ordinary
                del self._kept[i]
        return self._summed

    def drop(self) -> None:
        """Forget what this step gathered so far; the parameters' own `grad` stays as it is."""
        self._end()

    def _end(self) -> None:
        self._kept.clear()
        self._summed = None
        if self._table is not None:
            self._table.zero_()
        self._seen = self._left = 0
        for layer in self._layers:
            layer.spoke = False

    def _between(self, what: str) -> None:
        if self._left:
            raise RuntimeError(f"{what}() in the middle of a second pass: {self._left} rows are missing")

    def turn(self) -> float:
        """The cosine between the update just combined and the one before, from sketches; NaN if there was none or one of them was 0."""
        return self._turn.item()

    # -- keeping --------------------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Bytes that it holds now."""
        tensors = [t for kept in self._kept.values() for t in kept if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*tensors, self._weights, self._table, self._update] if t is not None)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, between steps: "weights" (D,), and "update" (16384,) once there was one."""
        return {"weights": self._weights.clone()} | ({} if self._update is None else {"update": self._update.clone()})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`. Raises UserError if it is of another number of directions."""
        update = state.get("update")
        if "weights" not in state or state["weights"].shape != (self.count,) or (update is not None and update.shape != (WIDTH,)):
            raise UserError(f"the checkpoint's steering does not fit this run's {self.count} directions: resume with the rewards that it was made with")
        self._weights = self._vector(state["weights"].tolist())
        self._update = None if update is None else update.to(self._device, torch.float32)
        self._end()

    def _vector(self, weights: Sequence[float]) -> Tensor:
        if len(weights) != self.count:
            raise ValueError(f"{len(weights)} weights for {self.count} directions")
        return torch.tensor(list(weights), dtype=torch.float32, device=self._device)


class _Layer:
    """One layer's collector: knows which tensors are its own."""

    coefficients: Tensor

    def __init__(self, owner: Directions, module: Any, number: int, adapter: str) -> None:
        self.owner, self.module, self.number, self.adapter = owner, module, number, adapter
        self.parameters = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        self.spoke = False

    def take(self, da: Tensor, db: Tensor) -> tuple[Tensor | None, Tensor | None]:
        self.spoke = True
        return self.owner.take(self.number, (da, db))


def _adapted(model: nn.Module, adapter: str) -> list[Any]:
    """The layers that carry the adapter, in the model's order."""
    found = []
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, BaseTunerLayer) and adapter in {n for names in module.adapter_layer_names for n in getattr(module, names)}:
            if not isinstance(module, Folding) or adapter in layer.lora_variant or layer.lora_bias.get(adapter):
                raise UserError(f"{name} ({type(module).__name__}) has no plain linear adapter, several gradients of it cannot be had in one pass: "
                                "leave it out of adapter.lora_target_modules")
            found.append(layer)
    if not found:
        raise ValueError(f"no layer carries the adapter {adapter!r}")
    return found


# -- keeping a gradient small ---------------------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """(D, n) float32 or bfloat16."""

    values: Tensor


class Blocks(NamedTuple):
    """(D, n) in int8: values = codes * scales * largest."""

    codes: Tensor
    """(D, n / 256, 256) int8, the last ones of each direction are padding."""
    scales: Tensor
    """(D, n / 256, 1) float16, shares of the largest: gradients' own scales are below what float16 can hold."""
    largest: Tensor
    """(D, 1, 1) float32."""
    n: int


def encode(values: Tensor, kind: str) -> Whole | Blocks:
    """(D, n) float32 -> the same, smaller. Numbers that are not finite stay so.

    >>> decode(encode(torch.tensor([[0.0, 1.0, -127.0]]), "int8"))
    tensor([[   0.,    1., -127.]])
    """
    if kind != "int8":
        return Whole(values.to(torch.float32 if kind == "float32" else torch.bfloat16))
    count, n = values.shape
    blocks = F.pad(values, (0, -n % BLOCK)).view(count, -1, BLOCK)
    step = blocks.abs().amax(2, keepdim=True) / 127
    largest = step.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scales = (step / largest).half()
    step = (scales.float() * largest).clamp(min=torch.finfo(torch.float32).tiny)
    return Blocks((blocks / step).round_().clamp_(-127, 127).to(torch.int8), scales, largest, n)


def decode(kept: Whole | Blocks) -> Tensor:
    """What `encode` kept. -> (D, n) float32; of float32, the very tensor."""
    if isinstance(kept, Whole):
        return kept.values.float()
    return (kept.codes * (kept.scales.float() * kept.largest)).flatten(1)[:, : kept.n].contiguous()


def sketch(values: Tensor, number: int) -> Tensor:
    """A table that keeps inner products, on average. (D, n) of tensor `number` -> (D, 16384); adds up like the values do.

    Every run of 16384 numbers gets random signs and is rotated by a random amount: two numbers meet in one place as seldom as if each had
    been sent to a place of its own choice, and nothing is scattered, so that the sum has the same order on every machine.
    """
    runs = -(-values.shape[1] // WIDTH)
    numbers = torch.arange(runs * WIDTH, device=values.device).view(runs, WIDTH)
    signs = 1.0 - 2.0 * (scrambled(numbers + (2 * number << 32)) & 1)
    places = (numbers + scrambled(numbers[:, :1] + (2 * number + 1 << 32))) & (WIDTH - 1)
    spread = F.pad(values, (0, runs * WIDTH - values.shape[1])).view(-1, runs, WIDTH) * signs
    return spread.gather(2, places.expand_as(spread)).sum(1)


def scrambled(numbers: Tensor) -> Tensor:
    """A pseudo-random number for each, the same on every device (the finaliser of splitmix64). int64 -> int64, not negative."""
    z = numbers * -7046029254386353131
    z = (z ^ ((z >> 30) & (1 << 34) - 1)) * -4658895280553007687
    z = (z ^ ((z >> 27) & (1 << 37) - 1)) * -7723592293110705685
    return (z ^ ((z >> 31) & (1 << 33) - 1)) & (1 << 62) - 1
