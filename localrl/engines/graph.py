"""A decoding step captured once as a CUDA graph and replayed: one launch instead of a thousand small ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from localrl.engines.weights import compute_device

Step = Callable[[], None]


def capturable(model: nn.Module) -> bool:
    """Whether nothing in this model is known to stand against it: LLM.int8() with a threshold asks the host at every product, and an
    embedding in the host's memory at every token."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if embedding.weight.device != compute_device(model):
        return False
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    return all(layer.state.threshold == 0 for layer in layers)


class Replayed:
    """`step` as a graph, captured anew whenever `form()` changes.

    `step` must do all its work on the device, on tensors that stay in place; `state()` names those that it both reads and writes, which
    are put back after the runs that warm it up. If capturing fails, it warns once and runs `step` as it is from then on.
    """

    def __init__(self, step: Step, form: Callable[[], Any], state: Callable[[], list[Tensor]]) -> None:
        self.step, self.form, self.state = step, form, state
        self.captured: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False

    def __call__(self) -> None:
        if not self.failed and self.form() != self.captured:
            self._capture()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def _capture(self) -> None:
        self.graph, self.captured = None, self.form()
        before = [tensor.clone() for tensor in self.state()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):                                       # libraries set themselves up on first use, which no graph may hold
                self.step()
                self._restore(before)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            if "captur" not in str(error).lower():
                raise
            self.failed = True
            self._restore(before)
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"the decoding step runs without a CUDA graph, which is slower: {reason}", RuntimeWarning, stacklevel=2)
            return
        self.graph = graph

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, value in zip(self.state(), before, strict=True):
            tensor.copy_(value)
