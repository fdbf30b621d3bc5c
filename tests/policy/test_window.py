"""Windowed attention equals the masked one, and keeps what it was given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localrl.policy.window import windowed


def tensors(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, count, 8).to(dtype).requires_grad_() for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("count", [1, 5, 6, 7, 13, 24])
@pytest.mark.parametrize("window", [1, 6, 30])
def test_value_and_gradients_equal_the_masked_ones(count: int, window: int) -> None:
    q, k, v = tensors(count)
    back = torch.arange(count)[:, None] - torch.arange(count)
    truth = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=(back >= 0) & (back < window), scale=0.3
    )
    ours, dy = windowed(q, k, v, 0.3, window), torch.randn(truth.shape)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    assert ours.transpose(1, 2).is_contiguous()
    for found, wanted in zip(torch.autograd.grad(ours, [q, k, v], dy), torch.autograd.grad(truth, [q, k, v], dy), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-5     # one token's queries and keys have no gradient but rounding


def test_it_keeps_queries_keys_and_values() -> None:
    inputs = tensors(24, torch.bfloat16)
    kept: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        _out = windowed(*inputs, 0.3, 6)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs}


def test_without_gradient() -> None:
    inputs = tensors(9)
    with torch.no_grad():
        out = windowed(*inputs, 0.3, 4)
    assert not out.requires_grad and torch.equal(out, windowed(*inputs, 0.3, 4))
