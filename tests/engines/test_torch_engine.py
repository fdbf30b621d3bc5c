"""Rollouts from the weights that learn: whole, reproducible, and without a trace in the model."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localrl.batch import Prompt, Request, Rollout, collate
from localrl.engines import Engine
from localrl.engines import torch as room
from localrl.engines.call import LOOK_FOR_STRINGS
from localrl.engines.decoder import Decoder
from localrl.settings import UserError
from tests.engines.models import by_name, engine, fingerprint, load, prompts, requests, sampling

OTHERS: dict[str, dict[str, Any]] = {                                # families that go through their own forward pass
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def logp_of(model: Any, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """By a plain forward pass over the whole sequence, the training path. -> (T,)."""
    start = len(rollout.request.prompt.tokens)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*rollout.request.prompt.tokens, *rollout.tokens]]), use_cache=False).logits[0, start - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1).gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]


def tokens_of(rollouts: list[Rollout]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {name: rollout.tokens for name, rollout in by_name(rollouts).items()}


# -- what is sampled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "weights"), [("nf4", "auto"), ("nf4", "live"), ("int8", "auto"), ("none", "auto")])
def test_log_probabilities_are_those_of_the_training_path(make_model: Callable[..., Path], quantization: str, weights: str) -> None:
    model, tokenizer = load(make_model("llama", head_dim=24), quantization)
    sampler: Engine = engine(model, tokenizer, temperature=0.7, weights=weights)
    for rollout in sampler.generate(requests(), version=3):
        assert rollout.logp is not None
        assert len(rollout.logp) == len(rollout.tokens) > 0
        torch.testing.assert_close(torch.tensor(rollout.logp), logp_of(model, rollout, 0.7), atol=2e-5, rtol=0)
        assert rollout.version == 3
        assert rollout.text == tokenizer.decode(rollout.tokens, skip_special_tokens=True)


def test_a_rollout_does_not_depend_on_the_batch(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("qwen3", head_dim=24))
    asked = requests(count=4, samples=5)
    whole = tokens_of(engine(model, tokenizer).generate(asked, 1))
    assert len(set(whole.values())) > 15                             # not all the same
    shuffled = random.Random(0).sample(asked, len(asked))
    back = engine(model, tokenizer).generate(shuffled, 1)
    assert [r.request for r in back] == shuffled
    assert tokens_of(back) == whole
    for concurrent in (1, 3, 7):
        assert tokens_of(engine(model, tokenizer, concurrent=concurrent).generate(asked, 1)) == whole
    for request in asked[::6]:
        [alone] = engine(model, tokenizer, weights="live").generate([request], 1)
        assert alone.tokens == whole[request.prompt.id, request.sample]
    other = tokens_of(engine(model, tokenizer).generate(asked, 2))
    assert all(other[name] != whole[name] for name in whole)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_letting_finished_rows_go_changes_nothing(make_model: Callable[..., Path], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """0: never, 1: whenever one is done; the usual share lies between."""
    model, tokenizer = load(make_model("llama"))
    model.generation_config.eos_token_id = list(range(0, 256, 20))   # many ends: rows leave all the time
    sampler = engine(model, tokenizer, max_completion_length=60)
    usual, between = sampler.generate(requests(3, 8), 0), sampler.stats
    assert len({len(r.tokens) for r in usual}) > 5
    monkeypatch.setitem(room.FOLD, "cpu", share)
    assert tokens_of(sampler.generate(requests(3, 8), 0)) == tokens_of(usual)
    assert (sampler.stats.alive < between.alive < 1) if share == 0 else (sampler.stats.alive == 1)


def test_a_group_is_read_once(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    sampler = engine(model, tokenizer)
    sampler.generate(requests(3, 4, longest=12), 0)
    assert sampler.stats.prefilled_tokens == 12 + 9 + 6


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", *OTHERS])
def test_greedy_rollouts_are_those_of_generate(make_model: Callable[..., Path], family: str) -> None:
    model, tokenizer = load(make_model(family, **OTHERS.get(family, {})), "none", adapter=family != "gpt2")      # peft warns of its layers
    for rollout in engine(model, tokenizer).generate(requests(3, 1), 0, settings=sampling(temperature=0.0)):
        context = torch.tensor([rollout.request.prompt.tokens])
        with torch.no_grad():
            expected = model.generate(
                input_ids=context, attention_mask=torch.ones_like(context), max_new_tokens=24, do_sample=False, pad_token_id=0, use_cache=True
            )
        assert rollout.tokens == tuple(expected[0, context.shape[1] :].tolist())


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_sample_alike_whatever_the_batch(make_model: Callable[..., Path], family: str) -> None:
    model, tokenizer = load(make_model(family, **OTHERS[family]), "nf4" if family != "gpt2" else "none", adapter=family != "gpt2")
    model.generation_config.eos_token_id = list(range(0, 256, 20))
    whole = engine(model, tokenizer, max_completion_length=40).generate(requests(3, 4), 0)
    assert len({len(r.tokens) for r in whole}) > 3
    for rollout in whole[::3]:
        torch.testing.assert_close(torch.tensor(rollout.logp), logp_of(model, rollout), atol=2e-5, rtol=0)
    assert tokens_of(engine(model, tokenizer, max_completion_length=40, concurrent=5).generate(requests(3, 4), 0)) == tokens_of(whole)


def test_past_its_window_a_model_goes_its_own_way(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("mistral", sliding_window=16), "none")
    for rollout in engine(model, tokenizer, max_completion_length=30).generate(requests(2, 2), 0):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp_of(model, rollout), atol=2e-5, rtol=0)


def test_adapters_off_samples_from_the_base(make_model: Callable[..., Path]) -> None:
    folder = make_model("llama")
    plain, tokenizer = load(folder, adapter=False)
    model, _ = load(folder)
    expected = tokens_of(engine(plain, tokenizer).generate(requests(), 0))
    with model.disable_adapter():
        assert tokens_of(engine(model, tokenizer).generate(requests(), 0)) == expected
    assert tokens_of(engine(model, tokenizer).generate(requests(), 0)) != expected


# -- where a response ends --------------------------------------------------------------------------------------------------


def test_end_tokens_end_a_response_and_stay_in_it(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    free = engine(model, tokenizer, max_completion_length=40).generate(requests(3, 4), 0)
    ends = [free[0].tokens[7], free[5].tokens[3]]
    model.generation_config.eos_token_id = ends
    cut = engine(model, tokenizer, max_completion_length=40).generate(requests(3, 4), 0)
    ends.append(tokenizer.eos_token_id)
    for before, after in zip(free, cut, strict=True):
        first = next((i for i, token in enumerate(before.tokens) if token in ends), None)
        assert after.tokens == before.tokens[: None if first is None else first + 1]
        assert after.done is (first is not None)
        assert after.logp is not None
        assert len(after.logp) == len(after.tokens)
    assert {r.done for r in cut} == {True, False}


def test_the_tokenizers_own_end_counts_too(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    free = engine(model, tokenizer).generate(requests(1, 1), 0)[0]
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free.tokens[4])
    [cut] = engine(model, tokenizer).generate(requests(1, 1), 0)
    assert cut.done
    assert cut.tokens == free.tokens[: free.tokens.index(free.tokens[4]) + 1]


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_stop_string_is_found_across_tokens(make_model: Callable[..., Path], size: int) -> None:
    model, tokenizer = load(make_model("llama"))
    free = engine(model, tokenizer, max_completion_length=48).generate(requests(3, 4), 0)
    text = free[2].text
    stop = next(s for i in range(9, len(text)) if "�" not in (s := text[i : i + size]))
    cut = engine(model, tokenizer, max_completion_length=48, stop=(stop, "never to be seen")).generate(requests(3, 4), 0)
    assert cut[2].done
    stopped = 0
    for before, after in zip(free, cut, strict=True):
        shortest = next((i for i in range(1, len(before.tokens) + 1) if stop in tokenizer.decode(before.tokens[:i], skip_special_tokens=True)), None)
        assert after.tokens == before.tokens[:shortest]
        assert after.done is (before.done or shortest is not None)
        stopped += shortest is not None
    assert stopped >= 1


def test_stop_strings_are_looked_for_on_the_way(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    sampler = engine(model, tokenizer, max_completion_length=200, stop=("a", "b", "c", "d", "e", "f", "g", "h"))
    rollouts = sampler.generate(requests(1, 2), 0)
    assert all(r.done for r in rollouts)
    assert sampler.stats.steps <= max(len(r.tokens) for r in rollouts) + LOOK_FOR_STRINGS < 199


def test_a_stop_string_that_is_a_special_token_is_an_end_token(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    model.get_base_model().lm_head.weight.data[tokenizer.convert_tokens_to_ids("<|im_start|>")] *= 8
    free = engine(model, tokenizer, max_completion_length=40).generate(requests(3, 4), 0)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    met = [i for i, r in enumerate(free) if start in r.tokens]
    assert met
    cut = engine(model, tokenizer, max_completion_length=40, stop=("<|im_start|>",)).generate(requests(3, 4), 0)
    for i in met:
        assert cut[i].done
        assert cut[i].tokens == free[i].tokens[: free[i].tokens.index(start) + 1]
        assert "im_start" not in cut[i].text


@pytest.mark.parametrize("length", [1, 2, 17, 33])
def test_the_length_limit(make_model: Callable[..., Path], length: int) -> None:
    """On both sides of the cache's blocks of 16."""
    model, tokenizer = load(make_model("llama"))
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    rollouts = engine(model, tokenizer, max_completion_length=length).generate(requests(), 0)
    assert {len(r.tokens) for r in rollouts} == {length}
    assert not any(r.done for r in rollouts)
    torch.testing.assert_close(torch.tensor(rollouts[-1].logp), logp_of(model, rollouts[-1]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_continuation_goes_on_as_if_it_had_not_stopped(make_model: Callable[..., Path], family: str) -> None:
    model, tokenizer = load(make_model(family, **OTHERS.get(family, {})), "none")
    whole = engine(model, tokenizer, max_completion_length=30).generate(requests(3, 3), 4)
    cuts = [0, 1, 5, 29, 30, 12, 0, 7, 20]
    again = [Request(r.request.prompt, r.request.sample, r.tokens[:cut]) for r, cut in zip(whole, cuts, strict=True)]
    sampler = engine(model, tokenizer, max_completion_length=30)
    back = sampler.generate(again, 4)
    for before, after, cut in zip(whole, back, cuts, strict=True):
        given = min(cut, len(before.tokens))
        if given < len(before.tokens) or not before.done:            # nobody continues what is done
            assert after.tokens == before.tokens
            assert after.text == before.text
            assert after.done is before.done
            assert after.logp is not None
            assert before.logp is not None
            assert all(math.isnan(x) for x in after.logp[:given])
            torch.testing.assert_close(torch.tensor(after.logp[given:]), torch.tensor(before.logp[given:]), atol=1e-5, rtol=0)
    assert sampler.stats.generated_tokens == sum(len(r.tokens) - len(q.so_far) for r, q in zip(back, again, strict=True))


# -- what it leaves behind: nothing -----------------------------------------------------------------------------------------


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(input_ids=torch.tensor([p.tokens[:6] for p in prompts(3)]), use_cache=False).logits.float()
    torch.logsumexp(out, -1).sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("weights", ["live", "unpacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_and_bytes_are_as_before(make_model: Callable[..., Path], quantization: str, weights: str, dtype: str) -> None:
    model, tokenizer = load(make_model("qwen2"), quantization, dtype)
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    before, marks = gradients(model), fingerprint(model)
    assert len(before) == 2 * 7 * 2
    engine(model, tokenizer, weights=weights).generate(requests(), 0)
    assert fingerprint(model) == marks
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))


@pytest.mark.parametrize(("family", "changes"), [
    ("gemma3_text", OTHERS["gemma3_text"]),
    ("llama", {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    ("phi3", {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 16}}),
])  # fmt: skip
def test_a_models_own_forward_pass_leaves_no_trace_either(make_model: Callable[..., Path], family: str, changes: dict[str, Any]) -> None:
    """Also where checkpointing would drop the cache, and where rotations are recomputed for long sequences (and stay, in transformers)."""
    model, tokenizer = load(make_model(family, **changes), "none")
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    before, marks = gradients(model), fingerprint(model)
    rollouts = engine(model, tokenizer, max_completion_length=30).generate(requests(2, 2), 0)
    assert max(len(r.tokens) for r in rollouts) > 20
    assert fingerprint(model) == marks
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_interrupt_leaves_the_model_whole(make_model: Callable[..., Path], family: str) -> None:
    model, tokenizer = load(make_model(family, **OTHERS.get(family, {})), "none")
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.generation_config.eos_token_id = list(range(0, 256, 10))
    marks = fingerprint(model)
    heard: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        heard.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(model, tokenizer, interrupt).generate(requests(), 0)
    assert len(heard) == 1
    assert fingerprint(model) == marks
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    engine(model, tokenizer).generate(requests(), 0)                 # and works again


def test_the_scratch_copy_dies_with_the_call(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Decoder]] = []

    class Watched(Decoder):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(weakref.ref(self))

    monkeypatch.setattr(room, "Decoder", Watched)
    model, tokenizer = load(make_model("llama"))
    sampler = engine(model, tokenizer, concurrent=5)
    rollouts = sampler.generate(requests(), 0)
    gc.collect()
    assert len(made) == 1                                            # once for all waves
    assert made[0]() is None
    assert len(rollouts) == 12


# -- the rest ---------------------------------------------------------------------------------------------------------------


def test_progress_and_statistics(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    model.generation_config.eos_token_id = list(range(0, 256, 20))
    heard: list[tuple[int, int]] = []
    sampler = engine(model, tokenizer, lambda done, total: heard.append((done, total)), concurrent=7)
    rollouts = sampler.generate(requests(), 0)
    assert heard[-1] == (12, 12)
    assert heard == sorted(heard)
    stats = sampler.stats
    assert stats.generated_tokens == sum(len(r.tokens) for r in rollouts)
    assert max(len(r.tokens) for r in rollouts) <= stats.steps + 2
    assert 0.5 < stats.alive <= 1
    assert stats.seconds > 0


def test_rollouts_make_a_batch(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    rollouts = engine(model, tokenizer).generate(requests(), 0)
    batch = collate(rollouts, (), 24)
    assert batch.sampler is not None
    torch.testing.assert_close(batch.sampler[0, : len(rollouts[0].tokens)], logp_of(model, rollouts[0]), atol=2e-5, rtol=0)


def test_nothing_asked_nothing_answered(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    assert engine(model, tokenizer).generate([], 0) == []


def test_weights_that_have_diverged_are_told(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        engine(model, tokenizer).generate(requests(), 0)


def test_a_prompt_without_tokens_is_told(make_model: Callable[..., Path]) -> None:
    model, tokenizer = load(make_model("llama"))
    with pytest.raises(UserError, match="prompt 5 has no tokens"):
        engine(model, tokenizer).generate([Request(Prompt(5, (), ""))], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", ["live", "unpacked"])
def test_a_captured_step_samples_what_the_plain_one_does(make_model: Callable[..., Path], weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(make_model("qwen3", head_dim=32), "none")
    model = model.cuda()
    model.generation_config.eos_token_id = list(range(0, 256, 20))
    captured = engine(model, tokenizer, max_completion_length=300, weights=weights).generate(requests(3, 8), 0)
    monkeypatch.setattr(room, "capturable", lambda model: False)
    plain = engine(model, tokenizer, max_completion_length=300, weights=weights).generate(requests(3, 8), 0)
    assert tokens_of(captured) == tokens_of(plain)
