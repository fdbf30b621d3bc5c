"""The plan: it fits what it says, honours what it is told, gets no worse on larger cards, and refuses with a way out that works."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.engines import cache, decoder, sampling
from localrl.engines import torch as torch_engine
from localrl.memory import fit, shape
from localrl.memory.cards import GIB, Card
from localrl.memory.knobs import HEAD_TILE
from localrl.memory.plan import SETTING, DoesNotFit, MemoryPlan
from localrl.memory.work import PHASES, Choice, micro_batch
from localrl.policy import head, lean
from localrl.settings import UserError
from tests.memory.models import a_plan

CARDS = ("6GiB", "8GiB", "12GiB", "16GiB", "24GiB")
asked = st.fixed_dictionaries(
    {
        "card": st.sampled_from(CARDS),
        "layers": st.sampled_from([8, 36, 60]),
        "rollout__prompts_per_step": st.integers(1, 16),
        "rollout__num_generations": st.integers(2, 16),
        "data__max_prompt_length": st.integers(1, 4096),
        "rollout__max_completion_length": st.integers(1, 32_768),
        "memory__micro_batch_tokens": st.none() | st.integers(16, 40_000),
        "rollout__concurrent": st.none() | st.integers(1, 128),
        "memory__head_chunk": st.none() | st.sampled_from([64, 1024]),
        "memory__offload": st.none() | st.booleans(),
    }
)
FREE = {**dict.fromkeys(("memory__micro_batch_tokens", "rollout__concurrent", "memory__head_chunk", "memory__offload")), "memory__embedding_on_host": False}
TOLD = {"concurrent": "rollout__concurrent", **{name: f"memory__{name}" for name in ("micro_batch_tokens", "head_chunk", "offload")}}


def knob(plan: MemoryPlan, name: str) -> Any:
    return next(k for k in plan.knobs if k.name == name)


@settings(max_examples=60, deadline=None)
@given(what=asked)
def test_lines_add_up_and_what_is_set_is_honoured(what: dict[str, Any]) -> None:
    plan = a_plan(**what)
    for phase in PHASES:
        assert plan.phases[phase] == sum(item.bytes for item in plan.items if phase in item.phases)
    assert [item.phases[0] for item in plan.items if item.name.startswith("margin")] == list(PHASES)
    assert all(item.bytes > 0 for item in (*plan.items, *plan.host))
    assert all(k.reason for k in plan.knobs)
    for name, setting in TOLD.items():
        assert what[setting] is None or (knob(plan, name).value, knob(plan, name).reason) == (what[setting], "as set")
    assert micro_batch(plan.work, plan.choice) <= max(plan.micro_batch_tokens, plan.work.longest)
    assert plan.fits == all(size <= plan.card.usable for size in plan.phases.values())
    if plan.fits:
        plan.check()


@settings(max_examples=40, deadline=None)
@given(what=asked)
def test_a_larger_card_never_gets_worse_knobs(what: dict[str, Any]) -> None:
    less, more = (a_plan(**{**what, **FREE, "card": card}) for card in (what["card"], "24GiB"))
    if not less.fits:
        return
    assert more.fits and more.concurrent >= less.concurrent
    rungs = [(not p.choice.gradient_checkpointing, not p.choice.offload, p.choice.mlp_tile == 0, p.choice.mlp_tile) for p in (less, more)]
    assert rungs[1] >= rungs[0], rungs
    if rungs[1] == rungs[0]:
        assert more.micro_batch_tokens >= less.micro_batch_tokens


@settings(max_examples=40, deadline=None)
@given(what=asked)
def test_free_knobs_are_as_large_as_fits(what: dict[str, Any]) -> None:
    what = {**what, **FREE}
    plan = a_plan(**what)
    if not plan.fits:
        return
    group, step = plan.work.num_generations, plan.work.rollouts
    if plan.concurrent < step:
        assert plan.concurrent % group == 0 or plan.concurrent < group
        assert not a_plan(**{**what, "rollout__concurrent": plan.concurrent + group, "memory__kv_cache": plan.choice.kv_cache}).fits
    if "largest" in knob(plan, "micro_batch_tokens").reason:
        rung = {"memory__gradient_checkpointing": plan.choice.gradient_checkpointing, "memory__mlp_tile": plan.choice.mlp_tile}
        more = {"memory__micro_batch_tokens": plan.micro_batch_tokens + 2 * plan.work.longest, "memory__offload": plan.choice.offload}
        grown = a_plan(**{**what, **rung, **more})
        assert not grown.fits or passes_of(grown) == passes_of(plan)


def passes_of(plan: MemoryPlan) -> int:
    return -(-plan.work.rollouts * plan.work.longest // micro_batch(plan.work, plan.choice))


@settings(max_examples=40, deadline=None)
@given(what=asked)
def test_a_refusal_names_a_way_out_that_works(what: dict[str, Any]) -> None:
    plan = a_plan(**what)
    if plan.fits:
        return
    with pytest.raises(DoesNotFit) as raised:
        plan.check()
    sentence = str(raised.value)
    assert sentence.startswith("needs ") and "\n" not in sentence and len(sentence) < 400
    if "; try " not in sentence:
        assert "no setting makes this model fit" in sentence and "take a smaller model" in sentence
        return
    changes = {}
    for setting, value in re.findall(r"([a-z_.]+)=(\S+)", sentence.split("; try ")[1]):
        assert setting in SETTING.values()
        changes[setting.replace(".", "__")] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    assert changes and all(what.get(name) != value for name, value in changes.items())   # nothing recommended that is so already
    assert a_plan(**{**what, **changes}).fits


def test_the_sentence() -> None:
    plan = a_plan(rollout__concurrent=64, rollout__max_completion_length=8192)
    need = r"needs [\d.]+ GiB while it rolls out, the card has 15\.0 GiB: KV cache [\d.]+, .*base \(nf4\) 5\.7, .*, \.\.\.; "
    with pytest.raises(UserError) as raised:
        plan.check()
    assert re.fullmatch(need + r"try rollout\.concurrent=\d+ \([\d.]+ GiB\)", str(raised.value)), str(raised.value)
    with pytest.raises(DoesNotFit, match=r"no setting makes this model fit, it takes a card of \d+\.\d GiB: take a smaller model"):
        a_plan("6GiB", layers=72).check()


def test_choices_on_ordinary_cards() -> None:
    plan = a_plan()
    assert plan.fits and plan.gradient_checkpointing and plan.head_chunk == head.CHUNK and plan.choice.kv_cache == "full"
    assert plan.micro_batch_tokens > 8000 and plan.concurrent >= 16 and plan.concurrent % 8 == 0
    assert not plan.choice.offload and not plan.choice.embedding_on_host
    assert a_plan("24GiB").micro_batch_tokens <= 16_384
    with pytest.raises(UserError, match="adapter target"):
        a_plan(adapter__lora_target_modules=["nothing"])


def test_long_responses_climb_the_ladder() -> None:
    """A group of 8 with 32,768 tokens each, on 16 GiB."""
    plan = a_plan(data__max_prompt_length=512, rollout__max_completion_length=32_768, rollout__prompts_per_step=1)
    assert plan.fits and plan.choice.mlp_tile > 0 and plan.micro_batch_tokens >= plan.work.longest
    assert plan.choice.offload == bool([need for need in plan.host if need.name.startswith("layer inputs")])


def test_eight_bit_keys_and_values_only_where_nothing_else_fits() -> None:
    long = {"rollout__max_completion_length": 32_768, "rollout__prompts_per_step": 1}
    roomy, tight = a_plan("16GiB", **long), a_plan("10GiB", layers=36, **long)
    assert roomy.choice.kv_cache == "full"
    if tight.choice.kv_cache == "int8":
        assert a_plan("10GiB", **long, rollout__concurrent=1, memory__kv_cache="full").phases["rollout"] > tight.card.usable


def test_the_embedding_goes_to_the_host_only_as_the_last_resort() -> None:
    untied = a_plan("8GiB", rollout__max_completion_length=512)
    assert untied.choice.embedding_on_host == (not a_plan("8GiB", rollout__max_completion_length=512, memory__embedding_on_host=False).fits)
    tied = a_plan("8GiB", "qwen3-4b-8gb")
    assert tied.shape.tied and not tied.choice.embedding_on_host
    if untied.choice.embedding_on_host:
        assert any(need.name == "embedding" for need in untied.host) and "the rest fits" in knob(untied, "embedding_on_host").reason


def test_on_a_cpu_passes_stay_small_and_nothing_moves_to_the_host() -> None:
    plan = a_plan(Card.of("16GiB", "cpu"), "demo")
    assert plan.fits and not plan.choice.offload and not plan.host and plan.micro_batch_tokens <= 4096
    assert plan.not_counted and not any("computer's own memory" in text for text in plan.not_counted)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), max_size=40), budget=st.integers(1, 2000))
def test_split_takes_every_row_once_and_keeps_to_the_bound(lengths: list[int], budget: int) -> None:
    plan = a_plan(memory__micro_batch_tokens=max(16, budget), data__max_prompt_length=100, rollout__max_completion_length=200)
    bound, rows = micro_batch(plan.work, plan.choice), torch.tensor(lengths, dtype=torch.int64)
    parts = plan.split(rows)
    assert sorted(torch.cat(parts).tolist() if parts else []) == list(range(len(lengths)))
    assert all(part.dtype == torch.int64 and (int(rows[part].sum()) <= bound or len(part) == 1) for part in parts)
    tops = [int(rows[part].max()) for part in parts]
    assert tops == sorted(tops, reverse=True)                       # longest first: if memory runs out, it does at once
    assert [part.tolist() for part in parts] == [part.tolist() for part in plan.split(rows)]


def test_searchers_bring_copies_of_the_model() -> None:
    rung = {"memory__gradient_checkpointing": True, "memory__mlp_tile": 0, "memory__offload": False, "memory__kv_cache": "full"}
    alone, two = (a_plan("24GiB", "qwen3-4b-16gb-tba", rollout__concurrent=8, search__processes=count, **rung) for count in (0, 2))
    base = next(item.bytes for item in alone.items if item.name.startswith("base"))
    assert all(two.phases[phase] - alone.phases[phase] > 2 * base for phase in PHASES)
    assert not a_plan("16GiB", "qwen3-4b-16gb-tba", search__processes=5, **rung).fits


def test_gradients_kept_apart_cost_a_tenth_at_most() -> None:
    without = a_plan("16GiB", "qwen3-4b-16gb-directed", algorithm__weighting="fixed")
    plan = a_plan("16GiB", "qwen3-4b-16gb-directed")
    assert plan.work.gradients > 1 and without.work.gradients == 0
    assert max(plan.phases.values()) <= max(plan.card.usable, 1.1 * max(without.phases.values()))
    assert str(plan.work.gradients) in knob(plan, "directions").reason and not any(k.name == "directions" for k in without.knobs)
    asked = a_plan("16GiB", "qwen3-4b-16gb-directed", memory__directions="float32")
    assert asked.directions == "float32" and asked.phases["backward"] >= without.phases["backward"]


def test_plain_values() -> None:
    plan = a_plan()
    told = json.loads(plan.to_json())
    assert told == plan.to_dict() and told["fits"] is True and told["card"]["total"] == 16 * GIB and set(told["phases"]) == set(PHASES)
    assert told["knobs"]["concurrent"]["value"] == plan.concurrent and told["not_counted"]
    assert sum(item["bytes"] for item in told["items"] if "rollout" in item["phases"]) == told["phases"]["rollout"]
    assert plan.rows()[-1][0] == "peak" and all(len(row) == 1 + len(PHASES) for row in plan.rows())


def test_choice_is_what_the_knobs_say() -> None:
    plan = a_plan(rollout__concurrent=3, memory__micro_batch_tokens=5000, memory__head_chunk=64, memory__mlp_tile=1024, memory__offload=True)
    assert plan.choice == Choice(3, 5000, True, 64, "lagged", 1024, True, "full", False)


def test_planning_is_quick_when_the_lines_are_there() -> None:
    a_plan("12GiB")
    start = time.process_time()
    a_plan("12GiB", rollout__max_completion_length=8192)
    assert time.process_time() - start < 1


def test_the_plan_knows_the_numbers_of_the_rooms_above() -> None:
    """Floors forbid the plan to look up into policy and engines, so what it knows of them is written down twice and held together here."""
    assert (fit.PREFILL_TOKENS, fit.BLOCK, fit.SAMPLED_AT_ONCE) == (decoder.PREFILL_TOKENS, cache.BLOCK, sampling.AT_ONCE)
    assert HEAD_TILE == head.TILE and fit.NORM_TOKENS == lean.TOKENS and torch_engine.FOLD == fit.FOLD
    assert shape.STATIC_ROPE == decoder.STATIC_ROPE
    assert {f"{name}forcausallm" for name in fit.OWN_LOOP} == {name.lower() for name in decoder.FAMILIES}
