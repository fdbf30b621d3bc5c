"""What a decoder layer's backward pass holds, counted on published shapes without a byte of them in memory."""

from __future__ import annotations

import sys
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from localrl.policy.adapters import checkpoint_layers
from localrl.policy.lean import make_lean
from localrl.policy.load import attach, freeze
from localrl.policy.lora import fold_adapters
from localrl.sections import AdapterSettings
from tests.memory.tracker import StorageTracker

KIB = 1024
SHAPES = {
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 8, 128),
    "Qwen3-8B": ("qwen3", 4096, 12288, 32, 8, 128),
    "Gemma-3-12B": ("gemma3_text", 3840, 15360, 16, 8, 256),
}


class FakeLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' NF4 layer around a plain parameter: its own kind of parameter does not pretend."""

    def __init__(self, base: nn.Linear, kind: torch.dtype) -> None:
        nn.Module.__init__(self)
        outputs, inputs = base.weight.shape
        self.in_features, self.out_features, self.bias, self.compute_dtype = inputs, outputs, base.bias, kind
        blocks = outputs * inputs // 64
        weight: Any = nn.Parameter(torch.empty(outputs * inputs // 2, 1, dtype=torch.uint8), requires_grad=False)
        second = QuantState(absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        weight.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8), shape=base.weight.shape, code=torch.empty(16), blocksize=64, quant_type="nf4",
            dtype=kind, offset=torch.empty(()), state2=second,
        )  # fmt: skip
        weight.compress_statistics, weight.quant_type = True, "nf4"
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.weight
        return bnb.matmul_4bit(x, self.weight, bias=self.bias, quant_state=state.quant_state)


FakeLinear4bit.__module__, FakeLinear4bit.__name__ = bnb.nn.Linear4bit.__module__, "Linear4bit"


def fake_model(name: str, layers: int = 2) -> Any:
    """NF4 in bfloat16 with adapters on all linear layers, in FakeTensorMode."""
    family, hidden, inside, heads, kv_heads, head_dim = SHAPES[name]
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=hidden, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=131072,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, own = path.rpartition(".")
            setattr(base.get_submodule(parent), own, FakeLinear4bit(module, torch.bfloat16))
    base.is_loaded_in_4bit = True
    return attach(freeze(base), AdapterSettings(lora_target_modules="all-linear", lora_r=16), 0)


def bytes_a_token(model: Any) -> float:
    """At the peak of a forward and backward pass, what is live for each token but the layers' inputs."""
    peaks = []
    for count in (4096, 8192):
        with StorageTracker() as tracker:

            def work(count: int = count) -> None:
                tokens, places = torch.zeros(1, count, dtype=torch.int64), torch.arange(count)[None]
                decoder = model.get_base_model().get_decoder()
                decoder(input_ids=tokens, position_ids=places, use_cache=False).last_hidden_state.sum().backward()
                model.zero_grad()

            peaks.append(tracker.peak_of(work))
    config = model.get_base_model().config
    return (peaks[1] - peaks[0]) / 4096 - config.num_hidden_layers * 2 * config.hidden_size


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_holds_less_than_90_kib_a_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)          # parameters that pretend cannot be swapped
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(name)
        checkpoint_layers(model, True)
        code = sys.modules[type(model.get_base_model()).__module__]
        for mask in ("create_causal_mask", "create_sliding_window_causal_mask"):
            monkeypatch.setattr(code, mask, lambda *args, **kwargs: None, raising=False)
        pefts = bytes_a_token(model)
        fold_adapters(model)
        make_lean(model, 1024)
        ours = bytes_a_token(model)
    print(f"{name}: {pefts / KIB:.0f} KiB a token, lean {ours / KIB:.0f}")
    assert ours < 90 * KIB
    assert ours < pefts / 4
