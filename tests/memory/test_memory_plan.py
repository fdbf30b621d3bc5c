"""The plan: against published simulations, its knobs, its refusals, its micro-batches, and how it is shown."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from localrl.memory import activations
from localrl.memory.cards import GIB
from localrl.memory.knobs import KNOBS, largest
from localrl.memory.plan import PASS_TOKENS, SETTING, DoesNotFit, MemoryPlan
from localrl.memory.show import Bars, cards_table, plan_table
from localrl.memory.work import PHASES, Choice
from localrl.policy import head
from localrl.settings import UserError
from tests.memory.models import MODELS, a_plan, untied

CARDS = ("8GiB", "12GiB", "16GiB", "24GiB")
# Simulated under FakeTensor (fp32 adapters of rank 16 on NF4, per-layer checkpointing, 8-bit Adam): the most thousand tokens of a pass.
TOKENS = {
    "Llama-3.1-8B": (2.0, 8.1, 14.2, 26),
    "Qwen3-8B": (1.4, 7.3, 13.1, 25),
    "Qwen3-4B": (7.7, 16, 24, 41),
    "Qwen2.5-7B": (2.4, 8.7, 14.9, 28),
    "Qwen3-14B": (0, 1.1, 5.4, 14),
    "Gemma-3-12B": (0, 1.7, 6.6, 16),
    "SmolLM2-1.7B": (19, 31, 44, 69),
}
# Rows that decode at once, 2560 tokens each, no more than 64.
ROWS = {
    "Llama-3.1-8B": (3, 15, 27, 51),
    "Qwen3-8B": (2, 12, 23, 44),
    "Qwen3-4B": (9, 19, 30, 51),
    "Qwen2.5-7B": (8, 35, 63, 64),
    "Qwen3-14B": (0, 1, 11, 30),
    "Gemma-3-12B": (0, 2, 10, 26),
    "SmolLM2-1.7B": (11, 19, 27, 43),
}


@pytest.mark.parametrize(("name", "card"), [(name, card) for name in TOKENS for card, most in zip(CARDS, TOKENS[name], strict=True) if most])
def test_the_tokens_that_a_simulation_found_to_fit_fill_the_card(name: str, card: str) -> None:
    """That simulation gave every model an output layer of its own, and adapters 0.2 GiB less (its weights and gradients were half as wide)."""
    tokens = int(1000 * TOKENS[name][CARDS.index(card)])
    plan = a_plan(
        untied(MODELS[name]), card_bytes=card, prompts_per_step=1, num_generations=1, fewest_generations=1, max_prompt_length=1,
        max_completion_length=tokens - 1, micro_batch_tokens=tokens, gradient_checkpointing=True, concurrent=1,
    )  # fmt: skip
    assert 0.98 < plan.phases["backward"] / plan.card.usable < 1.06


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("card", CARDS)
def test_the_rows_that_a_simulation_found_to_fit(name: str, card: str) -> None:
    def fits(rows: int) -> bool:
        plan = a_plan(
            untied(MODELS[name]), card_bytes=card, prompts_per_step=64, num_generations=1, fewest_generations=1, max_prompt_length=1,
            max_completion_length=2559, concurrent=rows, micro_batch_tokens=1, gradient_checkpointing=True,
        )  # fmt: skip
        return plan.phases["rollout"] <= plan.card.usable

    expected = ROWS[name][CARDS.index(card)]
    found = largest(0, 64, lambda rows: rows == 0 or fits(rows))
    assert abs(found - expected) <= max(1, 0.1 * expected)


def test_a_full_model_at_four_lengths() -> None:
    """The same simulation's peaks of Llama-3.1-8B, GiB, without margin and libraries."""
    for tokens, peak in ((2048, 7.05), (4096, 8.32), (8192, 10.85), (16384, 15.92)):
        plan = a_plan(MODELS["Llama-3.1-8B"], prompts_per_step=64, max_prompt_length=256, max_completion_length=256,
                      micro_batch_tokens=tokens, gradient_checkpointing=True, concurrent=1)  # fmt: skip
        own = sum(item.bytes for item in plan.lines("backward") if not item.name.startswith(("margin", "libraries")))
        assert own / GIB == pytest.approx(peak, rel=0.03)


def test_the_output_layer_is_counted_as_its_own_room_counts_it() -> None:
    for name, device, width, backward in (
        ("Qwen3-8B", "cuda", 2, True), ("Qwen3-8B", "cuda", 2, False), ("Llama-3.1-8B", "cpu", 4, True), ("SmolLM2-1.7B", "cpu", 2, True),
    ):  # fmt: skip
        shape = MODELS[name]
        plan = a_plan(shape, device=device, compute_bytes=width, card_bytes="16GiB", micro_batch_tokens=4096, head_chunk=512)
        kind = torch.bfloat16 if width == 2 else torch.float32
        theirs = head.workspace(4096, shape.vocab, shape.hidden, weight=kind, hidden=kind, mixed=device == "cuda", chunk=512, backward=backward)
        assert activations.head(shape, plan.work, plan.choice, backward) == theirs
    assert activations.TILE == head.TILE


works = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(sorted(MODELS)),
        "card_bytes": st.sampled_from(["6GiB", "8GiB", "10GiB", "12GiB", "16GiB", "24GiB", "80GiB"]),
        "quantization": st.sampled_from(["nf4", "int8", "none"]),
        "device": st.sampled_from(["cuda", "cpu"]),
        "compute_bytes": st.sampled_from([2, 4]),
        "lora_r": st.sampled_from([4, 16, 64]),
        "critic": st.booleans(),
        "reference": st.booleans(),
        "truncated": st.booleans(),
        "optimizer": st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_32bit"]),
        "prompts_per_step": st.integers(1, 16),
        "num_generations": st.integers(1, 16),
        "max_prompt_length": st.integers(1, 4096),
        "max_completion_length": st.integers(1, 16384),
        "micro_batch_tokens": st.none() | st.integers(1, 40_000),
        "concurrent": st.none() | st.integers(1, 128),
        "gradient_checkpointing": st.none() | st.booleans(),
        "head_chunk": st.none() | st.sampled_from([64, 1024]),
    }
)


def planned(work: dict[str, Any], **changes: Any) -> MemoryPlan:
    values = {**work, **changes}
    return a_plan(MODELS[values.pop("shape")], **values)


@settings(max_examples=40, deadline=None)
@given(work=works)
def test_lines_add_up_and_what_is_set_is_honoured(work: dict[str, Any]) -> None:
    plan = planned(work)
    for phase in PHASES:
        assert plan.phases[phase] == sum(item.bytes for item in plan.items if phase in item.phases)
    assert [item.phases[0] for item in plan.items if item.name.startswith("margin")] == list(PHASES)
    assert all(item.bytes > 0 for item in plan.items)
    for knob in plan.knobs:
        assert knob.reason and (work[knob.name] is None or (knob.value == work[knob.name] and knob.reason == "as set"))
    if plan.fits:
        plan.check()


@settings(max_examples=40, deadline=None)
@given(work=works, more=st.sampled_from(["lora_r", "prompts_per_step", "num_generations", "max_prompt_length", "max_completion_length", "critic", "truncated"]))
def test_asking_for_more_never_needs_less(work: dict[str, Any], more: str) -> None:
    fixed = {**work, "concurrent": 16, "micro_batch_tokens": 4096, "gradient_checkpointing": True, "head_chunk": 256}
    less, grown = planned(fixed), planned(fixed, **{more: True if isinstance(work[more], bool) else 2 * work[more]})
    if more == "num_generations":                                   # sharing a prompt among more rows is a saving
        grown = planned(fixed, num_generations=2 * work[more], fewest_generations=min(8, work[more]))
        less = planned(fixed, fewest_generations=min(8, work[more]))
    if more == "max_prompt_length":                                 # a window that is passed makes the engine take another way
        return
    assert all(grown.phases[phase] >= less.phases[phase] for phase in PHASES)


@settings(max_examples=40, deadline=None)
@given(work=works)
def test_free_knobs_are_as_large_as_fits(work: dict[str, Any]) -> None:
    free = dict.fromkeys(KNOBS)
    plan = planned(work, **free)
    if not plan.fits:
        return
    step = plan.work.rollouts
    if plan.concurrent < step:
        group = plan.work.num_generations
        assert planned(work, **free | {"concurrent": plan.concurrent + group}).fits is False
        assert plan.concurrent % group == 0 or plan.concurrent < group
    if "largest" in next(knob.reason for knob in plan.knobs if knob.name == "micro_batch_tokens"):
        bigger = planned(work, **free | {"micro_batch_tokens": plan.micro_batch_tokens + 256, "gradient_checkpointing": plan.gradient_checkpointing})
        assert not bigger.fits
    assert plan.micro_batch_tokens >= min(plan.work.longest, step * plan.work.longest)


@settings(max_examples=40, deadline=None)
@given(work=works)
def test_a_refusal_names_a_way_out_that_works(work: dict[str, Any]) -> None:
    plan = planned(work)
    if plan.fits:
        return
    with pytest.raises(DoesNotFit) as raised:
        plan.check()
    sentence = str(raised.value)
    assert sentence.startswith("needs ") and "\n" not in sentence and len(sentence) < 400
    if "; try " not in sentence:
        assert "no setting makes this model fit" in sentence and "take a smaller model" in sentence
        return
    names = {setting: name for name, setting in SETTING.items()}
    changes: dict[str, Any] = {}
    for setting, value in re.findall(r"([a-z_.]+)=(\S+)", sentence.split("; try ")[1]):
        changes[names[setting]] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    better = planned(work, **changes)
    assert changes and better.fits and better.phases[better.worst] <= plan.card.usable
    assert all(work.get(name) != value for name, value in changes.items())               # nothing recommended that is so already


