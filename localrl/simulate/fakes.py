"""A quantised model with adapters that takes no memory: made from its config on the meta device, then turned into fake CPU tensors.

bitsandbytes' parameters cannot hold fake tensors, so its layers have stand-ins here: subclasses with plain parameters of the same sizes and
types, which call the same products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from localrl.config import Run
from localrl.memory.shape import Quantization
from localrl.policy.load import attach, freeze

BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share an absmax, and absmaxes that share theirs (NF4 with double quantisation)."""


class Linear4bit(bnb.nn.Linear4bit):
    """Stand-in with a plain uint8 parameter."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype, self.compute_type_is_set = inputs, outputs, dtype, True
        self.quant_type, self.quant_storage, self.support_avx512bf16_for_cpu = "nf4", torch.uint8, False
        blocks = -(-inputs * outputs // BLOCK)
        outer = QuantState(absmax=torch.empty(-(-blocks // OUTER_BLOCK)), blocksize=OUTER_BLOCK, code=torch.empty(256), dtype=torch.float32)
        self.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8), shape=torch.Size((outputs, inputs)), code=torch.empty(16), blocksize=BLOCK,
            quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=outer,
        )  # fmt: skip
        weight: Any = nn.Parameter(torch.empty(-(-inputs * outputs // 2), 1, dtype=torch.uint8), requires_grad=False)
        weight.quant_state, weight.compress_statistics, weight.quant_type = self.quant_state, True, "nf4"
        self.weight: Any = weight
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x.to(self.compute_dtype), self.weight, bias=self.bias, quant_state=self.quant_state).to(x.dtype)

    def tensors(self, turn: Any) -> None:
        """Replace what is no parameter."""
        state = self.quant_state
        state.absmax, state.code, state.offset = turn(state.absmax), turn(state.code), turn(state.offset)
        state.state2.absmax, state.state2.code = turn(state.state2.absmax), turn(state.state2.code)
        self.weight.quant_state = state


class Linear8bitLt(bnb.nn.Linear8bitLt):
    """Stand-in with a plain int8 parameter."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.index = inputs, outputs, None
        self.weight: Any = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None
        self.state = bnb.MatmulLtState()
        self.state.threshold, self.state.has_fp16_weights = 0.0, False
        self.scales = torch.empty(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return bnb.matmul(x, self.weight, bias=self.bias, state=self.state)

    def tensors(self, turn: Any) -> None:
        """Replace what is no parameter."""
        self.state.CB, self.state.SCB = self.weight.data, turn(self.scales)
        self.weight.CB, self.weight.SCB = None, None
        del self.scales


STAND_INS: dict[Quantization, type[Linear4bit] | type[Linear8bitLt]] = {"nf4": Linear4bit, "int8": Linear8bitLt}
for _kind in STAND_INS.values():                                    # the adapters' own step knows bitsandbytes' layers by module and name
    _kind.__module__ = "bitsandbytes.nn.modules"


def fake_model(config: Any, run: Run, dtype: torch.dtype, critic: bool, mode: FakeTensorMode) -> Any:
    """A PeftModel of the config's architecture, quantised as the run asks, all of its tensors fake. Takes no memory worth naming."""
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if run.model.quantization != "none":
            _quantise(base, STAND_INS[run.model.quantization], dtype)
            setattr(base, "is_loaded_in_4bit" if run.model.quantization == "nf4" else "is_loaded_in_8bit", True)
        base.config.use_cache = False
        model = attach(freeze(base), run.adapter, run.seed, critic)
    _turn(model, mode)
    return model


@contextmanager
def real_tables() -> Iterator[None]:
    """While it is open, bitsandbytes' table of 8-bit numbers is made of real ones: it is computed by looking at them."""
    make = bnb.functional.create_dynamic_map

    def outside(*args: Any, **kwargs: Any) -> Tensor:
        with _disable_current_modes():
            return make(*args, **kwargs)

    bnb.functional.create_dynamic_map = outside
    try:
        yield
    finally:
        bnb.functional.create_dynamic_map = make


def fake(tensor: Tensor, mode: FakeTensorMode) -> FakeTensor:
    """A meta tensor as one that claims to lie on the CPU."""
    return FakeTensor(mode, tensor.detach(), torch.device("cpu"))


def _quantise(base: nn.Module, kind: Any, dtype: torch.dtype) -> None:
    head = base.get_output_embeddings()  # type: ignore[operator]
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, kind(child.in_features, child.out_features, child.bias is not None, dtype))


def _turn(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every parameter and buffer of a meta model becomes a fake one; what was shared stays shared."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(fake(parameter, mode), requires_grad=parameter.requires_grad), parameter
                module._parameters[name] = known[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, mode)
        base: Any = module
        if isinstance(module, Linear4bit | Linear8bitLt):
            base.tensors(lambda tensor: fake(tensor, mode))
