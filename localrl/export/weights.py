"""The live model read as fp32 rows: quantised or not, adapter added or not, never changed and never whole in memory.

A merge into a quantised base would round most of a small update away (a delta of 1 % of the weights keeps 1.5 % of itself in NF4), so the
sum W + scaling * B A is formed here in fp32, block of rows by block of rows, and only ever written to a file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localrl.export.families import Family, family_of, head_width, row_order
from localrl.export.rope import rope_tensors
from localrl.settings import UserError

BLOCK = 2**24
"""Elements of a tensor that are held in fp32 at a time (64 MiB)."""

Reader = Callable[[Tensor], Tensor]
"""Row numbers (n,) int64 -> those rows (n, in) float32, on the weight's device."""


@dataclass(frozen=True)
class Source:
    """A tensor of the file to be. Reading begins with `open`: a 4-bit weight is de-quantised then, and let go when its reader is."""

    name: str
    shape: tuple[int, ...]
    """In torch's order."""
    open: Callable[[], Reader]
    order: Tensor | None = None
    """Which of the live rows stands at each row of the file; None: as they are."""

    def blocks(self) -> Iterator[Tensor]:
        """The tensor in blocks of whole rows, in the file's order: (n, ...) float32 on the CPU."""
        read = self.open()
        for rows in row_blocks(self.shape):
            yield read(rows if self.order is None else self.order[rows]).cpu()


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_lora(settings: Mapping[str, Any], family: Family) -> None:
    """UserError for adapter settings that a GGUF cannot express. Keys as PEFT's LoraConfig names them; missing ones are PEFT's defaults.

    >>> from localrl.export.families import FAMILIES
    >>> check_lora({"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj"]}, FAMILIES["llama"])
    >>> check_lora({"use_dora": True}, FAMILIES["llama"])
    Traceback (most recent call last):
    localrl.settings.UserError: use_dora = True cannot be exported to GGUF, only False: set it before training
    """
    usual: dict[str, Any] = {
        "use_dora": False,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "use_qalora": False,
    }
    for key, value in usual.items():
        if settings.get(key, value) not in (value, None):
            raise UserError(f"{key} = {settings[key]} cannot be exported to GGUF, only {value}: set it before training")
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens"):
        if settings.get(key):
            raise UserError(f"{key} = {settings[key]} cannot be exported to GGUF, only LoRA on linear layers: leave it empty before training")
    targets = settings.get("target_modules") or ()
    fitting = family.projections
    if isinstance(targets, str):  # "all-linear" leaves the output layer alone, another string is a regular expression
        targets = [name for name in ("lm_head", "model.embed_tokens") if targets != "all-linear" and re.fullmatch(targets, name)]
    for target in targets:
        if target.split(".")[-1] not in fitting:
            known = ", ".join(sorted(fitting))
            raise UserError(f"LoRA on '{target}' cannot be exported to GGUF: take it out of target_modules (known: {known})")


def lora_of(module: Any, adapter: str | None) -> tuple[Tensor, Tensor, float] | None:
    """(A (r, in), B (out, r), scaling) of a PEFT layer, or None where it has no such adapter."""
    if adapter is None or not hasattr(module, "lora_A") or adapter not in module.lora_A:
        return None
    if getattr(module, "merged_adapters", None):
        raise ValueError("an adapter is merged into the base: its weights are no longer those that were trained")
    if adapter in getattr(module, "lora_variant", {}) or module.lora_bias[adapter]:
        raise UserError(f"adapter '{adapter}' is not plain LoRA (DoRA, aLoRA or a bias) and no GGUF can hold it: train with use_dora = false")
    return module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach(), float(module.scaling[adapter])


def stored(module: Any) -> Any:
    """The layer that holds the base's weight: PEFT wraps it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def base_reader(module: nn.Module) -> Reader:
    """Rows of a base weight in fp32: bitsandbytes' 4-bit and 8-bit de-quantised in fp32, anything else cast."""
    weight: Any = stored(module).weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return four_bit_reader(weight, state)
    if weight.dtype == torch.int8:
        scales = getattr(weight, "SCB", None)
        scales = stored(module).state.SCB if scales is None else scales
        return lambda rows: weight.data[rows.to(weight.device)].float() * (scales[rows.to(scales.device)].float() / 127.0).unsqueeze(1)
    if not weight.is_floating_point():
        raise UserError(f"a weight of type {weight.dtype} cannot be read for an export: load the base in nf4, int8 or unquantised")
    return scaled(weight.detach())


def four_bit_reader(weight: Any, state: Any) -> Reader:
    """Rows of a Linear4bit, de-quantised whole here (out * in * 4 bytes on the weight's device) for as long as the reader lives."""
    from bitsandbytes.functional import dequantize_4bit

    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has repacked a 4-bit weight for its CPU kernel, its bytes have changed: keep the model in train mode")
    exact = copy.copy(state)
    exact.dtype = torch.float32  # else code * absmax is rounded to the checkpoint's bf16
    return scaled(dequantize_4bit(weight.data, exact))


def weight_reader(module: nn.Module, adapter: str | None) -> Reader:
    """Rows of W + scaling * B A in fp32 (just W without an adapter here)."""
    base, lora = base_reader(module), lora_of(module, adapter)
    if lora is None:
        return base
    a, b, scaling = lora

    def read(rows: Tensor) -> Tensor:
        delta = scaling * (b[rows.to(b.device)].float() @ a.float())
        return base(rows).add_(delta)

    return read


