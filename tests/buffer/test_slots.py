"""Windows: every token is learned from once, in the step that wrote it, with what its own sampler said of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from localrl.batch import collate
from localrl.buffer import GroupBuffer, SlotBuffer
from localrl.settings import UserError
from tests.buffer.rollouts import goes_on_alike, one_step, sample, settings, stream


@given(count=st.integers(1, 5), prompts=st.integers(1, 3), group=st.integers(1, 4), window=st.integers(1, 6), limit=st.integers(1, 14))
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_token_is_fresh_once_and_keeps_its_first_log_probability(count: int, prompts: int, group: int, window: int, limit: int) -> None:
    asked = settings(prompts, group, window=window, max_completion_length=limit)
    buffer = SlotBuffer(stream(count), asked)
    growing: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    for step in range(12):
        told = [sample(request, step, asked) for request in buffer.requests(step)]
        keys = [(r.request.prompt.id, r.request.sample) for r in told]
        assert len(told) == len(set(keys)) == prompts * group and not buffer.ready
        going = [key for key, r in zip(keys, told, strict=True) if r.request.so_far]
        assert going == keys[: len(going)] and set(going) == set(growing)                       # what goes on comes first, and all of it
        buffer.add(told)
        assert buffer.ready
        drawn = buffer.draw(step)
        batch = collate(drawn, (1.0,), limit, step)
        first = {key: r.logp for key, r in zip(keys, told, strict=True)}
        for row, r in enumerate(drawn):
            key = (r.request.prompt.id, r.request.sample)
            tokens, logp = growing.pop(key, ([], []))
            old = len(tokens)
            assert list(r.tokens[:old]) == tokens and r.tokens[old:]
            assert [i for i, fresh in enumerate(batch.fresh[row].tolist()) if fresh] == list(range(old, len(r.tokens)))
            said = first[key]
            assert said is not None and r.logp == (*logp, *said[old:]) and not any(map(math.isnan, r.logp))
            if r.more:
                growing[key] = (list(r.tokens), list(r.logp))
            else:
                assert r.done or len(r.tokens) == limit
        assert buffer.metrics()["buffer/unfinished"] == len(growing)


@given(count=st.integers(1, 5), prompts=st.integers(1, 4), group=st.integers(1, 4), limit=st.integers(1, 8), slack=st.integers(0, 2))
def test_a_window_of_the_whole_length_is_no_window(count: int, prompts: int, group: int, limit: int, slack: int) -> None:
    whole = settings(prompts, group, max_completion_length=limit)
    wide = settings(prompts, group, max_completion_length=limit, window=limit + slack)
    slots, groups = SlotBuffer(stream(count), wide), GroupBuffer(stream(count), whole, (1.0,))
    for step in range(4):
        assert one_step(slots, step, wide) == one_step(groups, step, whole)
    assert slots.state()["position"] == groups.state()["position"]


def test_all_samples_of_a_prompt_start_and_prompts_come_in_turn() -> None:
    asked = settings(2, 3, window=2, max_completion_length=9)
    buffer = SlotBuffer(stream(50), asked)
    started = []
    for step in range(20):
        started += [(r.request.prompt.id, r.request.sample) for r in one_step(buffer, step, asked) if not r.request.so_far]
    order = [p.id for p in stream(50).take(50)]
    expected = [(prompt, number) for prompt in order for number in range(3)]
    assert sorted(started) == sorted(expected[: len(started)]) and len(started) > 30


def test_an_engine_that_knows_no_log_probabilities_leaves_none() -> None:
    asked = settings(1, 1, window=1, max_completion_length=3)
    buffer = SlotBuffer(stream(9), asked)
    for step in range(6):
        buffer.add([replace(sample(request, step, asked), logp=None) for request in buffer.requests(step)])
        assert [r.logp for r in buffer.draw(step)] == [None]


def test_resumed_and_rolled_back_runs_go_on_alike() -> None:
    asked = settings(2, 3, window=2, max_completion_length=7)
    goes_on_alike(lambda: SlotBuffer(stream(3), asked), asked, lambda *_: (math.nan,))


def test_a_state_of_other_data_is_refused() -> None:
    asked = settings(2, 3, window=1, max_completion_length=7)
    buffer = SlotBuffer(stream(9), asked)
    one_step(buffer, 0, asked)
    with pytest.raises(UserError, match="resume with the data that the run began with"):
        SlotBuffer(stream(1), asked).restore(buffer.state())
