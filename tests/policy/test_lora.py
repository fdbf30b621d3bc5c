"""The short way through an adapted layer equals PEFT's, in value and gradient, on every kind of base and in every type."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localrl.policy import lora
from localrl.policy.lora import Folding, fold_adapters
from localrl.policy.policy import Policy
from tests.policy.test_policy import QUANTIZATIONS, a_batch, a_policy, a_run, gradients

Make = Callable[..., Path]


def folding(policy: Policy) -> list[Any]:
    return [m for m in policy.model.modules() if isinstance(m, Folding)]


def unfold(policy: Policy) -> None:
    """PEFT's own class again."""
    for layer in folding(policy):
        layer.__class__ = type(layer).__mro__[2]


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of all gradients together, as a share of their length."""
    assert found.keys() == truth.keys()
    return float(sum((found[n] - truth[n]).square().sum() for n in truth) / sum(g.square().sum() for g in truth.values())) ** 0.5


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])                # with and without a bias
@pytest.mark.parametrize("checkpointing", [False, True])
def test_folded_layers_equal_pefts(make_model: Make, quantization: str, family: str, checkpointing: bool) -> None:
    policy = a_policy(a_run(make_model(family), model={"quantization": quantization}), checkpointing=checkpointing)
    assert len(folding(policy)) == 14
    batch = a_batch()
    short, value = gradients(policy, batch), policy.read(batch, {"logp", "ref"})
    unfold(policy)
    long, other = gradients(policy, batch), policy.read(batch, {"logp", "ref"})
    torch.testing.assert_close(value.logp, other.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.ref, other.ref, rtol=1e-5, atol=1e-5)
    for name, gradient in short.items():
        assert (gradient - long[name]).norm() <= 1e-5 * long[name].norm(), name
    assert fold_adapters(policy.model) == 14


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_is_as_near_to_the_truth_as_pefts(make_model: Make, quantization: str, checkpointing: bool) -> None:
    """Two ways of rounding every activation differ by as much as each from float32: the truth is the judge."""
    folder, batch = make_model("qwen2"), a_batch()
    kinds = {"quantization": quantization}
    exact = a_policy(a_run(folder, model=kinds), checkpointing=checkpointing)
    policy = a_policy(a_run(folder, model=kinds | {"compute_dtype": "bfloat16"}), checkpointing=checkpointing)
    assert len(folding(policy)) == 14
    truth = gradients(exact, batch)
    short, value = gradients(policy, batch), policy.read(batch, {"logp", "ref"})
    unfold(policy)
    long, other = gradients(policy, batch), policy.read(batch, {"logp", "ref"})
    with torch.no_grad():
        readout = exact.read(batch, {"logp"})
    assert torch.equal(value.ref, other.ref)                          # adapters off: the base as it is
    assert all(gradient.dtype == torch.float32 for gradient in short.values())
    ours, theirs = (distance({"": one.logp.detach()}, {"": readout.logp}) for one in (value, other))
    assert ours < 1.3 * theirs
    assert distance(short, truth) < 1.3 * distance(long, truth)
    assert distance(short, long) < 0.03


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("fused", [False, True])
def test_one_layer_in_half_precision(make_model: Make, quantization: str, kind: str, fused: bool, request: pytest.FixtureRequest) -> None:
    if fused:
        request.getfixturevalue("mixed_kernel")
    dtype = getattr(torch, kind)
    policy = a_policy(a_run(make_model("qwen2"), model={"quantization": quantization, "compute_dtype": kind}))
    layer: Any = next(m for n, m in policy.model.named_modules() if n.endswith("0.self_attn.q_proj"))
    x, dy = torch.randn(3, 5, 64).to(dtype), torch.randn(3, 5, 64).to(dtype)

    def run() -> list[Tensor]:
        leaf, wanted = x.clone().requires_grad_(), [layer.lora_A["policy"].weight, layer.lora_B["policy"].weight]
        out = layer(leaf)
        assert out.dtype == dtype
        return [out.detach().float(), *(g.float() for g in torch.autograd.grad(out, [leaf, *wanted], dy))]

    short = run()
    unfold(policy)
    for ours, theirs in zip(short, run(), strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_what_a_layer_keeps(make_model: Make) -> None:
    """Its input, which other layers keep as well, and r numbers a token."""
    policy = a_policy(a_run(make_model(), model={"compute_dtype": "bfloat16"}))
    layers: list[Any] = [m for n, m in policy.model.named_modules() if n.endswith(("0.self_attn.q_proj", "0.self_attn.k_proj"))]
    x = torch.randn(3, 5, 64).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _outputs = [layer(x) for layer in layers]
    weights = {p.data_ptr() for p in policy.model.parameters()}
    own = {t.untyped_storage().data_ptr(): t for t in kept if t.data_ptr() not in weights}
    assert sorted(t.nbytes for t in own.values()) == [15 * 4 * 2, 15 * 4 * 2, x.nbytes]


def test_two_adapters_dropout_or_autocast_are_left_to_peft(make_model: Make) -> None:
    policy: Any = a_policy(a_run(make_model(), model={"quantization": "none"}), critic=True)
    layer, x = folding(policy)[0], torch.randn(3, 64)
    one = layer(x)
    layer._active_adapter = ["policy", "critic"]
    assert not torch.allclose(layer(x), one)                         # the critic's B is perturbed too
    layer._active_adapter = ["policy"]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.lora_dropout["policy"] = torch.nn.Dropout(0.9)
    assert not torch.allclose(layer(x), one)
    layer.lora_dropout["policy"] = torch.nn.Identity()
    assert torch.equal(layer(x), one)


@pytest.fixture
def mixed_kernel() -> Iterator[None]:
    """torch.mm(half, half, out_dtype=float32), which PyTorch has for CUDA alone, for the CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, out_dtype: torch.mm(a.to(out_dtype), b.to(out_dtype)), "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("mixed_kernel")
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_float16_products_keep_small_and_large_factors(size: float) -> None:
    wide, half = torch.randn(7, 40) * size, torch.randn(40, 9).half()
    truth = wide.double() @ half.double()
    assert (lora.product(wide, half) - truth).norm() < 1e-3 * truth.norm()
    assert (lora.product(half.T, wide.T) - truth.T).norm() < 1e-3 * truth.norm()
    assert not lora.product(0 * wide, half).any()
