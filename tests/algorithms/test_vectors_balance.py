"""TBRM, TBA, Group DPO and GDPO's forms against figures, and the two balances against the optimum they claim."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from localrl.algorithms.base import Algorithm
from localrl.algorithms.gdpo import GDPO
from localrl.algorithms.group_dpo import GroupDPO, pairwise, softmax
from localrl.algorithms.tba import TBA, anneal
from localrl.algorithms.tbrm import TBRM
from localrl.batch import Batch, Readout, rows_of
from tests.algorithms.test_vectors import a_batch, cases, numbers


def one_token(logits: torch.Tensor, arms: torch.Tensor, rewards: torch.Tensor, log_ref: torch.Tensor, step: int = 0) -> tuple[Batch, Readout]:
    """Responses of one token, prompt by prompt alike: (N,) arms of a softmax over `logits`."""
    logp, mask = logits.log_softmax(-1)[arms][:, None], torch.ones(len(arms), 1).bool()
    batch = replace(a_batch(arms[:, None], mask, rewards[arms][:, None], torch.ones(1), torch.zeros(len(arms)).long()), step=step)
    return batch, Readout(logp=logp, ref=log_ref[arms][:, None], lse=logits.logsumexp(-1).expand(len(arms))[:, None], entropy=torch.zeros(len(arms), 1))


def test_tbrm_residuals_and_gradients() -> None:
    (case,) = [c.values[0] for c in cases("tbrm_loss") if c.values[0]["tag"] == "random, beta=0.5"]
    given, expected = case["inputs"], case["expected"]
    logits = torch.tensor(given["logits"], dtype=torch.float64, requires_grad=True)
    mask, ids = torch.tensor(given["mask"]).bool(), torch.tensor(given["ids"])
    lse = logits.logsumexp(-1)
    logp = (logits.gather(2, ids[..., None]).squeeze(2) - lse) * mask
    batch = a_batch(ids, mask, torch.tensor(given["reward"])[:, None], torch.ones(1), torch.arange(len(ids)))
    algorithm = TBRM(beta=given["beta"], scale="none")
    credit = algorithm.credit(batch, Readout(ref=torch.tensor(given["ref_log_prob"], dtype=torch.float64)))
    loss = algorithm.loss(batch, Readout(logp=logp, lse=lse), credit)
    assert loss.value.item() == pytest.approx(expected["loss_mean"], rel=1e-6)
    assert loss.stats["tbrm/residual"].item() == pytest.approx(sum(abs(x) for x in expected["residual"]) / 3, rel=1e-6)
    loss.value.backward()
    torch.testing.assert_close(logits.grad, torch.tensor(expected["grad_logits"], dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_tbrm_bandit_residuals() -> None:
    (case,) = [c.values[0] for c in cases("tbrm_loss") if "bandit" in c.values[0]["tag"]]
    given, expected = case["inputs"], case["expected"]
    rewards, log_ref, arms = torch.tensor(given["reward"]).double(), torch.tensor(given["log_ref"]).double(), torch.arange(2)
    algorithm = TBRM(beta=given["beta"], scale="none")
    for logits, wanted in ((torch.zeros(2).double(), expected["residual_at_zero"]), (torch.tensor(expected["q_star"]).double(), expected["residual_at_qstar"])):
        batch, readout = one_token(logits, arms, rewards, log_ref)
        for arm in range(2):
            rows = torch.tensor([arm])
            credit = algorithm.credit(batch[rows], readout[rows])
            assert algorithm.loss(batch[rows], readout[rows], credit).stats["tbrm/residual_mean"].item() == pytest.approx(wanted[arm], abs=1e-6)


@pytest.mark.parametrize("case", cases("tba_tb_vargrad"))
def test_trajectory_balance(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    logp = torch.tensor(given["log_pi"])[:, None].requires_grad_(True)
    rows = len(logp)
    one = torch.ones(rows, 1)
    batch = a_batch(one.long(), one.bool(), torch.tensor(given["score"])[:, None], torch.ones(1), torch.arange(rows) // given["K"])
    ref = torch.tensor(given["log_ref"])[:, None]
    for scale, factor in (("none", 1.0), ("reinforce", given["beta"] / 2)):
        algorithm = TBA(beta=given["beta"], scale=scale)
        logp.grad = None
        loss = algorithm.loss(batch, Readout(logp=logp), algorithm.credit(batch, Readout(logp=logp.detach(), ref=ref))).value
        loss.backward()
        assert loss.item() == pytest.approx(factor * expected.get("loss", expected.get("loss_correct")), rel=1e-6)
        if "grad_log_pi" in expected:
            torch.testing.assert_close(logp.grad[:, 0], factor * torch.tensor(expected["grad_log_pi"]))


def test_trajectory_balance_is_reinforce_with_a_baseline_and_kl() -> None:
    """Equation 7: the gradient is -A / (B K) per rollout, A = (r - mean r) - beta (KL - mean KL), with the default scale."""
    draw = torch.Generator().manual_seed(0)
    logp, ref, rewards = (torch.randn(6, 1, generator=draw) for _ in range(3))
    batch = a_batch(torch.ones(6, 1).long(), torch.ones(6, 1).bool(), rewards, torch.ones(1), torch.arange(6) // 3)
    algorithm, at = TBA(beta=0.3), logp.clone().requires_grad_(True)
    algorithm.loss(batch, Readout(logp=at), algorithm.credit(batch, Readout(logp=logp, ref=ref))).value.backward()

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.view(2, 3).mean(1).repeat_interleave(3)

    advantage = centred(rewards[:, 0]) - 0.3 * centred((logp - ref)[:, 0])
    assert at.grad is not None
    torch.testing.assert_close(at.grad[:, 0], -advantage / 6)


@pytest.mark.parametrize("case", cases("tba_beta_schedule"))
def test_beta_schedule(case: dict[str, Any]) -> None:
    given = case["inputs"]
    for update, wanted in case["expected"].items():
        assert anneal(int(update), given["start"], given["final"], given["stop_iter"], given["target_iter"]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("case", cases("group_dpo"))
def test_group_preferences(case: dict[str, Any]) -> None:
    u = torch.tensor(case["inputs"]["u"], dtype=torch.float64, requires_grad=True)
    label = torch.tensor(case["inputs"]["label"], dtype=torch.float64) - 0.5
    loss = {"pairwise_mean": pairwise, "group_softmax": softmax}[case["tag"]](u, label, 0.0)
    assert loss is not None
    assert loss.item() == pytest.approx(case["expected"]["loss"], rel=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss, u)[0], torch.tensor(case["expected"]["coeff"], dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pairs", ["pairwise", "softmax"])
def test_the_surrogates_gradient_is_the_direct_one(pairs: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, width = 8, 5
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=draw)
    logp, ref = (-torch.rand(rows, width, generator=draw, dtype=torch.float64) * mask for _ in range(2))
    batch = a_batch(mask.long(), mask, torch.rand(rows, 2, generator=draw), torch.tensor([1.0, 2.0]), torch.arange(rows) // 4)
    algorithm = GroupDPO(pairs=pairs, beta=0.5)
    at = logp.clone().requires_grad_(True)
    credit = algorithm.credit(batch, Readout(logp=logp, ref=ref))
    algorithm.loss(batch, Readout(logp=at), credit).value.backward()
    direct = logp.clone().requires_grad_(True)
    u = algorithm.beta * ((direct - ref) * mask).sum(1)
    mean = batch.rewards.view(2, 4, 2).mean(1).repeat_interleave(4, 0)
    score = ((batch.rewards - mean) / (batch.rewards.view(2, 4, 2).std(1).repeat_interleave(4, 0) + 1e-4) * batch.weights).sum(1)
    phi = {"pairwise": pairwise, "softmax": softmax}[pairs]
    sum(phi(u[i : i + 4], score[i : i + 4], 0.0) for i in (0, 4)).div(2).backward()  # type: ignore[union-attr, misc, operator]
    torch.testing.assert_close(at.grad, direct.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", cases("gdpo_verl_token_whiten"))
def test_gdpo_whitened_over_tokens(case: dict[str, Any]) -> None:
    given = case["inputs"]
    mask = torch.tensor(given["mask"]).bool()
    rewards = torch.tensor([given["correctness"], given["format"]]).T.float()
    group = torch.tensor([ord(g) for g in given["group"]]) - ord("a")
    batch = a_batch(mask.long(), mask, rewards, torch.ones(2), group)
    found = GDPO(normalise="tokens", advantage_epsilon=1e-6).advantage(batch)
    torch.testing.assert_close(found[:, None] * mask, torch.tensor(case["expected"]["advantages"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases("gd2po_filter"))
@pytest.mark.parametrize("kind", ["hard", "snr"])
def test_conflict_filters(case: dict[str, Any], kind: Any) -> None:
    given, expected = case["inputs"], case["expected"]
    rewards, lengths = numbers(given["rewards"]).T, torch.tensor(given["lens"])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    group = torch.tensor([ord(g) for g in given["groups"]]) - ord("a")
    batch = a_batch(mask.long(), mask, rewards, torch.ones(rewards.shape[1]), group)
    algorithm = GDPO(normalise="tokens", advantage_epsilon=1e-6, conflict_filter=kind, conflict_threshold=given["tau"])
    if kind == "hard":
        assert algorithm.keep(algorithm.decoupled(batch), batch)[0].tolist() == expected["hard_keep"]
    torch.testing.assert_close(algorithm.advantage(batch)[:, None] * mask, torch.tensor(expected[f"{kind}_advantages"]), rtol=1e-4, atol=1e-4)


def test_a_penalty_that_falls_agrees_with_a_reward_that_rises() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    batch = a_batch(torch.ones(4, 2).long(), torch.ones(4, 2).bool(), rewards, torch.tensor([1.0, -1.0]), torch.zeros(4).long())
    algorithm = GDPO(conflict_filter="hard")
    kept, _ = algorithm.keep(algorithm.decoupled(batch) * batch.weights.sign(), batch)
    assert kept.tolist() == [True, True, False, False]
    assert algorithm.advantage(batch)[0] > 0 > algorithm.advantage(batch)[1]


@pytest.mark.parametrize("off_policy", [False, True])
def test_a_rewards_seeds_make_the_gradient_of_its_own_clipped_loss(off_policy: bool) -> None:
    """The two-seed rule, reward by reward; and with weights as given, the sum over rewards is the published update."""
    draw = torch.Generator().manual_seed(0)
    rows, mask = 12, torch.ones(12, 4).bool()
    logp, old = (-torch.rand(rows, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([1.0, 0.5, -0.7])
    batch = a_batch(mask.long(), mask, torch.rand(rows, 3, generator=draw), weights, torch.arange(rows) // 4)
    algorithm = GDPO(weighting="directed")
    credit = algorithm.credit(batch, Readout(logp=old if off_policy else None))
    assert credit.single is not None

    def gradient_of(value: Any) -> torch.Tensor:
        leaf = logp.clone().requires_grad_(True)
        value(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    total = torch.zeros_like(logp)
    for k in range(3):
        alone = gradient_of(lambda leaf, k=k: algorithm.loss(batch, Readout(logp=leaf), credit._replace(advantage=credit.single[:, 0, k])).value)
        seeded = sum(
            gradient_of(lambda leaf, i=i: algorithm.loss(batch, Readout(logp=leaf), credit).seeds[i].value) * seed.coefficients[:, k, None]
            for i, seed in enumerate(algorithm.loss(batch, Readout(logp=logp), credit).seeds)
        )
        torch.testing.assert_close(seeded, alone)
        total += weights[k].abs() * alone
    if not off_policy:
        fixed = GDPO().credit(batch, Readout())
        torch.testing.assert_close(total, gradient_of(lambda leaf: GDPO().loss(batch, Readout(logp=leaf), fixed).value), rtol=1e-4, atol=1e-7)


def test_more_rewards_than_columns() -> None:
    """A micro-batch of short rows keeps every reward's coefficient."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([2, 6, 1, 2, 5, 2, 1, 2])[:, None]
    batch = a_batch(mask.long(), mask, torch.rand(8, 9, generator=draw), torch.ones(9), torch.arange(8) // 4)
    algorithm = GDPO(weighting="directed")
    whole = algorithm.credit(batch, Readout())
    assert whole.single is not None
    rows = torch.tensor([0, 2, 5])
    part = batch[rows]
    seeds = algorithm.loss(part, Readout(logp=torch.zeros(3, 2)), rows_of(whole, rows, part.tokens.shape[1])).seeds
    torch.testing.assert_close(seeds[0].coefficients, whole.single[rows, 0])


def test_tbrm_residual_moves_with_the_first_logits_alone() -> None:
    (case,) = [c.values[0] for c in cases("tbrm_loss") if "shift" in c.values[0]["tag"]]
    expected = case["expected"]
    base, first, rest = (torch.tensor(expected[k]) for k in ("base", "shift_first", "shift_rest"))
    torch.testing.assert_close(first - base, torch.full_like(base, 1.5))
    torch.testing.assert_close(rest, base)
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2], [3, 4, 0]])
    batch = a_batch(ids, torch.ones(2, 3).bool(), torch.ones(2, 1), torch.ones(1), torch.arange(2))

    def residual(shift: torch.Tensor) -> float:
        moved = logits + shift[None, :, None]
        read = Readout(logp=moved.log_softmax(-1).gather(2, ids[..., None]).squeeze(2), lse=moved.logsumexp(-1))
        credit = TBRM(beta=0.5).credit(batch, Readout(ref=torch.zeros(2, 3)))
        return TBRM(beta=0.5).loss(batch, read, credit).stats["tbrm/residual_mean"].item()

    at = residual(torch.zeros(3))
    assert residual(torch.tensor([1.5, 0.0, 0.0])) == pytest.approx(at + 1.5, abs=1e-5)
    assert residual(torch.tensor([0.0, 1.5, 1.5])) == pytest.approx(at, abs=1e-5)


