"""An exported file says what the live model says, for every family, every form of the base, every way to scale an adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig

from localrl.export import Export, Sample, export
from localrl.export.reference import ask, exact, last_logits

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]
Fingerprint = Callable[[Any], str]

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
PATTERNS = {"rank_pattern": {"q_proj": 4, "down_proj": 16}, "alpha_pattern": {"up_proj": 64}}

MERGED = [
    ("llama", "nf4", {}, {"attention_bias": True, "mlp_bias": True}),
    ("llama", "int8", {"use_rslora": True}, {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "vocab_size": 272}),
    ("llama", "none", {"target_modules": ["q_proj", "v_proj"]}, {"rope_parameters": YARN}),
    ("mistral", "nf4", {}, {"head_dim": 32, "rope_parameters": LINEAR}),
    ("qwen2", "int8", {}, {"tie_word_embeddings": True}),
    ("qwen3", "nf4", PATTERNS, {"head_dim": 64, "vocab_size": 304}),
]
ADAPTERS = [
    ("llama", "nf4", PATTERNS | {"use_rslora": True}, {"rope_parameters": LLAMA3}),
    ("qwen2", "none", {"use_rslora": True}, {}),
    ("qwen3", "int8", {}, {"head_dim": 64, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "form", "lora", "config"), MERGED)
def test_merged_f32_has_the_live_models_logits(
    family: str,
    form: str,
    lora: dict[str, Any],
    config: dict[str, Any],
    live: Live,
    samples: Samples,
    fingerprint: Fingerprint,
    tmp_path: Path,
) -> None:
    model, tokenizer = live(family, form, lora=lora, **config)
    before = fingerprint(model)
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    assert fingerprint(model) == before
    assert done.report.figures["max_abs"] < 1e-4
    assert done.report.figures["kl_mean"] < 1e-9
    assert done.report.types == {"F32": sum(done.report.types.values())}
    assert done.path.name == "model-merged-f32.gguf"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("family", "form", "lora", "config"), ADAPTERS)
def test_base_and_adapter_f32_have_the_live_models_logits(
    family: str,
    form: str,
    lora: dict[str, Any],
    config: dict[str, Any],
    live: Live,
    samples: Samples,
    fingerprint: Fingerprint,
    tmp_path: Path,
) -> None:
    model, tokenizer = live(family, form, lora=lora, **config)
    before = fingerprint(model)
    done = export(model, tokenizer, tmp_path, what="adapter", dtype="f32", samples=samples(tokenizer), name="small")
    assert fingerprint(model) == before
    assert done.report.figures["max_abs"] < 1e-4
    assert done.base == tmp_path / "small-base-f32.gguf"
    base = json.loads((tmp_path / "small-base-f32.gguf.check.json").read_text())
    assert base["figures"]["max_abs"] < 1e-4
    assert done.path.stat().st_size < done.base.stat().st_size


@pytest.mark.parametrize(("what", "dtype"), [("merged", "q8_0"), ("merged", "f16"), ("adapter", "q8_0")])
def test_smaller_types_stay_close(what: Any, dtype: Any, live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "nf4", vocab_size=272)
    seen: list[tuple[int, int, str]] = []
    told = samples(tokenizer)
    done = export(
        model,
        tokenizer,
        tmp_path,
        what=what,
        dtype=dtype,
        samples=told,
        metadata={"seed": 7, "note": "x"},
        progress=lambda *p: seen.append(p),
    )
    assert done.report.passed
    assert done.report.figures["kl_mean"] < {"f16": 1e-5, "q8_0": 1e-3}[dtype]
    assert seen[-1] == (1, 1, "self-check")
    assert {name for _, _, name in seen} >= {"blk.1.ffn_down.weight" + (".lora_b" if what == "adapter" else "")}
    fields = GGUFReader(done.path).fields
    assert fields["localrl.seed"].contents() == 7
    assert fields["localrl.note"].contents() == "x"
    if what == "merged":
        assert done.report.types == {{"q8_0": "Q8_0", "f16": "F16"}[dtype]: 16, "F32": 5}
    else:
        assert done.report.types == {"F16": 28}
        assert fields["adapter.lora.alpha"].contents() == 0.0


def test_adapter_on_a_base_that_is_already_there(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("qwen2", "nf4")
    told = samples(tokenizer)
    base = export(model, tokenizer, tmp_path / "base", what="base", dtype="f32", samples=told)
    done = export(model, tokenizer, tmp_path, what="adapter", dtype="f32", samples=told, base=base.path)
    assert done.base == base.path
    assert sorted(p.name for p in tmp_path.glob("*.gguf")) == ["model-adapter-f32.gguf"]


def test_a_model_that_trains_in_bf16_is_compared_in_fp32(live: Live, samples: Samples, fingerprint: Fingerprint, tmp_path: Path) -> None:
    model, tokenizer = live("qwen3", "nf4", dtype=torch.bfloat16, tie_word_embeddings=True)
    before = fingerprint(model)
    done: Export = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    assert fingerprint(model) == before
    assert done.report.figures["max_abs"] < 1e-4, "bf16's own rounding must not be in the way of a strict comparison"
    rounding = [row for row in done.report.checks if row.name == "trainer's rounding"]
    assert len(rounding) == 1
    assert rounding[0].passed


@pytest.mark.parametrize("form", ["nf4", "int8", "none"])
def test_the_fp32_reference_is_the_live_model_where_that_is_fp32(form: str, live: Live, samples: Samples) -> None:
    model, tokenizer = live("llama", form)
    told = samples(tokenizer)
    direct = ask(model, told, len(tokenizer))
    with exact(model, "policy"):
        again = ask(model, told, len(tokenizer))
    after = ask(model, told, len(tokenizer))
    for a, b, c in zip(direct, again, after, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.logits, b.logits, atol=2e-5, rtol=0)
        assert torch.equal(a.logits, c.logits), "nothing of the model may stay changed"
    with exact(model, None):
        base = last_logits(model, told[0].prompt, 1)
    assert (base - last_logits(model, told[0].prompt, 1)).abs().max() > 1e-2, "without the adapter it is another model"
    with model.disable_adapter():
        torch.testing.assert_close(base, last_logits(model, told[0].prompt, 1), atol=2e-5, rtol=0)


def test_only_the_policys_adapter_is_exported(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "nf4")
    told = samples(tokenizer)
    model.add_adapter("critic", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "critic" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.train()
    for on in ("policy", "critic"):  # whichever is on at that moment
        model.set_adapter(on)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=told, name=on)
        assert done.report.figures["max_abs"] < 1e-4
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    digests = [
        hashlib.sha256((tmp_path / f"{on}-merged-f32.gguf").read_bytes().replace(on.encode(), b"")).digest() for on in ("policy", "critic")
    ]
    assert digests[0] == digests[1]


def test_long_samples_are_cut_to_the_sliding_window(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("mistral", "none", sliding_window=64)
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    assert GGUFReader(done.path).fields["llama.context_length"].contents() == 64
    assert done.report.figures["max_abs"] < 1e-4
