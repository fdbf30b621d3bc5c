"""What the lab computes, against numbers worked out by hand and against the algorithms themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from localrl.algorithms import ALGORITHMS
from localrl.batch import Readout, collate
from localrl.lab.numbers import advantages, correlation, correlations, probed, signal, steered, summaries, variants, warnings
from localrl.lab.show import as_dict, tables
from localrl.lab.trial import Trial

from .trials import NAN, trial

MIXED = [[(1, 0), (0, 1), (1, 1), (0, 0)], [(1, 2), (1, 2), (1, 2), (1, 2)], [(1, 0), (0, 1), (1, 0), (0, 1)]]


def test_a_reward_by_itself() -> None:
    a, b = summaries(trial([[(1, NAN), (0, 2)], [(1, 4), (1, 4)]], [1, 1]))
    assert (a.mean, a.missing, a.flat, a.seconds) == (0.75, 0, 0.5, 0.25)
    assert a.std == pytest.approx(math.sqrt(3) / 4)
    assert (b.mean, b.missing, b.flat) == (pytest.approx(10 / 3), 1, 1.0)
    assert [count for *_, count in a.histogram(2)] == [1, 3]


def test_groups_without_signal_and_groups_that_cancel() -> None:
    stats = signal(trial(MIXED, [1, 1]), [1, 1])
    assert stats["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert stats["frac_reward_cancelling"] == pytest.approx(1 / 3)
    assert signal(trial(MIXED, [1, 1]), [1, 2])["frac_reward_cancelling"] == 0


def test_correlation_of_rewards() -> None:
    table = correlations(trial([[(1, 0, 7), (2, -2, 7), (3, NAN, 7), (4, -6, 7)]], [1, 1, 1]))
    assert table[0][1] == table[1][0] == -1.0
    assert table[0][2] is None
    assert correlation([1, 2, 3], [1, 3, 2]) == 0.5


def test_a_probe_that_earns_more_than_real_answers_is_said() -> None:
    made = trial([[(1, 0), (0, 0)]], [1, 1], {"nothing at all": [(0, 1)], "very long": [(0, 0.25)]})
    one, other = probed(made, [1, 1])
    assert (one.total, one.beats, other.beats) == (1, True, False)
    said = " ".join(warnings(made, [1, 1]))
    assert "'nothing at all' (1)" in said
    assert "very long" not in said
    assert not any(p.beats for p in probed(made, [1, 0.1]))


def test_a_probe_is_compared_by_the_rewards_that_it_has() -> None:
    made = trial([[(1, -5), (0, -5)]], [1, 1], {"echo": [(0, NAN)]})
    assert not probed(made, [1, 1])[0].beats


def test_advantages_are_the_algorithms_own() -> None:
    made, weights = trial(MIXED, [1, 0.5]), [1, 0.5]
    found = {each.label: each for each in advantages(made, weights)}
    batch = collate(made.rollouts, weights, made.limit)
    for kind in ALGORITHMS.values():
        for label, values in kind.lab:
            algorithm = kind(**values)
            if algorithm.directions(weights):
                continue
            own = algorithm.for_sampler(exact=True).credit(batch, Readout())
            assert found[label].values == tuple(own.advantage.tolist())
    assert len(found) == 3


def test_group_relative_advantages_by_hand() -> None:
    made = trial([[(0,), (1,), (1,), (2,)]], [2])
    first = advantages(made, [2])[0]
    std = math.sqrt(8 / 3)
    assert first.values == pytest.approx([-2 / (std + 1e-4), 0, 0, 2 / (std + 1e-4)], abs=1e-5)


def test_rewards_that_cancel_teach_only_those_that_normalise_apart() -> None:
    plain, apart, _ = advantages(trial([[(0, 4), (1, 3), (2, 2), (3, 1)]], [1, 1]), [1, 0.5])
    assert any(plain.values)
    plain, apart, _ = advantages(trial([[(1, 0), (0, 10), (1, 0), (0, 10)], [(0, 0), (1, 0), (0, 1), (1, 1)]], [10, 1]), [10, 1])
    assert plain.values[:4] == (0, 0, 0, 0)
    assert max(map(abs, apart.values[:4])) > 0.1


def test_directed_weights_want_gradients_and_two_rewards() -> None:
    made = trial(MIXED, [1, 1])
    assert "gradients" in advantages(made, [1, 1])[-1].note
    alone = trial([[(1,), (0,)]], [1])
    assert "nothing to direct" in advantages(alone, [1])[-1].note


def test_directed_weights_are_those_of_the_algorithm() -> None:
    gram = torch.tensor([[4.0, -1.5], [-1.5, 1.0]], dtype=torch.float64)
    made = Trial(**{**vars(trial(MIXED, [1, 1])), "gram": tuple(map(tuple, gram.tolist()))})
    algorithm = steered()
    assert algorithm is not None
    found = advantages(made, [1, 1])[-1]
    assert found.weights == algorithm.steer(gram, [1.0, 1.0], []).weights
    assert found.weights != (1, 1)
    turned = advantages(made, [1, -1])[-1]
    assert turned.weights[1] < 0
    expected = algorithm.steer(gram * torch.tensor([[1, -1], [-1, 1]]), [1.0, -1.0], [])
    assert [abs(w) for w in turned.weights] == list(expected.weights)


def test_variants_without_gradients_come_first() -> None:
    assert [bool(algorithm.directions((1, 1))) for _, algorithm in variants()] == [False, False, True]


def test_a_trial_comes_back_from_its_file(tmp_path: Path) -> None:
    made = trial([[(1, NAN), (0, 1)]], [1, -0.5], {"echo": [(0, NAN)]})
    made.write(tmp_path / "t.json")
    read = Trial.read(tmp_path / "t.json")
    assert repr(read) == repr(made)                                     # NaN equals itself in print alone
    assert as_dict(read)["rewards"]["a"]["mean"] == 0.5
    assert len(list(tables(read))) == 4
