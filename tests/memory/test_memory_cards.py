"""Cards by name and by size."""

from __future__ import annotations

import pytest

from localrl.memory.cards import CARDS, GIB, Card, card_bytes, gib, machine_memory, usable_bytes
from localrl.settings import UserError


@pytest.mark.parametrize(
    ("told", "size"),
    [
        ("16GiB", 16), ("16 GB", 16), ("16g", 16), ("16384MiB", 16), (str(16 * GIB), 16), (16 * GIB, 16), ("1.5 GiB", 1.5),
        ("RTX 4080", 16), ("rtx 4080", 16), ("4080", 16), ("NVIDIA GeForce RTX 4080", 16), ("rtx-4080-super", 16), ("4060 Ti", 8),
        ("RTX 4060 Ti 16GB", 16), ("RTX 3060", 12), ("1080 Ti", 11), ("RTX 4090 Laptop", 16), ("rtx4090", 24),
    ],
)  # fmt: skip
def test_names_and_sizes(told: str | int, size: float) -> None:
    assert card_bytes(told) == size * GIB


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("RTX 4800", "did you mean"),
        ("RTX 4O80", "did you mean 'RTX 4080'"),
        ("a big one", "16GiB"),
        ("", "16GiB"),
        ("16", "'16GiB'"),
        ("0GiB", "no card"),
        (-1, "no card"),
        ("1.2.3GiB", "16GiB"),
    ],
)
def test_unknown_cards_get_a_hint(told: str | int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        card_bytes(told)


def test_every_name_finds_itself_and_sizes_are_sane() -> None:
    assert all(card_bytes(name) == size and 4 * GIB <= size <= 200 * GIB for name, size in CARDS.items())


def test_usable_share() -> None:
    """Less the lines that every bill has (4 % and 0.1 GiB), a card of 16 GiB holds 14.3 GiB of a run's own tensors."""
    for size, own in ((8, 6.8), (12, 10.6), (16, 14.3), (24, 21.8)):
        assert round(usable_bytes(size * GIB) / GIB / 1.04 - 0.1, 1) == own
    assert usable_bytes(GIB // 2) == 0


def test_this_machine() -> None:
    available, total = machine_memory()
    assert 0 < available <= total
    card = Card.of(None, "cpu")
    assert card.total == total and card.device == "cpu" and 0 < card.usable <= total
    assert Card.of("4GiB", "cpu").usable == 4 * GIB


def test_no_gpu_to_plan_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        Card.of(None, "cuda")


def test_bytes_for_people() -> None:
    assert gib(16 * GIB) == "16.0 GiB" and gib(0) == "0.0 MiB" and gib(int(2.5 * 2**20)) == "2.5 MiB"
