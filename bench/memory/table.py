"""The longest responses, and the largest groups, that published models learn from on small cards: predicted, from their configs alone.

    python -m bench.memory table            all models, minutes the first time
    python -m bench.memory table Qwen3-8B   one of them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from localrl.config import Run, build
from localrl.memory.cards import Card
from localrl.memory.fit import OWN_LOOP
from localrl.memory.knobs import largest
from localrl.memory.plan import MemoryPlan
from localrl.planning import plan_on
from localrl.simulate.solve import NotLinear

RESULT = Path(__file__).parent / "results" / "table.md"
CARDS = ("8GiB", "12GiB", "16GiB", "24GiB")
PROMPT, GROUP, LENGTH = 512, 8, 8192
LONGEST, MOST = 131_072, 1024
STEP = 512
"""Tokens by which lengths are tried."""
COARSE = sorted({factor * 2**power for power in range(8, 16) for factor in (2, 3)} | {LONGEST})
"""Those tried for a model that decodes by its own forward pass: each of its lengths is a simulation of its own."""
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32, 8, 128, 128_256), {}),
    "Qwen3-8B": ("qwen3", (4096, 12288, 36, 32, 8, 128, 151_936), {}),
    "Qwen3-4B": ("qwen3", (2560, 9728, 36, 32, 8, 128, 151_936), {"tie_word_embeddings": True}),
    "Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 28, 4, 128, 152_064), {}),
    "Qwen3-14B": ("qwen3", (5120, 17408, 40, 40, 8, 128, 151_936), {}),
    "Gemma-3-12B": ("gemma3_text", (3840, 15360, 48, 16, 8, 256, 262_208), {"sliding_window": 1024}),
    "SmolLM2-1.7B": ("llama", (2048, 8192, 24, 32, 32, 64, 49_152), {"tie_word_embeddings": True}),
}


def a_run(quantization: str, group: int, length: int) -> Run:
    """One prompt a step, so that the group is the step; its responses may come in waves."""
    return build({
        "model": {"path": "by numbers", "quantization": quantization}, "data": {"path": "unused.jsonl", "max_prompt_length": PROMPT},
        "rewards": {"functions": [{"function": "exact_answer"}]}, "algorithm": {"name": "grpo"}, "optim": {"optimizer": "adamw_8bit"},
        "rollout": {"prompts_per_step": 1, "num_generations": group, "max_completion_length": length}, "eval": {"num_generations": 1},
    })  # fmt: skip


def knobs(plan: MemoryPlan) -> str:
    """What makes it so, in a few words."""
    choice, rollouts = plan.choice, plan.work.rollouts
    words = [f"wave {choice.concurrent}" if choice.concurrent < rollouts else "one wave", f"{-(-plan.micro_batch_tokens // plan.work.longest)} rows a pass"]
    words += [f"tile {choice.mlp_tile}"] if choice.mlp_tile else []
    words += ["inputs on the host"] if choice.offload else []
    words += ["8-bit KV"] if choice.kv_cache == "int8" else []
    words += ["embedding on the host"] if choice.embedding_on_host else []
    return ", ".join(words if choice.gradient_checkpointing else [*words, "every activation kept"])


def cell(plan_at: Callable[[int], MemoryPlan], sizes: Sequence[int]) -> str:
    """The largest of these that fits, and how."""
    if not plan_at(sizes[0]).fits:
        return "-"
    found = sizes[largest(0, len(sizes) - 1, lambda index: plan_at(sizes[index]).fits)]
    return f"**{found:,}**{' or more' if found == sizes[-1] else ''} ({knobs(plan_at(found))})"


def rows(name: str, quantization: str) -> tuple[str, str]:
    """Of both tables."""
    family, numbers, more = MODELS[name]
    config = AutoConfig.for_model(family, **dict(zip(NAMES, numbers, strict=True)), **more)

    def at(card: str, group: int, length: int) -> MemoryPlan:
        return plan_on(a_run(quantization, group, length), config, Card.of(card, "cuda"), torch.bfloat16)

    fine = range(STEP, LONGEST + 1, STEP)
    lengths = [cell(lambda length, card=card: at(card, GROUP, length), fine if family in OWN_LOOP else COARSE) for card in CARDS]  # type: ignore[misc]
    groups = [cell(lambda group, card=card: at(card, group, LENGTH), range(2, MOST + 1, 2)) for card in CARDS]  # type: ignore[misc]
    start = f"| {name} | {quantization} | "
    return start + " | ".join(lengths) + " |", start + " | ".join(groups) + " |"


def main(arguments: Sequence[str] = ()) -> None:
    """Writes results/table.md; with names, only prints."""
    lengths, groups = [], []
    for name in arguments or MODELS:
        for quantization in ("nf4", "int8"):
            try:
                one, other = rows(name, quantization)
            except NotLinear as error:
                one = other = f"| {name} | {quantization} | not predicted: {error} | | | |"
            print(one, other, sep="\n", flush=True)
            lengths.append(one)
            groups.append(other)
    head = "| model | base | " + " | ".join(CARDS) + " |\n|" + "---|" * (2 + len(CARDS))
    text = "\n".join([
        "# What fits", "", f"Predicted (not measured), LoRA of rank 16, 8-bit Adam, prompts of {PROMPT} tokens, no other program on the card.", "",
        f"## Longest responses with groups of {GROUP}, tokens", "", head, *lengths, "",
        f"## Largest groups with responses of {LENGTH:,} tokens", "", head, *groups, "",
    ])  # fmt: skip
    if not arguments:
        RESULT.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
