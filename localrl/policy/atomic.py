"""Gradients of a micro-batch, each added exactly once, however often memory runs out on the way.

A backward pass that fails half-way has added to some parameters' gradients and not to others'. To throw the half away one must have kept what
was there before: a second set of gradients on the device, or a copy on the host after every micro-batch (for 42 million numbers 168 MB and 7 to
14 ms each time). But nothing need be thrown away: a parameter gets all of a pass's gradient in one addition that allocates nothing, so its part is
right if it is there at all. A ledger notes whose part is; the rows are then cut in two, and each half pays into those parameters alone
that the failed pass still owes. That costs an undisturbed step no memory and a Python call a parameter, a disturbed one that micro-batch's work once more,
and the sum is that of the undisturbed step up to the rounding of a sum over rows that is taken in two parts.

The atom is one reading of one micro-batch (policy and critic are read and differentiated one after the other): its metrics count when it is through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from localrl.batch import Batch
from localrl.config import Run
from localrl.oom import Limits, failure

T = TypeVar("T")
Paid = frozenset[Hashable]


class Ledger:
    """Which gradients of the rows at hand have been added. Holds names alone, no tensor, and outside `following` nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.pass_number = 0
        """Of the backward passes over the same rows: each adds to every parameter."""
        self._paid: set[Hashable] | None = None
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        self.pay(id(parameter))

    def pay(self, what: Hashable) -> None:
        """This pass's part of it is there now."""
        if self._paid is not None:
            self._paid.add((self.pass_number, what))

    def owes(self, what: Hashable) -> bool:
        """Whether this pass's part of it is still to come."""
        return self._paid is None or (self.pass_number, what) not in self._paid

    @property
    def paid(self) -> Paid:
        """All that has been added so far."""
        return frozenset(self._paid or ())

    @contextmanager
    def following(self, paid: Paid) -> Iterator[None]:
        """Rows that have paid so much already."""
        self._paid, self.pass_number = set(paid), 0
        try:
            yield
        finally:
            self._paid, self.pass_number = None, 0


def in_pieces(doing: str, work: Callable[[Tensor], T], rows: Tensor, batch: Batch, limits: Limits, ledger: Ledger, way_out: str) -> list[T]:
    """`work` on some rows of a batch, in as many pieces as memory allows. rows (n,) int64 -> what each piece came to.

    OutOfMemory: one row by itself is too much; `way_out` says what a person can do about it.
    """
    todo: list[tuple[Tensor, Paid, bool]] = [(rows, frozenset(), False)]
    found = []
    while todo:
        part, paid, last = todo.pop(0)
        if limits.micro_batch_tokens is not None:
            part, *others = _cut(part, limits.cut(_sizes(part, batch, limits)))
            todo[:0] = [(other, paid, False) for other in others]
        with ledger.following(paid):
            done = limits.attempt(partial(work, part))
            paid = ledger.paid
        if done is not None:
            found.append(done.value)
            continue
        sizes = _sizes(part, batch, limits)
        if len(sizes) == 1:
            if last:
                raise failure(f"{doing} with a single row of {sizes[0]} tokens", way_out)
            todo.insert(0, (part, paid, True))                       # once more: what was let go of may have been in its way
        else:
            todo[:0] = [(half, paid, False) for half in _cut(part, limits.halve(doing, sizes))]
    return found


def _sizes(rows: Tensor, batch: Batch, limits: Limits) -> list[int]:
    """Tokens of each of these rows, on the host."""
    sizes = limits.again("counting tokens", lambda: batch.sequence_length).tolist()
    return [sizes[row] for row in rows.tolist()]


def _cut(rows: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    return [rows[start:end] for start, end in runs]


def way_out(run: Run, *, checkpointing: bool, offload: bool, mlp_tile: int, head_chunk: int) -> str:
    """Part of a sentence: settings with which a row needs less, of those that are not in force."""
    ways = [
        ("memory.gradient_checkpointing=true", not checkpointing),
        ("memory.mlp_tile=512", not mlp_tile),
        ("memory.offload=true", not offload),
        ("model.quantization=nf4", run.model.quantization != "nf4"),
        (f"memory.head_chunk={head_chunk // 2}", head_chunk > 64),
        (f"rollout.max_completion_length={max(1, run.rollout.max_completion_length // 2)}", True),
    ]
    return "try " + " or ".join(way for way, helps in ways if helps)
