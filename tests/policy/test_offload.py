"""Boundary activations on the host: the same gradients, and on the device nothing but the last layer's input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from localrl.policy import offload
from localrl.policy.adapters import checkpoint_layers, using
from localrl.policy.lean import make_lean
from localrl.policy.load import ADAPTER, CRITIC, attach, freeze
from localrl.policy.lora import fold_adapters
from localrl.policy.offload import offloading
from localrl.sections import AdapterSettings
from tests.conftest import tiny_config
from tests.memory.tracker import StorageTracker
from tests.policy.test_lean import a_model, assert_same, read, take_gradients, weighed

Make = Callable[..., Path]
LAYERS, INPUT = 4, 18 * 64 * 4
"""Of the models here: layers, and bytes of one layer's input for the 18 tokens that are read, in float32."""


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors on the host, in the order of their making."""
    made: list[Tensor] = []
    room = offload.host_memory

    def watched(like: Tensor) -> Tensor:
        made.append(room(like))
        return made[-1]

    monkeypatch.setattr(offload, "host_memory", watched)
    return made


def ready(make_model: Make, family: str = "llama", checkpointing: bool = True, **more: Any) -> Any:
    model = a_model(make_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_hidden_layers=LAYERS), **more)
    fold_adapters(model)
    make_lean(model, 5)
    checkpoint_layers(model, checkpointing)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_changes_but_the_place(make_model: Make, moved: list[Tensor], family: str, dtype: str) -> None:
    model = ready(make_model, family, quantization="nf4", dtype=dtype)
    weighed(read(model)).backward()
    truth = take_gradients(model)
    assert not moved
    with offloading(model):
        states = read(model)
    weighed(states).backward()
    assert_same(take_gradients(model), truth, 0)
    size = INPUT if dtype == "float32" else INPUT // 2
    assert [t.nbytes for t in moved] == [size] * (LAYERS - 1)         # 2 H bytes a token and layer in half precision
    weighed(read(model)).backward()
    assert len(moved) == LAYERS - 1                                    # nothing is left behind in the model


def test_the_device_holds_one_input_and_the_host_the_others(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(make_model)
    live = {}
    for context in (nullcontext, lambda: offloading(model)):
        with StorageTracker() as tracker:
            on_host: list[Tensor] = []
            monkeypatch.setattr(offload, "host_memory", lambda like, on_host=on_host: on_host.append(torch.empty_like(like)) or on_host[-1])
            with context():
                states = read(model)
            live[len(on_host)] = tracker.now - sum(t.nbytes for t in on_host)
            del states
    assert live[0] - live[LAYERS - 1] == (LAYERS - 1) * INPUT


def test_inputs_come_back_one_layer_ahead(make_model: Make, moved: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's input is taken, the one before it has been sent for: the first time is the only one to wait for."""
    model, events, known = ready(make_model), [], []
    fetch, take = offload.Moved.fetch, offload.Moved.take

    def number(one: offload.Moved) -> int:
        return next(i for i, host in enumerate(moved) if host is one.host)

    def fetched(self: offload.Moved) -> None:
        if self._coming is None:
            events.append(("fetch", number(self)))
        fetch(self)

    def taken(self: offload.Moved) -> Tensor:
        tensor = take(self)
        events.append(("take", number(self)))
        known.append(self)
        return tensor

    monkeypatch.setattr(offload.Moved, "fetch", fetched)
    monkeypatch.setattr(offload.Moved, "take", taken)
    with offloading(model):
        states = read(model)
    weighed(states).backward()
    assert events == [("fetch", 2), ("take", 2), ("fetch", 1), ("take", 1), ("fetch", 0), ("take", 0)]
    assert all(one._coming is None for one in known)                  # no copy stays on the device


def test_a_kept_graph_fetches_again(make_model: Make, moved: list[Tensor]) -> None:
    model = ready(make_model)
    with offloading(model):
        states = read(model)
    found = []
    for keep in (True, False):
        weighed(states).backward(retain_graph=keep)
        found.append(take_gradients(model))
    assert_same(found[1], found[0], 0)
    assert len(moved) == LAYERS - 1


def test_policy_and_critic_in_one_reading(make_model: Make, moved: list[Tensor]) -> None:
    model = ready(make_model, critic=True)
    found = []
    for context in (nullcontext(), offloading(model)):
        with context:
            with torch.no_grad(), using(model, None):
                read(model)                                           # the reference keeps nothing
            with using(model, ADAPTER):
                policy = read(model)
            with using(model, CRITIC):
                critic = read(model)
        weighed(policy + critic.sin()).backward()
        found.append(take_gradients(model))
    assert_same(found[1], found[0], 0)
    assert len(moved) == 2 * (LAYERS - 1)


def test_without_checkpointing_nothing_is_moved(make_model: Make, moved: list[Tensor]) -> None:
    model = ready(make_model, checkpointing=False)
    with offloading(model):
        states = read(model)
    weighed(states).backward()
    assert not moved and len(take_gradients(model)) == 2 * 7 * LAYERS


def test_it_can_be_pretended(moved: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In FakeTensorMode, where storages have no address."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = freeze(AutoModelForCausalLM.from_config(tiny_config("llama", 256, num_hidden_layers=LAYERS)))
        model = attach(base, AdapterSettings(lora_target_modules="all-linear"), 0)
        fold_adapters(model)
        make_lean(model, 5)
        checkpoint_layers(model, True)
        with offloading(model):
            states = read(model)
        weighed(states).backward()
    assert [t.nbytes for t in moved] == [INPUT] * (LAYERS - 1)
