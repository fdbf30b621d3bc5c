"""Lean norms and MLPs equal transformers' and PEFT's own, in value and gradient, whatever the family, the base, the type and the tile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from localrl.policy.adapters import checkpoint_layers, using
from localrl.policy.gated import Gated, LeanMLP
from localrl.policy.lean import LeanNorm, make_lean
from localrl.policy.load import ADAPTER, CRITIC, attach, freeze, load_base
from localrl.policy.lora import fold_adapters
from tests.conftest import tiny_config
from tests.policy.test_policy import QUANTIZATIONS, a_run

Make = Callable[..., Path]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3"]
WAYS = [(0, False), (3, False), (0, True), (5, True)]
"""Tile, checkpointing; of 18 tokens."""


def a_model(folder: Path, quantization: str = "none", dtype: str = "float32", critic: bool = False) -> Any:
    """As PEFT leaves it, with adapters that have something to say."""
    run = a_run(folder, model={"quantization": quantization, "compute_dtype": dtype}, adapter={"lora_target_modules": "all-linear"})
    model = attach(load_base(run.model), run.adapter, 0, critic)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


def folder_of(make_model: Make, family: str) -> Path:
    return make_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def read(model: Any) -> Tensor:
    tokens = 3 + torch.arange(18).view(2, 9) * 7                       # none of which is padding, all zeros to a norm
    states = model.get_base_model().get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    assert isinstance(states, Tensor)
    return states.float()


def weighed(states: Tensor) -> Tensor:
    """A sum in which each counts differently."""
    return (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum()


def pull(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of their weighed sum."""
    states = read(model)
    weighed(states).backward()
    return states.detach(), take_gradients(model)


def take_gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == truth.keys() and truth
    for name, gradient in truth.items():
        assert (found[name] - gradient).norm() <= limit * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_equal_pefts(make_model: Make, family: str, quantization: str) -> None:
    model = a_model(folder_of(make_model, family), quantization)
    states, truth = pull(model)
    linears = 8 if family == "phi3" else 14
    assert fold_adapters(model) == linears and len(truth) == 2 * linears
    for tile, checkpointing in WAYS:
        per_layer = {"qwen3": 4, "gemma2": 4, "gemma3_text": 6}.get(family, 2)
        assert make_lean(model, tile) == 2 * (per_layer + 1) + 1
        checkpoint_layers(model, checkpointing)
        ours, gradients = pull(model)
        torch.testing.assert_close(ours, states, rtol=1e-5, atol=2e-5)
        assert_same(gradients, truth)
        with torch.no_grad():
            assert torch.equal(read(model), ours)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_where_transformers_does(make_model: Make, family: str, quantization: str, dtype: str) -> None:
    """Against the same adapters' function layer by layer: the same values, bit for bit where the same rows are multiplied at a time (some processors'
    float16 products round by their number), and gradients within a rounding of theirs."""
    eps = torch.finfo(getattr(torch, dtype)).eps
    model = a_model(folder_of(make_model, family), quantization, dtype)
    fold_adapters(model)
    states, truth = pull(model)
    for tile, checkpointing in WAYS:
        make_lean(model, tile)
        checkpoint_layers(model, checkpointing)
        ours, gradients = pull(model)
        torch.testing.assert_close(ours, states, rtol=4 * eps * (tile > 0), atol=4 * eps * (tile > 0))
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        assert_same(gradients, truth, 8 * eps)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_policy_critic_and_reference_on_one_base(make_model: Make, quantization: str, tile: int, checkpointing: bool) -> None:
    model = a_model(make_model(), quantization, critic=True)

    def both() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), using(model, None):
            reference = read(model)
        with using(model, ADAPTER):
            policy = read(model)
        with using(model, CRITIC):
            critic = read(model)
        weighed(policy + critic.sin()).backward()
        return reference, take_gradients(model)

    reference, truth = both()
    fold_adapters(model)
    make_lean(model, tile)
    checkpoint_layers(model, checkpointing)
    ours, gradients = both()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert len(truth) == 2 * 2 * 14
    assert_same(gradients, truth)


