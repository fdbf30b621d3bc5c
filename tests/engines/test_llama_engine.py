"""Rollouts by llama.cpp: the policy's own but for rounding, whoever else is in the wave, whichever adapter was on before."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("llama_cpp")

from localrl.batch import Request
from localrl.engines.llama.base import base_file, folder
from localrl.engines.llama.binding import BATCH, Weights
from localrl.engines.llama.engine import LlamaEngine, write_adapter
from localrl.policy.load import ADAPTER
from localrl.settings import UserError
from tests.engines.models import engine as torch_engine
from tests.engines.models import fingerprint, load, prompts, requests, sampling
from tests.engines.test_torch_engine import logp_of, tokens_of

Make = Callable[..., Path]
ROUNDING = 2e-3
"""Nats: what half precision does to the log-probabilities of these models on average; a wrong weight, key or position does a hundred times that."""


GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
OTHERS: dict[str, dict[str, Any]] = {                                # windows that a response passes several times
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "phi3": {"pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "smollm3": {"pad_token_id": 0, "num_hidden_layers": 4},
}


def nobody(text: str) -> None:
    """Hears what is made."""


@pytest.fixture
def open_engine() -> Iterator[Callable[..., LlamaEngine]]:
    """open_engine(model, tokenizer, kind="q8_0", **sampling) -> an engine with the live adapter, closed at the end."""
    opened: list[LlamaEngine] = []

    def make(model: Any, tokenizer: Any, kind: Any = "q8_0", threads: int | None = 1, **changes: Any) -> LlamaEngine:
        opened.append(LlamaEngine(model, tokenizer, sampling(**changes), 7, kind=kind, threads=threads, say=nobody))
        opened[-1].follow(lambda folder: None, 0)
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def gaps(model: Any, rollouts: list[Any], temperature: float = 1.0) -> torch.Tensor:
    """Of every token: the sampler's log-probability less the training path's."""
    return torch.cat([torch.tensor(r.logp) - logp_of(model, r, temperature) for r in rollouts])


@pytest.mark.parametrize(("family", "quantization"), [
    ("llama", "nf4"), ("qwen2", "nf4"), ("qwen3", "int8"), ("mistral", "none"), *((family, "nf4") for family in OTHERS),
])  # fmt: skip
def test_log_probabilities_are_the_policys_but_for_rounding(make_model: Make, open_engine: Any, family: str, quantization: str) -> None:
    model, tokenizer = load(make_model(family, **OTHERS.get(family, {})), quantization)
    before = fingerprint(model)
    exact = open_engine(model, tokenizer, "f32", temperature=0.7).generate(requests(), 3)
    rounded = open_engine(model, tokenizer, "q8_0").generate(requests(), 3)
    assert fingerprint(model) == before                              # before the training path reads it, which unpacks INT8's scales
    assert gaps(model, exact, 0.7).abs().mean() < ROUNDING           # keys and values are in half precision
    assert ROUNDING < gaps(model, rounded).abs().mean() < 0.05
    assert all(r.version == 3 and r.text == tokenizer.decode(r.tokens, skip_special_tokens=True) for r in exact)


def test_nearly_all_samples_are_those_of_the_torch_engine(make_model: Make, open_engine: Any) -> None:
    """The same random numbers: only where one falls between two sums that are rounded differently is another token taken."""
    model, tokenizer = load(make_model("llama"))
    ours = tokens_of(open_engine(model, tokenizer, "f32").generate(requests(4, 8), 1))
    theirs = tokens_of(torch_engine(model, tokenizer).generate(requests(4, 8), 1))
    assert sum(ours[name] == theirs[name] for name in ours) > 0.8 * len(ours)


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "f16"), ("qwen3", "q8_0"), ("gemma3_text", "f16"), ("phi3", "f16")])
def test_a_rollout_does_not_depend_on_the_wave(make_model: Make, open_engine: Any, family: str, kind: str) -> None:
    """Many ends, so that rows leave all the time and others move into their places, also those that look back no further than a window."""
    model, tokenizer = load(make_model(family, **OTHERS.get(family, {})))
    model.generation_config.eos_token_id = list(range(0, 256, 20))
    sampler = open_engine(model, tokenizer, kind, max_completion_length=60)
    whole = sampler.generate(requests(4, 6), 1)
    assert len({len(r.tokens) for r in whole}) > 5
    assert sampler.stats.alive == 1                                  # no step for a row that is done
    assert [(r.tokens, r.logp) for r in sampler.generate(requests(4, 6), 1)] == [(r.tokens, r.logp) for r in whole]      # to the last bit
    for concurrent, threads in ((1, 1), (5, 1), (24, 2)):
        again = open_engine(model, tokenizer, kind, threads=threads, max_completion_length=60, concurrent=concurrent).generate(requests(4, 6), 1)
        same = [(a.logp, b.logp) for a, b in zip(whole, again, strict=True) if a.tokens == b.tokens]
        assert len(same) > 20                                        # but for rounding, which depends on how many rows a product has
        assert max(abs(a - b) for one, other in same for a, b in zip(one, other, strict=True)) < 1e-2


def test_stops_windows_and_greedy_are_the_torch_engines(make_model: Make, open_engine: Any) -> None:
    model, tokenizer = load(make_model("llama"), "none")
    sampler = open_engine(model, tokenizer, "f32")
    greedy = sampler.generate(requests(3, 1), 0, settings=sampling(temperature=0.0))
    assert tokens_of(greedy) == tokens_of(torch_engine(model, tokenizer).generate(requests(3, 1), 0, settings=sampling(temperature=0.0)))
    whole = sampler.generate(requests(3, 4), 0)
    first = sampler.generate(requests(3, 4), 0, settings=sampling(window=10))
    assert all(r.more for r in first if not r.done)
    rest = sampler.generate([Request(r.request.prompt, r.request.sample, r.tokens) for r in first if r.more], 0, settings=sampling(window=14))
    full = tokens_of(whole)
    assert all(r.tokens == full[r.request.prompt.id, r.request.sample] for r in rest)
    word = whole[0].text[3:5]
    cut = sampler.generate(requests(3, 4), 0, settings=sampling(stop=(word,)))
    assert cut[0].done and word in cut[0].text and len(cut[0].tokens) < len(whole[0].tokens)
    narrow = sampler.generate(requests(2, 4), 0, settings=sampling(top_k=1))
    assert tokens_of(narrow)[10, 0] == tokens_of(greedy)[10, 0]


def test_prompts_longer_than_a_pass_and_more_rows_than_sequences(make_model: Make, open_engine: Any) -> None:
    model, tokenizer = load(make_model("llama", max_position_embeddings=1024))
    long = [Request(prompts(1, BATCH + 70)[0], k) for k in range(2)]
    found = open_engine(model, tokenizer, "f32", max_completion_length=6).generate(long, 0)
    assert gaps(model, found).abs().mean() < ROUNDING
    many = open_engine(model, tokenizer, "f32", max_completion_length=2).generate(requests(2, 140), 0)
    assert len(many) == 280 and all(r.logp and all(map(math.isfinite, r.logp)) for r in many)


def test_past_what_llama_cpp_computes_it_says_so(make_model: Make, open_engine: Any) -> None:
    model, tokenizer = load(make_model("mistral", sliding_window=16))
    with pytest.raises(UserError, match=r"36 tokens.*up to 16.*engine=torch"):
        open_engine(model, tokenizer).generate(requests(1, 1), 0)


def test_past_the_original_length_of_longrope_it_says_so(make_model: Make, open_engine: Any) -> None:
    """The trainer takes the short factors as long as a sequence is short, llama.cpp as long as its room is."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8, "original_max_position_embeddings": 256}
    model, tokenizer = load(make_model("phi3", pad_token_id=0, max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=rope))
    sampler = open_engine(model, tokenizer, "f32", max_completion_length=12)
    long = [Request(prompts(1, 244)[0], 0)]
    assert gaps(model, sampler.generate(long, 0)).abs().mean() < ROUNDING
    with pytest.raises(UserError, match=r"257 tokens.*up to 256.*engine=torch"):
        sampler.generate([Request(prompts(1, 245)[0], 0)], 0)


