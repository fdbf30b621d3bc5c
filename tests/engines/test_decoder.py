"""The hand-written step against the model's own `generate`: the same logits, whatever the family, the base and the form of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localrl.engines.decoder import FAMILIES, Decoder, misfit
from tests.engines.models import load, prompts

STEPS = 20
CONTEXTS = [p.tokens for p in prompts(3, 12)]
OWNER = [0, 0, 1, 2, 2, 2]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, wide heads, tied": ("llama", {"head_dim": 24, "tie_word_embeddings": True}),
    "llama, biases, llama3 rope": ("llama", {
        "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    }),
    "llama, one group, yarn": ("llama", {
        "num_key_value_heads": 4, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    }),
    "mistral, wide heads": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 24}),
    "qwen3, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}  # fmt: skip


def generated(model: Any, context: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Greedy tokens of transformers' own loop, and the logits behind them (STEPS, V)."""
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([context]), attention_mask=torch.ones(1, len(context), dtype=torch.int64), max_new_tokens=STEPS,
            min_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0, use_cache=True,
        )  # fmt: skip
    return out.sequences[0, len(context) :].tolist(), torch.stack(out.logits)[:, 0].float()


def stepped(decoder: Decoder, answers: list[list[int]]) -> Tensor:
    """Logits of the hand-written step, fed the same tokens; rows leave on the way. -> (rows, STEPS, V), NaN once a row has left."""
    with torch.no_grad():
        logits, cache = decoder.prefill(CONTEXTS, OWNER, STEPS - 1)
        found = torch.full((len(OWNER), STEPS, logits.shape[1]), float("nan"))
        rows = torch.arange(len(OWNER))
        for t in range(STEPS):
            found[rows, t] = logits
            leaving = {5: [1], 9: [3, 2]}.get(t, [])                 # one of a group; later a whole group and one of another
            stay = [i for i, row in enumerate(rows.tolist()) if row not in leaving]
            if leaving:
                cache.keep(stay)
                rows = rows[stay]
            if t + 1 < STEPS:
                cache.grow()
                logits = decoder.step(torch.tensor([answers[OWNER[row]][t] for row in rows.tolist()]), cache)
    return found


def compare(model: Any, found: Tensor, references: list[Tensor], tolerance: float) -> None:
    for row, owner in enumerate(OWNER):
        known = ~found[row, :, 0].isnan()
        assert known.sum() >= 6
        torch.testing.assert_close(found[row, known], references[owner][known], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_logits_are_those_of_generate(make_model: Callable[..., Path], name: str, quantization: str) -> None:
    family, changes = MODELS[name]
    model, _ = load(make_model(family, **changes), quantization)
    assert misfit(model, 64) is None
    answers, references = zip(*(generated(model, context) for context in CONTEXTS), strict=True)
    for unpack in (False, True):
        for fixed in (False, True):
            decoder = Decoder(model, unpack, 64, fixed=fixed)
            assert decoder.apart is unpack
            compare(model, stepped(decoder, list(answers)), list(references), 1e-5)


def test_int8_logits_are_those_of_the_training_path(make_model: Callable[..., Path]) -> None:
    model, _ = load(make_model("qwen3", head_dim=24), "int8")
    answers, references = zip(*(generated(model, context) for context in CONTEXTS), strict=True)
    for unpack in (False, True):
        compare(model, stepped(Decoder(model, unpack, 64), list(answers)), list(references), 1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_in_bf16_the_adapter_stays_beside_the_base(make_model: Callable[..., Path], quantization: str) -> None:
    """As close to an fp32 model of the same weights as transformers' own bf16 pass is; with a small adapter lost it would be further."""
    folder = make_model("llama", head_dim=24, attention_bias=True)
    model, _ = load(folder, quantization, "bfloat16")
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data *= 0.02                                       # deltas of a thousandth of the weights: below half a bf16 step
    answers, own = zip(*(generated(model, context) for context in CONTEXTS), strict=True)
    with model.disable_adapter():
        base = stepped(Decoder(model, True, 64), list(answers))
    for unpack in (False, True):
        found = stepped(Decoder(model, unpack, 64), list(answers))
        noise = torch.stack([(found[i] - own[o]).abs().nanmean() for i, o in enumerate(OWNER)]).mean()
        assert noise < 0.02
    assert (found - base).abs().nanmean() > 1e-4                     # and the adapter is there


def test_the_adapter_in_bf16_is_exact_where_the_base_is_nothing(make_model: Callable[..., Path]) -> None:
    """One layer by itself: W = 0, so that what comes out is the adapter's, to bf16's three digits."""
    from localrl.engines.weights import unpacked

    model, _ = load(make_model("llama"), "none", "bfloat16")
    attention = model.get_base_model().model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    for layer in layers:
        layer.base_layer.weight.data.zero_()
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], -1).float()
        order = torch.randperm(128)
        for out, wanted in ((unpacked(layers, torch.bfloat16)(x), expected), (unpacked(layers, torch.bfloat16, order)(x), expected[:, order])):
            torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.02 * float(expected.abs().mean()))


def test_adapters_off_is_the_base(make_model: Callable[..., Path]) -> None:
    folder = make_model("qwen2")
    plain, _ = load(folder, "nf4", adapter=False)
    model, _ = load(folder, "nf4")
    answers, references = zip(*(generated(plain, context) for context in CONTEXTS), strict=True)
    with model.disable_adapter():
        for unpack in (False, True):
            compare(model, stepped(Decoder(model, unpack, 64), list(answers)), list(references), 1e-5)


def test_a_large_matrix_is_laid_out_for_multiplication(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localrl.engines.weights.PACK_FROM", 1)
    model, _ = load(make_model("llama", attention_bias=True), "nf4")
    answers, references = zip(*(generated(model, context) for context in CONTEXTS), strict=True)
    compare(model, stepped(Decoder(model, True, 64), list(answers)), list(references), 1e-5)


def test_layers_that_are_more_than_plain_lora_are_called_themselves(make_model: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = load(make_model("llama"), "none", adapter=False)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data.normal_(std=0.05)
    answers, references = zip(*(generated(model, context) for context in CONTEXTS), strict=True)
    decoder = Decoder(model, True, 64)
    assert not decoder.apart
    compare(model, stepped(decoder, list(answers)), list(references), 1e-5)


def test_prompts_in_several_passes_are_the_same_prompts(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(make_model("llama"), "none")
    answers, references = zip(*(generated(model, context) for context in CONTEXTS), strict=True)
    monkeypatch.setattr("localrl.engines.decoder.PREFILL_TOKENS", 13)
    compare(model, stepped(Decoder(model, True, 64), list(answers)), list(references), 1e-5)


def test_what_does_not_fit_is_told(make_model: Callable[..., Path]) -> None:
    mistral, _ = load(make_model("mistral", sliding_window=32), "none")
    assert misfit(mistral, 32) is None
    assert "sliding window of 32" in str(misfit(mistral, 33))
    dynamic, _ = load(make_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "none")
    assert "dynamic" in str(misfit(dynamic, 8))
    gemma, _ = load(make_model("gemma2"), "none")
    assert "Gemma2ForCausalLM" in str(misfit(gemma, 8))
    assert len(FAMILIES) == 4
