"""SmolLM3, Gemma 2 and 3, Phi-3: a file says what the live model says; what is off is caught, what llama.cpp cannot compute is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from llama_cpp import Llama
from transformers import AutoConfig

from localrl.export import Sample, check_exportable, export
from localrl.export.check_worker import load as strict
from localrl.export.check_worker import logits_of
from localrl.export.families import context_length, same_length
from localrl.export.reference import last_logits
from localrl.settings import UserError
from tests.export.test_gguf_failures import plant

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]

GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
"""Heads together twice as wide as the model, a window that is much shorter than a sample."""
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}  # fmt: skip
SPLIT = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 5, "pad_token_id": 0},
    "smollm3 untied": {"num_hidden_layers": 4, "pad_token_id": 0, "tie_word_embeddings": False, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}},
    "gemma2": {**GEMMA, "num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "vocab_size": 304},
    "gemma2 27B": {**GEMMA, "num_hidden_layers": 46, "query_pre_attn_scalar": 16, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7, "rope_parameters": SPLIT},
    "gemma3_text capped": {**GEMMA, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "final_logit_softcapping": 3.0},
    "phi3": {"pad_token_id": 0, "sliding_window": 2047, "vocab_size": 304},
    "phi3 partial": {"pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "phi3 long": {"pad_token_id": 0, "max_position_embeddings": 1024, "original_max_position_embeddings": 256, "rope_parameters": LONG,
                  "tie_word_embeddings": True},
}  # fmt: skip


def limit(name: str) -> float:
    """Logits of a strict comparison: llama.cpp takes Gemma's GELU from a table in half precision."""
    return 5e-3 if name.startswith("gemma") else 1e-4


@pytest.fixture
def of(live: Live) -> Callable[..., tuple[Any, Any]]:
    """of("gemma2 27B", "nf4") -> (live model, tokenizer)."""
    return lambda name, form="none", **more: live(name.split()[0], form, **(CONFIGS[name] | more))


@pytest.mark.parametrize(("name", "form"), [(name, "nf4") for name in CONFIGS if name != "gemma2 27B"] + [("gemma2 27B", "none"), ("phi3", "int8")])
def test_merged_f32_has_the_live_models_logits(name: str, form: str, of: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = of(name, form)
    told = samples(tokenizer)
    assert max(len(s.prompt + s.response) for s in told) > 200  # several windows
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=told)
    assert done.report.figures["max_abs"] < limit(name)
    assert done.report.types == {"F32": sum(done.report.types.values())}
    plain = Llama(str(done.path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)  # as a person opens it, with what llama.cpp does by default
    assert len(plain.create_completion("one two", max_tokens=2, temperature=0.0)["choices"]) == 1  # type: ignore[index]
    plain.close()


@pytest.mark.parametrize("name", ["smollm3", "gemma2", "gemma3_text", "phi3 long"])
def test_base_and_adapter_f32_have_the_live_models_logits(name: str, of: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = of(name, "nf4", lora={"use_rslora": True, "lora_dropout": 0.0})
    done = export(model, tokenizer, tmp_path, what="adapter", dtype="f32", samples=samples(tokenizer))
    assert done.report.figures["max_abs"] < limit(name)
    names = {t.name.removeprefix("blk.0.") for t in GGUFReader(done.path).tensors if t.name.startswith("blk.0.")}
    fused = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    modules = fused if name.startswith("phi3") else {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    assert names == {f"{module}.weight.lora_{x}" for module in modules for x in "ab"}


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi3"])
def test_a_model_that_trains_in_bf16_is_compared_in_fp32(name: str, of: Live, samples: Samples, tmp_path: Path) -> None:
    """Gemma's embedding is multiplied by the root of its width there too."""
    model, tokenizer = of(name, "nf4", dtype=torch.bfloat16)
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    assert done.report.figures["max_abs"] < limit(name)
    (rounding,) = [row for row in done.report.checks if row.name == "trainer's rounding"]
    assert float(rounding.value.split()[0]) < 2e-3


@pytest.mark.parametrize("name", ["smollm3", "gemma2", "gemma3_text", "phi3"])
def test_a_k_quant_passes(name: str, of: Live, samples: Samples, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.04}
    heads = {"head_dim": 64, "query_pre_attn_scalar": 64} if name.startswith("gemma") else {}
    model, tokenizer = of(name, "nf4", **wide, **heads)
    done = export(model, tokenizer, tmp_path, what="merged", dtype="q4_k_m", samples=samples(tokenizer))
    assert not done.report.fallbacks
    assert done.report.types["Q4_K"] >= 6
    assert done.report.figures["kl_mean"] < 0.1


# -- longrope ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [250, 500])
def test_longrope_turns_as_transformers_does_on_both_sides_of_the_original_length(length: int, of: Live, samples: Samples, tmp_path: Path) -> None:
    """llama.cpp takes the short factors in a context of up to 256 tokens here, and the long ones in a longer one."""
    model, tokenizer = of("phi3 long")
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer))
    fields = GGUFReader(done.path).fields
    assert fields["phi3.context_length"].contents() == context_length(model.get_base_model().config) == 1024
    assert fields["phi3.rope.dimension_count"].contents() == 12
    assert fields["phi3.rope.scaling.original_context_length"].contents() == same_length(model.get_base_model().config) == 256
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    job = {"model": str(done.path), "adapter": None, "threads": 1, "sequences": [{"tokens": tokens}], "prompts": [], "count": 0}
    opened = strict(job)
    assert np.abs(last_logits(model, tokens, 20).numpy() - logits_of(opened, tokens, 20)).max() < 1e-4
    opened.close()


def test_samples_are_cut_where_longrope_begins_to_differ(of: Live, tmp_path: Path) -> None:
    model, tokenizer = of("phi3 long")
    told = [Sample(tuple(tokenizer("Longer and longer. " * 40)["input_ids"])), Sample(tuple(tokenizer("Short.")["input_ids"]))]
    assert len(told[0].prompt) > 600
    done = export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=told)
    assert done.report.figures["positions"] == 256 + len(told[1].prompt)
    assert "PARAMETER num_ctx 256\n" in done.path.with_suffix(".Modelfile").read_text()


