"""Random numbers with an address, and a sampler that takes exactly the tokens they point at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from localrl.batch import Prompt, Request
from localrl.engines import sampling
from localrl.engines.sampling import Sampler, inverse_cdf, stream_keys, uniforms
from tests.memory.tracker import StorageTracker


def requests(count: int) -> list[Request]:
    return [Request(Prompt(i // 4, (1,), ""), i % 4) for i in range(count)]


def sampler(**changes: Any) -> Sampler:
    return Sampler(SimpleNamespace(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0} | changes)))


def test_a_stream_does_not_depend_on_its_neighbours() -> None:
    together = uniforms(stream_keys(3, 5, requests(12)), [0] * 12, 40)
    for row, request in enumerate(requests(12)):
        alone = uniforms(stream_keys(3, 5, [request]), [0], 40)
        assert (alone[:, 0] == together[:, row]).all()
        later = uniforms(stream_keys(3, 5, [request]), [17], 23)
        assert (later[:, 0] == together[17:, row]).all()


def test_streams_are_uniform_and_all_different() -> None:
    numbers = uniforms(stream_keys(0, 0, requests(64)), [0] * 64, 2000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 50 < chi2 < 160                                           # 99 degrees of freedom
    assert abs(np.corrcoef(numbers[:, :8].T) - np.eye(8)).max() < 0.1
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.01


def test_every_part_of_the_name_counts() -> None:
    names = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, -1, 0), (2**31 - 1, 0, 0, 0)]
    keys = {int(stream_keys(seed, version, [Request(Prompt(i, (1,), ""), k)])[0]) for seed, version, i, k in names}
    assert len(keys) == len(names)


@given(st.integers(1, 9000), st.integers(0, 2**31), st.floats(0.05, 4))
def test_the_running_sum_passes_the_number_at_the_token(vocabulary: int, seed: int, sharpness: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(3, vocabulary, generator=draw) * sharpness, -1)
    p[torch.rand(3, vocabulary, generator=draw) < 0.3] = 0
    p[:, 0] += 1e-3
    u = torch.rand(3, generator=draw, dtype=torch.float64)
    token = inverse_cdf(p, u)
    upto = p.double().cumsum(1)
    mass = upto.gather(1, token)
    share, before = (mass / upto[:, -1:]).squeeze(1), ((mass - p.gather(1, token)) / upto[:, -1:]).squeeze(1)
    assert (p.gather(1, token) > 0).all()
    assert ((before <= u + 1e-6) & (u <= share + 1e-6)).all()


@pytest.mark.parametrize("vocabulary", [7, 300, 5000])
def test_the_ends_of_the_interval(vocabulary: int) -> None:
    p = torch.zeros(2, vocabulary)
    p[:, 2] = p[:, vocabulary - 3] = 0.5
    assert inverse_cdf(p, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).flatten().tolist() == [2, vocabulary - 3]


def test_tokens_come_as_often_as_they_should() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    count = 40_000
    u = torch.from_numpy(uniforms(stream_keys(1, 1, requests(1)), [0], count)[:, 0])
    tokens, _ = sampler(temperature=0.8)(logits.expand(count, -1), u)
    expected = torch.softmax(logits[0] / 0.8, -1) * count
    chi2 = ((torch.bincount(tokens, minlength=40) - expected) ** 2 / expected).sum()
    assert chi2 < 80                                                 # 39 degrees of freedom


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (12, 0.5), (400, 0.999), (1, 1.0), (0, 1e-6)])
def test_truncation_is_that_of_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)) * 2
    warped = TemperatureLogitsWarper(0.9)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = torch.softmax(warped[0], -1)
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, logp = sampler(temperature=0.9, top_k=top_k, top_p=top_p)(logits.expand(count, -1), u)
    found = torch.bincount(tokens, minlength=300) / count
    torch.testing.assert_close(found, expected, atol=2 / count, rtol=0)
    torch.testing.assert_close(logp, torch.log_softmax(logits[0] / 0.9, -1)[tokens], atol=1e-5, rtol=0)     # before truncation


def test_greedy_takes_the_likeliest_and_tells_its_plain_log_probability() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    tokens, logp = sampler(temperature=0)(logits, torch.rand(6, dtype=torch.float64))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1).amax(-1))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}])
@pytest.mark.parametrize("vocabulary", [3000, 5001])
def test_rows_in_parts_are_the_same_rows(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], vocabulary: int) -> None:
    """Bit for bit, with and without a block that is not full."""
    logits, u = 3 * torch.randn(70, vocabulary, generator=torch.Generator().manual_seed(3)), torch.rand(70, dtype=torch.float64)
    assert logits.numel() < sampling.AT_ONCE
    whole = sampler(**settings)(logits, u)
    for rows in (1, 16, 33):
        monkeypatch.setattr(sampling, "AT_ONCE", rows * vocabulary)
        parts = sampler(**settings)(logits, u)
        assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("truncated", [False, True])
def test_a_large_vocabulary_takes_little_beside_its_logits(truncated: bool) -> None:
    logits, u = torch.randn(32, 262_208), torch.rand(32, dtype=torch.float64)
    with StorageTracker() as tracker:
        tracker.adopt([logits])
        taken = tracker.peak_of(lambda: sampler(temperature=0.9, top_p=0.9 if truncated else 1.0)(logits, u)) - logits.nbytes
    assert taken < (24 if truncated else 8.2) * sampling.AT_ONCE


def test_logits_that_are_not_finite_show_in_the_log_probability_and_harm_nothing() -> None:
    logits = torch.full((2, 300), float("nan"))
    for settings in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}):
        tokens, logp = sampler(**settings)(logits, torch.tensor([0.3, 0.9], dtype=torch.float64))
        assert logp.isnan().all()
        assert ((tokens >= 0) & (tokens < 300)).all()