def test_the_sentence() -> None:
    plan = a_plan(MODELS["Llama-3.1-8B"], concurrent=64, max_completion_length=4096)
    with pytest.raises(UserError) as raised:
        plan.check()
    need = r"needs [\d.]+ GiB while it rolls out, the card has 15\.0 GiB: KV cache [\d.]+, base \(nf4\) 5\.3, .*, \.\.\.; "
    assert re.fullmatch(need + r"try rollout\.concurrent=\d+ \([\d.]+ GiB\)", str(raised.value))
    with pytest.raises(DoesNotFit, match=r"no setting makes this model fit, it takes a card of 7\.\d GiB: take a smaller model"):
        a_plan(MODELS["Llama-3.1-8B"], card_bytes="6GiB").check()
    with pytest.raises(DoesNotFit, match=r"the machine has .* of free memory"):
        a_plan(MODELS["Llama-3.1-8B"], card_bytes="6GiB", device="cpu", compute_bytes=4).check()


def test_choices_on_ordinary_cards() -> None:
    plan = a_plan(MODELS["Qwen3-8B"])
    assert plan.fits and plan.gradient_checkpointing and plan.head_chunk == head.CHUNK
    assert plan.micro_batch_tokens > 8000 and plan.concurrent >= 24 and plan.concurrent % 8 == 0
    roomy = a_plan(MODELS["SmolLM2-1.7B"], card_bytes="H200")
    assert not roomy.gradient_checkpointing and roomy.concurrent == 64
    assert a_plan(MODELS["Qwen3-8B"], card_bytes="24GiB").micro_batch_tokens <= 16384
    with pytest.raises(UserError, match="adapter target"):
        a_plan(MODELS["Qwen3-8B"], lora_targets=["nothing"])


def test_on_a_cpu_passes_stay_small_and_the_unpacked_copy_is_counted() -> None:
    plan = a_plan(MODELS["SmolLM2-1.7B"], device="cpu", compute_bytes=4, card_bytes="32GiB", max_completion_length=256)
    assert plan.micro_batch_tokens == 1024 and plan.gradient_checkpointing
    copy = next(item for item in plan.items if item.name == "unpacked weights for sampling")
    assert copy.bytes == 4 * MODELS["SmolLM2-1.7B"].quantisable and copy.phases == ("rollout",)
    assert not any(item.name == copy.name for item in a_plan(MODELS["SmolLM2-1.7B"], device="cpu", compute_bytes=4, unpacked=False).items)


def test_sliding_windows_save_only_where_the_engine_lets_them() -> None:
    mistral = replace(MODELS["Llama-3.1-8B"], family="mistral", window=4096, windowed_layers=32)
    inside, past = (a_plan(mistral, max_completion_length=length, concurrent=8) for length in (3584, 3585))
    cache = [sum(item.bytes for item in plan.items if item.name == "KV cache") for plan in (inside, past)]
    assert inside.shape.window == 4096 and cache[0] != cache[1] == 8 * past.shape.kv_bytes(4096)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), max_size=40), budget=st.integers(1, 2000))
def test_split_takes_every_row_once_and_keeps_to_the_budget(lengths: list[int], budget: int) -> None:
    plan = a_plan(MODELS["Qwen3-4B"], micro_batch_tokens=budget)
    rows = torch.tensor(lengths, dtype=torch.int64)
    parts = plan.split(rows)
    assert sorted(torch.cat(parts).tolist() if parts else []) == list(range(len(lengths)))
    for part in parts:
        assert part.dtype == torch.int64 and (len(part) * int(rows[part].max()) <= budget or len(part) == 1)
    tops = [int(rows[part].max()) for part in parts]
    assert tops == sorted(tops, reverse=True)                       # longest first: if memory runs out, it does at once
    assert [part.tolist() for part in parts] == [part.tolist() for part in plan.split(rows)]
    for one, other in pairwise(parts):                       # no two parts would be cheaper as one
        together = (len(one) + len(other)) * int(rows[one].max())
        apart = len(one) * int(rows[one].max()) + len(other) * int(rows[other].max()) + PASS_TOKENS
        assert together > budget or together >= apart


def test_split_does_not_pad_short_rows_to_the_longest() -> None:
    parts = a_plan(MODELS["Qwen3-4B"], micro_batch_tokens=8192).split(torch.tensor([40] * 14 + [400, 390]))
    assert [sorted(part.tolist()) for part in parts] == [[14, 15], list(range(14))]


