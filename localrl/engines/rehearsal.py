"""The worst case of sampling, without sampling: the fullest moments of a wave, one after the other.

A wave is fullest when its prompts have been read, and again near its end, when the last block of keys and values moves behind the others and
every row asks all that was written. What lies between differs in nothing but how much has been written, so it is left out: the cache is put
into the state that it would have by then. Nothing is read back from the device: on tensors that hold nothing the same code counts their bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from localrl.batch import Prompt, Request
from localrl.devices import kind_of
from localrl.engines.cache import BLOCK, Cache
from localrl.engines.graph import Replayed
from localrl.engines.sampling import Sampler, stream_keys
from localrl.engines.stops import StopStrings
from localrl.engines.torch import FOLD, TorchEngine
from localrl.engines.wave import Wave
from localrl.sections import RolloutSettings


def rehearse(
    engine: TorchEngine, prompt_length: int, response_length: int, rows: int, prompts: int, settings: RolloutSettings | None = None
) -> None:
    """Take the memory that `engine.generate` takes for a wave of `rows` responses of up to `response_length` tokens to `prompts` different
    contexts of up to `prompt_length` tokens, when all of them run to the limit; then as few leave as make the others move.

    `rows` and `prompts` at least 1, `prompts` at most `rows`. Changes nothing about the model or the engine. All contexts but the first are a
    token shorter, because a model that masks what is padded needs more than one that need not.
    """
    settings = settings or engine.settings
    lengths = [prompt_length, *[max(1, prompt_length - 1)] * (prompts - 1)]
    contexts = [(number % 2,) * length for number, length in enumerate(lengths)]
    owner = [row * prompts // rows for row in range(rows)]
    requests = [Request(Prompt(asked, contexts[asked], ""), row) for row, asked in enumerate(owner)]
    sampler = Sampler(settings)
    with engine.reading(prompt_length + response_length) as backend:
        room = response_length - 1
        logits, cache = backend.prefill(contexts, owner, room)
        ends = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        keys = stream_keys(engine.seed, 0, requests)
        wave = Wave(requests, keys, [response_length] * rows, ends, StopStrings(engine.tokenizer, ()))
        wave.take(logits, sampler)
        del logits

        def step() -> None:
            wave.take(backend.step(wave.last, cache), sampler)

        advance: Callable[[], None] = step
        if isinstance(cache, Cache) and cache.fixed and wave.last.is_cuda:              # a pretended device captures nothing
            advance = Replayed(step, lambda: cache.form, lambda: [*cache.state, *wave.state])
        if room < 1:
            return
        # One short of the last time that a block moves, or of the end where none ever does (or the cache grows by itself).
        filled = (room - 1) // BLOCK * BLOCK if isinstance(cache, Cache) and room > BLOCK and cache.block == BLOCK else room - 1
        cache.fill(filled)
        cache.grow()
        advance()
        staying = int(FOLD[kind_of(wave.last.device)] * rows)
        if staying and cache.foldable:
            wave.running[staying:] = False
            cache.keep(wave.keep_running())