def norm_reader(module: Any, offset: float) -> Reader:
    """Entries of a norm's weight in fp32, with what transformers adds to it whenever it computes."""
    weight = module.weight.detach()
    return (lambda rows: weight[rows.to(weight.device)].float() + offset) if offset else scaled(weight)


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """(out, in) of a linear layer or an embedding, (width,) of a norm; packed weights do not tell it themselves."""
    base: Any = stored(module)
    if isinstance(base, nn.Linear):
        return (base.out_features, base.in_features)
    return tuple(base.weight.shape)


def modules_of(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(GGUF name without suffix, key of the family's `layer` or '', module) of everything that the file holds, in the file's order."""
    lm = causal_lm(model)
    yield "token_embd", "", lm.model.embed_tokens
    paths = family_of(lm.config).layer
    for i, layer in enumerate(lm.model.layers):
        known = dict(layer.named_modules())
        for path, name in paths.items():
            if path in known:
                yield f"blk.{i}.{name}", path, known[path]
    yield "output_norm", "", lm.model.norm
    if stored(lm.lm_head).weight is not stored(lm.model.embed_tokens).weight:  # tied: llama.cpp uses the embedding
        yield "output", "", lm.lm_head


def check_model(model: nn.Module, adapter: str | None) -> None:
    """UserError unless every weight of the live model has a place in the file and the adapter is plain LoRA on linear layers."""
    lm = causal_lm(model)
    family = family_of(lm.config)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter is not None and adapter not in configs:
        raise UserError(f"the model has no adapter '{adapter}' (it has: {', '.join(configs) or 'none'}): export what = 'base' instead")
    if adapter is not None:
        check_lora(configs[adapter].to_dict(), family)
    taken: set[int] = set()
    for name, path, module in modules_of(model):
        base = stored(module)
        taken |= {id(p) for p in base.parameters(recurse=False)}
        if lora_of(module, adapter) is not None and not path.endswith("_proj"):
            raise UserError(f"LoRA on '{name}' cannot be exported to GGUF: take embeddings and output layer out of target_modules")
        if getattr(base, "bias", None) is not None and path not in family.biases:
            raise UserError(f"a bias on '{name}' has no counterpart in llama.cpp's {family.arch} graph: keep the PEFT adapter instead")
    for name, parameter in lm.named_parameters():
        if id(parameter) not in taken and "lora_" not in name and name.startswith(("model.", "lm_head.")):
            raise UserError(f"the weight '{name}' has no place in a {family.arch} GGUF: keep the PEFT adapter instead")


def model_sources(model: nn.Module, adapter: str | None) -> list[Source]:
    """Every tensor of a model file, with the adapter added to the weights (None: the base alone)."""
    config = causal_lm(model).config
    family, factors = family_of(config), rope_tensors(config, head_width(config))
    found = [Source(name, values.shape, partial(scaled, torch.from_numpy(values))) for name, values in factors.items()]
    for name, path, module in modules_of(model):
        shape = shape_of(module)
        order = row_order(config, path, shape[0])
        weight = partial(norm_reader, module, family.norm_offset) if name.endswith("norm") else partial(weight_reader, module, adapter)
        found.append(Source(f"{name}.weight", shape, weight, order))
        bias = getattr(stored(module), "bias", None)
        if bias is not None:
            found.append(Source(f"{name}.bias", tuple(bias.shape), partial(scaled, bias.detach()), order))
    return found


def adapter_sources(model: nn.Module, adapter: str, *, balanced: bool) -> list[Source]:
    """The tensors of an adapter file: A (r, in) and B (out, r) with PEFT's scaling of that very module folded into B.

    `balanced` moves a power of two from the larger factor to the smaller: a freshly trained B lies where fp16 is sparse.
    """
    config = causal_lm(model).config
    found: list[Source] = []
    for name, path, module in modules_of(model):
        lora = lora_of(module, adapter)
        if lora is None:
            continue
        a, b, scaling = lora
        shift = balance(a, b * scaling) if balanced else 0
        order = row_order(config, path, b.shape[0])
        found.append(Source(f"{name}.weight.lora_a", tuple(a.shape), partial(scaled, a, 2.0**shift)))
        found.append(Source(f"{name}.weight.lora_b", tuple(b.shape), partial(scaled, b, scaling * 2.0**-shift), order))
    return found


def balance(a: Tensor, b: Tensor) -> int:
    """The k for which a * 2^k and b * 2^-k have largest entries of about the same size; 0 if one of them is zero.

    >>> balance(torch.tensor([1.0]), torch.tensor([2.0**-10]))
    -5
    """
    high, low = float(a.abs().max()), float(b.abs().max())
    return round(float(torch.tensor(low / high).log2()) / 2) if high > 0 and low > 0 else 0


def scaled(value: Tensor, factor: float = 1.0) -> Reader:
    """Rows of value * factor in fp32."""
    return lambda rows: value[rows.to(value.device)].float() * factor


def row_blocks(shape: tuple[int, ...]) -> Sequence[Tensor]:
    """Row numbers of a tensor of this shape in blocks of at most BLOCK elements (but at least a row)."""
    width = int(torch.Size(shape[1:]).numel())
    return torch.arange(shape[0]).split(max(1, BLOCK // max(1, width)))
