"""Lines found on two and three layers, against a simulation of the whole work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from localrl.config import Run, build
from localrl.devices import Kind
from localrl.memory.fit import Mode, pass_variables, wave_variables
from localrl.memory.lines import Feature
from localrl.memory.shape import ModelShape
from localrl.simulate.fits import TRAINING, cut, rollout_lines, training_lines
from localrl.simulate.phases import Pass, Rehearsal, WaveOf
from localrl.simulate.solve import NotLinear, lines_of

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1500}
VOCABULARY = SIZES["vocab_size"]
TRAINED: dict[str, tuple[str, str, Kind, str, Mode]] = {
    "llama nf4, a card, tiles, inputs on the host": ("llama", "nf4", "cuda", "grpo", Mode(True, True, True)),
    "qwen3 int8, a CPU, every activation, a critic": ("qwen3", "int8", "cpu", "ppo", Mode(False, False, False)),
    "qwen2 unquantised, a card": ("qwen2", "none", "cuda", "gtpo", Mode(True, False, False)),
}
SAMPLED: dict[str, tuple[str, str, Kind, str]] = {
    "llama nf4, a card": ("llama", "nf4", "cuda", "full"),
    "qwen3 int8, a CPU": ("qwen3", "int8", "cpu", "full"),
    "qwen3 nf4, a card, 8 bits": ("qwen3", "nf4", "cuda", "int8"),
}


def a_config(family: str) -> Any:
    return AutoConfig.for_model(family, **SIZES)


def a_run(quantization: str, algorithm: str = "grpo") -> Run:
    return build({
        "model": {"path": "unused", "quantization": quantization}, "data": {"path": "unused.jsonl"}, "algorithm": {"name": algorithm},
        "rewards": {"functions": [{"function": "exact_answer"}]}, "adapter": {"lora_r": 4}, "optim": {"optimizer": "adamw"},
    })  # fmt: skip


def its_dtype(device: Kind) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)
def test_training_at_other_sizes(case: tuple[str, str, Kind, str, Mode]) -> None:
    _trains(*case, layers=6)


@pytest.mark.parametrize("layers", [1, 3])
def test_training_of_a_model_with_few_layers(layers: int) -> None:
    _trains("qwen3", "nf4", "cpu", "grpo", Mode(True, False, True), layers)


def _trains(family: str, quantization: str, device: Kind, algorithm: str, mode: Mode, layers: int) -> None:
    config, run = cut(a_config(family), layers), a_run(quantization, algorithm)
    lines = training_lines(config, run, its_dtype(device), device, mode, mode.depths(ModelShape.read(config.to_dict())))
    whole = Rehearsal(config, run, its_dtype(device), device, checkpointing=mode.gradient_checkpointing, offload=mode.offload)
    whole.make_gradients()
    reads = run.algorithm.reads_before or frozenset({"logp"})
    for rows, prompt, response, chunk, tile in ((1, 2500, 2000, 256, 1024), (8, 300, 200, 1024, 512), (3, 900, 100, 64, 300)):
        tile *= mode.tiled
        whole.turn(head_chunk=chunk, mlp_tile=tile)
        at = pass_variables(layers, rows * (prompt + response), rows * response, chunk, tile)
        work = Pass(rows, prompt, response)
        assert lines["scoring"].at(at) == pytest.approx(whole.scoring(work, reads).peak, rel=1e-3)
        assert lines["backward"].at(at) == pytest.approx(whole.backward(work).peak, rel=5e-3)
    at = {"layers": layers}
    assert [lines[name].at(at) for name in ("loaded", "kept", "gradients")] == [whole.loaded, whole.kept, whole.gradients]
    assert lines["optimiser"].at(at) == pytest.approx(whole.update().peak, rel=1e-3)


def test_training_on_rows_that_pass_the_window() -> None:
    """One row by itself and several: a norm takes 512 tokens at a time, which is more than the one row has."""
    row = 284
    config = cut(AutoConfig.for_model("gemma3_text", **SIZES, head_dim=32, sliding_window=64), 4)
    run, mode = a_run("nf4"), Mode(True, False, False)
    lines = training_lines(config, run, torch.float32, "cpu", mode, mode.depths(ModelShape.read(config.to_dict())), row)
    whole = Rehearsal(config, run, torch.float32, "cpu", checkpointing=True)
    whole.make_gradients()
    whole.turn(head_chunk=64, mlp_tile=0)
    for rows in (1, 3):
        at, work = pass_variables(4, rows * row, rows * row // 4, 64, 0), Pass(rows, row - row // 4, row // 4)
        assert lines["scoring"].at(at) == pytest.approx(whole.scoring(work, frozenset({"logp"})).peak, rel=0.01)
        assert lines["backward"].at(at) == pytest.approx(whole.backward(work).peak, rel=0.01)


@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_waves_at_other_sizes(case: tuple[str, str, Kind, Any]) -> None:
    _samples(*case, layers=5)


def test_waves_of_a_model_with_one_layer() -> None:
    _samples("qwen3", "int8", "cpu", "full", layers=1)


def _samples(family: str, quantization: str, device: Kind, kv_cache: Any, layers: int) -> None:
    config, run = cut(a_config(family), layers), a_run(quantization)
    lines = rollout_lines(config, run, its_dtype(device), device, kv_cache)
    whole = Rehearsal(config, run, its_dtype(device), device, checkpointing=True)
    for rows, prompts, prompt, response in ((96, 8, 512, 2000), (12, 3, 1000, 3000), (8, 8, 2000, 500), (9, 3, 200, 900)):
        peak = whole.rollout(WaveOf(rows, prompts, prompt, response), kv_cache).peak - (whole.kept - whole.loaded)
        assert lines.at(wave_variables(layers, VOCABULARY, rows, prompts, prompt, response, None, device)) == pytest.approx(peak, rel=0.01)


def test_a_feature_that_is_left_out_is_noticed() -> None:
    """Each is needed: without it sizes are no sums of the others."""
    rehearsal = {layers: Rehearsal(cut(a_config("llama"), layers), a_run("none"), torch.float32, "cpu", checkpointing=True) for layers in (2, 3)}
    points = []
    for layers, rows, response in ((2, 2, 100), (3, 2, 100), (2, 4, 100), (3, 4, 100), (2, 2, 200), (3, 2, 200), (2, 3, 300)):
        rehearsal[layers].turn(head_chunk=64, mlp_tile=0)
        at = pass_variables(layers, rows * (300 + response), rows * response, 64, 0)
        points.append((at, rehearsal[layers].scoring(Pass(rows, 300, response), frozenset({"logp"})).events))
    constant = [feature for feature in TRAINING if feature not in (("chunk",), ("normed",))]     # what changes in none of them

    def box(draw: Any) -> dict[str, float]:
        return dict(points[int(draw.integers(len(points)))][0])

    lines = lines_of(points, constant, box)
    assert all(lines.at(at) == pytest.approx(max(event.live for event in events), rel=1e-3) for at, events in points)
    without: list[Feature] = [feature for feature in constant if "tokens" not in feature]
    with pytest.raises(NotLinear):
        lines_of(points, without, box)
