"""The short way through an adapted layer equals PEFT's, in value and gradient, on every kind of base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from localrl.policy.lora import Folding, fold_adapters
from tests.policy.test_policy import a_batch, a_policy, a_run, gradients


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])                # with and without a bias
@pytest.mark.parametrize("checkpointing", [False, True])
def test_folded_layers_equal_pefts(make_model: Callable[..., Path], quantization: str, family: str, checkpointing: bool) -> None:
    policy = a_policy(a_run(make_model(family), model={"quantization": quantization}), checkpointing=checkpointing)
    layers = [m for m in policy.model.modules() if isinstance(m, Folding)]
    assert len(layers) == 14
    batch = a_batch()
    short, value = gradients(policy, batch), policy.read(batch, {"logp", "ref"})
    for layer in layers:
        layer.__class__ = type(layer).__mro__[2]                     # PEFT's own class again
    long, other = gradients(policy, batch), policy.read(batch, {"logp", "ref"})
    torch.testing.assert_close(value.logp, other.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.ref, other.ref, rtol=1e-5, atol=1e-5)
    for name, gradient in short.items():
        assert (gradient - long[name]).norm() <= 1e-5 * long[name].norm(), name
    assert fold_adapters(policy.model) == 14


def test_half_precision_keeps_pefts_way(make_model: Callable[..., Path]) -> None:
    policy = a_policy(a_run(make_model(), model={"compute_dtype": "bfloat16"}))
    assert not any(isinstance(m, Folding) for m in policy.model.modules())


def test_an_autocast_or_second_adapter_is_left_to_peft(make_model: Callable[..., Path]) -> None:
    policy: Any = a_policy(a_run(make_model()), critic=True)
    layer = next(m for m in policy.model.modules() if isinstance(m, Folding))
    x = torch.randn(3, 64)
    layer._active_adapter = ["policy", "critic"]
    both = layer(x)
    layer._active_adapter = ["policy"]
    assert not torch.allclose(both, layer(x))                        # the critic's B is perturbed too
