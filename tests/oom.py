"""Memory that runs out where a test says: at the k-th allocation, beyond a budget of live bytes, or for large blocks only.

    with fail_at(7) as memory:                   # the seventh new storage is refused, once
        work()
    assert memory.failures == 1

    with budget(20 * 2**20) as memory:           # whatever would make more than 20 MiB live at once is refused
        work()

An operation that returns a new storage is carried out and its result thrown away: an operation without effect, as where an allocator refuses. What
lives before is not counted unless it is `adopt`ed; scratch inside an operator is not seen, but for the optimisers of bitsandbytes, which are Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.backends.cpu import ops as cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIFTED = torch.ops.aten.lift_fresh.default
INSIDE = {
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default: cpu._optimizer_update_8bit_blockwise_cpu,
    torch.ops.bitsandbytes.optimizer_update_32bit.default: cpu._optimizer_update_32bit_cpu,
}


class Scarce(TorchDispatchMode):
    """Counts new storages (`allocations`), the bytes of those that live (`now`, `peak`), the `largest` asked for, and refusals (`failures`)."""

    def __init__(self, at: int | None = None, most: int | None = None, block: int | None = None) -> None:
        """Refuse the allocation of this number (from 1), whatever takes `now` past `most` bytes, blocks of more than `block` bytes."""
        super().__init__()
        self.at, self.most, self.block = at, most, block
        self.allocations = self.failures = self.now = self.peak = self.largest = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count storages that were made past it."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _refuse(self, size: int) -> bool:
        self.allocations += 1
        self.largest = max(self.largest, size)
        return (
            self.allocations == self.at
            or (self.most is not None and self.now + size > self.most)
            or (self.block is not None and size > self.block)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in INSIDE:
            with self:
                return INSIDE[func](*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if strided(leaf)} if func is not LIFTED else set()
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if strided(leaf) and (storage := leaf.untyped_storage()).nbytes() and storage._cdata not in given and storage._cdata not in self._known:
                if self._refuse(storage.nbytes()):
                    self.failures += 1
                    raise torch.OutOfMemoryError(f"out of memory: allocation {self.allocations}, {storage.nbytes()} bytes ({func})")
                self._count(storage)
        return out


def strided(leaf: Any) -> bool:
    """Whether it is a tensor with a storage of its own."""
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta"


def fail_at(number: int | None) -> Scarce:
    """The allocation of this number, from 1, is refused once. None: none is, for counting."""
    return Scarce(at=number)


def budget(size: int, tensors: Iterable[torch.Tensor] = ()) -> Scarce:
    """More than so many live bytes are refused; `tensors` live already."""
    scarce = Scarce(most=size)
    scarce.adopt(tensors)
    return scarce


def fragmented(block: int) -> Scarce:
    """Blocks of more bytes than this are refused, however much is free."""
    return Scarce(block=block)
