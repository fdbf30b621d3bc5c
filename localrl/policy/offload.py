"""Boundary activations in host memory: with gradient checkpointing, what a layer keeps is its input, and that may wait elsewhere.

A micro-batch of N tokens moves 2 * H * N bytes a layer in half precision (4 in float32) out during its forward pass and back during its
backward pass: all layers' inputs but the last one's, which is wanted again at once. On CUDA the copies run on a stream of their own, out while
the next layers are computed, and back one layer ahead of the backward pass; host memory is pinned. On a CPU the same code copies to plain
memory, which saves nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from localrl.devices import moved_out


def host_memory(like: Tensor) -> Tensor:
    """Room on the host for a tensor: pinned, if it comes from a GPU. All that is moved is put into tensors made here."""
    return moved_out(torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda"))


@contextmanager
def offloading(model: nn.Module) -> Iterator[None]:
    """To be open around a micro-batch's forward pass: the inputs of its checkpointed decoder layers go to the host until they are wanted.

    The backward pass may come after it is closed, more than once if the graph is kept. Without gradient checkpointing nothing is moved.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training]
    mover = Mover()
    handles = [layer.register_forward_pre_hook(mover.expect) for layer in layers[:-1]]
    try:
        with torch.autograd.graph.saved_tensors_hooks(mover.pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


class Mover:
    """Sees every tensor that autograd keeps, and moves those that were announced."""

    def __init__(self) -> None:
        self._expected: Tensor | None = None
        self._last: Moved | None = None

    def expect(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a decoder layer: its input is the next one to be kept."""
        self._expected = inputs[0] if inputs and isinstance(inputs[0], Tensor) and torch.is_grad_enabled() else None

    def pack(self, tensor: Tensor) -> Tensor | Moved:
        """In place of the tensor that is kept."""
        expected = self._expected
        if expected is None or tensor.shape != expected.shape or tensor.untyped_storage()._cdata != expected.untyped_storage()._cdata:
            return tensor
        self._expected, self._last = None, Moved(tensor, self._last)
        return self._last


class Moved:
    """A tensor in host memory, and the one that will be wanted after it."""

    def __init__(self, tensor: Tensor, next_wanted: Moved | None) -> None:
        tensor = tensor.detach()
        self.device, self.next_wanted = tensor.device, next_wanted
        self.host = host_memory(tensor)
        self._coming: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None
        if self.device.type != "cuda":
            self.host.copy_(tensor)
            return
        side = side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))    # until it is computed
        with torch.cuda.stream(side):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(side)

    def fetch(self) -> None:
        """Have it brought back; returns before it has arrived."""
        if self._coming is not None:
            return
        self._coming = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        if self.device.type != "cuda":
            self._coming.copy_(self.host)
            return
        side = side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))    # its room may have been somebody else's until now
        with torch.cuda.stream(side):
            self._coming.copy_(self.host, non_blocking=True)
            self._arrival = side.record_event()
        self._coming.record_stream(side)

    def take(self) -> Tensor:
        """On its device, ready for what is queued from here on."""
        self.fetch()
        if self._arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrival)
        tensor, self._coming, self._arrival = self._coming, None, None
        assert tensor is not None
        return tensor


def unpack(kept: Tensor | Moved) -> Tensor:
    """The tensor that was kept; the one before it sets out."""
    if isinstance(kept, Tensor):
        return kept
    tensor = kept.take()
    if kept.next_wanted is not None:
        kept.next_wanted.fetch()
    return tensor


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that copies, of each device."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