# -- the optimum: pi_ref exp(r / beta) -----------------------------------------------------------------------------------------

REWARDS, LOG_REF = torch.tensor([1.0, 0.0, 0.5, 0.2]), torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def optimum(beta: float) -> torch.Tensor:
    return (LOG_REF + REWARDS / beta).softmax(-1)


def descend(algorithm: Algorithm, sampler: str, steps: int = 600) -> torch.Tensor:
    """A softmax policy learns from samples of itself, of an old self, or of somebody else's uniform choice."""
    logits = LOG_REF.clone().requires_grad_(True)
    optimizer, draw = torch.optim.Adam([logits], lr=0.05), torch.Generator().manual_seed(0)
    past = []
    for step in range(steps):
        past.append(logits.detach().softmax(-1))
        source = {"own": past[-1], "stale": past[max(0, len(past) - 16)], "foreign": torch.full((4,), 0.25)}[sampler]
        arms = torch.multinomial(source, 256, replacement=True, generator=draw)
        batch, readout = one_token(logits, arms, REWARDS, LOG_REF, step)
        detached = Readout(**{n: v.detach() for n in ("logp", "ref", "lse") if (v := getattr(readout, n)) is not None})
        optimizer.zero_grad()
        algorithm.loss(batch, readout, algorithm.credit(batch, detached)).value.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("sampler", ["own", "stale", "foreign"])
