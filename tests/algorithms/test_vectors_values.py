"""PPO and T-PPO against the figures of published code, with its errors left out, and the traps that go with windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from localrl.algorithms.advantages import adaptive_lambda, gae, whiten
from localrl.algorithms.ppo import PPO, Credit, at_the_end
from localrl.algorithms.tppo import TPPO
from localrl.batch import Batch, Readout
from tests.algorithms.test_vectors import a_batch, cases


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("case", [c for c in cases("advantage_baselines") if "GAE" in c.values[0]["tag"]])
def test_gae_whitened_and_returns(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    mask, values, rewards = tensor(given["mask"]).bool(), tensor(given["values"]), tensor(given["rewards"])
    lam = torch.full((len(mask),), given["lam"])
    raw = gae(rewards * mask, values * mask, mask, torch.ones(len(mask)).bool(), given["gamma"], lam)
    torch.testing.assert_close(raw + values * mask, tensor(expected["returns"]) * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whiten(raw, mask), tensor(expected["advantages"]) * mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases("tppo_egae"))
def test_truncated_gae(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    values, finished = tensor(given["values"]), torch.tensor(given["is_finished"]).bool()
    mask = tensor(given["eos_mask"]).bool()
    length = torch.tensor(given["seq_len_per_sample"]) + torch.where(finished, 0, mask.shape[1] // 2)
    lam = adaptive_lambda(length, given["lam"], given["variable_lambda_scalar"]) if given["use_variable_lambda"] else torch.full((2,), given["lam"])
    raw = gae(tensor(given["single_token_level_rewards"]), values, mask, finished, given["gamma"], lam)
    torch.testing.assert_close(raw, tensor(expected["raw_advantages"]), rtol=1e-5, atol=1e-6)
    tail = ~finished[:, None] & (torch.arange(4) >= 4 - given["ignore_token_num"])
    found = whiten(raw, mask & ~tail) if given["adv_whiten"] else raw * ~tail
    torch.testing.assert_close(found, tensor(expected["advantages"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", cases("tppo_egae_paper"))
def test_egae_of_the_paper(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["expected"]
    values, finished = torch.tensor([given["values"]]), torch.tensor([given["finished"]])
    mask = torch.arange(4)[None] < given["length"]
    found = gae(torch.tensor([given["rewards"]]), values, mask, finished, given["gamma"], torch.tensor([given["lam"]]))
    torch.testing.assert_close(found, torch.tensor([expected["advantages"]]), rtol=1e-6, atol=1e-6)
    total = torch.tensor([sum(given["rewards"])])
    batch = replace(a_batch(mask.long(), mask, total[:, None], torch.ones(1), torch.zeros(1).long()), more=~finished)
    credit = PPO(gamma=given["gamma"]).credit(batch, Readout(value=values * mask))
    torch.testing.assert_close(credit.returns, torch.tensor([expected["mc_returns_for_critic"]]), rtol=1e-6, atol=1e-6)
    assert (credit.value_share > 0).tolist() == [[bool(x) for x in expected["critic_mask"]]]


def test_gamma_other_than_one_keeps_its_sign() -> None:
    """The port's ~finished on an integer turns it: the last step of a row that goes on is (gamma - 1) V."""
    found = gae(torch.zeros(1, 3), torch.tensor([[.5, .2, .4]]), torch.ones(1, 3).bool(), torch.tensor([False]), 0.99, torch.tensor([0.95]))
    assert found[0, 2].item() == pytest.approx(-0.01 * 0.4, rel=1e-5)


def loss_case(tag: str) -> dict[str, Any]:
    (case,) = [c.values[0] for c in cases("tppo_losses") if tag in c.values[0]["tag"]]
    return case  # type: ignore[no-any-return]


def test_value_loss_of_finished_rows() -> None:
    """The same numbers, but for the mean: over finished rows (2 of 3 here), not over all."""
    case = loss_case("value loss")
    given = case["inputs"]
    mask, finished = tensor(given["mask"]).bool(), torch.tensor(given["is_finished"]).bool()
    batch = replace(a_batch(mask.long(), mask, torch.zeros(3, 1), torch.ones(1), torch.arange(3)), more=~finished)
    algorithm = TPPO(value_clip=given["clip_low"], value_clip_high=given["clip_high"])
    credit = algorithm.credit(batch, Readout(value=tensor(given["old_values"]) * mask))
    credit = credit._replace(returns=tensor(given["returns"]), value=tensor(given["old_values"]))
    loss, clipped = algorithm.value_loss(Readout(value=tensor(given["vpreds"])), credit)
    assert loss.item() == pytest.approx(case["expected"]["vf_loss"] * 3 / 2, rel=1e-5)
    assert 0 < clipped.item() < 1


def test_policy_loss_has_the_true_ratio() -> None:
    """The port exponentiates the KL estimate instead of the log ratio: at the old policy its gradient is 0."""
    case = loss_case("policy loss")
    given, mask = case["inputs"], tensor(case["inputs"]["mask"]).bool()
    share = mask / mask.sum()
    zero = torch.zeros_like(share)
    credit = Credit(tensor(given["advantages"]), zero, zero, share, zero, zero, tensor(given["old_log_prob"]))
    algorithm = TPPO(epsilon=given["clip_low"], epsilon_high=given["clip_high"], dual_clip=given["c"])
    loss, _ = algorithm.policy_loss(Readout(logp=tensor(given["log_prob"])), credit)
    assert loss.item() == pytest.approx(case["expected"]["correct_ratio"], rel=1e-5)
    assert loss.item() != pytest.approx(case["expected"]["code_as_written"], rel=1e-2)
    logp = tensor(given["old_log_prob"]).requires_grad_(True)
    algorithm.policy_loss(Readout(logp=logp), credit)[0].backward()
    torch.testing.assert_close(logp.grad, -tensor(given["advantages"]) * share)


