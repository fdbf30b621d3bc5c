"""What a step is expected to take, against figures worked out by hand and against what must follow from the knobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from localrl.memory import speed
from localrl.memory.cards import Card
from localrl.memory.shape import ModelShape
from localrl.memory.speed import BANDWIDTH_SHARE, Speed, expected, step_bytes
from localrl.memory.work import Choice, Work
from tests.memory.models import MODELS

LLAMA = MODELS["Llama-3.1-8B"]
CHOICE = Choice(concurrent=64, micro_batch_tokens=8192, gradient_checkpointing=True, head_chunk=1024)
ROOFLINE = {
    # 70 % of the bandwidth, tokens/s: 4-bit weights multiplied as they are, and unpacked first. (rows, context): ...
    "RTX 4060 Ti 16GB": {(8, 1024): (282, 48), (16, 1024): (474, 93), (32, 1024): (721, 175), (64, 1024): (974, 313), (16, 4096): (244, 78)},
    "RTX A4000": {(8, 1024): (438, 75), (16, 1024): (738, 145), (32, 1024): (1122, 272), (64, 1024): (1516, 488), (16, 4096): (379, 122)},
    "RTX 4080": {(8, 1024): (701, 119), (16, 1024): (1181, 231), (32, 1024): (1795, 436), (64, 1024): (2426, 780), (16, 4096): (606, 195)},
    "RTX 5080": {(8, 1024): (939, 160), (16, 1024): (1581, 310), (32, 1024): (2404, 583), (64, 1024): (3248, 1045), (16, 4096): (812, 261)},
}


class Case(NamedTuple):
    """A model's step on a card."""

    card: Card
    work: Work
    choice: Choice = CHOICE
    shape: ModelShape = LLAMA

    def expected(self, passes: int | None = None) -> Speed:
        found = expected(self.shape, self.work, self.choice, self.card, passes)
        assert found is not None
        return found


def a_case(card: str = "16GiB", concurrent: int = 64, shape: ModelShape = LLAMA, **changes: Any) -> Case:
    """64 prompts with one response each, so that a row's context is its own."""
    usual: dict[str, Any] = {
        "quantization": "nf4", "compute_bytes": 2, "lora_r": 16, "lora_targets": "all-linear", "critic": False, "optimizer": "adamw_8bit",
        "prompts_per_step": 64, "num_generations": 1, "max_prompt_length": 512, "max_completion_length": 1536, "reference": False,
        "device": "cuda", "unpacked": False, "fewest_generations": 1, "truncated": False,
    }  # fmt: skip
    return Case(Card.of(card, "cuda"), Work(**{**usual, **changes}), replace(CHOICE, concurrent=concurrent), shape)


@pytest.mark.parametrize("name", ROOFLINE)
@pytest.mark.parametrize("fused", [True, False])
def test_bytes_of_a_step_of_a_wave(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "FUSED_ROWS", 64 if fused else 0)
    card, work, *_ = a_case(name)
    assert card.bandwidth is not None
    for (rows, context), told in ROOFLINE[name].items():
        found = rows * card.bandwidth * BANDWIDTH_SHARE / sum(step_bytes(LLAMA, work, CHOICE, rows, context))
        assert found == pytest.approx(told[0 if fused else 1], rel=0.1), (rows, context)


@pytest.mark.parametrize("name", ROOFLINE)
def test_tokens_a_second_of_whole_rollouts(name: str) -> None:
    """Up to 16 rows the bandwidth decides; beyond, multiplying may, and then it is slower than the bytes alone would have it."""
    for (rows, context), (told, _) in ROOFLINE[name].items():
        found = a_case(name, prompts_per_step=rows, concurrent=rows, max_prompt_length=1, max_completion_length=2 * context - 2).expected()
        if rows <= 16:
            assert found.rollout.tokens_per_second == pytest.approx(told, rel=0.1), (rows, context)
        assert found.rollout.tokens_per_second < 1.1 * told


def seconds(its: Case, part: str = "learning", **changes: Any) -> float:
    """Of one part of the step, with other knobs."""
    return float(getattr(its._replace(choice=replace(its.choice, **changes)).expected(), part).seconds)


def test_a_trained_token_costs_six_operations_a_weight() -> None:
    """48 GFLOP of an 8B with checkpointing, at 45 % of a 4060 Ti's 44 TFLOP/s: 2.4 ms, unpacking apart; short rows, so that attention is little."""
    its = a_case("RTX 4060 Ti 16GB", max_prompt_length=64, max_completion_length=192)
    assert seconds(its, micro_batch_tokens=65536) / (64 * 256) == pytest.approx(48e9 / (0.45 * 44.1e12), rel=0.1)


def test_every_knob_costs_what_it_must() -> None:
    its = a_case()
    usual = seconds(its)
    assert seconds(its, gradient_checkpointing=False) < 0.8 * usual
    assert 1.02 * usual < seconds(its, micro_batch_tokens=2048) < 1.5 * usual          # weights unpacked four times as often
    assert usual < seconds(its, mlp_tile=1024) < 1.5 * usual
    assert seconds(its, offload=True) == usual                      # hidden behind the multiplying
    hurried = its._replace(card=replace(its.card, flops=1e18, bandwidth=1e15), choice=replace(its.choice, offload=True)).expected()
    assert "host" in hurried.learning.reason
    assert seconds(its, "rollout", concurrent=8) > 2 * seconds(its, "rollout")
    assert seconds(its, "rollout", kv_cache="int8") < 0.9 * seconds(its, "rollout")
    assert seconds(its._replace(work=replace(its.work, gradients=3)), directions="two_pass") == 2 * usual


def test_prompts_shared_by_a_group_are_read_once() -> None:
    alone = a_case(max_prompt_length=4096, max_completion_length=256)
    group = a_case(prompts_per_step=8, num_generations=8, fewest_generations=8, max_prompt_length=4096, max_completion_length=256)
    assert seconds(group, "rollout") < 0.5 * seconds(alone, "rollout")


def test_scoring_reads_as_often_as_it_is_asked_to() -> None:
    its = a_case(reference=True)
    assert its.expected().scoring.seconds == pytest.approx(2 * its.expected(1).scoring.seconds)
    none = its.expected(0).scoring
    assert none.seconds == none.tokens_per_second == 0


def test_what_is_told() -> None:
    found = a_case().expected()
    assert found.assumed == "RTX 4060 Ti 16GB" and found.dominant is found.learning
    assert "like the RTX 4060 Ti 16GB" in found.sentence and "most is learning: multiplying" in found.sentence
    assert found.seconds == sum(part.seconds for part in found.parts)


def test_without_figures_nothing_is_expected() -> None:
    its = a_case()
    for card in (Card.of("16GiB", "cpu"), Card.budget(2**34, "cuda")):
        assert expected(LLAMA, its.work, its.choice, card) is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_every_model_has_a_speed(name: str, quantization: str) -> None:
    found = a_case("24GiB", shape=MODELS[name], quantization=quantization, critic=True).expected()
    assert all(part.seconds > 0 and part.reason for part in found.parts)
