"""What the trained model says: the logits that an exported file has to match.

Where the live model computes in fp32, it is asked as it stands. Where it trains in bf16, or multiplies in int8, its own rounding (about
1e-2 in a log-probability) would hide what is looked for, such as a wrong norm epsilon. Then the same transformers code runs on the same
weights in fp32, layer by layer de-quantised, and the distance between the two is reported too.

The model is never put into eval mode: bitsandbytes would repack 4-bit weights in place on some CPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localrl.export.families import same_length
from localrl.export.original import Original, is_quantised
from localrl.export.weights import Reader, base_reader, causal_lm, lora_of, row_blocks, shape_of, stored

FLOATS = 2**25
"""Logits kept for the comparison in all: positions x vocabulary (128 MiB in fp32)."""
SAMPLES = 16
"""Most samples whose logits are compared."""
WORK = 2**44
"""Most tokens x parameters of them, but at least two samples: 2,000 tokens of an 8B model, which a file on two cores reads in minutes."""
LONGEST = 512
"""Most tokens of a sample that are looked at."""
GREEDY = 16
"""Tokens of greedy text."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what the policy answered, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """One sequence and the logits (keep, V) float32 that predict what follows each of its last `keep` tokens."""

    tokens: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Parting:
    """Where a greedy text leaves the model's own first choices, and by how many nats the model preferred its own."""

    prompt: int
    """Which of the prompts."""
    at: int
    """Which token of the text."""
    wanted: int
    got: int
    lead: float


def computes_in_fp32(model: nn.Module) -> bool:
    """Whether the live model's own forward pass is fp32 throughout, so that it can be compared strictly."""
    for module in causal_lm(model).modules():
        weight: Any = getattr(module, "weight", None)
        if weight is None:
            continue
        if weight.is_floating_point() and weight.dtype != torch.float32:
            return False
        if weight.dtype == torch.int8 and weight.device.type != "cpu":  # LLM.int8 rounds the activations there
            return False
        if getattr(weight, "quant_state", None) is not None and getattr(module, "compute_dtype", None) not in (None, torch.float32):
            return False
    return True


def is_on(model: nn.Module, adapter: str) -> bool:
    """Whether this adapter, and no other, is what PEFT adds at the moment."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    return all(list(layer.active_adapters) == [adapter] and not layer.disable_adapters for layer in layers)


@contextmanager
def exact(model: nn.Module, adapter: str | None, original: Original | None = None) -> Iterator[None]:
    """Within it the model's forward pass is fp32, with W + scaling * B A for `adapter` (None: W alone), whatever PEFT has active.

    `original`: where W comes from, for layers that are quantised in the live model.
    Only the `forward` attributes of linear layers and embeddings change, and they are put back.
    """
    lm = causal_lm(model)
    named = {name: m for name, m in lm.named_modules() if isinstance(stored(m), nn.Linear | nn.Embedding) and not inside_lora(name)}
    leaves = list(named.values())
    before = {id(m): vars(m).get("forward") for m in leaves}
    for name, module in named.items():
        open_base = partial(original, name) if original is not None and is_quantised(module) else partial(base_reader, module)
        module.forward = embed(module, open_base) if isinstance(stored(module), nn.Embedding) else linear(module, adapter, open_base)
    try:
        yield
    finally:
        for module in leaves:
            if before[id(module)] is None:
                del module.forward
            else:
                module.forward = before[id(module)]


@contextmanager
def reference(model: nn.Module, adapter: str | None, original: Original | None = None) -> Iterator[None]:
    """Within it the model is the one to compare with: as it stands where that is fp32 and this adapter is on, else `exact`."""
    if original is None and adapter is not None and is_on(model, adapter) and computes_in_fp32(model):
        yield
    else:
        with exact(model, adapter, original):
            yield


def inside_lora(name: str) -> bool:
    """Whether this module belongs to a PEFT layer, which is replaced whole."""
    return any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))


def embed(module: Any, open_base: Callable[[], Reader]) -> Any:
    """Forward of an embedding in fp32; Gemma's multiplies by the root of its width."""
    scale = float(getattr(stored(module), "scalar_embed_scale", 1.0))

    def forward(ids: Tensor) -> Tensor:
        return open_base()(ids.reshape(-1)).to(ids.device).reshape(*ids.shape, -1) * scale

    return forward


def linear(module: nn.Module, adapter: str | None, open_base: Callable[[], Reader]) -> Any:
    """Forward of a linear layer in fp32, unmerged: x W' + scaling * (x A') B' + bias. The reader lives for one call, as a 4-bit weight's must."""
    bias, lora = getattr(stored(module), "bias", None), lora_of(module, adapter)

    def forward(x: Tensor) -> Tensor:
        read = open_base()
        y = torch.cat([x.float() @ read(rows).to(x.device).T for rows in row_blocks(shape_of(module))], -1)
        if lora is not None:
            a, b, scaling = lora
            y = y + scaling * (x.float() @ a.float().T @ b.float().T)
        return y if bias is None else y + bias.detach().float()

    return forward


@torch.no_grad()
def last_logits(model: nn.Module, tokens: Sequence[int], keep: int) -> Tensor:
    """(keep, V) float32 on the CPU, from the model as it stands (train mode, dropout 0)."""
    ids = torch.tensor([list(tokens)], device=causal_lm(model).model.embed_tokens.weight.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # gradient checkpointing without gradient
        out = model(input_ids=ids, use_cache=False, logits_to_keep=keep)
    return out.logits[0, -keep:].float().cpu()


def ask(model: nn.Module, samples: Sequence[Sample], vocabulary: int) -> list[Asked]:
    """The model's logits on the last positions of the first SAMPLES (as many as WORK allows), as many as FLOATS allows; cut after LONGEST tokens."""
    samples = samples[: few_enough(model, samples)]
    share = max(1, FLOATS // (vocabulary * len(samples)))
    cut = [(*sample.prompt, *sample.response)[: room(model)] for sample in samples]
    return [Asked(tokens, last_logits(model, tokens, min(share, len(tokens)))) for tokens in cut if tokens]


def few_enough(model: nn.Module, samples: Sequence[Sample]) -> int:
    """How many of the samples are asked about."""
    parameters, tokens = sum(p.numel() for p in causal_lm(model).parameters()), 0
    for count, sample in enumerate(samples[:SAMPLES]):
        tokens += min(room(model), len(sample.prompt) + len(sample.response))
        if count >= 2 and tokens * parameters > WORK:
            return count
    return min(len(samples), SAMPLES)


def room(model: nn.Module) -> int:
    """Tokens of a sample that are looked at: LONGEST, or what the two agree on."""
    return min(LONGEST, same_length(causal_lm(model).config))


def partings(model: nn.Module, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> list[Parting]:
    """Where texts that llama.cpp wrote greedily part from the model's first choices: one forward pass each, up to the first parting."""
    found: list[Parting] = []
    for number, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
        if not tokens:
            continue
        logp = torch.log_softmax(last_logits(model, [*prompt, *tokens[:-1]], len(tokens)), -1)
        for at, (row, got) in enumerate(zip(logp, tokens, strict=True)):
            wanted = int(row.argmax())
            if wanted != got:
                found.append(Parting(number, at, wanted, got, float(row[wanted] - row[got])))
                break
    return found


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two sets of logits, nats per position. (n, V), (n, V) -> (n,) float64.

    >>> divergence(torch.zeros(1, 3), torch.ones(1, 3)).item()
    0.0
    """
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)
