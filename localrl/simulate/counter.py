"""Bytes of every live tensor storage while something runs, real or fake: what is there now, the peak, and the events in between.

A dispatch mode sees each operator's outputs, and a weak reference to each storage tells when it goes. What a kernel allocates and frees
inside one operator cannot be seen; the few that matter are in `SCRATCH`.
"""

from __future__ import annotations

import weakref
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localrl.devices import hearing_of_moves
from localrl.pieces import watching
from localrl.simulate.scratch import SCRATCH

ALIKE = ("tokens of the head", "tokens of the head, back", "rows of the head", "norm", "norm, back", "tile", "tile, back")
"""Loops whose pieces leave nothing behind but numbers: of these the first and the last are enough, if all are of one size."""
DEVICE: Any = torch.ops.prim.device.default
Place = tuple[tuple[str, str], ...]
"""Which loops an event lies in, and in which of their pieces: first, second, middle, last but one or last."""


class Event(NamedTuple):
    """One operator that allocated."""

    place: Place
    name: str
    live: int
    """Bytes at its fullest moment."""
    owed: int = 0
    """Of these, gradients that the pass under way has not added to yet: before the first pass they are not there."""


class Counter(TorchDispatchMode):
    """Counts while it is entered. Storages that were made before are counted once `adopt` has seen them."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        """Whose scratch table applies."""
        self.now = self.peak = 0
        self.events: list[Event] | None = None
        self.skips = False
        """Whether pieces in the middle are left out where they are like the last one."""
        self.counts: dict[str, int] = {}
        """Pieces of loops that do not count themselves."""
        self.owed = 0
        """Bytes of gradients that the pass under way has yet to add to."""
        self._counted: Counted[str] = Counted()
        self._place: dict[str, str] = {}
        self._known: dict[int, weakref.ref[Any]] = {}
        self._elsewhere: set[int] = set()

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count storages that were made past it."""
        for tensor in tensors:
            self._see(tensor)

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """The events while it is open; `peak` starts again."""
        self.peak, self.events = self.now, []
        self._place.clear()
        self._counted.clear()
        try:
            with watching(self.enter), hearing_of_moves(self.move_out):
                yield self.events
        finally:
            self.events = None

    @contextmanager
    def holding(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """As if copies of these tensors lived while it is open."""
        size = sum(tensor.nbytes for tensor in tensors)
        self.now += size
        try:
            yield
        finally:
            self.now -= size

    def enter(self, loop: str, number: int, count: int) -> bool:
        """A loop goes on to another piece, or is over: `localrl.pieces.Watch`. What it was in the middle of is over too."""
        if number < 0:
            count = self.counts[loop]
            number, self._counted[loop] = self._counted[loop] % count, self._counted[loop] + 1
        for name in list(reversed(self._place)):
            if loop in self._place:
                del self._place[name]
        if number < count:
            ends = {0: "first", count - 1: "last"}
            self._place[loop] = ends.get(number) or ("second" if number == 1 else "last but one" if number == count - 2 else "middle")
        return not self.skips or loop not in ALIKE or number in (0, count - 1)

    def peak_of(self, work: Callable[[], object]) -> int:
        """Bytes at the fullest moment of `work`."""
        self.peak = self.now
        work()
        return self.peak

    def move_out(self, tensor: Tensor) -> None:
        """A tensor that stands for host memory: no longer counted."""
        key = tensor.untyped_storage()._cdata
        if key in self._known and key not in self._elsewhere:
            self._elsewhere.add(key)
            self.now -= tensor.untyped_storage().nbytes()

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        if tensor.layout is torch.strided:
            kept: Any = tensor.untyped_storage()
            key, size = kept._cdata, kept.nbytes()
        else:                                                        # laid out for oneDNN: no storage, the tensor itself is the owner
            kept, key, size = tensor, id(tensor), tensor.numel() * tensor.element_size()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            if key in self._elsewhere:
                self._elsewhere.remove(key)
            else:
                self.now -= size

        self._known[key] = weakref.ref(kept, gone)
        self.now += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):       # more than half of all calls, and they make nothing
            return args[0].fake_device
        before = self.now
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        hidden = SCRATCH.get(f"{self.device}:{func._schema.name}")
        live = self.now + (hidden(args, out) if hidden else 0)
        if live > before:
            self.peak = max(self.peak, live)
            if self.events is not None:
                self.events.append(Event(tuple(self._place.items()), func._schema.name, live, self.owed))
        return out
