"""Random configurations: a model of a family, how it is quantised and adapted, an algorithm, sizes of the work, and knobs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from localrl.batch import Prompt, Request
from localrl.config import Run, build
from localrl.memory.cards import Card
from localrl.memory.plan import MemoryPlan
from localrl.planning import plan_on
from localrl.policy.place import DEMO_MODEL

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "gemma2", "phi3")
TARGETS: tuple[str | tuple[str, ...], ...] = (
    "all-linear", "all-linear", ("o_proj", "down_proj"), ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"),
)  # fmt: skip
ALGORITHMS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("grpo", {}, 1), ("grpo", {"beta": 0.04}, 2), ("gtpo", {}, 1), ("gdpo", {}, 3), ("gdpo", {"weighting": "directed"}, 2),
    ("gdpo", {"weighting": "directed", "beta": 0.04}, 3), ("group_dpo", {}, 1), ("tba", {}, 1), ("tbrm", {}, 2), ("ppo", {}, 1), ("ppo", {"kl_coef": 0.05}, 1),
    ("tppo", {"ignore_tail": 2}, 1),
)  # fmt: skip
"""Name, settings, rewards."""
SEVERAL = 4
"""Sizes of work that are tried on each setting: lines of one setting are simulated once."""
UNBOUNDED = 2**40


@dataclass(frozen=True)
class Case:
    """One configuration. `what` it is decides which tensors there are, the rest how large they are."""

    family: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    window: int | None
    quantization: Literal["nf4", "int8", "none"]
    dtype: Literal["float32", "bfloat16"]
    rank: int
    targets: str | tuple[str, ...]
    algorithm: str
    settings: tuple[tuple[str, Any], ...]
    rewards: int
    optimizer: Literal["adamw", "adamw_8bit"]
    checkpointing: bool
    offload: bool
    weights: Literal["live", "unpacked"]
    int8_cache: bool
    truncated: bool
    directions: str
    # -- sizes
    layers: int = 2
    prompts: int = 2
    group: int = 4
    prompt: int = 64
    response: int = 64
    micro_batch: int = 256
    chunk: int = 64
    tile: int = 0
    concurrent: int = 8
    ragged: bool = False
    """Rows of different lengths, prompts too."""

    @property
    def what(self) -> str:
        """In a few words."""
        told = [self.family, self.quantization, self.dtype, f"r{self.rank}", self.algorithm, *(f"{k}={v}" for k, v in self.settings), self.optimizer]
        told += [word for word, is_so in (
            ("checkpointing", self.checkpointing), ("offload", self.offload), (self.weights, True), ("int8 cache", self.int8_cache),
            ("top-p", self.truncated), (f"tile {self.tile}", self.tile), ("ragged", self.ragged), (self.directions, self.directions != "auto"),
        ) if is_so]  # fmt: skip
        sizes = f"L{self.layers} H{self.hidden} F{self.ffn} {self.heads}/{self.kv_heads}x{self.head_dim} V{self.vocab}"
        return f"{' '.join(told)}; {sizes}; {self.prompts}x{self.group} rows of {self.prompt}+{self.response}"

    def config(self) -> Any:
        """transformers' own of that model."""
        sizes: dict[str, Any] = {
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "max_position_embeddings": 4096, "tie_word_embeddings": self.tied,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        if self.family == "smollm3":
            sizes["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(self.layers)]
        if self.family.startswith("gemma"):
            sizes["query_pre_attn_scalar"] = self.head_dim
        if self.family not in ("qwen2", "phi3"):
            sizes["head_dim"] = self.head_dim
        if self.window is not None:
            sizes["sliding_window"] = self.window
        return AutoConfig.for_model(self.family, **sizes)

    def run(self, folder: Path) -> Run:
        """Settings for the model in that folder, with every knob told."""
        return build({
            "model": {"path": str(folder), "quantization": self.quantization, "device": "cpu", "compute_dtype": self.dtype},
            "adapter": {"lora_r": self.rank, "lora_target_modules": self.targets if isinstance(self.targets, str) else list(self.targets)},
            "data": {"path": "unused.jsonl", "max_prompt_length": self.prompt},
            "rewards": {"functions": [{"function": "exact_answer", "name": f"reward{i}"} for i in range(self.rewards)]},
            "algorithm": {"name": self.algorithm, **dict(self.settings)},
            "rollout": {
                "prompts_per_step": self.prompts, "num_generations": self.group, "max_completion_length": self.response, "concurrent": self.concurrent,
                "weights": self.weights, **({"top_p": 0.9} if self.truncated else {}), **({"window": self.response} if self.algorithm == "tppo" else {}),
            },
            "optim": {"optimizer": self.optimizer},
            "eval": {"num_generations": self.group},
            "memory": {
                "micro_batch_tokens": self.micro_batch, "gradient_checkpointing": self.checkpointing, "head_chunk": self.chunk, "mlp_tile": self.tile,
                "offload": self.offload, "kv_cache": "int8" if self.int8_cache else "full", "embedding_on_host": False, "directions": self.directions,
            },
        })  # fmt: skip

    def plan(self, run: Run, budget: int = UNBOUNDED) -> MemoryPlan:
        """Of that run, with as many bytes."""
        return plan_on(run, self.config(), Card.budget(budget), getattr(torch, self.dtype))

    def requests(self) -> list[Request]:
        """Prompts as long as they may be; ragged: the first one alone."""
        draw = random.Random(0)
        lengths = [max(1, self.prompt - (draw.randint(1, self.prompt // 2) if self.ragged and i else 0)) for i in range(self.prompts)]
        prompts = [Prompt(i, tuple(draw.randrange(256) for _ in range(length)), "") for i, length in enumerate(lengths)]
        return [Request(prompt, sample) for prompt in prompts for sample in range(self.group)]


def draw(count: int, seed: int) -> list[Case]:
    """As many cases, always the same ones for a seed; `SEVERAL` in a row share a setting."""
    source, cases = random.Random(seed), list[Case]()
    while len(cases) < count:
        setting = _setting(source, len(cases) // SEVERAL)
        cases += [_sized(source, setting) for _ in range(SEVERAL)]
    return cases[:count]


def _setting(source: random.Random, number: int) -> Case:
    """Families and algorithms in turn, everything else by chance."""
    family, (algorithm, settings, rewards) = FAMILIES[number % len(FAMILIES)], ALGORITHMS[(number + number // len(FAMILIES)) % len(ALGORITHMS)]
    kv_heads, head_dim = source.choice((1, 2, 4)), source.choice((16, 32, 64))
    heads = kv_heads * source.choice((1, 2, 4))
    hidden = heads * head_dim if family in ("qwen2", "phi3") else 32 * source.randint(2, 16)
    quantization: Any = source.choice(("nf4", "nf4", "int8", "none"))
    own_loop = family in ("llama", "mistral", "qwen2", "qwen3")
    checkpointing = source.random() < 0.7
    directed = ("weighting", "directed") in settings.items()
    return Case(
        family, hidden, 32 * source.randint(4, 40), heads, kv_heads, head_dim, source.randint(500, 20_000), family.startswith("gemma") or source.random() < 0.4,
        source.choice((64, 512)) if family.startswith("gemma") else None, quantization, source.choice(("float32", "bfloat16")),
        2 ** source.randint(0, 6), "all-linear" if family == "phi3" else source.choice(TARGETS), algorithm, tuple(settings.items()), rewards,
        source.choice(("adamw", "adamw_8bit")), checkpointing, checkpointing and source.random() < 0.25, source.choice(("live", "unpacked")),
        own_loop and algorithm in ("grpo", "tba", "tbrm") and source.random() < 0.4, source.random() < 0.25,
        source.choice(("float32", "bfloat16", "int8", "lagged", "two_pass")) if directed else "auto",
        tile=source.choice((0, 0, 64)) if checkpointing else 0,
    )  # fmt: skip


def _sized(source: random.Random, setting: Case) -> Case:
    prompts, group = source.randint(1, 3), source.choice((2, 3, 4, 6))
    prompt, response = source.choice((8, 24, 60, 150, 400)), source.choice((5, 20, 40, 70, 120))
    rows = prompts * group
    return replace(
        setting, layers=source.randint(1, 6), prompts=prompts, group=group, prompt=prompt + source.randint(0, 9), response=response + source.randint(0, 9),
        micro_batch=source.choice((1, 256, 600, 10**6)), chunk=source.choice((16, 64, 256)), tile=setting.tile and source.choice((64, 128)),
        concurrent=source.choice((rows, rows, max(1, rows // 2), 3)),
    )  # fmt: skip


@contextmanager
def model_of(case: Case, folder: Path) -> Iterator[Path]:
    """A folder with that model, random weights in half precision, as published ones are, and a tokenizer; gone afterwards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    del model
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
