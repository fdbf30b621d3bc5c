"""Who samples: torch or llama.cpp, as the settings say, or as some seconds of both say. The answer is kept, so that a resumed run is the same run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from localrl.batch import Request, Rollout
from localrl.engines.call import Waves
from localrl.engines.llama.binding import missing
from localrl.export.families import family_of
from localrl.export.weights import check_lora
from localrl.sections import AdapterSettings, Gguf, RolloutSettings
from localrl.settings import UserError

FILE = "engine.json"
"""In the run folder."""
SECONDS = 2.0
"""Both are tried with longer and longer responses, until the slower one took so long."""
TRIAL = -3
"""The trial's version: no step samples from its random streams."""
Name = Literal["torch", "llama_cpp"]


@dataclass(frozen=True)
class Chosen:
    """Who samples in this run."""

    engine: Name
    gguf: Gguf
    why: str


def check_engine(settings: RolloutSettings, adapter: AdapterSettings, config: Any) -> None:
    """Before a weight is loaded: UserError if llama.cpp is asked for and is not there, or has no graph for this model or adapter."""
    if settings.engine == "llama_cpp" and (reason := objection(adapter, config)):
        raise UserError(reason)


def objection(adapter: AdapterSettings, config: Any) -> str | None:
    """Why llama.cpp cannot sample for a model of this transformers config; None: it can."""
    if sentence := missing():
        return sentence
    try:
        check_lora({"target_modules": adapter.lora_target_modules}, family_of(config))
    except UserError as error:
        return f"rollout.engine = 'llama_cpp' cannot hold this model ({error}): take rollout.engine=torch"
    return None


def kept(folder: Path | None) -> Chosen | None:
    """What an earlier part of the run chose."""
    path = None if folder is None else folder / FILE
    return Chosen(**json.loads(path.read_text("utf-8"))) if path is not None and path.exists() else None


def as_text(chosen: Chosen) -> str:
    """For the run folder."""
    return json.dumps(asdict(chosen), indent=1)


def quicker(
    own: Waves, other: Waves, requests: Sequence[Request], gguf: Gguf, correct: Callable[[list[Rollout]], object] | None, limit: float = SECONDS
) -> Chosen:
    """Let both sample these requests and compare. `correct`: the pass over its samples that only `other` makes necessary."""
    length, longest = 4, own.settings.max_completion_length
    for engine in (own, other):                                      # whatever is done once is done now
        engine.generate(list(requests), TRIAL, settings=own.settings.model_copy(update={"max_completion_length": 1, "window": None}))
    while True:
        settings = own.settings.model_copy(update={"max_completion_length": min(length, longest), "window": None})
        speeds: dict[str, float] = {}
        slowest = 0.0
        for name, engine in (("torch", own), ("llama_cpp", other)):
            start = time.perf_counter()
            rollouts = engine.generate(list(requests), TRIAL, settings=settings)
            if correct is not None and engine is other:
                correct(rollouts)
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            speeds[name] = sum(len(r.tokens) for r in rollouts) / seconds
        if slowest >= limit or length >= longest:
            break
        length *= 2
    extra = " with the pass that corrects for it" if correct is not None else ""
    why = f"llama.cpp {speeds['llama_cpp']:.0f} tokens/s{extra}, torch {speeds['torch']:.0f}, {len(requests)} responses of up to {min(length, longest)} tokens"
    return Chosen("llama_cpp" if speeds["llama_cpp"] > speeds["torch"] else "torch", gguf, why)
