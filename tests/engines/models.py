"""Small models as a run has them: loaded and given adapters by the policy's room, adapters that say something."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from localrl.batch import Prompt, Request, Rollout
from localrl.engines.torch import TorchEngine
from localrl.policy.load import attach, load_base, load_tokenizer
from localrl.sections import AdapterSettings, ModelSettings, RolloutSettings


def load(folder: Path, quantization: str = "nf4", dtype: str = "float32", adapter: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    settings = ModelSettings(path=str(folder), quantization=quantization, compute_dtype=dtype, device="cpu")
    model: Any = load_base(settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):                  # else all ones and zeros, which hides what is forgotten
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    if adapter:
        model = attach(model, AdapterSettings(lora_r=4, lora_alpha=8), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    return model, load_tokenizer(settings)


def sampling(**changes: Any) -> RolloutSettings:
    """Settings with a length limit of 24."""
    return RolloutSettings(**({"max_completion_length": 24} | changes))


def engine(model: Any, tokenizer: Any, progress: Any = None, **changes: Any) -> TorchEngine:
    return TorchEngine(model, tokenizer, sampling(**changes), seed=7, progress=progress)


def prompts(count: int = 3, longest: int = 12) -> list[Prompt]:
    """Of different lengths: longest, longest - 3, ..."""
    draw = torch.Generator().manual_seed(0)
    sizes = [max(1, longest - 3 * i) for i in range(count)]
    return [Prompt(10 + i, tuple(torch.randint(0, 256, (size,), generator=draw).tolist()), "") for i, size in enumerate(sizes)]


def requests(count: int = 3, samples: int = 4, longest: int = 12) -> list[Request]:
    return [Request(prompt, sample) for prompt in prompts(count, longest) for sample in range(samples)]


def by_name(rollouts: list[Rollout]) -> dict[tuple[int, int], Rollout]:
    return {(r.request.prompt.id, r.request.sample): r for r in rollouts}


def fingerprint(model: Any) -> str:
    """Of every byte that the model holds, quantisation states, buffers and flags included, and of where the bytes lie."""
    seen = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        seen.update(f"{name} {sorted(plain.items())}".encode())
        own = {**module._parameters, **module._buffers}
        for state in (getattr(own.get("weight"), "quant_state", None), getattr(module, "state", None)):
            parts = vars(state) if state is not None else {}
            own |= {f"state.{k}": v for k, v in parts.items() if torch.is_tensor(v)}
            nested = vars(parts["state2"]) if parts.get("state2") is not None else {}
            own |= {f"state2.{k}": v for k, v in nested.items() if torch.is_tensor(v)}
        for key, tensor in sorted(own.items()):
            if tensor is not None:
                content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                seen.update(f"{key} {tensor.dtype} {tensor.shape} {tensor.requires_grad} {tensor.is_inference()} {tensor.data_ptr()}".encode() + content)
    return seen.hexdigest()
