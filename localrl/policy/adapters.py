"""Three models out of one base: which adapter is on while a piece of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from localrl.pieces import another
from localrl.policy.packing import Layout, current, laid_out


@contextmanager
def using(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run with one adapter on, or with none (the reference). Leaves everything as it was.

    PEFT's own `set_adapter` also switches `requires_grad` of the other adapters off, which must not happen between the forward and
    the backward pass of two adapters; so only the choice is changed here.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


class Again(AbstractContextManager[None]):
    """A reading as it was, as often as it is entered: a graph that is kept is computed again for each of its backward passes."""

    def __init__(self, model: Any, adapter: str | None, layout: Layout | None) -> None:
        self._model, self._adapter, self._layout = model, adapter, layout
        self._open: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(using(self._model, self._adapter))
            stack.enter_context(laid_out(self._model.config, self._layout))
            self._open.append(stack.pop_all())
        another("layer again")

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)


def active(model: nn.Module) -> str | None:
    """The adapter that is on, None if none is."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            return None if layer._disable_adapters else next(iter(layer.active_adapters))
    return None


def checkpoint_layers(model: Any, on: bool) -> None:
    """Gradient checkpointing on or off: keep each layer's input, compute the rest again in the backward pass.

    The second computation happens when another adapter may be on (policy and critic share the base) and the rows' layout is gone, so it
    restores both.
    """
    base = model.get_base_model()
    if not on:
        base.activation_checkpointing_disable()
        return

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), Again(model, active(model), current())

    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})
    base.disable_input_require_grads()                              # only a reentrant one needs it: a gradient of the embeddings, that nobody reads