def disturb(model: Any, seed: int) -> None:
    """Another adapter."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)


def test_a_thousand_swaps(make_model: Make, tmp_path: Path) -> None:
    """Each changes what is computed to exactly what that adapter gives, and memory stays as it is."""
    model, _ = load(make_model("llama"))
    weights = Weights(base_file(model, ADAPTER, "q8_0", nobody))
    context = weights.open(4, 64, 1)
    files, wanted = [], []
    ids, places, rows = (np.array(x, dtype=np.int32) for x in ([5, 6, 7, 8], [0] * 4, range(4)))
    for seed in range(3):
        disturb(model, seed)
        files.append(tmp_path / f"{seed}.gguf")
        write_adapter(model, files[-1], "f16")
        weights.swap(files[-1])
        wanted.append(context.decode(ids, places, rows).copy())
    assert all(np.abs(wanted[0] - other).max() > 0.01 for other in wanted[1:])
    process, size = psutil.Process(os.getpid()), 0
    for number in range(1000):
        weights.swap(files[number % 3])
        if number % 25 < 3:
            assert (context.decode(ids, places, rows) == wanted[number % 3]).all(), number
        if number == 200:
            size = process.memory_info().rss
    assert process.memory_info().rss - size < 8 * 2**20
    weights.close()


def test_the_engine_follows_the_policy_and_keeps_nothing_of_before(make_model: Make, open_engine: Any) -> None:
    model, tokenizer = load(make_model("llama"))
    sampler = open_engine(model, tokenizer, "f32")
    sampler.generate(requests(), 0)
    disturb(model, 5)
    sampler.follow(lambda folder: None, 1)
    assert gaps(model, sampler.generate(requests(), 1)).abs().mean() < ROUNDING


def test_the_base_is_made_once_and_again_if_it_is_damaged(make_model: Make) -> None:
    model, _ = load(make_model("llama"))
    said: list[str] = []
    path = base_file(model, ADAPTER, "q8_0", nobody)
    assert base_file(model, ADAPTER, "q8_0", said.append) == path and not said
    disturb(model, 9)                                                # the adapter is no part of it
    assert base_file(model, ADAPTER, "q8_0", said.append) == path
    assert base_file(load(make_model("llama"), "int8")[0], ADAPTER, "q8_0", nobody) != path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert base_file(model, ADAPTER, "q8_0", said.append) == path
    assert path.read_bytes() == whole and "is damaged" in said[0]
    assert not list(folder().glob(".*"))                             # nothing half-made is left


def test_q4_k_m_samples_nearby(make_model: Make, open_engine: Any) -> None:
    model, tokenizer = load(make_model("llama", hidden_size=256, intermediate_size=256, initializer_range=0.03))
    found = gaps(model, open_engine(model, tokenizer, "q4_k_m").generate(requests(), 0))
    assert 1e-3 < found.abs().mean() < 0.3


def test_a_model_that_has_no_graph_there_is_refused_in_a_sentence(make_model: Make) -> None:
    model, tokenizer = load(make_model("gemma3_text", head_dim=16), "none", adapter=False)
    with pytest.raises(UserError, match="query_pre_attn_scalar = 256"):
        LlamaEngine(model, tokenizer, sampling(), 0)
