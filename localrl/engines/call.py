"""One call of `generate`, whoever computes: waves of rows that are decoded together, their ends, and what running out of memory makes of them.

A backend reads contexts and then one token a row; everything else is here, so that every engine stops, continues and draws alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from localrl.batch import Request, Rollout
from localrl.devices import kind_of
from localrl.engines.cache import Cache
from localrl.engines.graph import Replayed
from localrl.engines.sampling import Sampler, stream_keys
from localrl.engines.stops import StopStrings, end_table, end_tokens
from localrl.engines.wave import Finished, Wave
from localrl.oom import Limits, OutOfMemory, failure
from localrl.sections import RolloutSettings
from localrl.settings import UserError

FOLD = {"cpu": 0.9, "cuda": 0.75}
"""Share of rows still running at or below which the others are let go: moving the cache costs about what a step does, a capture more."""
LOOK = {"cpu": 1, "cuda": 16}
"""Steps between two looks for ends. A look makes a GPU wait."""
LOOK_FOR_STRINGS = 8
"""At least, where there are stop strings: tails are decoded to text."""


class RowCache(Protocol):
    """What a backend remembers of the rows of a wave."""

    foldable: bool
    """Rows can leave it."""
    moves: bool
    """That moves the others, at about the cost of a step. Else rows leave as soon as they are done."""

    def grow(self) -> None: ...
    def keep(self, rows: Sequence[int]) -> None: ...


class Backend(Protocol):
    """A model that reads contexts, and then one token a row."""

    apart: bool
    """Past its making, it calls none of the model's modules."""

    def prefill(self, contexts: Sequence[Sequence[int]], owner: Sequence[int], room: int) -> tuple[Tensor, Any]: ...
    def step(self, tokens: Tensor, cache: Any) -> Tensor: ...


@dataclass(frozen=True)
class Stats:
    """What one call of `generate` did."""

    prefilled_tokens: int
    """Of prompts and of what continued rollouts had written, each read once a group."""
    generated_tokens: int
    """Kept: none past an end."""
    steps: int
    """Forward passes of one token a row."""
    rows: int
    """In all those passes together."""
    alive: float
    """Of these, the share that was not done yet."""
    seconds: float


class Waves:
    """An engine that samples wave by wave in this process. Whoever computes is a subclass's matter (`open`).

    `model`: whose end tokens count. `progress` hears how many of a call's rollouts are done, and of how many.
    """

    most: int | None = None
    """Rows that can be decoded together at all; None: as many as there is memory for."""
    way_out = ""
    """Where not even one response fits in memory: what to try beside a shorter one."""

    def __init__(self, model: Any, tokenizer: Any, settings: RolloutSettings, seed: int, progress: Callable[[int, int], None] | None) -> None:
        self.model, self.tokenizer, self.settings, self.seed, self.progress = model, tokenizer, settings, seed, progress
        self.stats = Stats(0, 0, 0, 0, 0.0, 0.0)
        self.limits = Limits()
        """What running out of memory has taught about waves."""
        self._calls: list[Stats] = []
        self._version = -1

    def open(self, longest: int, stack: ExitStack) -> Backend:
        """A backend for sequences of up to `longest` tokens, until the stack is closed."""
        raise NotImplementedError

    def generate(self, requests: list[Request], version: int, *, settings: RolloutSettings | None = None) -> list[Rollout]:
        """One rollout for each request, in their order. `settings`: others for this call.

        Reproducible: a rollout depends on the weights, the seed, the version, its prompt and its sample number, not on the other requests
        (but for rounding: a matrix product may round differently in a larger batch). The token that completes a stop string is the last
        one kept. Raises UserError if the logits are not finite.
        """
        settings = settings or self.settings
        start = time.perf_counter()
        call = Call(self, requests, version, settings)
        call.run(min(settings.concurrent or self.settings.concurrent or len(requests), self.most or len(requests)))
        rollouts = call.rollouts()
        self.stats = Stats(
            call.prefilled, call.generated, call.steps, call.computed, call.useful / max(1, call.computed), time.perf_counter() - start
        )  # fmt: skip
        self._calls.append(self.stats)
        return rollouts

    def begin(self, version: int) -> bool:
        """Whether this is another version than before: then `metrics` starts anew."""
        if version == self._version:
            return False
        self._version = version
        self._calls.clear()
        return True

    def metrics(self) -> dict[str, float]:
        """Of the step so far: `rollout/tokens` written, `rollout/passes` of one token a row, and `rollout/idle_share`: of the rows in those passes,
        the share whose response was over already."""
        rows = sum(call.rows for call in self._calls)
        metrics = {"rollout/tokens": float(sum(call.generated_tokens for call in self._calls)), "rollout/passes": float(sum(c.steps for c in self._calls))}
        return {**metrics, "rollout/idle_share": 1 - sum(call.alive * call.rows for call in self._calls) / rows} if rows else metrics