# -- faults -----------------------------------------------------------------------------------------------------------------


def number(path: Path, key: str, value: float) -> None:
    """Another number in place."""
    field = GGUFReader(path, "r+").fields[key]
    assert field.contents() != value
    field.parts[field.data[0]][0] = value


def tensors(path: Path, ending: str) -> list[Any]:
    found = [t.data for t in GGUFReader(path, "r+").tensors if t.name.endswith(ending)]
    assert found
    return found


def norms_without_one(path: Path) -> None:
    """The classic of Gemma."""
    for data in tensors(path, "norm.weight"):
        data[:] -= 1.0


def one_norm_without_one(path: Path) -> None:
    """Only that of the keys."""
    for data in tensors(path, "attn_k_norm.weight"):
        data[:] -= 1.0


def norms_in_each_others_place(path: Path) -> None:
    """What has the name that it has elsewhere."""
    for one, other in zip(tensors(path, "post_attention_norm.weight"), tensors(path, "ffn_norm.weight"), strict=True):
        one[:], other[:] = other.copy(), one.copy()


def swap_rows(path: Path, ending: str, first: slice, second: slice) -> None:
    for data in tensors(path, ending):
        data[first], data[second] = data[second].copy(), data[first].copy()


def factors_in_each_others_place(path: Path) -> None:
    (one,), (other,) = tensors(path, "factors_long.weight"), tensors(path, "factors_short.weight")
    one[:], other[:] = other.copy(), one.copy()


FAULTS: list[tuple[str, Callable[[Path], None]]] = [
    ("smollm3", lambda path: number(path, "smollm3.rope.freq_base", 1e4)),
    ("gemma2", norms_without_one),
    ("gemma2", norms_in_each_others_place),
    ("gemma2", lambda path: number(path, "gemma2.attention.sliding_window", 48)),
    ("gemma2", lambda path: number(path, "gemma2.attn_logit_softcapping", 50.0)),
    ("gemma2", lambda path: number(path, "gemma2.final_logit_softcapping", 30.0)),
    ("gemma3_text", norms_without_one),
    ("gemma3_text", one_norm_without_one),
    ("gemma3_text", lambda path: number(path, "gemma3.attention.sliding_window", 31)),
    ("gemma3_text", lambda path: number(path, "gemma3.rope.freq_base_swa", 1e4)),
    ("gemma3_text", lambda path: number(path, "gemma3.rope.scaling.factor", 1.0)),
    ("phi3", lambda path: swap_rows(path, "ffn_up.weight", slice(0, 128), slice(128, 256))),
    ("phi3", lambda path: swap_rows(path, "attn_qkv.weight", slice(64, 96), slice(96, 128))),
    ("phi3 long", factors_in_each_others_place),
    ("phi3 long", lambda path: number(path, "phi3.rope.scaling.attn_factor", 1.0)),
    ("phi3 partial", lambda path: number(path, "phi3.rope.dimension_count", 16)),
]


@pytest.mark.parametrize(("name", "damage"), FAULTS)
def test_what_is_off_shows_in_the_logits(name: str, damage: Callable[[Path], None], of: Live, samples: Samples, tmp_path: Path) -> None:
    """Whatever the other checks say: the same mistake within the exporter would be in agreement with them."""
    model, tokenizer = of(name)
    fault = plant(damage, tmp_path / "model-merged-f32.gguf.tmp")
    with pytest.raises(UserError):
        export(model, tokenizer, tmp_path, what="merged", dtype="f32", samples=samples(tokenizer), progress=fault)
    report = json.loads((tmp_path / "model-merged-f32.gguf.failed.check.json").read_text())
    failed = {row["name"] for row in report["checks"] if not row["passed"]}
    assert {"logits", "mean KL"} <= failed


