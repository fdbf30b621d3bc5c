"""What holds for every algorithm, whatever it does: a new file in the folder is tested on arrival."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.batch import COLUMNS, Batch, Readout, rows_of

every = pytest.mark.parametrize("name", ALGORITHMS)


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
        rewards=rewards, weights=torch.tensor([1.0, 0.5]), limit=width,
    )  # fmt: skip
    return batch, Readout(**{name: -torch.rand(rows, width, generator=draw) * (1 if name in ("logp", "ref", "value") else -1) * mask for name in COLUMNS})


def built(name: str, readout: Readout, batch: Batch) -> Algorithm:
    algorithm = ALGORITHMS[name]()
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
        read = {n: (logp if n == "logp" else getattr(readout, n))[rows][:, :width] for n in algorithm.reads_during | {"entropy"}}
        loss = algorithm.loss(part, Readout(**read), rows_of(credit, rows, width))
        loss.value.backward()
        for key, value in {"loss": loss.value.detach(), **loss.stats}.items():
            stats[key] = stats.get(key, 0.0) + value.item()
    assert logp.grad is not None
    return logp.grad, stats


@every
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), size=st.integers(2, 5), width=st.integers(1, 7), cut=st.integers(1, 14))
def test_micro_batches_add_up(name: str, seed: int, groups: int, size: int, width: int, cut: int) -> None:
    batch, readout = step_of(seed, groups, size, width)
    algorithm = built(name, readout, batch)
    rows = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    whole, stats = gradient(algorithm, batch, readout, [rows])
    split, added = gradient(algorithm, batch, readout, list(rows.split(cut)))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
    assert added == pytest.approx(stats, abs=1e-5)


@every
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 4))
def test_padding_changes_nothing(name: str, seed: int, extra: int) -> None:
    batch, readout = step_of(seed, 2, 3, 5)
    algorithm = built(name, readout, batch)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full((len(x), extra), 3, dtype=x.dtype) if x.dtype == torch.int64 else torch.zeros(len(x), extra, dtype=x.dtype)], 1)

    padded = Batch(**{n: wide(getattr(batch, n)) if n in ("tokens", "mask", "fresh") else getattr(batch, n) for n in Batch.__dataclass_fields__})
    wider = Readout(**{n: wide(getattr(readout, n)) for n in COLUMNS})
    rows = torch.arange(len(batch))
    found, _ = gradient(algorithm, padded, wider, [rows])
    expected, _ = gradient(algorithm, batch, readout, [rows])
    torch.testing.assert_close(found[:, : batch.tokens.shape[1]], expected)
    assert not found[:, batch.tokens.shape[1] :].any()


@every
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuting_rows_permutes_credit(name: str, seed: int) -> None:
    batch, readout = step_of(seed, 3, 4, 5)
    algorithm = built(name, readout, batch)
    rows = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    columns = {n: getattr(batch, n) for n in Batch.__dataclass_fields__}
    permuted = Batch(**{n: v[rows] if isinstance(v, torch.Tensor) and n != "weights" else v for n, v in columns.items()})
    turned = algorithm.credit(permuted, only(readout[rows], algorithm.reads_before))
    for one, other in zip(algorithm.credit(batch, only(readout, algorithm.reads_before)), turned, strict=True):
        if one is not None:
            torch.testing.assert_close(one[rows], other)


@every
def test_columns_are_known_and_what_is_reported_is_declared(name: str) -> None:
    batch, readout = step_of(3, 2, 4, 6)
    algorithm = built(name, readout, batch)
    assert algorithm.reads_before <= COLUMNS
    assert algorithm.reads_during <= COLUMNS
    _, stats = gradient(algorithm, batch, readout, [torch.arange(len(batch))])
    seen = (set(stats) | set(algorithm.observe(batch, algorithm.credit(batch, readout)))) - {"loss"}
    assert seen <= set(algorithm.reports)


@every
def test_without_any_reward_nobody_is_preferred(name: str) -> None:
    """All rewards missing: finite gradients, and none that tells one rollout's tokens from another's by reward."""
    batch, readout = step_of(3, 2, 4, 6)
    empty = Batch(**{**{n: getattr(batch, n) for n in Batch.__dataclass_fields__}, "rewards": torch.full_like(batch.rewards, torch.nan)})
    found, _ = gradient(built(name, readout, empty), empty, readout, [torch.arange(len(batch))])
    assert found.isfinite().all()


@every
def test_settings_are_documented(name: str) -> None:
    for field, info in ALGORITHMS[name].model_fields.items():
        assert info.description, f"{name}.{field} has no help text"
