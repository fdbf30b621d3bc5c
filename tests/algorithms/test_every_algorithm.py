"""What holds for every algorithm, whatever it does: a new file in the folder is tested on arrival."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.batch import COLUMNS, Batch, Readout, rows_of

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "grpo": [{"beta": 0.1, "share": "sequence_mean"}, {"scale_rewards": "batch", "share": "fixed_length"}, {"correction": "truncate"}, {"correction": "mask"},
             {"ratio_level": "sequence"}],
    "gdpo": [{"conflict_filter": "hard"}, {"conflict_filter": "snr", "normalise": "tokens"}, {"weighting": "directed", "beta": 0.1}],
    "gtpo": [{"variant": "official", "threshold": 0.7}, {"correction": "truncate"}],
    "ppo": [{"kl_coef": 0.1, "lm_coef": 0.1, "gamma": 0.9, "share": "sequence_mean"}, {"correction": "truncate", "dual_clip": 3.0, "critic_lambda": 0.9}],
    "tppo": [{"ignore_tail": 1}],
    "tbrm": [{"value_mode": "logit+bias", "scale": "none"}, {"value_mode": "vargrad", "scale": "length"}],
    "tba": [{"beta_final": 0.004, "scale": "none"}],
    "group_dpo": [{"pairs": "softmax", "lm_coef": 0.1}],
}
"""Settings that take another way through the code than the defaults do."""
CASES = [(name, changes) for name in ALGORITHMS for changes in ({}, *VARIANTS.get(name, []))]
every = pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{n}-{'-'.join(map(str, c.values()))}" if c else n for n, c in CASES])


def step_of(seed: int, groups: int, size: int, width: int, vocabulary: int = 4) -> tuple[Batch, Readout]:
    """A random step: groups side by side, right-padded rows, two rewards with holes, and all columns read."""
    draw = torch.Generator().manual_seed(seed)
    rows = groups * size
    length = torch.randint(1, width + 1, (rows,), generator=draw)
    mask = torch.arange(width) < length[:, None]
    rewards = torch.rand(rows, 2, generator=draw)
    rewards[torch.rand(rows, 2, generator=draw) < 0.1] = torch.nan
    batch = Batch(
        context=torch.ones(rows, 2, dtype=torch.int64), context_length=torch.full((rows,), 2),
        tokens=torch.randint(0, vocabulary, (rows, width), generator=draw) * mask, mask=mask, fresh=mask,
        group=torch.arange(groups).repeat_interleave(size), done=torch.ones(rows).bool(), version=torch.zeros(rows).long(),
        rewards=rewards, weights=torch.tensor([1.0, 0.5]), limit=width, sampler=-torch.rand(rows, width, generator=draw) * mask, step=100,
    )  # fmt: skip
    return batch, Readout(**{name: -torch.rand(rows, width, generator=draw) * (1 if name in ("logp", "ref", "value") else -1) * mask for name in COLUMNS})


def built(name: str, changes: dict[str, Any], readout: Readout, batch: Batch) -> Algorithm:
    algorithm = ALGORITHMS[name](**changes)
    return algorithm.calibrate(batch, readout) if algorithm.calibrates else algorithm


def only(readout: Readout, columns: frozenset[str]) -> Readout:
    return Readout(**{name: getattr(readout, name) for name in columns})


def gradient(algorithm: Algorithm, batch: Batch, readout: Readout, parts: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Of the step's loss with respect to the log-probabilities, gathered part by part."""
    assert readout.logp is not None
    logp = readout.logp.clone().requires_grad_(True)
    credit = algorithm.credit(batch, only(readout, algorithm.reads_before))
    stats: dict[str, float] = {}
    for rows in parts:
        part = batch[rows]
        width = part.tokens.shape[1]
        for columns in algorithm.readings:
            read = {n: (logp if n == "logp" else getattr(readout, n))[rows][:, :width] for n in columns | {"entropy"}}
            loss = algorithm.loss(part, Readout(**read), rows_of(credit, rows, width))
            if "logp" in columns:
                loss.value.backward()
            for key, value in {"loss": loss.value.detach(), **loss.stats}.items():
                stats[key] = stats.get(key, 0.0) + value.item()
    assert logp.grad is not None
    return logp.grad, stats


@every
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), size=st.integers(2, 5), width=st.integers(1, 7), cut=st.integers(1, 14))
def test_micro_batches_add_up(name: str, changes: dict[str, Any], seed: int, groups: int, size: int, width: int, cut: int) -> None:
    batch, readout = step_of(seed, groups, size, width)
    algorithm = built(name, changes, readout, batch)
    rows = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    whole, stats = gradient(algorithm, batch, readout, [rows])
    split, added = gradient(algorithm, batch, readout, list(rows.split(cut)))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    assert added == pytest.approx(stats, abs=1e-5, rel=1e-4)


