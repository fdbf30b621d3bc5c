"""On-policy groups, and dynamic sampling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrl.batch import Request
from localrl.buffer import GroupBuffer
from localrl.buffer.groups import has_signal
from tests.buffer.rollouts import goes_on_alike, one_step, rollout, sample, settings, stream

DYNAMIC = settings(3, 2, dynamic_sampling=True, max_resamples=2)


def test_a_prompt_that_comes_twice_gets_other_samples() -> None:
    """Sample numbers name the random stream: two equal ones would be the same rollout."""
    asked = settings(5, 3)
    requests = GroupBuffer(stream(2), asked, ()).requests(0)
    assert len(requests) == 15
    assert set(Counter((r.prompt.id, r.sample) for r in requests).values()) == {1}


def test_what_is_drawn_is_gone() -> None:
    asked = settings(2, 2)
    buffer = GroupBuffer(stream(4), asked, (1.0,))
    assert not buffer.ready
    rollouts = [sample(r, 0, asked) for r in buffer.requests(0)]
    buffer.add(rollouts)
    assert buffer.ready and buffer.requests(0) == []
    assert buffer.draw(0) == rollouts and not buffer.ready and buffer.metrics() == {}
    second = one_step(buffer, 1, asked)
    assert {r.request.prompt.id for r in (*rollouts, *second)} == {0, 1, 2, 3}


def odd_teach(request: Request, step: int) -> Sequence[float]:
    """Odd prompts' samples differ, even ones' are all alike."""
    return (float(request.prompt.id % 2 and request.sample % 2),)


def test_only_the_missing_groups_are_sampled_again() -> None:
    buffer = GroupBuffer(stream(6, shuffle=False), DYNAMIC, (1.0,))
    first = buffer.requests(0)                                            # 0, 1, 2
    buffer.add([sample(r, 0, DYNAMIC, odd_teach) for r in first])
    assert not buffer.ready
    second = buffer.requests(0)                                           # 3, 4: one group is there
    assert [r.prompt.id for r in second] == [3, 3, 4, 4]
    buffer.add([sample(r, 0, DYNAMIC, odd_teach) for r in second])
    third = buffer.requests(0)
    assert [r.prompt.id for r in third] == [5, 5]
    buffer.add([sample(r, 0, DYNAMIC, odd_teach) for r in third])
    assert buffer.ready and buffer.requests(0) == []
    assert [r.request.prompt.id for r in buffer.draw(0)] == [1, 1, 3, 3, 5, 5]
    assert buffer.metrics() == {"buffer/resamples": 2, "buffer/flat_groups": 3, "buffer/flat_drawn": 0}


def test_a_step_is_full_even_where_nothing_teaches() -> None:
    buffer = GroupBuffer(stream(4), DYNAMIC, (1.0,))
    drawn = one_step(buffer, 0, DYNAMIC)
    assert len(drawn) == 6 and buffer.stream.position == 9                # three rounds of three
    assert buffer.metrics() == {"buffer/resamples": 2, "buffer/flat_groups": 9, "buffer/flat_drawn": 3}
    assert len(one_step(buffer, 1, DYNAMIC)) == 6


@given(count=st.integers(1, 7), prompts=st.integers(1, 5), group=st.integers(2, 4), rounds=st.integers(0, 3), teaching=st.sets(st.integers(0, 6)))
def test_a_step_has_all_its_groups_and_no_sample_twice(count: int, prompts: int, group: int, rounds: int, teaching: set[int]) -> None:
    asked = settings(prompts, group, dynamic_sampling=True, max_resamples=rounds)
    buffer = GroupBuffer(stream(count), asked, (1.0,))
    for step in range(3):
        drawn = one_step(buffer, step, asked, lambda request, _: (float(request.prompt.id in teaching and request.sample % group == 0),))
        keys = [(r.request.prompt.id, r.request.sample) for r in drawn]
        assert len(drawn) == len(set(keys)) == prompts * group
        flat = sum(r.request.prompt.id not in teaching for r in drawn)
        assert flat == buffer.metrics()["buffer/flat_drawn"] * group
        assert buffer.metrics()["buffer/resamples"] <= rounds
        order = [prompt for prompt, _ in keys]
        assert sum(a != b for a, b in pairwise(order)) == len(set(order)) - 1          # side by side


@pytest.mark.parametrize(
    ("rewards", "weights", "total", "each"),
    [
        ([(0.0, 1.0), (1.0, 0.0)], (1.0, 1.0), False, True),              # cancel in the sum
        ([(0.0, 1.0), (1.0, 1.0)], (0.0, 1.0), False, False),             # what differs does not count
        ([(math.nan, 1.0), (math.nan, 2.0)], (1.0, 1.0), True, True),
        ([(math.nan, math.nan), (0.0, 1.0)], (1.0, 1.0), False, False),   # only one is known
        ([(math.nan, math.nan)] * 2, (1.0, 1.0), False, False),
    ],
)
def test_signal(rewards: list[tuple[float, ...]], weights: tuple[float, ...], total: bool, each: bool) -> None:
    group = [rollout(0, [1], r) for r in rewards]
    assert has_signal(group, weights) is total
    assert has_signal(group, weights, each_reward=True) is each


def test_resumed_and_rolled_back_runs_go_on_alike() -> None:
    goes_on_alike(lambda: GroupBuffer(stream(5), DYNAMIC, (1.0,)), DYNAMIC, odd_teach)