class Taker:
    """A collector that keeps what it is given."""

    adapter = ADAPTER

    def __init__(self, coefficients: Tensor) -> None:
        self.coefficients, self.taken = coefficients, []  # type: ignore[var-annotated]

    def take(self, da: Tensor, db: Tensor) -> tuple[None, None]:
        self.taken.append((da, db))
        return None, None


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tile", [0, 3])
def test_several_gradients_out_of_one_pass(make_model: Make, family: str, tile: int) -> None:
    model = a_model(folder_of(make_model, family), "nf4")
    mlp: Any = next(m for name, m in model.named_modules() if name.endswith("0.mlp"))
    layers: list[Any] = [m for m in mlp.modules() if isinstance(m, LoraLayer)]
    x, dy, coefficients = torch.randn(1, 11, 64), torch.randn(1, 11, 64), torch.randn(11, 3)
    truth = []
    for d in range(3):
        mlp(x).backward(dy * coefficients[None, :, d, None])
        truth.append(take_gradients(mlp))
    fold_adapters(model)
    make_lean(model, tile)
    for layer in layers:
        layer.collector = Taker(coefficients)
    mlp(x).backward(dy)
    assert not take_gradients(mlp)
    for name, layer in mlp.named_modules():
        if layer in layers:
            (da, db), = layer.collector.taken                        # once, over all tiles
            assert da.dtype == db.dtype == torch.float32
            for d in range(3):
                assert_same({"": da[d]}, {"": truth[d][f"{name}.lora_A.{ADAPTER}.weight"]})
                assert_same({"": db[d].T}, {"": truth[d][f"{name}.lora_B.{ADAPTER}.weight"]})
    layers[0].collector = Taker(coefficients[:5])
    with pytest.raises(RuntimeError, match="5 tokens have coefficients, but a layer reads 11"):
        mlp(x).backward(dy)


