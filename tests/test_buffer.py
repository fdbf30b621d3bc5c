"""Which prompts come when, and that a resumed run is asked the same."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from localrl.batch import Prompt, Rollout
from localrl.buffer import PromptStream, RolloutBuffer


def stream(count: int, seed: int = 0, shuffle: bool = True) -> PromptStream:
    return PromptStream([Prompt(i, (i,), "") for i in range(count)], seed, shuffle)


@given(count=st.integers(1, 12), takes=st.lists(st.integers(1, 20), min_size=1, max_size=6), cut=st.integers(0, 5))
def test_every_epoch_is_a_permutation_and_a_position_says_it_all(count: int, takes: list[int], cut: int) -> None:
    whole = stream(count)
    parts = [[p.id for p in whole.take(size)] for size in takes]
    flat = [i for part in parts for i in part]
    assert whole.position == len(flat)
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    resumed = stream(count)
    resumed.position = sum(takes[:cut])
    assert [[p.id for p in resumed.take(size)] for size in takes[cut:]] == parts[cut:]


def test_epochs_and_seeds_differ_and_order_can_be_the_files() -> None:
    one = [p.id for p in stream(20).take(40)]
    assert one[:20] != one[20:]
    assert one[:20] != [p.id for p in stream(20, seed=1).take(20)]
    assert [p.id for p in stream(3, shuffle=False).take(5)] == [0, 1, 2, 0, 1]


def test_a_prompt_that_comes_twice_gets_other_samples() -> None:
    """Sample numbers name the random stream: two equal ones would be the same rollout."""
    buffer = RolloutBuffer(stream(2), prompts_per_step=5, num_generations=3)
    requests = buffer.requests()
    assert len(requests) == 15
    assert set(Counter((r.prompt.id, r.sample) for r in requests).values()) == {1}


def test_what_is_drawn_is_gone() -> None:
    buffer = RolloutBuffer(stream(4), 2, 2)
    rollouts = [Rollout(r, (1,), "", True, 0) for r in buffer.requests()]
    buffer.add(rollouts)
    assert buffer.draw() == rollouts
    assert buffer.draw() == []
    other = RolloutBuffer(stream(4), 2, 2)
    other.restore(buffer.state())
    assert other.requests() == buffer.requests()
