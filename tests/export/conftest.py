"""Live models as training leaves them: a base in NF4, INT8 or unquantised, and a LoRA adapter that says something."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from localrl.export import Sample

LiveModel = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def live(make_model: Callable[..., Path]) -> LiveModel:
    """live("llama", "nf4", lora={...}, dtype=..., **config) -> (PeftModel in train mode with the adapter "policy", tokenizer)."""

    def load(
        family: str = "llama", form: str = "none", *, lora: dict[str, Any] | None = None, dtype: Any = torch.float32, **config: Any
    ) -> Any:
        folder = make_model(family, **config)
        quantization = {
            "nf4": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
            ),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
            "none": None,
        }[form]
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization, device_map={"": "cpu"})
        draw = torch.Generator().manual_seed(2)
        for name, parameter in base.named_parameters():
            if "norm" in name or name.endswith("bias"):  # else all ones and zeros, which hides what is forgotten
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=draw))
        settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | (lora or {})
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings), adapter_name="policy")
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return model.train(), PreTrainedTokenizerFast.from_pretrained(folder)

    return load


@pytest.fixture(scope="session")
def samples() -> Callable[[Any], list[Sample]]:
    """Prompts and answers as token ids."""

    def make(tokenizer: Any) -> list[Sample]:
        pairs = [
            ("<|im_start|>user\nWhat is 12+34?<|im_end|>\n<|im_start|>assistant\n", "<answer>46</answer><|im_end|>"),
            ("A longer prompt, so that rope turns far enough to matter: " + "the quick brown fox, " * 8, "jumps"),
        ]
        return [Sample(tuple(tokenizer(a)["input_ids"]), tuple(tokenizer(b)["input_ids"])) for a, b in pairs]

    return make


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[nn.Module], str]:
    """A hash of every byte of the base and the adapters, quantisation states included."""

    def of(model: nn.Module) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return of
