"""Seconds and memory of a step's phases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from localrl import metrics
from localrl.metrics import CLEAR_REFS, Clock, most_memory, peak_resident

MIB = 2**20
LINUX = pytest.mark.skipif(not CLEAR_REFS.exists(), reason="no /proc")


def a_clock(**planned: int) -> Clock:
    return Clock(lambda phase: None, torch.device("cpu"), planned)  # type: ignore[arg-type]


@LINUX
def test_each_phase_has_its_own_peak_on_a_cpu() -> None:
    clock = a_clock()
    with clock("rewards"):
        pass
    with clock("learn"):
        torch.ones(256 * MIB // 4)                                  # touched, and gone before the phase ends
    with clock("update"):
        pass
    before, most, after = (clock.peaks[name] for name in ("rewards", "learn", "update"))
    assert 250 * MIB < most - before < 300 * MIB and most - after > 200 * MIB
    assert set(clock.seconds) == {"rewards", "learn", "update"} and not clock.reserved


@LINUX
def test_a_phase_entered_again_keeps_the_larger_peak_and_is_held_against_its_plan() -> None:
    clock = a_clock(backward=100 * MIB)
    for size in (128, 1):
        with clock("learn"):
            torch.ones(size * MIB // 4)
    told = clock.memory()
    assert told["memory/learn"] == clock.peaks["learn"] > 128 * MIB and told["memory/learn_planned"] == 100 * MIB
    assert told["memory/learn_ratio"] == pytest.approx(told["memory/learn"] / (100 * MIB))
    assert most_memory(told) == told["memory/learn"]


def test_where_linux_does_not_tell_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "CLEAR_REFS", tmp_path / "no" / "such")
    clock = a_clock(backward=1)
    with clock("learn"):
        pass
    assert clock.memory() == {} and clock.seconds
    monkeypatch.setattr(metrics, "STATUS", tmp_path / "none")
    assert peak_resident() is None
    assert most_memory({"reward": 1.0}) is None


def test_on_a_gpu_what_was_handed_out_and_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """(What the allocator says is replaced: there is no GPU here.)"""
    resets: list[str] = []
    for name, value in {"max_memory_allocated": 7, "max_memory_reserved": 9, "synchronize": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: resets.append("reset"))
    clock = Clock(lambda phase: None, torch.device("cuda"), {"backward": 10})
    with clock("learn"):
        pass
    assert clock.memory() == {"memory/learn": 7.0, "memory/learn_reserved": 9.0, "memory/learn_planned": 10.0, "memory/learn_ratio": 0.7}
    assert resets == ["reset"]
