"""Replay: what is kept, and what is drawn from it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from localrl.batch import Request
from localrl.buffer import ReplayBuffer
from localrl.buffer.keep import Kept, merge, pick, probabilities, take_turn
from localrl.sections import ReplaySettings
from localrl.settings import UserError
from tests.buffer.rollouts import goes_on_alike, one_step, rollout, sample, settings, stream

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "tba_buffer.json").read_text())["cases"]


def make(prompts: int = 4, per_step: int = 2, group: int = 2, *, weights: Sequence[float] = (1.0,), filters: Sequence[tuple[int, float]] = (),
         least: int = 2, asynchronous: bool = False, **replay: Any) -> ReplayBuffer:  # fmt: skip
    return ReplayBuffer(stream(prompts), settings(per_step, group), ReplaySettings(**{"capacity": 8} | replay), weights, filters, least, asynchronous)


def test_what_is_kept_evolves_as_in_the_authors_buffer() -> None:
    """Of one policy's responses the authors put later ones before earlier ones; here they come in the order of their arrival."""
    buffer = make(1, capacity=4, sync_every=2)
    arrivals: list[tuple[int, list[tuple[list[int], float]]]] = [
        (0, [([1, 2], 0.0), ([1, 3], 1.0), ([1, 2], 0.0)]), (4, [([1, 2], 0.5), ([7, 7], 2.0)]), (4, [([8, 8], 0.0)]), (6, [([9, 9], 1.0)]),
    ]  # fmt: skip
    for (step, items), expected in zip(arrivals, VECTORS[0]["expected"], strict=True):
        buffer.requests(step)
        buffer.add([rollout(0, tokens, (score,), version=step) for tokens, score in items])
        kept = buffer._kept[0]
        wanted = {tuple(tokens): rest for tokens, *rest in zip(*(expected[k] for k in ("responses", "iters", "scores")), strict=True)}
        assert {item.rollout.tokens: [item.rollout.version, item.total] for item in kept} == wanted
        assert [item.rollout.version for item in kept] == sorted(item.rollout.version for item in kept)
        assert len(buffer._recent(step)[0]) == expected["n_online"]
        chance = dict(zip(map(tuple, expected["responses"]), expected["prob"], strict=True))
        assert {item.rollout.tokens: p for item, p in zip(kept, probabilities(kept, 1.0), strict=True)} == pytest.approx(chance)


def test_reward_draws_include_rollouts_as_often_as_the_authors() -> None:
    case = VECTORS[1]
    kept = [Kept(rollout(0, [i]), math.log(p), 0) for i, p in enumerate(case["inputs"]["prob"])]
    chance, draws = random.Random(0), case["inputs"]["draws"]
    counts = Counter(r.tokens[0] for _ in range(draws) for r in pick(kept, case["inputs"]["num_samples"], 1.0, chance))
    assert [counts[i] / draws for i in range(4)] == pytest.approx(case["expected"]["inclusion"], abs=0.015)


def test_draws_are_without_replacement_if_there_are_enough() -> None:
    kept = [Kept(rollout(0, [i]), 1000.0 * i, 0) for i in range(3)]                 # exp would overflow, or underflow
    assert {r.tokens for r in pick(kept, 3, 1.0, random.Random(0))} == {(0,), (1,), (2,)}
    assert len(pick(kept, 7, 0.0, random.Random(0))) == 7
    uniform = Counter(r.tokens[0] for seed in range(6000) for r in pick(kept, 1, 0.0, random.Random(seed)))
    assert [uniform[i] / 6000 for i in range(3)] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_an_older_copy_does_not_replace_a_newer_one() -> None:
    newer, older = Kept(rollout(0, [1], version=5), 0.0, 5), Kept(rollout(0, [1], version=3), 0.0, 6)
    assert merge([newer], [older], 8) == (newer,)


def test_prompts_take_turns() -> None:
    used: set[int] = set()
    order = [take_turn(range(5), used, set(), random.Random(i)) for i in range(15)]
    for start in (0, 5, 10):
        assert sorted(order[start : start + 5]) == list(range(5))
    taken: set[int] = set()
    assert len({take_turn(range(5), {0, 1, 2}, taken, random.Random(0)) for _ in range(5)}) == 5


def binary(request: Request, step: int) -> Sequence[float]:
    return (float((request.prompt.id + request.sample) % 2),)


def test_sampled_and_drawn_stay_in_proportion() -> None:
    buffer = make(7, per_step=2, group=3, sync_every=3)
    asked = settings(2, 3)
    numbers = []
    for step in range(9):
        requests = buffer.requests(step)
        numbers.append(len(requests))
        assert len({(r.prompt.id, r.sample) for r in requests}) == len(requests)
        buffer.add([sample(r, step, asked, binary) for r in requests])
        assert len(buffer.draw(step)) == 6
        assert buffer.metrics()["buffer/staleness/max"] <= step
    assert numbers == [18, 0, 0] * 3


