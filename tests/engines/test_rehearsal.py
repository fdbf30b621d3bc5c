"""A rehearsal takes what the real thing takes: bytes in storages, at the fullest moment of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from localrl.batch import Prompt, Request
from localrl.devices import pretending
from localrl.engines.rehearsal import rehearse
from localrl.engines.torch import TorchEngine
from tests.engines.models import fingerprint, load, sampling
from tests.memory.tracker import StorageTracker

ROWS, PROMPTS, PROMPT, RESPONSE = 12, 3, 40, 53
GEMMA = {"family": "gemma3_text", "head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, dict[str, Any]] = {
    "llama, unpacked": {"quantization": "nf4"},
    "llama, live": {"quantization": "nf4", "weights": "live"},
    "llama, the model outweighs the cache": {"weights": "unpacked", "vocab_size": 4000, "hidden_size": 128},
    "qwen3, bf16": {"family": "qwen3", "dtype": "bfloat16", "weights": "live", "response": 100},
    "llama, 8 bits": {"kv_cache": "int8"},
    "llama, top-p": {"top_p": 0.9, "vocab_size": 2000},
    "llama, responses within a block": {"response": 10},
    "gemma3, its own forward pass": GEMMA,
    "gpt2, its own forward pass": {"family": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def make_engine(make_model: Callable[..., Path], case: dict[str, Any]) -> TorchEngine:
    """Nothing ends a response but its limit."""
    told = {"family": "llama", "quantization": "none", "dtype": "float32", "weights": "auto", "kv_cache": "full", "top_p": 1.0, **case}
    ours = ("family", "quantization", "dtype", "weights", "kv_cache", "top_p", "response")
    folder = make_model(told["family"], **{k: v for k, v in told.items() if k not in ours})
    model, tokenizer = load(folder, told["quantization"], told["dtype"], adapter=told["family"] != "gpt2")
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    settings = sampling(max_completion_length=told.get("response", RESPONSE), weights=told["weights"], top_p=told["top_p"])
    return TorchEngine(model, tokenizer, settings, seed=0, kv_cache=told["kv_cache"])


def asked(rows: int = ROWS, prompts: int = PROMPTS) -> list[Request]:
    """The first prompt of full length, the others a token shorter."""
    made = [Prompt(i, tuple((7 * i + 3 * t) % 250 for t in range(PROMPT if i == 0 else PROMPT - 1)), "") for i in range(prompts)]
    return [Request(made[row * prompts // rows], row) for row in range(rows)]


def peaks(engine: TorchEngine, requests: list[Request]) -> tuple[int, int]:
    """Of sampling and of rehearsing it."""
    contexts = {(*r.prompt.tokens, *r.so_far) for r in requests}
    with StorageTracker() as tracker:
        tracker.adopt([*engine.model.parameters(), *engine.model.buffers()])
        model = tracker.now
        real = tracker.peak_of(lambda: engine.generate(requests, 0)) - model
        rehearsed = tracker.peak_of(lambda: rehearse(engine, PROMPT, engine.settings.max_completion_length, len(requests), len(contexts))) - model
        assert tracker.now - model < 0.02 * real                     # nothing stays
    return real, rehearsed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_takes_what_sampling_takes(make_model: Callable[..., Path], case: dict[str, Any]) -> None:
    engine = make_engine(make_model, case)
    before = fingerprint(engine.model)
    real, rehearsed = peaks(engine, asked())
    assert rehearsed == pytest.approx(real, rel=0.01)
    assert fingerprint(engine.model) == before and engine.stats.generated_tokens == ROWS * engine.settings.max_completion_length


@pytest.mark.parametrize("name", ["llama, live", "llama, 8 bits", "gemma3, its own forward pass"])
def test_rows_that_leave(make_model: Callable[..., Path], name: str) -> None:
    """As few near the end, when the cache is full, as make the others move: the same peak. Here and there: at most that."""
    engine = make_engine(make_model, CASES[name])
    late = [Request(r.prompt, r.sample) if i % 6 else Request(Prompt(r.prompt.id + 50, r.prompt.tokens[:-2], ""), r.sample, r.prompt.tokens[-2:])
            for i, r in enumerate(asked())]  # fmt: skip
    real, rehearsed = peaks(engine, late)
    assert engine.stats.alive == 1 and rehearsed == pytest.approx(real, rel=0.02)
    engine.model.generation_config.eos_token_id = list(range(0, 250, 50))
    real, rehearsed = peaks(engine, asked())
    assert engine.stats.generated_tokens < ROWS * RESPONSE and real < 1.01 * rehearsed


@pytest.mark.parametrize(("rows", "prompts", "response"), [(1, 1, 1), (1, 1, 2), (5, 1, 17), (4, 4, 18)])
def test_waves_of_every_size(make_model: Callable[..., Path], rows: int, prompts: int, response: int) -> None:
    for name in ("llama, 8 bits", "gemma3, its own forward pass"):
        engine = make_engine(make_model, {**CASES[name], "response": response})
        real, rehearsed = peaks(engine, asked(rows, prompts))
        assert rehearsed == pytest.approx(real, rel=0.01), name


@pytest.mark.parametrize("case", [
    {"model_type": "llama"}, {"model_type": "llama", "weights": "live", "kv_cache": "int8"}, {"model_type": "qwen3", "weights": "live"}, GEMMA,
], ids=str)  # fmt: skip
def test_tensors_that_hold_nothing_take_the_same(case: dict[str, Any]) -> None:
    sizes = {
        "vocab_size": 600, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, **{k: v for k, v in case.items() if k in ("head_dim", "sliding_window", "layer_types")},
    }  # fmt: skip
    config = AutoConfig.for_model(case.get("family", case.get("model_type")), **sizes)

    def peak() -> int:
        model = AutoModelForCausalLM.from_config(config).train()
        engine = TorchEngine(model, None, sampling(weights=case.get("weights", "auto")), 0, kv_cache=case.get("kv_cache", "full"))
        with StorageTracker() as tracker:
            return tracker.peak_of(lambda: rehearse(engine, PROMPT, RESPONSE, ROWS, PROMPTS))

    torch.manual_seed(0)
    real = peak()
    with FakeTensorMode():
        assert peak() == pytest.approx(real, rel=0.002)


def test_a_card_that_is_not_there() -> None:
    """The steps that a card takes (fixed shapes, keys and values in bf16), told on a machine without one."""
    sizes = {"vocab_size": 600, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config, taken = AutoConfig.for_model("llama", **sizes), {}
    for kv_cache in ("full", "int8"):
        with FakeTensorMode(), pretending("cuda"), StorageTracker() as tracker:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
            engine = TorchEngine(model, None, sampling(), 0, kv_cache=kv_cache)
            tracker.adopt(model.parameters())
            taken[kv_cache] = tracker.peak_of(lambda engine=engine: rehearse(engine, PROMPT, 400, ROWS, PROMPTS)) - sum(p.nbytes for p in model.parameters())
    full = (PROMPTS * PROMPT + ROWS * 399) * 2 * 2 * 2 * 64 * 2                           # tokens, layers, k and v, heads, width, bytes
    assert full < taken["full"] < 1.6 * full and 0.5 * full < taken["int8"] < 0.8 * taken["full"]
