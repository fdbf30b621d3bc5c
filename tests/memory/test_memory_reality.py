"""The plan's bytes against the CPU allocator's own trace, while the real policy, engine and exporter work."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest

from bench.memory.cases import Case
from bench.memory.truth import compare
from localrl.engines import cache, decoder, sampling
from localrl.memory import fit, shape
from localrl.policy import lean

PLAIN = Case(
    family="llama", hidden=256, ffn=640, heads=4, kv_heads=2, head_dim=64, vocab=3000, tied=False, window=None, quantization="nf4", dtype="float32",
    rank=8, targets="all-linear", algorithm="grpo", settings=(), rewards=1, optimizer="adamw", checkpointing=True, offload=False, weights="live",
    int8_cache=False, truncated=False, directions="auto", layers=3, prompts=2, group=4, prompt=60, response=50, micro_batch=440, chunk=64, concurrent=8,
)  # fmt: skip
CASES = {
    "llama, nf4, bf16, 8-bit optimiser, one pass": replace(PLAIN, dtype="bfloat16", optimizer="adamw_8bit", micro_batch=10**6),
    "qwen2, int8, every activation": replace(PLAIN, family="qwen2", quantization="int8", checkpointing=False),
    "qwen3, nf4, tiles, reference": replace(PLAIN, family="qwen3", settings=(("beta", 0.04),), tile=128, tied=True),
    "mistral, not quantised, critic, small waves, top-p": replace(
        PLAIN, family="mistral", quantization="none", algorithm="ppo", concurrent=3, truncated=True, weights="unpacked"
    ),
}
WORST = 0.03


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_phase_takes_what_was_planned(case: Case, tmp_path: Path) -> None:
    gc.collect()
    gc.freeze()                                                      # collecting what the libraries made takes longer than the work
    try:
        rows = compare(case, tmp_path / "model")
    finally:
        gc.unfreeze()
    assert {row.phase for row in rows} == {"load", "rollout", "scoring", "backward", "optimiser", "export"}
    assert all(abs(row.error) <= WORST for row in rows), {row.phase: f"{row.predicted} for {row.measured}, {row.error:+.2%}" for row in rows}


def test_the_engine_and_the_plan_speak_of_the_same_loop() -> None:
    """Floors forbid the plan to look up into engine and policy, so what it knows of them is written down twice and held together here."""
    assert (fit.PREFILL_TOKENS, fit.BLOCK, fit.SAMPLED_AT_ONCE) == (decoder.PREFILL_TOKENS, cache.BLOCK, sampling.AT_ONCE)
    assert lean.TOKENS == fit.NORM_TOKENS
    assert shape.STATIC_ROPE == decoder.STATIC_ROPE
    assert {f"{name}forcausallm" for name in fit.OWN_LOOP} == {name.lower() for name in decoder.FAMILIES}
