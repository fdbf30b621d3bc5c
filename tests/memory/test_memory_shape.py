"""A model's numbers from its config, against transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from localrl.memory.families import FAMILIES
from localrl.memory.shape import ModelShape
from localrl.settings import UserError
from tests.memory.models import MODELS

SIZES = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 301, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}
CHANGES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 24},
    {"num_key_value_heads": 6},
    {"qk_layernorm": True},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_counts_are_those_of_the_model_itself(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **(SIZES | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output]
    shape = ModelShape.read(config.to_dict())
    assert shape.quantisable == sum(m.weight.numel() for m in linears)
    assert shape.parameters == sum(p.numel() for p in model.parameters())                # a tied weight counts once
    assert sorted((m.in_features, m.out_features) for m in linears) == sorted([(m.inputs, m.outputs) for m in shape.linears] * shape.layers)
    assert {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m in linears} == {m.name for m in shape.linears}
    windowed = sum(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [])
    assert not windowed or shape.windowed_layers == windowed


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_fills_in(family: str) -> None:
    """A published config.json holds what differs from its class; the bare one must mean the same as the full one."""
    bare = {"model_type": family, **SIZES}
    full = AutoConfig.for_model(family, **SIZES).to_dict()
    assert ModelShape.read(bare).parameters == ModelShape.read(full).parameters
    assert ModelShape.read(bare).linears == ModelShape.read(full).linears


def test_file_folder_and_values_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelShape.read(tmp_path) == ModelShape.read(tmp_path / "config.json") == ModelShape.read(LLAMA) == ModelShape.read(str(tmp_path))


def test_published_sizes() -> None:
    known = {"Llama-3.1-8B": 8.03, "Qwen3-8B": 8.19, "Qwen3-4B": 4.02, "Qwen2.5-7B": 7.62, "Qwen3-14B": 14.77, "Gemma-3-12B": 11.77, "SmolLM2-1.7B": 1.71}
    assert {name: round(shape.parameters / 1e9, 2) for name, shape in MODELS.items()} == known
    llama = MODELS["Llama-3.1-8B"]
    assert llama.base_bytes("nf4", 2) // 2**20 == 5438                                   # simulated: 5439
    assert sum(llama.adapter_parts(16, "all-linear")) == 41_943_040
    assert [MODELS[name].kv_bytes(1) // 1024 for name in ("Llama-3.1-8B", "Qwen3-8B", "Qwen2.5-7B", "SmolLM2-1.7B")] == [128, 144, 56, 192]
    gemma = MODELS["Gemma-3-12B"]                                    # 8 of 48 layers see everything
    assert gemma.kv_bytes(5000, windowed=True) == (64 * 5000 + 320 * 1024) * 1024 and gemma.kv_bytes(1000, windowed=True) == gemma.kv_bytes(1000)


def test_the_text_part_of_a_model_with_images() -> None:
    """Gemma 3's published config leaves out even the number of heads."""
    text = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8,
            "sliding_window": 1024, "model_type": "gemma3_text"}  # fmt: skip
    shape = ModelShape.read({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert shape.parameters == MODELS["Gemma-3-12B"].parameters
    assert "image" in shape.not_counted[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**LLAMA, "model_type": "lama"}, ["'lama'", "did you mean 'llama'"]),
        ({**LLAMA, "model_type": "mamba2"}, ["'mamba2'", "llama"]),
        ({"model_type": "mixtral", **SIZES, "num_local_experts": 8}, ["8 experts", "bitsandbytes", "dense"]),
        ({"model_type": "qwen3_moe", **SIZES, "num_experts": 128}, ["128 experts"]),
        ({"model_type": "gpt_oss", **SIZES}, ["experts"]),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, ["lacks 'hidden_size'", "config.json"]),
        ({**LLAMA, "vocab_size": "many"}, ["vocab_size", "'many'"]),
        ({**LLAMA, "num_hidden_layers": 0}, ["num_hidden_layers = 0"]),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, ["'awq'", "original"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        ModelShape.read(values)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        ModelShape.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        ModelShape.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        ModelShape.read(tmp_path)


def test_adapter_targets() -> None:
    shape = ModelShape.read(LLAMA)
    assert sum(shape.adapter_parts(4, ["q_proj", "v_proj"])) == 3 * 4 * (96 + 96 + 96 + 32)
    assert shape.adapter_parts(4, "q_proj") == shape.adapter_parts(4, ["q_proj"])
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        shape.adapter_parts(4, ["q_porj"])
    assert ModelShape.read({**LLAMA, "quantization_config": {"quant_method": "bitsandbytes"}}).quantisable == shape.quantisable
