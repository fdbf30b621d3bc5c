"""Which prompts come when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.buffer.rollouts import stream


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
    singly = stream(count)
    assert [singly.take(1)[0].id for _ in flat] == flat


def test_epochs_and_seeds_differ_and_order_can_be_the_files() -> None:
    one = [p.id for p in stream(20).take(40)]
    assert one[:20] != one[20:]
    assert one[:20] != [p.id for p in stream(20, seed=1).take(20)]
    assert [p.id for p in stream(3, shuffle=False).take(5)] == [0, 1, 2, 0, 1]