# -- refusals ---------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("smollm3", {"no_rope_layer_interval": 3}, r"no_rope_layers = \[1, 1, 0.* every 4th layer.*keep the PEFT adapter"),
    ("smollm3", {"attention_bias": True}, "attention_bias = True.*only False"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias = True.*only False"),
    ("smollm3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 128}}, "rope_type = 'llama3' is not in llama.cpp's smollm3 graph, only default, linear, yarn"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None .*always caps"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping = None .*always caps"),
    ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar = 144 .*only 256 with 26 layers"),
    ("gemma2", {"num_hidden_layers": 46}, "query_pre_attn_scalar = 256 .*only 288 with 46 layers"),
    ("gemma2", {"layer_types": ["full_attention"] * 26}, r"full attention in \[0, 1.*last of every 2"),
    ("gemma2", {"sliding_window": None}, "sliding_window = None"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' .*only 'gelu_pytorch_tanh'"),
    ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings = False .*only True"),
    ("gemma2", {"attention_bias": True}, "attention_bias = True.*only False"),
    ("gemma3_text", {"sliding_window_pattern": 4}, r"full attention in \[3, 7.*last of every 6"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 .*only None"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True .*only False"),
    ("gemma3_text", {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar = 168 .*only 256 with 26 layers"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0}}}, "'yarn' .*only default, linear"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}}, "'linear' in layers with a window"),
    ("phi3", {"head_dim": 64}, "head_dim 64 x 32 heads is not hidden_size 3072"),
    ("phi3", {"hidden_act": "gelu"}, "hidden_act = 'gelu' .*only 'silu'"),
    ("phi3", {"max_position_embeddings": 512, "original_max_position_embeddings": 128, "rope_parameters": {
     "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}, "128 is less than .*smallest context of 256"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 .*only 1"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 32}, "layers of type 'chunked_attention'"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 128}}, "rope_type = 'llama3' is not in llama.cpp's qwen2 graph"),
    ("gemma3", {}, "type 'gemma3'.*gemma3_text"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_llama_cpp_computes_differently_is_refused_with_its_value_and_a_way_out(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        check_exportable(AutoConfig.for_model(family, **changes), {})
    assert "PEFT adapter" in str(error.value)


PUBLISHED: list[tuple[str, dict[str, Any], int, int]] = [
    ("smollm3", {}, 32768, 32768),
    ("gemma2", {}, 8192, 8192),
    ("gemma2", {"hidden_size": 4608, "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
                "query_pre_attn_scalar": 144}, 8192, 8192),  # 27B
    ("gemma3_text", {"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512, "max_position_embeddings": 32768},
     32768, 32768),  # 1B
    ("phi3", {"sliding_window": 2047}, 2047, 2047),  # Phi-3-mini-4k
    ("phi3", {"num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 262144, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "partial_rotary_factor": 0.75}}, 131072, 4096),
]  # fmt: skip
"""As published, as far as this is told here: family, settings beside transformers' defaults, the file's context, up to where the two agree in any case."""


@pytest.mark.parametrize(("family", "changes", "longest", "same"), PUBLISHED)
def test_the_published_sizes_are_not_refused(family: str, changes: dict[str, Any], longest: int, same: int) -> None:
    config = AutoConfig.for_model(family, **changes)
    check_exportable(config, {"lora_dropout": 0.1})
    assert (context_length(config), same_length(config)) == (longest, same)


def test_a_theta_is_never_guessed() -> None:
    config = AutoConfig.for_model("gemma3_text")
    config.rope_parameters = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UserError, match="not for 'full_attention'"):
        check_exportable(config, {})
    config = AutoConfig.for_model("llama")
    config.rope_parameters = {"rope_type": "default"}
    with pytest.raises(UserError, match="names no rope_theta"):
        check_exportable(config, {})
    config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UserError, match="for each type of layer"):
        check_exportable(config, {})


def test_targets_are_those_of_the_family() -> None:
    phi, gemma = AutoConfig.for_model("phi3"), AutoConfig.for_model("gemma2")
    check_exportable(phi, {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]})
    with pytest.raises(UserError, match=r"LoRA on 'q_proj'.*known: down_proj, gate_up_proj, o_proj, qkv_proj"):
        check_exportable(phi, {"target_modules": ["q_proj"]})
    with pytest.raises(UserError, match="LoRA on 'qkv_proj'"):
        check_exportable(gemma, {"target_modules": ["qkv_proj"]})


def test_without_windows_in_llama_cpp_the_window_is_the_limit() -> None:
    assert context_length(AutoConfig.for_model("phi3", sliding_window=2047)) == 2047
    assert context_length(AutoConfig.for_model("smollm3", sliding_window=2047)) == 32768  # not in use
    assert context_length(AutoConfig.for_model("smollm3", sliding_window=2047, use_sliding_window=True)) == 2047
    assert context_length(AutoConfig.for_model("gemma2", sliding_window=2047)) == 8192
