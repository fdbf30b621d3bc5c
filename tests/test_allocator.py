"""What is told to PyTorch's allocator before it starts."""

from __future__ import annotations

import os

import pytest

from localrl import allocator
from localrl.allocator import EXPANDABLE, SETTINGS, expands, set_allocator
from localrl.memory.cards import FRAGMENTATION, FRAGMENTATION_OF_FIXED, Card


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing set, on plain Linux with a new torch; and put back afterwards."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator.platform, "system", lambda: "Linux")
    monkeypatch.setattr(allocator, "under_wsl", lambda: False)
    monkeypatch.setattr(allocator, "version", lambda name: "2.13.0+cu130")


def test_segments_may_grow_and_the_plan_counts_on_it() -> None:
    set_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == EXPANDABLE and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert expands() and Card.of("16GiB", "cuda").overheads.fragmentation == FRAGMENTATION


@pytest.mark.parametrize("release", ["2.8.0", "2.9.1+cu128"])
def test_an_older_torch_heeds_the_older_name_alone(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(allocator, "version", lambda name: release)
    set_allocator()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == EXPANDABLE and "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("said", "grows"), [("max_split_size_mb:128", False), ("expandable_segments:False", False), ("a:1, expandable_segments: True", True)])
def test_what_a_person_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str, said: str, grows: bool) -> None:
    monkeypatch.setenv(name, said)
    set_allocator()
    assert {key: os.environ.get(key) for key in SETTINGS} == {key: said if key == name else None for key in SETTINGS}
    assert expands() == grows
    assert Card.of("16GiB", "cuda").overheads.fragmentation == (FRAGMENTATION if grows else FRAGMENTATION_OF_FIXED)


@pytest.mark.parametrize(("system", "wsl"), [("Windows", False), ("Darwin", False), ("Linux", True)])
def test_where_it_may_crash_it_is_left_alone(monkeypatch: pytest.MonkeyPatch, system: str, wsl: bool) -> None:
    monkeypatch.setattr(allocator.platform, "system", lambda: system)
    monkeypatch.setattr(allocator, "under_wsl", lambda: wsl)
    set_allocator()
    assert not any(name in os.environ for name in SETTINGS)
    assert Card.of("16GiB", "cuda").overheads.fragmentation == FRAGMENTATION_OF_FIXED