class Call:
    """One call of `generate`: what it needs throughout, and what it has."""

    def __init__(self, engine: Waves, requests: Sequence[Request], version: int, settings: RolloutSettings) -> None:
        self.engine, self.requests, self.version, self.settings = engine, requests, version, settings
        self.contexts = [(*r.prompt.tokens, *r.so_far) for r in requests]
        self.left = [settings.max_completion_length - len(r.so_far) for r in requests]
        self.limits = [min(left, settings.window or left) for left in self.left]
        for request, context in zip(requests, self.contexts, strict=True):
            if not context:
                raise UserError(f"prompt {request.prompt.id} has no tokens: a response needs at least one to follow")
        self.keys = stream_keys(engine.seed, version, requests)
        self.sampler = Sampler(settings)
        self.stops = StopStrings(engine.tokenizer, settings.stop)
        self.written: dict[int, Finished] = {}
        self.wave: Wave | None = None
        """Under way."""
        self.asked = list(requests)                                  # with what was written in waves that were dropped
        self.begun: dict[int, Finished] = {}                         # the same, of each such row
        self.stuck: dict[int, int] = {}                              # how long rows were that failed by themselves
        self.anew: set[int] = set()                                  # those that began a second time
        self.prefilled = self.generated = self.steps = self.useful = self.computed = 0

    def run(self, concurrent: int) -> None:
        """Wave after wave, prompts of like length together, groups side by side."""
        todo = [i for i, limit in enumerate(self.limits) if limit > 0]
        if not todo:
            return
        longest = max(len(self.contexts[i]) + self.limits[i] for i in todo)
        todo.sort(key=lambda i: (-len(self.contexts[i]), self.contexts[i], i))
        limits = self.engine.limits
        with ExitStack() as stack:
            backend = self.engine.open(longest, stack)
            while todo:
                rows = min(concurrent, limits.concurrent or concurrent)
                places, todo = todo[:rows], todo[rows:]
                if limits.attempt(partial(self._wave, backend, places)) is None:
                    todo = [*self._recover(places), *todo]

    def _recover(self, places: list[int]) -> list[int]:
        """A wave was dropped: take over what it has finished, and what it has begun. -> rows to go on with, at most half as many at a time.

        They go on behind their last token: the random number of a token has an address, so that responses are the same, up to rounding.
        """
        limits, wave = self.engine.limits, self.wave
        self.wave = None
        if wave is not None:
            if wave.count > wave.settled:
                limits.again("looking for ends of responses", partial(self._settle, wave, places))
            for part in limits.again("keeping what was written", wave.unfinished):
                self._go_on(places[part.row], part)
        left = [i for i in places if i not in self.written]
        if len(places) > 1:
            limits.narrow(len(places))
        for i in left if len(places) == 1 else ():
            if self.stuck.get(i) == len(self.contexts[i]):           # by itself, and no further than the last time
                if i not in self.begun or i in self.anew:
                    raise self._failure(i)
                self._begin_anew(i)                                  # to read a long context takes more room than to write it
            self.stuck[i] = len(self.contexts[i])
        return left

    def _go_on(self, i: int, part: Finished) -> None:
        """From here on this row's request is the one that carries what it has written."""
        before, request = self.begun.get(i, part._replace(tokens=[], logp=[])), self.asked[i]
        self.begun[i] = part._replace(tokens=before.tokens + part.tokens, logp=before.logp + part.logp)
        self.asked[i] = replace(request, so_far=(*request.so_far, *part.tokens))
        self.contexts[i] += tuple(part.tokens)
        self.limits[i] -= len(part.tokens)

    def _begin_anew(self, i: int) -> None:
        """From the request as it was asked."""
        written = len(self.begun.pop(i).tokens)
        self.asked[i] = self.requests[i]
        self.contexts[i] = self.contexts[i][: len(self.contexts[i]) - written]
        self.limits[i] += written
        self.anew.add(i)

    def _failure(self, i: int) -> OutOfMemory:
        what = f"sampling one response by itself, {len(self.contexts[i]) + self.limits[i]} tokens with its prompt"
        return failure(what, f"try rollout.max_completion_length={max(1, self.settings.max_completion_length // 2)}{self.engine.way_out}")

    def _wave(self, backend: Backend, places: list[int]) -> None:
        index: dict[tuple[int, ...], int] = {}
        owner = [index.setdefault(self.contexts[i], len(index)) for i in places]
        requests, limits = [self.asked[i] for i in places], [self.limits[i] for i in places]
        cache: RowCache
        logits, cache = backend.prefill(list(index), owner, max(limits) - 1)
        self.prefilled += sum(len(context) for context in index)
        ends = end_table(end_tokens(self.engine.model, self.engine.tokenizer, self.settings.stop), logits.shape[1], logits.device)
        wave = self.wave = Wave(requests, self.keys[places], limits, ends, self.stops)
        wave.take(logits, self.sampler)
        device = kind_of(logits.device)
        del logits                                                   # for every row, through the whole wave
        look = max(LOOK[device], LOOK_FOR_STRINGS if self.stops else 1)

        def step() -> None:
            wave.take(backend.step(wave.last, cache), self.sampler)

        advance: Callable[[], None] = step
        if isinstance(cache, Cache) and cache.fixed:
            advance = Replayed(step, lambda: cache.form, lambda: [*cache.state, *wave.state])
        running = len(wave)
        while True:
            wave.count += 1
            if wave.count % look == 0 or wave.count == wave.room:
                running = self._settle(wave, places)
                if not running:
                    self.wave = None
                    return
                if cache.foldable and running <= (FOLD[device] if cache.moves else 1 - 1 / len(wave)) * len(wave):
                    cache.keep(wave.keep_running())
            cache.grow()
            advance()
            self.steps, self.useful, self.computed = self.steps + 1, self.useful + running, self.computed + len(wave)

    def _settle(self, wave: Wave, places: list[int]) -> int:
        """Take over what has ended. -> rows that have not."""
        ended = wave.settle()
        for finished in ended:
            i = places[finished.row]
            if i in self.begun:
                before = self.begun[i]
                finished = finished._replace(tokens=before.tokens + finished.tokens, logp=before.logp + finished.logp)
            self.written[i] = finished
            self.generated += len(finished.tokens)
        if ended and self.engine.progress is not None:
            self.engine.progress(len(self.written), len(self.requests))
        return wave.alive

    def rollouts(self) -> list[Rollout]:
        """In the requests' order."""
        nothing = Finished(0, [], [], False)
        found = [self.written.get(i, nothing) for i in range(len(self.requests))]
        tokens = [(*request.so_far, *new.tokens) for request, new in zip(self.requests, found, strict=True)]
        texts = self.engine.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []
        rollouts = []
        for request, row, text, new, left in zip(self.requests, tokens, texts, found, self.left, strict=True):
            if not math.isfinite(sum(new.logp)):
                raise UserError(f"logits are not finite (prompt {request.prompt.id}): the weights have diverged, lower optim.learning_rate")
            logp = (*[math.nan] * len(request.so_far), *new.logp)                # an earlier call knows those of so_far
            rollouts.append(Rollout(request, row, text, new.done, self.version, logp, more=not new.done and len(new.tokens) < left))
        return rollouts