def test_language_model_loss_on_good_responses() -> None:
    case = loss_case("LM loss")
    given = case["inputs"]
    length = torch.tensor(given["eos_ids"]) + 1
    mask = torch.arange(5) < length[:, None]
    rewards = tensor([[sum(row)] for row in given["raw_scores"]])
    logp = tensor(given["log_prob"]) * mask
    batch = a_batch(mask.long(), mask, rewards, torch.ones(1), torch.arange(3))
    algorithm = PPO(lm_coef=1.0)
    credit = algorithm.credit(batch, Readout(value=torch.zeros(3, 5)))
    loss = algorithm.loss(batch, Readout(logp=logp, value=torch.zeros(3, 5)), credit)
    assert loss.stats["lm_loss"].item() == pytest.approx(case["expected"]["lm_loss"], rel=1e-6)


# -- windows ------------------------------------------------------------------------------------------------------------------


def window(finished: list[bool], fresh_from: list[int], rewards: list[float], width: int = 12) -> Batch:
    """Rows of `width` tokens, earlier ones not fresh; who goes on has no reward."""
    mask = torch.ones(len(finished), width).bool()
    fresh = torch.arange(width) >= torch.tensor(fresh_from)[:, None]
    batch = a_batch(mask.long(), mask, torch.tensor(rewards)[:, None], torch.ones(1), torch.arange(len(finished)))
    return replace(batch, fresh=fresh, more=~torch.tensor(finished), step=100)


def test_only_fresh_tokens_move_the_policy_and_only_finished_rows_the_critic() -> None:
    batch = window([True, False, True], [4, 0, 8], [1.0, torch.nan, 0.0])
    value = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    algorithm = TPPO(ignore_tail=2, lm_coef=0.0)
    credit = algorithm.credit(batch, Readout(value=value))
    assert not credit.share[~batch.fresh].any()
    assert not credit.share[1, 10:].any()                            # the unreliable tail of the row that goes on
    assert credit.share[1, :10].all()
    assert credit.share.sum().item() == pytest.approx(1)
    assert credit.value_share[[0, 2]].all()                          # the whole response, earlier windows too
    assert not credit.value_share[1].any()
    assert credit.value_share.sum().item() == pytest.approx(1)
    torch.testing.assert_close(credit.returns[0], torch.ones(12))


def test_an_ignored_tail_of_zero_ignores_nothing() -> None:
    """In the port a slice [-0:] blanks the whole row."""
    batch = window([False], [0], [torch.nan])
    value = torch.rand(1, 12, generator=torch.Generator().manual_seed(0))
    assert (TPPO(ignore_tail=0).credit(batch, Readout(value=value)).share > 0).all()
    assert TPPO(ignore_tail=8).objection(8, 1) is not None
    assert TPPO(ignore_tail=8).objection(9, 1) is None


def test_without_a_critic_unfinished_rows_are_not_pushed_by_whitening() -> None:
    """V = 0 everywhere: they have no signal, and subtracting a mean must not make one."""
    credit = TPPO(ignore_tail=0).credit(window([True, False, True], [0, 0, 0], [1.0, torch.nan, 0.0]), Readout(value=torch.zeros(3, 12)))
    assert not credit.advantage[1].any()
    assert credit.advantage[0].abs().sum() > 0


def test_the_critic_warms_up_alone() -> None:
    batch = window([True, True], [0, 0], [1.0, 0.0])
    algorithm = TPPO(critic_warmup=3)
    for step, moves in ((2, False), (3, True)):
        at = replace(batch, step=step)
        logp, value = torch.zeros(2, 12, requires_grad=True), torch.zeros(2, 12, requires_grad=True)
        credit = algorithm.credit(at, Readout(value=torch.linspace(0, 1, 24).view(2, 12)))
        algorithm.loss(at, Readout(logp=logp, value=value), credit).value.backward()
        assert (logp.grad is not None) is moves
        assert value.grad is not None


def test_a_single_token_has_no_variance_to_divide_by() -> None:
    mask = torch.tensor([[True]])
    credit = PPO().credit(a_batch(mask.long(), mask, torch.ones(1, 1), torch.ones(1), torch.zeros(1).long()), Readout(value=torch.zeros(1, 1)))
    assert credit.advantage.tolist() == [[1.0]]


def test_the_last_window_gets_the_advantages_of_one_long_window() -> None:
    """The recursion only looks ahead."""
    value = torch.rand(1, 12, generator=torch.Generator().manual_seed(1))
    one, last = (gae(at_the_end(torch.ones(1), torch.ones(1, 12).bool()), value, window([True], [start], [1.0]).fresh,
                     torch.tensor([True]), 0.97, torch.tensor([0.9])) for start in (0, 8))
    torch.testing.assert_close(one[:, 8:], last[:, 8:])