def test_split_is_a_step_in_few_parts() -> None:
    parts = a_plan(MODELS["Qwen3-4B"], micro_batch_tokens=1000).split(torch.tensor([100, 500, 90, 400, 100, 80]))
    assert [part.tolist() for part in parts] == [[1, 3], [0, 4, 2, 5]]


def test_searchers_bring_copies_of_the_model() -> None:
    alone, two = (a_plan(MODELS["Qwen3-4B"], card_bytes="80GiB", concurrent=8, searchers=count) for count in (0, 2))
    base = next(item.bytes for item in alone.items if item.name.startswith("base"))
    assert all(two.phases[phase] - alone.phases[phase] > 2 * base for phase in PHASES)
    assert not a_plan(MODELS["Qwen3-8B"], card_bytes="16GiB", searchers=3).fits


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("gradients", [2, 5, 12])
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_gradients_kept_apart_cost_a_tenth_at_most(name: str, gradients: int, rank: int) -> None:
    without = a_plan(MODELS[name], lora_r=rank)
    plan = a_plan(MODELS[name], lora_r=rank, gradients=gradients)
    fixed = {knob.name: knob.value for knob in plan.knobs if knob.name != "directions"}
    same = a_plan(MODELS[name], lora_r=rank, **fixed)                # the knobs that the larger need has led to
    assert max(plan.phases.values()) <= 1.1 * max(same.phases.values())
    assert plan.fits or not without.fits
    (knob,) = [knob for knob in plan.knobs if knob.name == "directions"]
    assert str(gradients) in knob.reason
    asked = a_plan(MODELS[name], lora_r=rank, gradients=gradients, directions="float32")
    assert asked.directions == "float32"
    assert max(asked.phases.values()) >= max(same.phases.values())


def test_plain_values() -> None:
    plan = a_plan(MODELS["Qwen3-8B"])
    told = json.loads(plan.to_json())
    assert told["fits"] is True and told["card"]["total"] == 16 * GIB and set(told["phases"]) == set(PHASES)
    assert told["knobs"]["concurrent"]["value"] == plan.concurrent and told["not_counted"]
    assert sum(item["bytes"] for item in told["items"] if "rollout" in item["phases"]) == told["phases"]["rollout"]
    assert plan.rows()[-1][0] == "peak" and all(len(row) == 1 + len(PHASES) for row in plan.rows())


def test_planning_is_quick() -> None:
    start = time.process_time()
    for name, shape in MODELS.items():
        a_plan(shape, card_bytes="12GiB", max_completion_length=8192 if "8B" in name else 2048)
    assert (time.process_time() - start) / len(MODELS) < 0.5


def rendered(thing: object, width: int = 110, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, legacy_windows=False).print(thing)
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("card", ["RTX 4080", "6GiB"])
def test_the_table_shows_every_line_reason_and_omission(card: str, encoding: str) -> None:
    plan = a_plan(MODELS["Qwen3-8B"], card_bytes=card)
    text = " ".join(rendered(plan_table(plan), 200, encoding).split())
    for item in plan.items:
        assert item.name in text
    assert all(knob.reason in text for knob in plan.knobs) and all(note in text for note in plan.not_counted)
    assert ("fits: " in text) == plan.fits and ("does not fit: " in text) != plan.fits and card in text


def test_bars_mark_where_the_card_ends() -> None:
    plan = a_plan(MODELS["Qwen3-8B"], micro_batch_tokens=32768)
    lines = dict(line.split(" ", 1) for line in rendered(Bars(plan)).splitlines()[: len(PHASES)])
    assert lines["backward"].index("▏") == max(line.index("▏") for line in lines.values()) > lines["load"].index("▏") - 1
    assert lines["backward"].count("█") > lines["rollout"].count("█") > lines["load"].count("█") > 10


def test_cards_side_by_side() -> None:
    plans = [a_plan(MODELS["Qwen3-8B"], card_bytes=card) for card in CARDS]
    text = rendered(cards_table(plans), 80)
    assert all(card in text for card in CARDS) and text.count(" yes ") == sum(plan.fits for plan in plans) < len(plans)
    assert "8GiB: try rollout.max_completion_length=" in text


def test_choice_is_what_the_knobs_say() -> None:
    plan = a_plan(MODELS["Qwen3-8B"], concurrent=3, micro_batch_tokens=5000, gradient_checkpointing=False, head_chunk=7)
    assert plan.choice == Choice(3, 5000, False, 7)
    assert (plan.concurrent, plan.micro_batch_tokens, plan.gradient_checkpointing, plan.head_chunk) == (3, 5000, False, 7)
