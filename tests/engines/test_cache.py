"""The cache by itself: what it frees when, and the short way to a state that steps would reach."""

from __future__ import annotations

import pytest
import torch

from localrl.engines.cache import BLOCK, Cache, Shape
from localrl.engines.store import EightBit, Store
from tests.memory.tracker import StorageTracker

SHAPE = Shape(layers=4, heads=4, kv_heads=2, width=16, scale=0.25, dtype=torch.float32)
ROOM = 60


def make(fixed: bool = False, eight_bit: bool = False) -> Cache:
    """Prompts of 9, 5 and 7 tokens, asked by 3, 1 and 2 rows."""
    return Cache(SHAPE, [9, 5, 7], [0, 0, 0, 1, 2, 2], ROOM, torch.device("cpu"), fixed, eight_bit)


def tensors(cache: Cache) -> list[torch.Tensor]:
    stores: list[Store | None] = [*cache.prompts, *cache.full]
    kept = [[s.codes, s.scales] if isinstance(s, EightBit) else [s.values] for s in stores if s is not None]  # type: ignore[attr-defined]
    return [*cache.state, cache.past, *cache.blocks, *(tensor for some in kept for tensor in some)]


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("columns", [0, 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5, ROOM])
def test_filling_leads_where_steps_lead(monkeypatch: pytest.MonkeyPatch, fixed: bool, eight_bit: bool, columns: int) -> None:
    monkeypatch.setattr("localrl.engines.cache.FIRST_WIDTH", BLOCK)
    stepped, filled = make(fixed, eight_bit), make(fixed, eight_bit)
    for _ in range(columns):
        stepped.grow()
        stepped.advance()
        for layer in range(SHAPE.layers):
            stepped.attend(layer, torch.zeros(6, 4, 16), torch.zeros(6, 2, 16), torch.zeros(6, 2, 16))
    filled.fill(columns)
    for _ in range(2):
        assert stepped.form == filled.form and (stepped.column, stepped.joined) == (filled.column, filled.joined)
        for a, b in zip(tensors(stepped), tensors(filled), strict=True):
            assert a.shape == b.shape and a.stride() == b.stride()
            torch.testing.assert_close(a, b, atol=1e-30, rtol=0)     # a scale of nothing is not quite 0
        if columns < ROOM:
            for cache in (stepped, filled):
                cache.grow()


@pytest.mark.parametrize("eight_bit", [False, True])
def test_moving_takes_a_piece_of_one_layer_beside_the_cache(eight_bit: bool) -> None:
    with StorageTracker() as tracker:
        cache = make(eight_bit=eight_bit)
        cache.fill(3 * BLOCK)
        peak = tracker.peak_of(cache.grow)
        grown = tracker.now
        assert peak <= grown + grown / SHAPE.layers
        assert tracker.peak_of(lambda: cache.keep([0, 1, 3, 5])) <= grown + 0.75 * grown / SHAPE.layers
        assert tracker.now < 0.8 * grown
        assert tracker.peak_of(lambda: cache.keep([3])) <= tracker.peak
    assert cache.lengths.tolist() == [7] and cache.owner.tolist() == [0] and cache.position.tolist() == [7 - 1 + 3 * BLOCK]