def test_the_recent_share_is_what_was_just_sampled() -> None:
    asked = settings(2, 2)
    buffer = make(40, recent=1.0, sync_every=2)
    for step in range(10):
        drawn = one_step(buffer, step, asked, binary)
        assert {r.version for r in drawn} == {step - step % 2}
        assert buffer.metrics()["buffer/recent"] == 1
    turns = make(40, recent=1.0, sync_every=2)
    seen = [r.request.prompt.id for step in range(2) for r in one_step(turns, step, asked, binary)]
    assert set(Counter(seen).values()) == {2} and len(set(seen)) == 4                # all four sampled prompts got one turn
    old = make(40, recent=0.0)
    versions = [{r.version for r in one_step(old, step, asked, binary)} for step in range(12)]
    assert any(min(found) < step for step, found in enumerate(versions)) and old.metrics()["buffer/recent"] == 0


def test_old_rollouts_go() -> None:
    asked = settings(2, 2)
    buffer = make(40, recent=0.0, max_staleness=2)
    expired = 0.0
    for step in range(8):
        assert all(step - r.version <= 2 for r in one_step(buffer, step, asked, binary))
        expired += buffer.metrics()["buffer/expired"]
    assert expired > 0
    assert all(7 - item.rollout.version <= 2 for items in buffer._kept.values() for item in items)


def test_when_all_are_too_old_new_ones_are_sampled_early() -> None:
    buffer = make(40, sync_every=4, max_staleness=1)
    for step in range(4):
        assert {step - r.version for r in one_step(buffer, step, settings(2, 2), binary)} <= {0, 1}


def test_filters_and_missing_rewards() -> None:
    buffer = make(4, weights=(1.0, 1.0), filters=[(1, 0.5)])
    buffer.requests(0)
    buffer.add([rollout(0, [i], rewards) for i, rewards in enumerate([(1.0, 0.4), (1.0, 0.5), (1.0, math.nan), (math.nan, 0.9), (math.nan, math.nan)])])
    assert [item.rollout.tokens for item in buffer._kept[0]] == [(1,), (3,)]
    buffer.draw(0)
    metrics = buffer.metrics()
    assert (metrics["buffer/refused"], metrics["buffer/unscored"], metrics["buffer/size"]) == (2, 1, 2)


def test_a_run_that_keeps_nothing_ends_with_a_sentence() -> None:
    with pytest.raises(UserError, match=r"replay\.filters"):
        one_step(make(filters=[(0, 2.0)]), 0, settings(2, 2), binary)


def test_the_first_update_waits_for_the_prefill() -> None:
    asked = settings(2, 2)
    buffer = make(3, prefill=11)
    assert not buffer.ready
    rounds = []
    while not buffer.ready:
        rounds.append(buffer.requests(0))
        buffer.add([sample(r, 0, asked, binary) for r in rounds[-1]])
    assert len(rounds) == 3
    flat = [(r.prompt.id, r.sample) for requests in rounds for r in requests]
    assert len(set(flat)) == len(flat) == 12                                        # asked again at the same weights: other samples


def test_prompts_with_one_response_wait() -> None:
    buffer = make(4, group=4)
    buffer.requests(0)
    buffer.add([rollout(0, [1], (1.0,)), rollout(1, [1], (1.0,)), rollout(1, [2], (0.0,))])
    assert {r.request.prompt.id for step in range(9) for r in buffer.draw(step)} == {1}
    single = make(4, least=1)
    single.requests(0)
    single.add([rollout(0, [1], (1.0,)), rollout(1, [1], (1.0,))])
    assert {r.request.prompt.id for r in single.draw(0)} == {0, 1}
    poor = make(4)
    poor.requests(0)
    poor.add([rollout(0, [1], (1.0,))])
    assert poor.ready and len(poor.draw(0)) == 4 and poor.metrics()["buffer/repeats"] == 0.75


def test_searchers_are_asked_at_every_step_and_may_answer_late() -> None:
    asked = settings(2, 2)
    buffer = make(9, asynchronous=True, sync_every=2)
    late: list[list[Any]] = []
    for step in range(8):
        requests = buffer.requests(step)
        assert len(requests) == 4
        late.append([sample(r, step, asked, binary) for r in requests])
        buffer.add(late[step - 2] if step >= 2 else [])
        assert buffer.ready is (step >= 2)
        if buffer.ready:
            drawn = buffer.draw(step)
            assert len(drawn) == 4 and all(r.version <= step - 2 for r in drawn)


@pytest.mark.parametrize("kind", [{}, {"sync_every": 3, "recent": 0.9}, {"max_staleness": 2, "draw": "uniform"}, {"capacity": 3, "prefill": 9}])
def test_resumed_and_rolled_back_runs_go_on_alike(kind: dict[str, Any]) -> None:
    goes_on_alike(lambda: make(5, per_step=2, group=3, **kind), settings(2, 3), binary)
