"""Two ways to merge: into the weights that were trained on, or into those from before they were quantised; the better by the run's own rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from localrl.batch import Prompt, Request, Rollout
from localrl.export import HeldOut, Original, Sample, export_all
from localrl.export.original import any_quantised, merged_sources
from localrl.export.weights import model_sources
from localrl.settings import UserError

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]


def held_out(tokenizer: Any, worth: Sequence[float]) -> HeldOut:
    """Six prompts, of which the n-th answer sheet that is handed in gets worth[n] (give or take a bit by prompt)."""
    prompts = [Prompt(i, tuple(tokenizer(f"What is {i} + {i}?")["input_ids"]), "x") for i in range(6)]
    sheets: list[float] = []

    def score(rollouts: list[Rollout]) -> list[Rollout]:
        sheets.append(worth[len(sheets)])
        return [replace(r, rewards=(sheets[-1] + 0.01 * (r.request.prompt.id % 2),)) for r in rollouts]

    live = [Rollout(Request(p), (1,), "x", False, 0, None, (0.0,)) for p in prompts]
    numbers = np.random.default_rng(0).random((8, len(prompts)))
    return HeldOut(live, numbers, 1.0, (), ("r",), (1.0,), score, lambda rows: ["x"] * len(rows), lambda text: None)


@pytest.mark.parametrize(("family", "form"), [("llama", "nf4"), ("llama", "int8"), ("phi3", "nf4"), ("gemma3_text", "nf4")])
def test_the_original_merge_is_that_of_an_unquantised_model(family: str, form: str, live: Live, make_model: Callable[..., Path]) -> None:
    config = {"tie_word_embeddings": True, "pad_token_id": 0} | ({"query_pre_attn_scalar": 16, "head_dim": 16} if family == "gemma3_text" else {})
    quantised, _ = live(family, form, **config)
    plain, _ = live(family, "none", **config)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(quantised, adapter_name="policy"), adapter_name="policy")
    original = Original.of(make_model(family, **config))
    assert any_quantised(quantised) and not any_quantised(plain)
    ours, wanted = (
        [torch.cat(list(s.blocks())) for s in sources] for sources in (merged_sources(quantised, "policy", original), model_sources(plain, "policy"))
    )
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)
    dequantised = [torch.cat(list(s.blocks())) for s in merged_sources(quantised, "policy", None)]
    assert any(not torch.equal(a, b) for a, b in zip(dequantised, wanted, strict=True))


@pytest.mark.parametrize(
    ("worth", "chosen", "why"),
    [
        ((0.0, 1.0, 1.0), "original", "the original is certainly better"),
        ((0.0, 0.0, 0.0), "dequantized", "not certainly better"),
        ((1.0, 0.0, 1.0), "dequantized", "not certainly better"),
    ],
)
def test_the_better_one_is_shipped(
    worth: Sequence[float], chosen: str, why: str, live: Live, samples: Samples, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = live("llama", "nf4")
    (done,) = export_all(
        model, tokenizer, tmp_path, what="merged", dtypes=["q8_0"], samples=samples(tokenizer), merge="auto",
        original=Original.of(make_model("llama")), held_out=held_out(tokenizer, worth),
    )  # fmt: skip
    assert GGUFReader(done.path).fields["localrl.merge"].contents() == chosen
    assert why in done.report.notes[-1]
    assert why in (tmp_path / "README.md").read_text()
    assert {p.name for p in tmp_path.glob("*.gguf*")} == {"model-merged-q8_0.gguf", "model-merged-q8_0.gguf.check.json"}
    strict = next(row for row in done.report.checks if row.name == "mean KL, f32 parent")
    assert float(strict.value.split()[0]) < 1e-9, "each is compared with its own reference"


def test_there_is_only_one_way_where_nothing_is_quantised(live: Live, samples: Samples, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none")
    seen: list[str] = []
    (done,) = export_all(
        model, tokenizer, tmp_path, what="merged", dtypes=["f32"], samples=samples(tokenizer), merge="auto",
        original=Original.of(make_model("llama")), progress=lambda done, total, name: seen.append(name),
    )  # fmt: skip
    assert seen.count("self-check") == 1
    assert "only one way to merge" in done.report.notes[0]


def test_without_rewards_or_the_original_weights_one_is_built_or_nothing(
    live: Live, samples: Samples, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = live("llama", "nf4")
    (done,) = export_all(model, tokenizer, tmp_path, what="merged", dtypes=["f32"], samples=samples(tokenizer), merge="auto")
    assert "not at hand" in done.report.notes[-1]
    original = Original.of(make_model("llama"))
    (done,) = export_all(model, tokenizer, tmp_path, what="merged", dtypes=["f32"], samples=samples(tokenizer), merge="auto", original=original)
    assert "No held-out rewards" in done.report.notes[-1]
    (done,) = export_all(model, tokenizer, tmp_path, what="merged", dtypes=["f32"], samples=samples(tokenizer), merge="original", original=original)
    assert GGUFReader(done.path).fields["localrl.merge"].contents() == "original"
    with pytest.raises(UserError, match="original"):
        export_all(model, tokenizer, tmp_path / "x", what="merged", dtypes=["f32"], samples=samples(tokenizer), merge="original")
    assert not (tmp_path / "x").exists()


def test_of_several_files_those_that_the_index_names_are_read(make_model: Callable[..., Path], tmp_path: Path) -> None:
    weights = load_file(make_model("llama") / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, kept in shards.items():
        save_file({name: weights[name] for name in kept}, tmp_path / file)
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, tmp_path / "consolidated.safetensors")  # as some models bring one
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, kept in shards.items() for name in kept}}))
    original, rows = Original.of(tmp_path), torch.arange(3)
    assert set(original.files) == set(names)
    for module in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(original(module)(rows), weights[f"{module}.weight"][:3])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index\.json names"):
        Original.of(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="is no index"):
        Original.of(tmp_path)


def test_checkpoints_that_hold_no_original_weights_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors"):
        Original.of(tmp_path)
    weights = load_file(make_model("llama") / "model.safetensors")
    save_file(weights | {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="quantised itself"):
        Original.of(tmp_path)
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, tmp_path / "model.safetensors")
    original, rows = Original.of(tmp_path), torch.arange(3)
    assert torch.equal(original("model.layers.1.mlp.up_proj")(rows), weights["model.layers.1.mlp.up_proj.weight"][:3])
    with pytest.raises(UserError, match=r"no weight 'model\.layers\.9"):
        original("model.layers.9.mlp.up_proj")