@every
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 4))
def test_padding_changes_nothing(name: str, changes: dict[str, Any], seed: int, extra: int) -> None:
    batch, readout = step_of(seed, 2, 3, 5)
    algorithm = built(name, changes, readout, batch)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full((len(x), extra), 3, dtype=x.dtype) if x.dtype == torch.int64 else torch.zeros(len(x), extra, dtype=x.dtype)], 1)

    padded = Batch(**{n: wide(getattr(batch, n)) if n in ("tokens", "mask", "fresh", "sampler") else getattr(batch, n) for n in Batch.__dataclass_fields__})
    wider = Readout(**{n: wide(getattr(readout, n)) for n in COLUMNS})
    rows = torch.arange(len(batch))
    found, _ = gradient(algorithm, padded, wider, [rows])
    expected, _ = gradient(algorithm, batch, readout, [rows])
    torch.testing.assert_close(found[:, : batch.tokens.shape[1]], expected)
    assert not found[:, batch.tokens.shape[1] :].any()


@every
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuting_rows_permutes_credit(name: str, changes: dict[str, Any], seed: int) -> None:
    batch, readout = step_of(seed, 3, 4, 5)
    algorithm = built(name, changes, readout, batch)
    rows = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    columns = {n: getattr(batch, n) for n in Batch.__dataclass_fields__}
    permuted = Batch(**{n: v[rows] if isinstance(v, torch.Tensor) and n != "weights" else v for n, v in columns.items()})
    turned = algorithm.credit(permuted, only(readout[rows], algorithm.reads_before))
    for one, other in zip(algorithm.credit(batch, only(readout, algorithm.reads_before)), turned, strict=True):
        if one is not None:
            torch.testing.assert_close(one[rows], other, rtol=1e-5, atol=1e-5)


@every
def test_columns_are_known_and_what_is_reported_is_declared(name: str, changes: dict[str, Any]) -> None:
    batch, readout = step_of(3, 2, 4, 6)
    algorithm = built(name, changes, readout, batch)
    assert algorithm.reads_before <= COLUMNS
    assert algorithm.reads_during <= COLUMNS
    assert frozenset().union(*algorithm.readings) == algorithm.reads_during
    _, stats = gradient(algorithm, batch, readout, [torch.arange(len(batch))])
    seen = (set(stats) | set(algorithm.observe(batch, algorithm.credit(batch, readout)))) - {"loss"}
    assert seen <= set(algorithm.reports)


@every
def test_without_any_reward_nobody_is_preferred(name: str, changes: dict[str, Any]) -> None:
    """All rewards missing: finite gradients, and none that tells one rollout's tokens from another's by reward."""
    batch, readout = step_of(3, 2, 4, 6)
    empty = Batch(**{**{n: getattr(batch, n) for n in Batch.__dataclass_fields__}, "rewards": torch.full_like(batch.rewards, torch.nan)})
    found, _ = gradient(built(name, changes, readout, empty), empty, readout, [torch.arange(len(batch))])
    assert found.isfinite().all()


@every
def test_settings_are_documented(name: str, changes: dict[str, Any]) -> None:
    for field, info in ALGORITHMS[name].model_fields.items():
        assert info.description, f"{name}.{field} has no help text"
    assert set(changes) <= set(ALGORITHMS[name].model_fields)


@every
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equal_rewards_teach_nothing_where_the_method_says_so(name: str, changes: dict[str, Any], seed: int) -> None:
    batch, readout = step_of(seed, 3, 4, 5)
    batch = replace(batch, rewards=torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5]])[batch.group])
    algorithm = built(name, {k: v for k, v in changes.items() if k not in ("beta", "lm_coef")}, readout, batch)
    found, _ = gradient(algorithm, batch, readout, [torch.arange(len(batch))])
    if algorithm.needs_contrast:
        assert found.abs().max() < 1e-6
    elif name in ("tba", "tbrm"):                                    # they pull towards the reference then
        assert found.abs().max() > 0


@every
def test_without_a_reference_nobody_reads_it(name: str, changes: dict[str, Any]) -> None:
    """Columns that are not asked for are not there; an algorithm that asks for the reference says so in its settings or its name."""
    algorithm = ALGORITHMS[name](**changes)
    asks = "ref" in algorithm.reads_before | algorithm.reads_during
    penalised = getattr(algorithm, "beta", 0) > 0 or getattr(algorithm, "kl_coef", 0) > 0
    assert asks == penalised


def test_rollouts_that_go_on_have_no_say_in_anything_but_their_own_tokens() -> None:
    """Rewards that are not there yet, for every algorithm that learns window by window."""
    for name, kind in ALGORITHMS.items():
        if kind.learns_from_unfinished:
            batch, readout = step_of(5, 2, 3, 6)
            more = torch.tensor([True, False] * 3)
            batch = replace(batch, more=more, rewards=torch.where(more[:, None], torch.nan, batch.rewards))
            found, _ = gradient(built(name, {}, readout, batch), batch, readout, [torch.arange(6)])
            assert found.isfinite().all()
