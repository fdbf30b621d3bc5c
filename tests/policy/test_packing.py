"""Rows laid end to end say what each would say by itself, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localrl.policy.packing import CALL_TOKENS, Layout, can_pack, cheapest_cuts, current, packed_attention
from tests.policy.test_policy import a_batch, a_policy, a_run, gradients

SIZES = ((5, 7), (5, 3), (9, 1), (2, 6), (30, 40))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 16}, "smollm3": {"pad_token_id": 0}, "phi3": {"sliding_window": 16, "pad_token_id": 0},
    "gemma2": {"sliding_window": 16, "head_dim": 16}, "gemma3_text": {"sliding_window": 16, "head_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_read_as_it_would_be_by_itself(make_model: Callable[..., Path], family: str) -> None:
    """Mixed lengths, windows that are passed, soft-capped scores: the model's own attention, row by row, is the truth."""
    targets = {"lora_target_modules": ["o_proj", "down_proj"]}
    policy, batch = a_policy(a_run(make_model(family, **FAMILIES[family]), adapter=targets)), a_batch(sizes=SIZES)
    assert can_pack(policy.model.get_base_model())
    packed, packed_gradients = policy.read(batch, {"logp", "entropy"}), gradients(policy, batch)
    policy.model.get_base_model()._supports_attention_backend = False
    single, single_gradients = policy.read(batch, {"logp", "entropy"}), gradients(policy, batch)
    torch.testing.assert_close(packed.logp, single.logp, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(packed.entropy, single.entropy, rtol=1e-4, atol=2e-5)
    for name, gradient in single_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7, msg=name)


def test_a_layout_knows_where_everything_lies() -> None:
    batch = a_batch(sizes=((3, 2), (1, 3)))
    layout = Layout.of(batch)
    assert layout.lengths == (5, 4)
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert layout.rows.tolist() == [0] * 5 + [1] * 4
    assert layout.predicting(True).tolist() == [2, 3, 5, 6, 7]
    assert layout.tokens[layout.predicting(True) + 1].tolist() == batch.tokens[batch.mask].tolist()
    assert current() is None


def test_attention_outside_of_a_reading_is_refused() -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="outside of a reading"):
        packed_attention(None, x, x, x, None)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_cuts_cover_every_row_once_and_never_cost_more_than_the_plain_ways(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    cuts = cheapest_cuts(lengths)
    assert [row for start, end in cuts for row in range(start, end)] == list(range(len(lengths)))
    cost = sum((end - start) * lengths[start] + CALL_TOKENS for start, end in cuts)
    assert cost <= min(len(lengths) * lengths[0] + CALL_TOKENS, sum(lengths) + len(lengths) * CALL_TOKENS)
