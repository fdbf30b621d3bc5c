"""The truth that the memory plan is held against: bytes of every live tensor storage, watched while real work runs on a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
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

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count storages that were made past it (read from a file)."""
        for tensor in tensors:
            self._see(tensor)

    def peak_of(self, work: Callable[[], object]) -> int:
        """Bytes that lived at the fullest moment of `work`."""
        gc.collect()
        self.peak = self.now
        work()
        return self.peak

    def _see(self, tensor: torch.Tensor) -> None:
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
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(kept, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return out
