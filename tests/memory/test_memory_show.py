"""What a person sees of a plan: on narrow and wide terminals, with and without colours, on paper and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType
from transformers import LlamaConfig

from localrl.config import Run, build
from localrl.memory.cards import Card, gib
from localrl.memory.plan import MemoryPlan
from localrl.memory.show import KINDS, REST, SHORT, WORK, Bars, Bill, Knobs, as_dict, cards_table, kind_of, plan_table, setting
from localrl.memory.work import PHASES
from localrl.planning import plan_on

ROLLOUT = 1 + PHASES.index("rollout")


def the_run() -> Run:
    return build({
        "model": {"path": "unused", "quantization": "nf4"},
        "data": {"path": "unused.jsonl", "max_prompt_length": 64},
        "rewards": {"functions": [{"function": "exact_answer"}]},
        "algorithm": {"name": "grpo"},
        "rollout": {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 192, "concurrent": 64},
        "memory": {"micro_batch_tokens": 256},
    })  # fmt: skip


@pytest.fixture(scope="module")
def plan() -> MemoryPlan:
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=512)
    return plan_on(the_run(), config, Card.of("16GiB", "cuda"), torch.bfloat16)


@pytest.fixture(scope="module")
def too_small(plan: MemoryPlan) -> MemoryPlan:
    """The whole step in one wave is more than the card has; all else is less."""
    others = max(size for phase, size in plan.phases.items() if phase != "rollout")
    assert others < plan.phases["rollout"]
    return replace(plan, card=replace(plan.card, name="small", usable=(others + plan.phases["rollout"]) // 2))


def knob(plan: MemoryPlan, **values: Any) -> MemoryPlan:
    return replace(plan, knobs=tuple(replace(k, value=values[k.name], reason="for a test") if k.name in values else k for k in plan.knobs))


def rendered(what: RenderableType, width: int = 80, encoding: str = "utf-8", colours: bool = False) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    Console(file=file, width=width, force_terminal=colours or None, color_system="truecolor" if colours else None).print(what)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_is_wider_than_the_terminal_nor_cut(plan: MemoryPlan, too_small: MemoryPlan, width: int, encoding: str) -> None:
    moved = knob(plan, embedding_on_host=True)
    for shown in (plan_table(plan), plan_table(too_small), plan_table(moved, (3 * 2**30, 8 * 2**30)), cards_table([plan, too_small])):
        text = rendered(shown, width, encoding)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "…" not in text and text.isascii()
    for text in (rendered(plan_table(plan), width, encoding), rendered(plan_table(too_small), width, encoding)):
        assert all(k.reason in words(text) and setting(k.name, k.value) in text for k in plan.knobs if k.reason == "as set")


def test_the_verdict_stands_before_everything(plan: MemoryPlan, too_small: MemoryPlan) -> None:
    title, verdict = rendered(plan_table(plan)).splitlines()[:2]
    assert title.startswith("16GiB: 15.0 GiB of 16.0 GiB usable")
    assert verdict == f"It fits: {gib(plan.phases[plan.worst])} at most, while it {'rolls out' if plan.worst == 'rollout' else 'learns'}."
    verdict, way = rendered(plan_table(too_small), 120).splitlines()[1:3]
    assert verdict.startswith(f"It does not fit: {gib(too_small.phases['rollout'])} at most, while it rolls out")
    assert way.startswith("Try rollout.concurrent=") and "Expected" not in rendered(plan_table(too_small))


def test_bars_are_as_long_as_their_phase_and_the_mark_stands_where_memory_ends(plan: MemoryPlan, too_small: MemoryPlan) -> None:
    for shown in (plan, too_small):
        lines = rendered(Bars(shown)).splitlines()
        assert [line.split()[0] for line in lines[: len(PHASES)]] == list(PHASES)
        end = lines[0].index("|")
        assert {line.index("|") for line in lines[: len(PHASES) + 1]} == {end}              # the line below says how much that is
        assert f"{gib(shown.card.usable)} usable" in lines[len(PHASES)]
        for phase, line in zip(PHASES, lines, strict=False):
            length = sum(line[10:68].count(kind.letter) for kind in KINDS)
            assert length == pytest.approx((end - 10) * shown.phases[phase] / shown.card.usable, abs=1)
            assert line.endswith(" !") == (shown.phases[phase] > shown.card.usable)
    inside, beyond = rendered(Bars(too_small)).splitlines()[1][10:68].split("|")
    assert inside.strip() and beyond.split()[0][0] in ".kw"


def test_colours_stand_where_there_are_some(plan: MemoryPlan) -> None:
    text = rendered(Bars(plan), colours=True)
    assert "██ KV cache" in text.replace("\x1b[33m", "").replace("\x1b[0m", "") and "┃" in text
    assert "█" not in rendered(Bars(plan), encoding="ascii", colours=True) and "█" not in rendered(Bars(plan))


def test_every_line_of_the_bill_is_in_the_table_once(plan: MemoryPlan) -> None:
    rows = Bill(plan).rows()
    assert {phase: sum(row[phase] for row in rows.values()) for phase in PHASES} == plan.phases
    assert {"base (nf4)", "KV cache", "at work", "gradients (fp32)"} <= rows.keys()
    assert all(rows["at work"][phase] for phase in ("rollout", "scoring", "backward", "export"))
    assert {item.name for item in plan.items if kind_of(plan, item.name) is REST} == {"libraries' workspaces", "margin (4%)"}
    assert {len(item.phases) for item in plan.items if kind_of(plan, item.name) is WORK} == {1}
    text = rendered(Bill(plan)).splitlines()
    assert text[0].split() == ["MiB", *PHASES] and text[-1].split()[ROLLOUT] == f"{plan.phases['rollout'] / 2**20:.1f}"
    assert len(text) == 2 + len([row for row in rows.values() if max(row.values()) >= 2**20 / 20])       # no name is wrapped, nothing is all blank
    assert rendered(Bill(plan), 60).splitlines()[0].split() == ["MiB", *SHORT.values()]


def test_knobs_that_do_nothing_take_one_line(plan: MemoryPlan) -> None:
    text = words(rendered(Knobs(plan)))
    assert "rollout.concurrent=64 as set" in text and "memory.micro_batch_tokens=256 as set" in text
    told, idle = text.split("not needed: ")
    assert "memory.offload=false" in idle and "memory.kv_cache=full" in idle and "memory.offload" not in told and "directions" not in text
    told = words(rendered(Knobs(knob(plan, offload=True, kv_cache="int8")))).split("not needed: ")[0]
    assert "memory.offload=true for a test" in told and "memory.kv_cache=int8 for a test" in told


def test_what_waits_on_the_host_is_held_against_the_computer(plan: MemoryPlan) -> None:
    assert "own memory instead" not in rendered(plan_table(plan))
    moved = knob(plan, embedding_on_host=True)
    (need,) = moved.host
    told = words(rendered(plan_table(moved)))
    assert f"In the computer's own memory instead embedding {gib(need.bytes)} all the time" in told and "this computer" not in told
    assert "this computer has 3.0 GiB free of 8.0 GiB" in rendered(plan_table(moved, (3 * 2**30, 8 * 2**30)))
    here = replace(moved, card=replace(moved.card, pinned=2 * 2**30))
    assert "about 2.0 GiB of it may be pinned" in rendered(plan_table(here)) and "pinned" not in told
    assert f"{gib(need.bytes - 1)} free of 8.0 GiB: too little" in rendered(plan_table(moved, (need.bytes - 1, 8 * 2**30)))


def test_speed_and_lessons_are_told_where_there_are_any(plan: MemoryPlan) -> None:
    text = words(rendered(plan_table(plan, passes=0)))
    assert "Expected on a card like the RTX 4060 Ti 16GB: " in text and "64 responses of 192 tokens, 256 with their prompts" in text
    assert "tokens/s" in text and "1 wave of 64" in text and " scoring " not in text.split("Expected")[1]
    assert " scoring " in words(rendered(plan_table(plan, passes=2))).split("Expected")[1]
    slow = replace(plan, card=replace(plan.card, bandwidth=None, flops=None, assumed=None))
    assert "Expected" not in rendered(plan_table(slow)) and as_dict(slow)["speed"] is None
    assert "Past runs" not in text
    taught = words(rendered(plan_table(replace(plan, learned={"backward": 1.25, "scoring": 1.0}))))
    assert "as a multiple of the plan: backward 1.25. What exceeds 1 is counted above" in taught and "more, as earlier runs measured" in taught


def test_several_cards(plan: MemoryPlan, too_small: MemoryPlan) -> None:
    text = rendered(cards_table([plan, too_small], passes=1))
    rows = text.splitlines()
    assert rows[0].split()[:2] == ["card", "fits"] and rows[1].split()[:2] == ["16GiB", "yes"] and rows[2].split()[:2] == ["small", "no"]
    assert "64 of 64" in rows[1] and "256" in rows[1] and "64 of 64" not in rows[2]
    assert "small: " in words(text) and "while it rolls out; try rollout.concurrent=" in words(text)
    assert "16GiB RTX 4060 Ti 16GB" in words(text)


def test_json_has_everything(plan: MemoryPlan, too_small: MemoryPlan) -> None:
    values = json.loads(json.dumps(as_dict(replace(plan, learned={"rollout": 1.1}), passes=1)))
    assert set(values) == {"fits", "card", "phases", "knobs", "items", "host", "not_counted", "speed", "learned", "way_out"}
    assert values["learned"] == {"rollout": 1.1} and values["way_out"] is None
    speed = values["speed"]
    assert speed["assumed"] == "RTX 4060 Ti 16GB" and set(speed["parts"]) == {"rollout", "scoring", "learning"}
    assert speed["seconds"] == pytest.approx(sum(part["seconds"] for part in speed["parts"].values()))
    assert all(part["tokens_per_second"] == pytest.approx(part["tokens"] / part["seconds"]) for part in speed["parts"].values())
    assert as_dict(too_small)["way_out"].startswith("try rollout.concurrent=")
