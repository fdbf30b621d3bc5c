"""The live model as a transformers checkpoint in fp32, the adapter added: what llama.cpp's own converter reads. It takes 4 bytes a parameter in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localrl.export.families import FAMILIES
from localrl.export.reference import inside_lora
from localrl.export.weights import causal_lm, check_lora, row_blocks, shape_of, stored, weight_reader
from localrl.settings import UserError


def check_mergeable(model: Any, adapter: str | None) -> None:
    """UserError unless the adapter is plain LoRA on linear layers, of a model that can be asked token by token."""
    lm = causal_lm(model)
    if not hasattr(getattr(lm, "model", None), "embed_tokens"):
        raise UserError(f"{type(lm).__name__} has no model.embed_tokens, which the self-check asks: keep the PEFT adapter instead")
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter is None:
        return
    if adapter not in configs:
        raise UserError(f"the model has no adapter '{adapter}' (it has: {', '.join(configs) or 'none'}): export what = 'base' instead")
    check_lora(configs[adapter].to_dict() | {"target_modules": ()}, FAMILIES["llama"])  # what no merge can express; not where it is
    for name, module in lm.named_modules():
        if hasattr(module, "lora_A") and not isinstance(stored(module), nn.Linear):
            raise UserError(f"LoRA on '{name}', a {type(stored(module)).__name__}, cannot be merged here, only on linear layers: keep the PEFT adapter instead")


def merged_state(model: Any, adapter: str | None) -> dict[str, Tensor]:
    """Every weight by transformers' name, in fp32 on the CPU: W + scaling * B A, de-quantised where it is quantised."""
    lm, state = causal_lm(model), {}
    leaves = {n: m for n, m in lm.named_modules() if isinstance(stored(m), nn.Linear | nn.Embedding) and not inside_lora(n)}
    for name, module in leaves.items():
        read = weight_reader(module, adapter)
        state[f"{name}.weight"] = torch.cat([read(rows).cpu() for rows in row_blocks(shape_of(module))])
        if getattr(stored(module), "bias", None) is not None:
            state[f"{name}.bias"] = stored(module).bias.detach().float().cpu()
    tied = {id(stored(m).weight): n for n, m in reversed(leaves.items())}
    for name, module in leaves.items():
        if (first := tied[id(stored(module).weight)]) != name:
            del state[f"{name}.weight"]
            assert f"{first}.weight" in state
    inside = tuple(f"{name}." for name in leaves)
    rest = [*lm.named_parameters(), *((n, b) for n, b in lm.named_buffers() if n in lm.state_dict())]
    return state | {n: t.detach().float().cpu().clone() for n, t in rest if not n.startswith(inside) and not inside_lora(n)}


def save_merged(model: Any, tokenizer: Any, adapter: str | None, folder: Path) -> Mapping[str, str]:
    """Write the checkpoint. -> sha256 of every weight by its name."""
    lm = causal_lm(model)
    config = copy.deepcopy(lm.config)
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    config.dtype = torch.float32
    with torch.device("meta"):
        empty = type(lm)(config)
    empty.generation_config = lm.generation_config
    state = merged_state(model, adapter)
    hashes = {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in state.items()}
    empty.save_pretrained(folder, state_dict=state, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
    return hashes
