"""Where a plan's bytes come from: the lines that simulations found, and the sizes that they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from localrl.memory.cards import Device
from localrl.memory.lines import Lines, Variables
from localrl.memory.shape import ModelShape
from localrl.memory.work import Choice, Work, micro_batch

BLOCK = 16
"""Tokens by which the cache of the responses grows (`localrl.engines.cache`)."""
NORM_TOKENS = 512
"""Tokens that a norm holds in float32 at a time (`localrl.policy.lean`)."""
PREFILL_TOKENS = 4096
"""Tokens of prompts that are read at once (`localrl.engines.decoder`)."""
SAMPLED_AT_ONCE = 2**22
"""Logits that the sampler works on at once (`localrl.engines.sampling`)."""

FOLD: Mapping[str, float] = {"cpu": 0.9, "cuda": 0.75}
"""A wave that has become this part of itself, or less, lets go of the rows that are done (`localrl.engines.torch`)."""

OWN_LOOP = ("llama", "mistral", "qwen2", "qwen3")
"""Families of `localrl.engines.decoder`; all others go through the model's own forward pass."""

Part = Literal["loaded", "tried", "kept", "gradients", "scoring", "first", "backward", "optimiser"]
"""Of training: base and adapters; the peak while the output layer is tried out; with the optimiser's state; with
gradients; and the peaks of three phases, those of scoring and of backward with gradients there, but for the first backward pass of a step."""


@dataclass(frozen=True)
class Mode:
    """How training is done, as far as it changes which tensors there are and not only their sizes."""

    gradient_checkpointing: bool
    tiled: bool
    offload: bool

    @classmethod
    def of(cls, choice: Choice) -> Mode:
        """The mode that some knobs stand for."""
        return cls(choice.gradient_checkpointing, choice.mlp_tile > 0, choice.offload and choice.gradient_checkpointing)

    def depths(self, shape: ModelShape) -> tuple[int, ...]:
        """Layers of the models that are simulated, two of them: the first layers must be like those between. A model of fewer is simulated as it is."""
        few = 4 if self.offload else 3 if 0 < shape.windowed_layers < shape.layers else 2
        return (few, few + 1) if shape.layers >= few else (shape.layers,)


class Fits(Protocol):
    """Lines of one model, asked of one kind of work. Making some may take seconds; they are kept."""

    def training(self, work: Work, mode: Mode) -> Mapping[Part, Lines]: ...
    def rollout(self, work: Work, kv_cache: Literal["full", "int8"]) -> Lines: ...


def training_variables(shape: ModelShape, work: Work, choice: Choice) -> Variables:
    """Of the largest micro-batch: longest rows, laid end to end."""
    tokens = micro_batch(work, choice)
    read = -(-tokens * work.max_completion_length // work.longest)
    return pass_variables(shape.layers, tokens, read, choice.head_chunk, choice.mlp_tile)


def pass_variables(layers: int, tokens: int, read: int, chunk: int, tile: int) -> Variables:
    """Of a micro-batch of `tokens`, of which the output layer reads so many."""
    tile = min(tile or tokens, tokens)
    return {"layers": layers, "tokens": tokens, "read": read, "chunk": min(chunk, read), "tile": tile, "normed": min(tokens, NORM_TOKENS)}


def rollout_variables(shape: ModelShape, work: Work, choice: Choice) -> Variables:
    """Of the largest wave, its prompts shared as little as the run ever shares them."""
    rows = min(choice.concurrent, work.rollouts)
    prompts, prompt, response = prompts_in_wave(work, rows), work.max_prompt_length, work.max_completion_length
    return wave_variables(shape.layers, shape.vocab, rows, prompts, prompt, response, shape.window, work.device, shape.windowed_layers)


def wave_variables(
    layers: int, vocab: int, rows: int, prompts: int, prompt: int, response: int, window: int | None, device: Device, windowed: int = 0
) -> Variables:
    """Of a wave of `rows` responses to `prompts` contexts. `windowed`: layers that see no more than the `window`."""
    longest = prompt + response
    return {
        "layers": layers, "full": layers - windowed, "windowed": windowed,
        "rows": rows, "prompts": prompts, "prompt": prompt, "response": response, "longest": longest,
        "joined": max(0, response - 2) // BLOCK * BLOCK,
        "staying": int(FOLD[device] * rows),
        "at once": min(prompts, max(1, PREFILL_TOKENS // prompt)) * prompt,
        "sampled": min(rows, max(1, SAMPLED_AT_ONCE // vocab)),
    }  # fmt: skip


def prompts_in_wave(work: Work, rows: int) -> int:
    """Different prompts in a wave of that many rows, where they are shared least: waves need not begin where a group does."""
    group = work.fewest_generations
    return max(-(-(start % group + min(rows, work.rollouts - start)) // group) for start in range(0, min(work.rollouts, group * rows), rows))


def shares_prompts(shape: ModelShape, work: Work) -> bool:
    """Whether the engine's own loop decodes this model: known family, rotations that do not change, no window that is ever passed."""
    return shape.family in OWN_LOOP and shape.static_rope and (shape.window is None or work.longest <= shape.window)
