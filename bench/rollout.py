"""Rollouts by each engine and by transformers' `generate()`: the same model, prompts and lengths, by turns in one process, one thread.

    python -m bench.rollout [1M|25M|13M-32k] [nf4|int8|none] [float32|bfloat16] [repeats] [engines ...]

Prints useful tokens (none after an end) per second of CPU time, and each turn's ratios to `generate()` and to `TorchEngine` in the same turn.
`generate()` runs as a trainer has it: in training mode, without gradient, every prompt repeated for each of its samples. llama.cpp samples from
the base that was quantised, with the adapter on top; its engine's own work (writing and swapping the adapter) is part of its turn.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from localrl.batch import Prompt, Request
from localrl.engines.call import Waves
from localrl.engines.llama.engine import LlamaEngine
from localrl.engines.torch import TorchEngine
from localrl.policy.load import attach, load_base, load_tokenizer
from localrl.quiet import quiet_libraries
from localrl.sections import AdapterSettings, ModelSettings, RolloutSettings

CASES: dict[str, dict[str, Any]] = {
    "1M": {
        "config": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 300},
        "prompts": 16, "samples": 4, "prompt": 32, "new": 96,
    },
    "25M": {
        "config": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 1024},
        "prompts": 4, "samples": 8, "prompt": 32, "new": 96,
    },
    "13M-32k": {
        "config": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 32000,
                   "tie_word_embeddings": True},
        "prompts": 4, "samples": 8, "prompt": 32, "new": 96,
    },
}  # fmt: skip


def make(folder: Path, config: dict[str, Any], quantization: str, dtype: str) -> tuple[Any, Any]:
    """A random Llama on disk, loaded as a run loads it, with an adapter that says something."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config, eos_token_id=256)).save_pretrained(folder)
    settings = ModelSettings(path=str(folder), quantization=quantization, compute_dtype=dtype, device="cpu")
    model = attach(load_base(settings), AdapterSettings(), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model, load_tokenizer(settings)


def by_generate(model: Any, prompts: list[list[int]], samples: int, new: int) -> int:
    """Useful tokens that `generate()` made."""
    tokens = torch.tensor([p for p in prompts for _ in range(samples)])
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=new, eos_token_id=256, pad_token_id=256, use_cache=True,
        )[:, tokens.shape[1] :]  # fmt: skip
    return int((out == 256).cumsum(1).eq(0).sum() + (out == 256).any(1).sum())


def engines_of(names: list[str], model: Any, tokenizer: Any, plain: Any, settings: RolloutSettings) -> dict[str, Waves]:
    """By name, in this order."""
    found: dict[str, Waves] = {}
    for name in names:
        if name == "TorchEngine":
            found[name] = TorchEngine(model, tokenizer, settings, seed=0)
        elif name == "unquantised":
            found[name] = TorchEngine(plain, tokenizer, settings, seed=0)
        elif name != "generate()":
            found[name] = LlamaEngine(model, tokenizer, settings, seed=0, kind=name, threads=1)  # type: ignore[arg-type]
    return found


def main(case: str, quantization: str, dtype: str, repeats: int, names: list[str]) -> None:
    """Measure one case and print it."""
    torch.set_num_threads(1)
    quiet_libraries()
    spec = CASES[case]
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 256, (spec["prompts"], spec["prompt"]), generator=draw).tolist()
    requests = [Request(Prompt(i, tuple(p), ""), k) for i, p in enumerate(prompts) for k in range(spec["samples"])]
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = make(Path(folder) / "a", spec["config"], quantization, dtype)
        plain, _ = make(Path(folder) / "b", spec["config"], "none", dtype)
    engines = engines_of(names, model, tokenizer, plain, RolloutSettings(max_completion_length=spec["new"]))
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, speed in speeds.items():
            start = time.process_time()
            if name == "generate()":
                useful = by_generate(model, prompts, spec["samples"], spec["new"])
            else:
                engines[name].follow(lambda folder: None, turn)
                useful = sum(len(r.tokens) for r in engines[name].generate(requests, turn))
            if turn:                                                 # the first warms caches up
                speed.append(useful / (time.process_time() - start))
    print(f"{case} {quantization} {dtype}, {len(requests)} rows of {spec['prompt']} + {spec['new']} tokens, {repeats} turns\n")
    print("| engine | tokens/s | to generate() | to TorchEngine |\n|---|---|---|---|")
    for name, speed in speeds.items():
        told = [ratio(speed, speeds[other]) if other in speeds else "" for other in ("generate()", "TorchEngine")]
        print(f"| {name} | {statistics.median(speed):.0f} | {' | '.join(told)} |")


def ratio(speed: list[float], other: list[float]) -> str:
    """Median and range of the turns' ratios."""
    ratios = [a / b for a, b in zip(speed, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    case, quantization, dtype, repeats = [*sys.argv[1:5], *["1M", "nf4", "float32", "5"][len(sys.argv[1:5]) :]]
    main(case, quantization, dtype, int(repeats), sys.argv[5:] or ["generate()", "TorchEngine", "unquantised", "f16", "q8_0", "q4_k_m"])
