"""The algorithms against numbers that their authors' code (or TRL's) produced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from localrl.algebra import group_moments
from localrl.algorithms.gdpo import GDPO
from localrl.algorithms.grpo import GRPO, Credit
from localrl.algorithms.gtpo import GTPO, conflict_runs
from localrl.batch import Batch, Readout

VECTORS = Path(__file__).parent.parent / "vectors"


def cases(name: str) -> list[Any]:
    return [pytest.param(case, id=case["tag"]) for case in json.loads((VECTORS / f"{name}.json").read_text())["cases"]]


def a_batch(tokens: torch.Tensor, mask: torch.Tensor, rewards: torch.Tensor, weights: torch.Tensor, group: torch.Tensor) -> Batch:
    rows = len(mask)
    one = torch.ones(rows, 1, dtype=torch.int64)
    return Batch(one, one[:, 0], tokens, mask, mask, group, torch.ones(rows).bool(), torch.zeros(rows).long(), rewards, weights, mask.shape[1])


def numbers(values: Any) -> torch.Tensor:
    return torch.tensor([[float(v) for v in row] for row in values])


@pytest.mark.parametrize("case", cases("gdpo_advantages"))
def test_advantages(case: dict[str, Any]) -> None:
    rewards, weights = numbers(case["inputs"]["rewards"]), torch.tensor(case["inputs"]["weights"])
    rows, expected = len(rewards), case["expected"]
    mask = torch.ones(rows, 3).bool()
    batch = a_batch(mask.long(), mask, rewards, weights, torch.arange(rows) // case["inputs"]["G"])
    found = {
        "trl_head_normalize_then_sum": GDPO().advantage(batch),
        "grpo_sum_then_normalize": GRPO().advantage(batch),
        "dr_grpo_no_std": GRPO(scale_rewards="none").advantage(batch),
        "grpo_batch_std": GRPO(scale_rewards="batch").advantage(batch),
    }
    assert set(found) & set(expected)
    for name, advantage in found.items():
        if name in expected:
            torch.testing.assert_close(advantage, torch.tensor([float(v) for v in expected[name]]), rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", cases("grpo_family_losses"))
def test_clipped_losses_and_their_gradients(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    mask = torch.tensor(given["mask"]).bool()
    share = {"grpo": "sequence_mean", "dapo": "token_mean", "bnpo": "token_mean", "dr_grpo": "fixed_length"}[given["lt"]]
    algorithm = GRPO(share=share, epsilon_high=given.get("eh"), beta=given.get("beta", 0.0), ratio_level=given.get("level", "token"))
    rows = len(mask)
    batch = a_batch(mask.long(), mask, torch.zeros(rows, 1), torch.ones(1), torch.zeros(rows).long())
    credit = algorithm.credit(batch, Readout(logp=torch.tensor(given["old_logp"])))
    credit = Credit(torch.tensor(given["advantages"]), credit.share, credit.old)
    logp = torch.tensor(given["logp"], requires_grad=True)
    loss = algorithm.loss(batch, Readout(logp=logp, ref=torch.tensor(given["ref_logp"])), credit)
    loss.value.backward()
    assert loss.value.item() == pytest.approx(expected["loss"], abs=1e-6)
    torch.testing.assert_close(logp.grad, torch.tensor(expected["grad_logp"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", cases("gtpo_conflict_mask"))
def test_conflict_weights(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    tokens, mask = torch.tensor(given["ids"]), torch.tensor(given["mask"]).bool()
    advantage, group = torch.tensor(given["advantages"]), torch.zeros(len(mask)).long()
    batch = a_batch(tokens, mask, advantage[:, None], torch.ones(1), group)
    official = GTPO(variant="official").credit(batch, Readout())
    if advantage.abs().sum() > 0 and abs(advantage.mean()) < 1e-6:            # credit centres: only centred cases come back as they went in
        torch.testing.assert_close(official.weight, torch.tensor(expected["lam"]))
        if "hand_lambda" in case:
            paper = GTPO().credit(batch, Readout())
            hand = torch.tensor(case["hand_lambda"]).float()
            torch.testing.assert_close(paper.weight, hand.clamp(max=2))
    ahead, behind = conflict_runs(tokens, mask, advantage, group)
    assert ahead.sum(1).tolist() == expected["prefix_run"]
    assert behind.sum(1).tolist() == expected["suffix_run"]
    if "is_conflict_corrected" in expected:
        assert (ahead | behind).int().tolist() == expected["is_conflict_corrected"]
    weight = torch.ones_like(mask).float()
    for run in (ahead, behind):
        weight = weight * torch.where(run, torch.where(advantage > 0, 2.0, 0.0)[:, None], 1.0)
    torch.testing.assert_close(weight * mask, torch.tensor(expected["lam"]))


@pytest.mark.parametrize("case", cases("gtpo_loss"))
def test_gtpo_loss_and_its_gradient(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    tokens, mask = torch.tensor(given["ids"]), torch.tensor(given["mask"]).bool()
    logits = torch.tensor(given["logits"], requires_grad=True)
    scores = logits.log_softmax(-1)
    entropy = -(scores.exp() * scores).sum(-1)
    batch = a_batch(tokens, mask, torch.tensor(given["advantages"])[:, None], torch.ones(1), torch.zeros(len(mask)).long())
    algorithm = GTPO(variant="official", threshold=given["ent_threshold"], gamma=given["ent_scale"])
    readout = Readout(logp=scores.gather(-1, tokens[..., None])[..., 0] * mask, entropy=entropy * mask)
    credit = algorithm.credit(batch, readout)
    torch.testing.assert_close(credit.weight, torch.tensor(expected["lam"]))
    loss = algorithm.loss(batch, readout, credit)
    loss.value.backward()
    assert loss.value.item() == pytest.approx(expected["loss_total"], abs=2e-5)
    torch.testing.assert_close(logits.grad, torch.tensor(expected["grad_logits"]), rtol=1e-4, atol=2e-5)


def test_gtpo_paper_variant_on_a_case_worked_by_hand() -> None:
    """[5 6 7 8 9 1] against [5 6 11 12 9 1], rewards 2 and 0, entropy 0: A = 1 and -1, weights 2 and 0 on the shared ends."""
    tokens = torch.tensor([[5, 6, 7, 8, 9, 1], [5, 6, 11, 12, 9, 1]])
    mask = torch.ones(2, 6).bool()
    batch = a_batch(tokens, mask, torch.tensor([[2.0], [0.0]]), torch.ones(1), torch.zeros(2).long())
    logp = torch.zeros(2, 6, requires_grad=True)
    algorithm = GTPO(threshold=0.7)
    readout = Readout(logp=logp, entropy=torch.zeros(2, 6))
    algorithm.loss(batch, readout, algorithm.credit(batch, readout)).value.backward()
    torch.testing.assert_close(logp.grad * 12, torch.tensor([[-2.0, -2, -1, -1, -2, -2], [0, 0, 1, 1, 0, 0]]))


@pytest.mark.parametrize(("entropy", "threshold"), [(0.2, 0.6931472), (1.0, 1.0)])
def test_gtpo_threshold_from_the_untrained_model(entropy: float, threshold: float) -> None:
    mask = torch.ones(8, 4).bool()
    batch = a_batch(mask.long(), mask, torch.zeros(8, 0), torch.zeros(0), torch.zeros(8).long())
    algorithm = GTPO()
    assert algorithm.calibrates == {"entropy"}
    fixed = algorithm.calibrate(batch, Readout(entropy=torch.full((8, 4), entropy)))
    assert fixed.threshold == pytest.approx(threshold)
    assert not fixed.calibrates


def test_moments_leave_nan_out() -> None:
    mean, std = group_moments(torch.tensor([[1.0, torch.nan], [3.0, 4.0], [torch.nan, 5.0]]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(mean[0], torch.tensor([2.0, 4.5]))
    torch.testing.assert_close(std[0], torch.tensor([2.0**0.5, 0.5**0.5]))


def test_outcome_advantages_of_another_code_base() -> None:
    """verl's GRPO, and its RLOO, which is the centred reward times G / (G - 1)."""
    known = {case.values[0]["tag"].split()[0]: case.values[0] for case in cases("advantage_baselines")}
    given, found = known["RLOO"]["inputs"], known["verl"]["expected"]
    rewards = torch.tensor(given["rewards"]).sum(1, keepdim=True)
    mask = torch.tensor(given["mask"]).bool()
    batch = a_batch(mask.long(), mask, rewards, torch.ones(1), torch.zeros(3).long())
    for algorithm, factor, expected in (
        (GRPO(advantage_epsilon=1e-6), 1.0, found["advantages"]),
        (GRPO(scale_rewards="none"), 1.0, found["no_std"]),
        (GRPO(scale_rewards="none"), 3 / 2, known["RLOO"]["expected"]["advantages"]),
    ):
        torch.testing.assert_close(factor * algorithm.advantage(batch)[:, None] * mask, torch.tensor(expected))
