"""From a folder or a hub id to a frozen base with fresh adapters, safe to sample from and to train in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from localrl.engines.decoder import bare_model
from localrl.engines.weights import compute_device
from localrl.policy.place import model_path, pick_device, pick_dtype
from localrl.sections import AdapterSettings, ModelSettings
from localrl.settings import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
ADAPTER = "policy"
CRITIC = "critic"


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's own tokenizer, never anything that a repository would like to execute."""
    path = model_path(settings)
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES[:2])}): copy the tokenizer files of its base model there")
    try:
        # By class, transformers 5 may rebuild a tokenizer (another normaliser, added tokens); tokenizer.json is what the model was trained with.
        return PreTrainedTokenizerFast.from_pretrained(path, revision=settings.revision)
    except (OSError, ValueError, TypeError):
        pass
    try:
        return AutoTokenizer.from_pretrained(path, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer from model.path = '{settings.path}': {_first_line(error)}") from None


def load_base(settings: ModelSettings) -> nn.Module:
    """The frozen base, quantised as asked, in training mode without dropout, on its device. Raises UserError if it cannot be had."""
    path, device = model_path(settings), pick_device(settings)
    dtype = pick_dtype(settings, device)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise UserError(f"{path} holds no config.json: it is no model folder")
    transformers_logging.disable_progress_bar()                     # its bar over tensors and ours would overwrite each other
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=settings.revision, dtype=dtype, quantization_config=_quantization(settings, dtype), device_map={"": device}
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"model.path = '{settings.path}' cannot be loaded: {_first_line(error)}") from None
    model.config.use_cache = False
    return freeze(model)


def freeze(model: nn.Module) -> nn.Module:
    """Nothing of the base learns, nothing drops out, nothing is repacked. Returns the same module, for good in training mode.

    In evaluation mode on a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights in place at the first call without gradient;
    its packed kernel has no autograd, so that every later gradient is wrong without a word. Training mode alone prevents it (transformers'
    own `generate` does not change the mode), the flag prevents it even for somebody who calls `eval()`.
    """
    model.requires_grad_(False)
    model.train()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def keep_embedding_on_host(model: nn.Module) -> int:
    """Moves the embedding's weight to the host's memory, for good: lookups happen there, and their rows go to the device. -> bytes moved.

    Rows that are looked up are few, so what a card saves costs a wait for the host at every pass; decoding steps are not captured as CUDA graphs
    any more. On a CPU nothing moves. Raises UserError where the weight is the output layer's too, which every pass reads whole.
    """
    bare: Any = bare_model(model)
    embedding, output = bare.get_input_embeddings(), bare.get_output_embeddings()
    if output is not None and output.weight.untyped_storage()._cdata == embedding.weight.untyped_storage()._cdata:
        raise UserError(
            f"memory.embedding_on_host = true but this {bare.config.model_type} model's embedding is its output layer too, which the card needs: "
            "leave it unset"
        )
    device, before = compute_device(bare), embedding.weight.device
    if before.type != "cpu":
        embedding.to("cpu")
    # Hooks and no class of its own: a family's embedding may do more than look up, and the weight keeps its name.
    embedding.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.device), *inputs[1:]))
    embedding.register_forward_hook(lambda module, inputs, rows: rows.to(device), prepend=True)
    return int(embedding.weight.nbytes) if before.type != "cpu" else 0


def attach(base: nn.Module, settings: AdapterSettings, seed: int, critic: bool = False) -> Any:
    """The base with a fresh float32 adapter "policy", and a second one, "critic", if asked. Returns a PeftModel; B starts at 0.

    Raises UserError for target modules that the model does not have.
    """
    torch.manual_seed(seed)
    targets: Any = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.use_rslora,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config, adapter_name=ADAPTER)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(f"adapter.lora_target_modules = {list(targets)}: {_first_line(error)} (this model's linear layers: {', '.join(names)})") from None
    if critic:
        model.add_adapter(CRITIC, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()
    return model


def _quantization(settings: ModelSettings, dtype: torch.dtype) -> Any:
    if settings.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.quantization == "int8" else None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
