"""Rollouts by llama.cpp, from a GGUF of the frozen base and the adapter as it is now."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from localrl.batch import Request, Rollout
from localrl.engines.call import Backend, Waves
from localrl.engines.llama.backend import Llama
from localrl.engines.llama.base import base_file
from localrl.engines.llama.binding import MOST_ROWS, Context, Weights
from localrl.engines.llama.threads import quickest
from localrl.export.families import family_of, same_length
from localrl.export.weights import adapter_sources, causal_lm
from localrl.export.writer import DType, write
from localrl.oom import silent
from localrl.policy.load import ADAPTER
from localrl.sections import Gguf, RolloutSettings
from localrl.settings import UserError

SLOWER, PATIENCE = 2.0, 2
"""A row and step that takes so many times what it took at best, in so many calls in a row: the threads are counted anew."""


class LlamaEngine(Waves):
    """Samples what the live model would, nearly: its base rounded to `kind`, its adapter to half precision. The model is only read.

    `threads`: None to try what is quickest, at the first call and when sampling has become much slower. `gpu_layers`: how many layers the GPU
    takes, where llama.cpp was built for one. `say` hears what was made and chosen. Making one loads the base; `close` lets go of it.
    UserError if llama.cpp is missing, or cannot express this model.
    """

    exact = False
    most = MOST_ROWS

    def __init__(
        self, model: Any, tokenizer: Any, settings: RolloutSettings, seed: int, progress: Callable[[int, int], None] | None = None, *,
        kind: Gguf = "q8_0", threads: int | None = None, kv_cache: Literal["full", "int8"] = "full", gpu_layers: int = 0,
        say: Callable[[str], None] = silent,
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, settings, seed, progress)
        self.kind, self.threads, self.say, self.gpu_layers = kind, threads, say, gpu_layers
        self._chosen, self._eight_bit = threads, kv_cache == "int8"
        self.way_out = "" if self._eight_bit else " or memory.kv_cache=int8"
        self.weights = Weights(base_file(model, ADAPTER, kind, say), gpu_layers)
        memory = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(prefix="localrl-adapter-", dir=memory if memory.is_dir() else None)
        self._synced = self._best = float("inf")
        self._slow = 0
        self._opened: Context | None = None                          # the weights know it only as long as somebody holds it

    # -- weights ------------------------------------------------------------------------------------------------------------

    def follow(self, save_weights: Callable[[Path], None], version: int) -> None:
        """Another version: the live model's adapter is written and swapped in. Nothing that was cached survives it."""
        if not self.begin(version):
            return
        start = time.perf_counter()
        path = Path(self._folder.name) / "adapter.gguf"
        write_adapter(self.model, path, "f32" if self.kind == "f32" else "f16")
        self.weights.swap(path)
        path.unlink()
        self._synced = time.perf_counter() - start

    # -- sampling -----------------------------------------------------------------------------------------------------------

    def open(self, longest: int, stack: ExitStack) -> Backend:
        """A backend until the stack is closed; meanwhile torch has one thread, because both would spin against each other."""
        limit = same_length(causal_lm(self.model).config)
        if longest > limit:
            raise UserError(f"prompt and response together are {longest} tokens, and llama.cpp computes this model up to {limit}: take rollout.engine=torch")
        if self._version < 0:
            raise RuntimeError("no weights yet: follow the policy first")
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(torch.inference_mode())
        if self.gpu_layers:                                          # there, learning wants the memory
            stack.callback(self._let_go)
        return Llama(lambda rows: self._context(rows, longest))

    def generate(self, requests: list[Request], version: int, *, settings: RolloutSettings | None = None) -> list[Rollout]:
        """As every engine does. Looks whether it has become slow."""
        rollouts = super().generate(requests, version, settings=settings)
        if self.threads is None and self.stats.rows:
            each = self.stats.seconds / self.stats.rows
            self._best = min(self._best, each)
            self._slow = self._slow + 1 if each > SLOWER * self._best else 0
            if self._slow == PATIENCE:
                self._slow, self._best, self._chosen = 0, float("inf"), None
        return rollouts

    def _context(self, rows: int, longest: int) -> Context:
        """The one that is there, if it is large enough."""
        context = self._opened
        if context and (context.rows < rows or context.length < longest):
            rows, longest = max(rows, context.rows), max(longest, context.length)
            self._let_go()
            context = None
        context = context or self.weights.open(rows, longest, self._chosen or 1, eight_bit=self._eight_bit)
        self._opened = context
        if self._chosen is None:
            self._chosen, seconds = quickest(context, rows)
            if len(seconds) > 1:
                tried = ", ".join(f"{count}: {1000 * s:.1f} ms" for count, s in seconds.items())
                self.say(f"llama.cpp samples with {self._chosen} {'thread' if self._chosen == 1 else 'threads'} (a step of {rows} rows with {tried})")
        return context

    def _let_go(self) -> None:
        if self._opened:
            self._opened.close()
            self._opened = None

    def metrics(self) -> dict[str, float]:
        """What every engine tells, and `rollout/threads`, and `rollout/sync` (seconds that the last swap of the adapter took)."""
        return {**super().metrics(), "rollout/threads": float(self._chosen or 0), "rollout/sync": self._synced}

    def close(self) -> None:
        """Give all memory back."""
        self._let_go()
        self.weights.close()
        self._folder.cleanup()


def write_adapter(model: Any, path: Path, dtype: DType) -> None:
    """The live adapter as llama.cpp reads it, PEFT's scaling folded in."""
    keys: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    write(path, family_of(causal_lm(model).config).arch, keys, adapter_sources(model, ADAPTER, balanced=dtype == "f16"), dtype, None)
