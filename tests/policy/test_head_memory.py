"""The chunked head's promise about memory, against PyTorch's own allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from localrl.policy.head import Head, TokenReadout, read_tokens, workspace


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most that `work` had allocated at once, by PyTorch's own allocator: scratch inside operators is in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    now = peak = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


def read_and_pull(n: int, kind: torch.dtype, softcap: float | None, entropy: bool, chunk: int) -> tuple[int, int]:
    """(peak, promise) of a forward and a backward pass over n tokens; the promise includes the returned gradient."""
    hidden, targets = torch.randn(n, 64, dtype=kind, requires_grad=True), torch.randint(20_000, (n,))
    head = Head(torch.randn(20_000, 64, dtype=kind), torch.randn(20_000, dtype=kind), softcap=softcap)

    def work() -> TokenReadout:
        out = read_tokens(hidden, targets, head, chunk=chunk, tile=2048, want_entropy=entropy)
        torch.stack([o.sum() for o in out if o is not None]).sum().backward()
        return out

    promise = workspace(
        n, 20_000, 64, weight=kind, hidden=kind, mixed=False, softcap=softcap is not None, chunk=chunk, tile=2048, want_entropy=entropy
    )
    return peak_bytes(work), promise + hidden.numel() * hidden.itemsize


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("entropy", [True, False])
def test_the_peak_is_the_tiles_and_not_the_tokens(kind: torch.dtype, softcap: float | None, entropy: bool) -> None:
    peak, promise = read_and_pull(256, kind, softcap, entropy, 64)
    assert 0.6 * promise < peak <= promise
    logits = 1024 * 20_000 * 4
    more, promise = read_and_pull(1024, kind, softcap, entropy, 64)
    assert more <= promise < 0.1 * logits
    # Four times the tokens cost their own columns and gradient, not one logit more.
    assert more - peak <= 768 * (64 * kind.itemsize + 100)
    wider, promise = read_and_pull(1024, kind, softcap, entropy, 256)
    assert 0.6 * promise < wider <= promise
    assert wider > 2 * more if kind == torch.float32 else wider > 1.5 * more
