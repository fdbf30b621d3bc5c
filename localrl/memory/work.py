"""What the memory plan speaks of: a line of the bill, the work asked for, and the knobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from localrl.memory.cards import Device
from localrl.memory.shape import ModelShape, Quantization
from localrl.sections import Gguf

Phase = Literal["load", "rollout", "scoring", "backward", "optimiser", "export"]
PHASES: tuple[Phase, ...] = ("load", "rollout", "scoring", "backward", "optimiser", "export")


DirectionKind = Literal["float32", "bfloat16", "int8", "two_pass", "lagged"]
"""Gradients of several directions: whole, in blocks of 8 bits with a scale each, or only as sketches."""
SKETCH = 16_384
"""Numbers of a gradient's sketch."""


@dataclass(frozen=True)
class Need:
    """One line of the bill."""

    name: str
    bytes: int
    phases: tuple[Phase, ...]
    """When it is there; a phase's peak is the sum of its lines."""


@dataclass(frozen=True)
class Work:
    """What is asked of the model: everything that decides the bill but the knobs."""

    quantization: Quantization
    compute_bytes: int
    """Of activations and of what is not quantised: 2 (bf16, fp16) or 4 (fp32)."""
    lora_r: int
    lora_targets: str | tuple[str, ...]
    critic: bool
    """A second adapter and a value head; policy and critic are read and differentiated one after the other."""
    optimizer: str
    prompts_per_step: int
    num_generations: int
    max_prompt_length: int
    max_completion_length: int
    reference: bool
    """Log-probabilities with the adapters off: a pass more, a column more, no weights."""
    device: Device
    unpacked: bool
    """Rollouts use a scratch copy of the linear layers in the compute type."""
    fewest_generations: int
    """Of one prompt, in the call of the engine that shares prompts least: an evaluation takes fewer than a step does."""
    truncated: bool
    """Sampling sorts (top-p, top-k)."""
    searchers: int = 0
    """Processes that sample beside this one, each with a copy of the model, on the same card or in the same machine's memory."""
    columns: int = 1
    """Numbers that are read of each token before learning: log-probabilities, values, ..."""
    gradients: int = 0
    """Gradients of the adapter that are kept apart until the step is over; 0: the ordinary step."""

    llama: Gguf | None = None
    """What llama.cpp's base is rounded to, at the least, where it samples or may come to."""

    @property
    def rollouts(self) -> int:
        """Of one step."""
        return self.prompts_per_step * self.num_generations

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and response."""
        return self.max_prompt_length + self.max_completion_length

    @property
    def mixed(self) -> bool:
        """Half precision is multiplied into fp32 without a copy: on a GPU."""
        return self.device == "cuda" and self.compute_bytes == 2

    @property
    def cache_bytes(self) -> int:
        """Of one number in the KV cache of the engine's own decoder: fp32 on a CPU."""
        return 4 if self.device == "cpu" else self.compute_bytes


@dataclass(frozen=True)
class Choice:
    """The knobs."""

    concurrent: int
    """Sequences decoded at once."""
    micro_batch_tokens: int
    """Tokens of one forward and backward pass; a row that is longer goes alone."""
    gradient_checkpointing: bool
    head_chunk: int
    """Tokens whose logits exist at a time."""
    directions: DirectionKind = "lagged"
    """How the gradients of several directions are kept."""
    mlp_tile: int = 0
    """Tokens of one layer's MLP that are computed at a time; 0: all at once."""
    offload: bool = False
    """The layers' inputs wait for the backward pass in the host's memory."""
    kv_cache: Literal["full", "int8"] = "full"
    embedding_on_host: bool = False


def passes(work: Work, choice: Choice) -> int:
    """Micro-batches of a step whose rows are all as long as they may be: whole rows, as few as the knob allows."""
    return -(-work.rollouts // max(1, min(choice.micro_batch_tokens // work.longest, work.rollouts)))


def micro_batch(work: Work, choice: Choice) -> int:
    """Tokens of the largest of them: they are of about one size. No micro-batch is ever larger, also where rows are shorter."""
    return -(-work.rollouts // passes(work, choice)) * work.longest


def adapter_count(shape: ModelShape, work: Work) -> int:
    """Numbers that learn: the LoRA matrices of every adapter, and the value head."""
    one = sum(shape.adapter_parts(work.lora_r, work.lora_targets))
    return 2 * one + shape.hidden + 1 if work.critic else one
