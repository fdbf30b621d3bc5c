"""llama.cpp's engine as a run's settings and its memory plan want it, and the choice between the two engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from localrl.batch import Request, Rollout
from localrl.config import Run
from localrl.engines.choice import Chosen, kept, quicker
from localrl.engines.llama.binding import library, missing
from localrl.engines.llama.engine import LlamaEngine
from localrl.engines.torch import TorchEngine
from localrl.memory.llama import gpu_layers, kind_for, llama_line
from localrl.memory.plan import MemoryPlan
from localrl.sections import Gguf
from localrl.settings import UserError


def kind_of_base(run: Run, plan: MemoryPlan) -> Gguf:
    """What llama.cpp's base is rounded to."""
    if run.rollout.gguf != "auto":
        return run.rollout.gguf
    if plan.card.device == "cpu":                                    # the plan counts the smallest already
        free = plan.card.usable - max(plan.phases.values()) + llama_line(plan.shape, plan.work, plan.concurrent, plan.choice.kv_cache == "int8")
    else:
        free = psutil.virtual_memory().available
    return kind_for(plan.shape, min(plan.concurrent, plan.work.rollouts), plan.work.longest, free)


def layers_on_gpu(plan: MemoryPlan, kind: Gguf) -> int:
    """Layers that the GPU takes while it samples: as many as the plan leaves room for, where this llama.cpp can use one."""
    if plan.card.device != "cuda" or not library().llama_supports_gpu_offload():
        return 0
    resting = plan.phases["rollout"] - sum(need.bytes for need in plan.items if need.phases == ("rollout",))
    return gpu_layers(plan.shape, kind, min(plan.concurrent, plan.work.rollouts), plan.work.longest, plan.card.usable - resting)


def llama_engine(run: Run, own: TorchEngine, kind: Gguf, layers: int, say: Callable[[str], None]) -> LlamaEngine:
    """Beside the engine that samples from the same live model."""
    return LlamaEngine(
        own.model, own.tokenizer, own.settings, run.seed, own.progress, kind=kind, threads=run.rollout.threads, kv_cache=own.kv_cache,
        gpu_layers=layers, say=say,
    )  # fmt: skip


def choose(
    run: Run, plan: MemoryPlan, own: TorchEngine, requests: Sequence[Request], correct: Callable[[list[Rollout]], object] | None, folder: Path | None,
    say: Callable[[str], None],
) -> tuple[Chosen, LlamaEngine | None]:  # fmt: skip
    """Who samples, and llama.cpp's engine if it does. `requests`: what the first step asks, of which one wave is tried; `correct`: the pass over its rollouts
    that only llama.cpp makes necessary; `folder`: the run's, where an earlier part of it may have chosen.

    UserError if llama.cpp is asked for by name and cannot.
    """
    known = kept(folder)
    wanted = known.engine if known else run.rollout.engine
    if wanted == "torch":
        return known or Chosen("torch", "q8_0", "as set"), None
    kind = known.gguf if known else kind_of_base(run, plan)
    if wanted == "auto" and (sentence := missing()):
        say(f"rollout.engine=auto: torch samples; {sentence}")
        return Chosen("torch", kind, sentence), None
    try:
        other = llama_engine(run, own, kind, layers_on_gpu(plan, kind), say)
    except UserError as error:
        if wanted != "auto":
            raise
        say(f"rollout.engine=auto: torch samples, because {error}")
        return Chosen("torch", kind, str(error)), None
    if wanted == "llama_cpp":
        return known or Chosen("llama_cpp", kind, "as set"), other
    other.follow(lambda folder: None, 0)
    chosen = quicker(own, other, requests[: own.settings.concurrent], kind, correct)
    say(f"rollout.engine=auto: {'llama.cpp' if chosen.engine == 'llama_cpp' else 'torch'} samples ({chosen.why})")
    if chosen.engine == "llama_cpp":
        other.begin(-1)
        return chosen, other
    other.close()
    return chosen, None