@pytest.mark.parametrize("algorithm", [TBA(beta=0.5), TBRM(beta=0.5), TBRM(beta=0.5, value_mode="logit+bias"), TBRM(beta=0.5, value_mode="vargrad")],
                         ids=lambda a: f"{a.name}-{getattr(a, 'value_mode', '')}")  # fmt: skip
def test_gibbs(algorithm: Algorithm, sampler: str) -> None:
    found = descend(algorithm, sampler)
    assert (found - optimum(0.5)).abs().max() < 0.03, found
    assert (LOG_REF.exp() - optimum(0.5)).abs().max() > 0.2                # it was not there to begin with


def test_gibbs_over_two_tokens() -> None:
    """A tree of two choices: sequence sums, not token sums, must balance."""
    draw = torch.Generator().manual_seed(0)
    rewards = torch.rand(3, 3, generator=draw)
    log_ref = torch.randn(3, 3, generator=draw).view(-1).log_softmax(-1).view(3, 3)
    beta = 0.5
    wanted = (log_ref + rewards / beta).view(-1).softmax(-1).view(3, 3)
    ref1, ref2 = log_ref.logsumexp(1), log_ref.log_softmax(1)
    for algorithm in (TBA(beta=beta), TBRM(beta=beta)):
        first, second = torch.zeros(3, requires_grad=True), torch.zeros(3, 3, requires_grad=True)
        optimizer = torch.optim.Adam([first, second], lr=0.05)
        for _ in range(800):
            a = torch.randint(0, 3, (128, 2), generator=draw)
            logp = torch.stack([first.log_softmax(0)[a[:, 0]], second.log_softmax(1)[a[:, 0], a[:, 1]]], 1)
            ref = torch.stack([ref1[a[:, 0]], ref2[a[:, 0], a[:, 1]]], 1)
            lse = torch.stack([first.logsumexp(0).expand(128), second.logsumexp(1)[a[:, 0]]], 1)
            batch = a_batch(a, torch.ones(128, 2).bool(), rewards[a[:, 0], a[:, 1]][:, None], torch.ones(1), torch.zeros(128).long())
            credit = algorithm.credit(batch, Readout(logp=logp.detach(), ref=ref, lse=lse.detach()))
            optimizer.zero_grad()
            algorithm.loss(batch, Readout(logp=logp, lse=lse), credit).value.backward()
            optimizer.step()
        found = first.softmax(0)[:, None] * second.softmax(1)
        assert (found - wanted).abs().max() < 0.03


def test_tbrm_says_when_the_logits_drift() -> None:
    first = {"tbrm/value": 10.0}
    assert dict(TBRM().alarms(first, [{"tbrm/value": 61.0}])).keys() == {"drift"}
    assert not dict(TBRM().alarms(first, [{"tbrm/value": 59.0}]))
    assert math.isclose(TBRM().beta, 0.002)
