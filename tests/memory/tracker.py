"""The truth that the memory plan is held against: bytes of every live tensor storage, watched while real work runs on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):
    """Bytes that live in storages created under it (`now`), and their `peak`; scratch inside an operator is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def adopt(self, tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        """Count storages that exist already (a model's parameters)."""
        for tensor in tensors:
            self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta" and leaf.layout is torch.strided:
                self._see(leaf.untyped_storage())
        return out


@contextmanager
def watch(*models: torch.nn.Module) -> Iterator[StorageTracker]:
    """A tracker over whatever runs inside."""
    with StorageTracker() as tracker:
        yield tracker
