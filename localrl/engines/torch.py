"""Rollouts from the very weights that learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from localrl.devices import kind_of
from localrl.engines.call import FOLD, Backend, Stats, Waves
from localrl.engines.decoder import Decoder, misfit
from localrl.engines.generic import OwnForward, decoding
from localrl.engines.graph import capturable
from localrl.engines.weights import compute_device
from localrl.sections import RolloutSettings
from localrl.settings import UserError

__all__ = ["FOLD", "Stats", "TorchEngine"]


class TorchEngine(Waves):
    """Samples from a live transformers model with whatever adapters are on, and changes nothing about it.

    Its mode is left as it is: training mode, for a quantised one (in evaluation mode bitsandbytes would repack 4-bit weights in place).
    `progress` hears how many of the call's rollouts are done, and of how many. `kv_cache`: keys and values in full precision, or in 8 bits,
    and then the sampler is not quite the policy.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: RolloutSettings, seed: int, progress: Callable[[int, int], None] | None = None,
        kv_cache: Literal["full", "int8"] = "full",
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, settings, seed, progress)
        self.kv_cache, self.exact = kv_cache, kv_cache == "full"
        self.way_out = "" if kv_cache == "int8" else " or memory.kv_cache=int8"
        self._live = False
        """There was no room for a scratch copy of the weights."""

    def follow(self, save_weights: Callable[[Path], None], version: int) -> None:
        """The weights are live: there is nothing to fetch. Another version is another step."""
        self.begin(version)

    def close(self) -> None:
        """Nothing to let go of."""

    @contextmanager
    def reading(self, longest: int) -> Iterator[Backend]:
        """The model, ready to decode sequences of up to `longest` tokens. UserError where it cannot as it is set."""
        reason = misfit(self.model, longest)
        if reason and self.kv_cache == "int8":
            raise UserError(f"memory.kv_cache = 'int8' but this model keeps its own cache, because {reason}: set it to 'full'")
        with torch.no_grad(), decoding(self.model) if reason else nullcontext():
            backend: Backend = OwnForward(self.model) if reason else self._decoder(longest)
            # Inference mode is quicker still, but its tensors must not reach the model's modules. inference_mode(False) would turn gradients on.
            with torch.inference_mode() if backend.apart else nullcontext():
                yield backend

    def open(self, longest: int, stack: ExitStack) -> Backend:
        """`reading` until the stack is closed; without a scratch copy of the weights where there is no room for one."""
        done = self.limits.attempt(lambda: stack.enter_context(self.reading(longest)))
        if done is None:
            self._live = True
            return self.limits.again("getting ready to sample", lambda: stack.enter_context(self.reading(longest)))
        return done.value

    def _decoder(self, longest: int) -> Decoder:
        on_cpu = kind_of(compute_device(self.model)) == "cpu"
        unpack = not self._live and (on_cpu if self.settings.weights == "auto" else self.settings.weights == "unpacked")
        return Decoder(self.model, unpack, longest, fixed=not on_cpu and capturable(self.model), eight_bit=self.kv_cache == "int8")
