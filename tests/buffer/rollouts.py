"""Prompts, settings and a tiny sampler: its responses and log-probabilities follow from (prompt, sample, step, position) alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from localrl.batch import Prompt, Request, Rollout
from localrl.buffer import Buffer, PromptStream
from localrl.sections import RolloutSettings


def stream(count: int, seed: int = 0, shuffle: bool = True) -> PromptStream:
    return PromptStream([Prompt(i, (i,), "") for i in range(count)], seed, shuffle)


def settings(prompts: int, group: int, **more: Any) -> RolloutSettings:
    return RolloutSettings(prompts_per_step=prompts, num_generations=group, **more)


def rollout(prompt: int | Prompt, tokens: Sequence[int], rewards: Sequence[float] = (0.0,), version: int = 0, sample: int = 0) -> Rollout:
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt, (prompt,), "")
    return Rollout(Request(prompt, sample), tuple(tokens), "", True, version, rewards=tuple(rewards))


def sample(request: Request, step: int, rollout: RolloutSettings, rewards: Callable[[Request, int], Sequence[float]] = lambda *_: (0.0,)) -> Rollout:
    """A response whose length nobody knows beforehand, cut at the window and the limit."""
    tokens, logp, done = list(request.so_far), [math.nan] * len(request.so_far), False
    room = rollout.max_completion_length - len(tokens)
    window = min(room, rollout.window or room)
    while not done and len(logp) < len(request.so_far) + window:
        chance = random.Random(f"{request.prompt.id}-{request.sample}-{step}-{len(tokens)}")
        done = chance.random() < 0.2
        tokens.append(0 if done else chance.randint(1, 9))
        logp.append(-chance.random())
    more = not done and len(tokens) < rollout.max_completion_length
    return Rollout(request, tuple(tokens), "", done, step, tuple(logp), tuple(rewards(request, step)), more=more)


def one_step(buffer: Buffer, step: int, rollout: RolloutSettings, rewards: Callable[[Request, int], Sequence[float]] = lambda *_: (0.0,)) -> list[Rollout]:
    """What the loop does."""
    while True:
        buffer.add([sample(request, step, rollout, rewards) for request in buffer.requests(step)])
        if buffer.ready:
            return buffer.draw(step)


def goes_on_alike(make: Callable[[], Buffer], rollout: RolloutSettings, rewards: Callable[[Request, int], Sequence[float]], steps: int = 9) -> None:
    """A run that was resumed from its state, and one that undid a step that was cut, draw what an undisturbed run draws."""
    whole = make()
    expected = [one_step(whole, step, rollout, rewards) for step in range(steps)]
    for cut in range(steps):
        buffer = make()
        for step in range(cut):
            one_step(buffer, step, rollout, rewards)
        before = buffer.snapshot()
        one_step(buffer, cut, rollout, rewards)
        buffer.rollback(before)
        buffer.add([sample(request, cut, rollout, rewards) for request in buffer.requests(cut)])
        buffer.rollback(before)
        state = json.loads(json.dumps(buffer.state()))
        resumed = make()
        resumed.restore(state)
        for other in (buffer, resumed):
            assert repr([one_step(other, step, rollout, rewards) for step in range(cut, steps)]) == repr(expected[cut:])       # NaN != NaN
