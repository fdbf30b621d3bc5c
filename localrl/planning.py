"""The memory plan of a run, from its model's config alone: no weights, and no library that loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from localrl.config import Run, preset_model_config
from localrl.memory.cards import Card
from localrl.memory.fit import shares_prompts
from localrl.memory.plan import MemoryPlan, choose
from localrl.memory.reality import correction, key
from localrl.memory.shape import ModelShape
from localrl.memory.work import Work
from localrl.policy.place import model_path, pick_device, pick_dtype
from localrl.settings import UserError
from localrl.simulate.provider import Simulated

FULL_STATE = 0.02
"""Share of the card that AdamW's two moments may take before 8 bits do as well."""


def plan_for_card(run: Run, card: str | None = None, say: Callable[[str], None] = lambda text: None) -> MemoryPlan:
    """What a run would need on a card named here or in the settings, whatever this machine has; without a name, on this machine.

    `say` hears if something has to be simulated first, which takes some seconds.
    """
    card = card or run.memory.card
    if card is None or run.model.device == "cpu":
        return plan_run(run, say)
    dtype = torch.bfloat16 if run.model.compute_dtype == "auto" else getattr(torch, run.model.compute_dtype)
    return plan_on(run, model_config(run), Card.of(card, "cuda"), dtype, say)


def plan_run(run: Run, say: Callable[[str], None] = lambda text: None) -> MemoryPlan:
    """What every phase will need on the device that the run will train on, from the model's config alone."""
    device = pick_device(run.model)
    card = Card.of(run.memory.card, "cuda" if device.type == "cuda" else "cpu")
    return plan_on(run, model_config(run), card, pick_dtype(run.model, device), say)


def plan_on(run: Run, config: Any, card: Card, dtype: torch.dtype, say: Callable[[str], None] = lambda text: None) -> MemoryPlan:
    """The plan of a run with the model of a transformers config, activations in `dtype`, on that card."""
    shape = ModelShape.read(config.to_dict())
    algorithm, rollout, memory = run.algorithm, run.rollout, run.memory
    reads = algorithm.reads_before | algorithm.reads_during
    work = Work(
        quantization=run.model.quantization,
        compute_bytes=dtype.itemsize,
        lora_r=run.adapter.lora_r,
        lora_targets=run.adapter.lora_target_modules,
        critic="value" in reads,
        optimizer=pick_optimizer(run, shape, card, "value" in reads),
        prompts_per_step=rollout.prompts_per_step,
        num_generations=rollout.num_generations,
        max_prompt_length=run.data.max_prompt_length,
        max_completion_length=rollout.max_completion_length,
        reference="ref" in reads,
        device=card.device,
        unpacked=card.device == "cpu" if rollout.weights == "auto" else rollout.weights == "unpacked",
        fewest_generations=min(run.eval.num_generations if run.eval.limit and run.eval.temperature else 1, rollout.num_generations),
        truncated=bool(rollout.top_k) or rollout.top_p < 1,
        searchers=run.search.processes,
        llama=None if rollout.engine == "torch" else "q4_k_m" if rollout.gguf == "auto" else rollout.gguf,
        columns=max(1, len(algorithm.reads_before)),
        gradients=len(algorithm.directions(run.rewards.weights)),
    )  # fmt: skip
    asked = {
        "concurrent": rollout.concurrent,
        "micro_batch_tokens": memory.micro_batch_tokens,
        "gradient_checkpointing": memory.gradient_checkpointing,
        "head_chunk": memory.head_chunk,
        "mlp_tile": memory.mlp_tile,
        "offload": memory.offload,
        "kv_cache": memory.kv_cache or (None if may_differ(run, shape, work) else "full"),
        "embedding_on_host": memory.embedding_on_host,
        "directions": None if memory.directions == "auto" else memory.directions,
    }
    return choose(card, shape, work, asked, Simulated(config, run, dtype, card.device, say), correction(key(card, shape, work)))


def pick_optimizer(run: Run, shape: ModelShape, card: Card, critic: bool) -> str:
    """What optim.optimizer stands for: "auto" means full state where it costs next to nothing."""
    if run.optim.optimizer != "auto":
        return run.optim.optimizer
    count = sum(shape.adapter_parts(run.adapter.lora_r, run.adapter.lora_target_modules)) * (2 if critic else 1)
    return "adamw" if 8 * count <= FULL_STATE * card.usable else "adamw_8bit"


def may_differ(run: Run, shape: ModelShape, work: Work) -> bool:
    """Whether the sampler may be another than the policy, as it is with 8-bit keys and values: the engine can, and the algorithm corrects for it."""
    return shares_prompts(shape, work) and (run.algorithm.learns_from_old or run.algorithm.for_sampler(exact=False).corrects)


def model_config(run: Run) -> Any:
    """As transformers reads it; for the presets' own models without a network."""
    from transformers import AutoConfig

    path = preset_model_config(run.model.path) or model_path(run.model)
    try:
        return AutoConfig.from_pretrained(str(path), revision=run.model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no model config from model.path = '{run.model.path}': {str(error).splitlines()[0]}") from None