@pytest.mark.parametrize("targets", [["q_proj"], ["up_proj"], ["gate_proj", "down_proj"]])
def test_adapters_on_some_layers_or_none(make_model: Make, targets: list[str]) -> None:
    run = a_run(make_model(), adapter={"lora_target_modules": targets})
    model = attach(load_base(run.model), run.adapter, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    _, truth = pull(model)
    fold_adapters(model)
    for tile, checkpointing in WAYS:
        make_lean(model, tile)
        checkpoint_layers(model, checkpointing)
        assert_same(pull(model)[1], truth)


@pytest.mark.parametrize("tile", [0, 4])
def test_what_is_kept(make_model: Make, tile: int) -> None:
    """A norm: its input and four bytes a row. An MLP: its input, and gate and up if all goes at once."""
    model = a_model(make_model(), "nf4", "bfloat16")
    fold_adapters(model)
    make_lean(model, tile)
    mlp: Any = next(m for m in model.modules() if isinstance(m, LeanMLP))
    norm: Any = next(m for m in model.modules() if isinstance(m, LeanNorm))
    x = torch.randn(1, 15, 64).bfloat16().requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept_by(module: Any) -> list[int]:
        kept: list[Tensor] = []

        def see(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            _out = module(x)
        return sorted({s.data_ptr(): s.nbytes() for t in kept if (s := t.untyped_storage()).data_ptr() not in weights}.values())

    assert kept_by(norm) == [15 * 4, x.nbytes]
    assert kept_by(mlp) == ([x.nbytes] if tile else [x.nbytes, 15 * 128 * 2, 15 * 128 * 2])


@pytest.mark.parametrize(("family", "tile", "checkpointing", "outputs", "wides"), [
    ("llama", 0, False, 0, 2), ("llama", 6, False, 2, 2 * 3 * 2), ("llama", 0, True, 2, 2 * 2), ("llama", 6, True, 2, 2 * 3 * 2),
    ("gemma3_text", 0, True, 2 * 2, 2 * 3),                           # its MLP's output is normed, so it must be had again
])  # fmt: skip
def test_nothing_is_computed_for_nothing(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, family: str, tile: int, checkpointing: bool, outputs: int, wides: int
) -> None:
    """Of two layers, 18 tokens: how often an MLP's output is made, and gate and up of a tile."""
    model, calls = a_model(folder_of(make_model, family), "nf4"), {"output": 0, "wide": 0}
    fold_adapters(model)
    make_lean(model, tile)
    checkpoint_layers(model, checkpointing)

    def counted(name: str, does: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return does(*args)

        return call

    for name in calls:
        monkeypatch.setattr(Gated, name, counted(name, getattr(Gated, name)))
    pull(model)
    assert calls == {"output": outputs, "wide": wides}


def test_a_graph_may_be_kept_and_pulled_again(make_model: Make) -> None:
    model = a_model(make_model(), "nf4")
    fold_adapters(model)
    for tile, checkpointing in WAYS:
        make_lean(model, tile)
        checkpoint_layers(model, checkpointing)
        states = read(model)
        found = []
        for keep in (True, False):
            states.sin().sum().backward(retain_graph=keep)
            found.append(take_gradients(model))
        assert_same(found[1], found[0], 0)


def test_norms_of_many_rows_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows that do not lie in order (Gemma 3 norms heads after it has moved them) come out as they went in."""
    for family in ("llama", "gemma3_text"):
        model = freeze(AutoModelForCausalLM.from_config(tiny_config(family, 32, pad_token_id=0)))
        norm: Any = next(m for n, m in model.named_modules() if n.endswith("input_layernorm"))
        norm.weight.data.normal_()
        x, dy = (torch.randn(2, 5, 3, 64).transpose(1, 2) for _ in range(2))
        plain = x.clone().requires_grad_()
        truth = norm(plain)
        truth.backward(dy)
        make_lean(model)
        monkeypatch.setattr("localrl.policy.lean.TOKENS", 7)
        for case in (x, x.contiguous(), x[:, :, ::2]):
            leaf = case.clone().requires_grad_()
            assert leaf.stride() == case.stride() or case.shape != x.shape
            out = norm(leaf)
            step = slice(None) if case.shape == x.shape else slice(None, None, 2)
            out.backward(dy[:, :, step])
            assert out.stride() == torch.empty_like(leaf).stride()
            torch.testing.assert_close(out, truth[:, :, step], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(leaf.grad, plain.grad[:, :, step], rtol=1e-5, atol=1e-5)  # type: ignore[index]


def test_what_is_not_known_is_left_alone(make_model: Make) -> None:
    model = freeze(AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "olmo2", vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)))  # fmt: skip
    assert make_lean(model) == 0
    llama = a_model(make_model())
    mlp: Any = next(m for n, m in llama.named_modules() if n.endswith("0.mlp"))
    mlp.act_fn, was = nn.Tanh(), mlp.act_fn
    own = type(mlp)
    assert make_lean(llama) == 6 and type(mlp) is own
    mlp.act_fn = was
    assert make_lean(llama) == 7 and isinstance(mlp, own)
    with pytest.raises(ValueError, match="-1"):
        make_lean(llama, -1)


def test_unusual_calls_are_left_to_peft_and_transformers(make_model: Make) -> None:
    model = a_model(make_model(), critic=True)
    fold_adapters(model)
    make_lean(model, 2)
    mlp: Any = next(m for m in model.modules() if isinstance(m, LeanMLP))
    norm: Any = next(m for m in model.modules() if isinstance(m, LeanNorm))
    x = torch.randn(1, 5, 64)
    one = mlp(x)
    mlp.up_proj._active_adapter = [ADAPTER, CRITIC]
    assert Gated.of(mlp, x) is None and not torch.allclose(mlp(x), one)
    mlp.up_proj._active_adapter = [ADAPTER]
    mlp.up_proj.lora_dropout[ADAPTER] = nn.Dropout(0.9)
    assert not torch.allclose(mlp(x), one)
    mlp.up_proj.lora_dropout[ADAPTER] = nn.Identity()
    assert torch.equal(mlp(x), one)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    norm.weight.requires_grad_(True)
    norm(x).sum().backward()
    assert norm.weight.grad.abs().sum() > 0
