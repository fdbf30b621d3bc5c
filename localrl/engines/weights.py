"""The linear layers as decoding calls them: the model's own, or a scratch copy of the same weights that is quicker to multiply with.

Nothing here changes the model. A scratch copy lives for one call of `generate`; the base's bytes and the adapter's stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from localrl.devices import kind_of

Linear = Callable[[Tensor], Tensor]
"""(n, in) -> (n, out), in the input's type."""
LowRank = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r), scaling."""
PACK_FROM = 2**17
"""Elements of a matrix that is worth laying out anew for multiplication."""
PACK_ROWS = 64
"""A hint of how many rows it will be multiplied with; any number works."""


def compute_device(model: nn.Module) -> torch.device:
    """Where the model computes: its embedding may lie elsewhere."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return next(parameter.device for parameter in model.parameters() if parameter is not embedding.weight)


def base_of(module: Any) -> Any:
    """The layer that holds the base's weight: PEFT wraps it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def adapters_of(module: Any) -> list[LowRank] | None:
    """The low-rank terms that a call of this layer would add now: none if adapters are off. None: it does something else than that."""
    if not hasattr(module, "get_base_layer"):
        return []
    if not hasattr(module, "lora_A") or module.merged:
        return None
    if module.disable_adapters:
        return []
    names = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant or module.lora_bias.get(name) or not isinstance(module.lora_A[name], nn.Linear) for name in names):
        return None
    return [(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])) for name in names]


def compute_dtype(module: nn.Module, hidden: torch.dtype) -> torch.dtype | None:
    """The type in which the training path multiplies with this weight. None: a kind of layer that is not known here."""
    base = base_of(module)
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in {module, base}):
        return None
    kind = type(base).__name__ if type(base).__module__.startswith("bitsandbytes.") else type(base)
    if kind == "Linear4bit":
        return base.compute_dtype or hidden
    if kind == "Linear8bitLt":
        return None if base.state.has_fp16_weights else hidden
    return base.weight.dtype if kind is nn.Linear else None


def dequantised(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The base's weight as the training path on a CPU multiplies with it, bit for bit. -> (out, in) of `dtype`; a plain one itself."""
    base = base_of(module)
    state = getattr(base.weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError("a 4-bit weight has been repacked for inference, gradients would be wrong: keep the model in training mode")
        absmax, ops = state.absmax, torch.ops.bitsandbytes
        if state.nested:
            second = state.state2
            absmax = ops.dequantize_blockwise(absmax, second.absmax, second.code, second.blocksize, torch.float32) + state.offset
        return ops.dequantize_4bit(base.weight.data.view(-1, 1), absmax, state.blocksize, state.quant_type, state.shape, dtype)
    if base.weight.dtype == torch.int8:
        codes, scales = (base.weight.CB, base.weight.SCB) if base.state.CB is None else (base.state.CB, base.state.SCB)
        return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    return base.weight.detach().to(dtype)


def common_dtype(modules: Sequence[nn.Module], hidden: torch.dtype) -> torch.dtype | None:
    """The one type that a scratch copy of these layers would have; None: they have none in common, or one of them must be called itself."""
    kinds = {compute_dtype(module, hidden) if adapters_of(module) is not None else None for module in modules}
    return kinds.pop() if len(kinds) == 1 else None


def live(modules: Sequence[nn.Module]) -> Linear:
    """The model's own layers, side by side: outputs in their order."""
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def unpacked(modules: Sequence[nn.Module], dtype: torch.dtype, order: Tensor | None = None) -> Linear:
    """One matrix of `dtype` out of layers that read the same input, adapters included. `order`: the old number of each output.

    A sum in fp32 loses nothing that counts. In bf16 it would round small adapters away, so there the rows of every A join the matrix, and
    one more product with each B, at its own outputs, adds them up.
    """
    weights = [dequantised(module, dtype) for module in modules]
    terms = [adapters_of(module) or [] for module in modules]
    if dtype == torch.float32:
        weights = [_added(weight, low) for weight, low in zip(weights, terms, strict=True)]
    bias = _joined_bias(modules, weights)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    if order is not None:
        weight, bias = weight.index_select(0, order), None if bias is None else bias.index_select(0, order)
    if dtype != torch.float32 and any(terms):
        return _with_adapters(weight, bias, [len(w) for w in weights], terms, order)
    product = multiply(weight, bias)
    return lambda x: product(x.to(dtype)).to(x.dtype)


def multiply(weight: Tensor, bias: Tensor | None) -> Linear:
    """x -> x W^T + b, for x (n, in) of the weight's type.

    A large matrix on a CPU is laid out once as oneDNN's kernels want it. They would do that anew in every product, which at a few dozen
    rows takes a third to a half of its time. torch has the two operators for its own compiler; where they are not, W is used as it is.
    """
    if weight.numel() < PACK_FROM or kind_of(weight.device) != "cpu" or not _packs(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    call = torch.ops.mkldnn._linear_pointwise
    # What oneDNN lays out has no fake: where nothing is computed, a copy of the same size stands for it.
    laid_out = weight.clone() if isinstance(weight, FakeTensor) else torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    return lambda x: call(x, laid_out, bias, "none", [], "")


def _packs(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN lays out such a matrix: bf16 only with instructions that many desktops' lack, and then it is an error to ask."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and hasattr(ops, "_is_mkldnn_bf16_supported") and bool(ops._is_mkldnn_bf16_supported()))


def _added(weight: Tensor, terms: list[LowRank]) -> Tensor:
    for a, b, scaling in terms:
        weight = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=scaling)      # a new one: it may be the live weight
    return weight


def _joined_bias(modules: Sequence[nn.Module], weights: Sequence[Tensor]) -> Tensor | None:
    bias = [base_of(module).bias for module in modules]
    if all(part is None for part in bias):
        return None
    return torch.cat([w.new_zeros(len(w)) if part is None else part.detach().to(w.dtype) for part, w in zip(bias, weights, strict=True)])


def _with_adapters(weight: Tensor, bias: Tensor | None, sizes: list[int], terms: list[list[LowRank]], order: Tensor | None) -> Linear:
    outputs = len(weight)
    rank = sum(len(a) for low in terms for a, _, _ in low)
    up = weight.new_zeros(rank, outputs)
    row = start = 0
    for size, low in zip(sizes, terms, strict=True):
        for a, b, scaling in low:
            up[row : row + len(a), start : start + size] = (b * scaling).t()
            row += len(a)
        start += size
    up = up if order is None else up.index_select(1, order)
    wide = multiply(torch.cat([weight, *(a.to(weight.dtype) for low in terms for a, _, _ in low)]), None if bias is None else F.pad(bias, (0, rank)))

    def call(x: Tensor) -> Tensor:
        y = wide(x.to(up.dtype))
        return torch.addmm(y[:, :outputs], y[:, outputs:], up).to(x.dtype)

    return call
