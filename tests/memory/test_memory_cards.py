"""Cards by name and by size."""

from __future__ import annotations

import pytest

from localrl.memory.cards import CARDS, CONTEXT, FRAGMENTATION, GIB, HEAP, Card, Overheads, card_bytes, gib, machine_memory, usable_bytes
from localrl.memory.specs import SPECS, spec_of
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


def test_every_card_has_a_speed_that_can_be() -> None:
    for name, spec in SPECS.items():
        card = Card.of(name, "cuda")
        assert (card.bandwidth, card.flops, card.assumed, card.total) == (spec.bandwidth, spec.flops, None, CARDS[name])
        assert 150e9 < spec.bandwidth < 5e12 and 4e12 < spec.flops < 1e15
        assert 20 < spec.flops / spec.bandwidth < 500               # operations a byte: nothing is out by a power of ten


@pytest.mark.parametrize(
    ("size", "like"),
    [("6GiB", "RTX 2060"), ("8GiB", "RTX 3050"), ("12GiB", "RTX 3060"), ("16GiB", "RTX 4060 Ti 16GB"), ("24GiB", "RTX 3090"), ("15.2GiB", "T4")],
)
def test_a_size_has_the_speed_of_the_slowest_common_card(size: str, like: str) -> None:
    card = Card.of(size, "cuda")
    assert card.assumed == like and (card.bandwidth, card.flops) == (SPECS[like].bandwidth, SPECS[like].flops)
    assert Card.of(size, "cpu").bandwidth is None


@pytest.mark.parametrize(
    ("driver", "total", "name"),
    [
        ("NVIDIA GeForce RTX 4080", 15.99, "RTX 4080"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.99, "RTX 4060 Ti"),
        ("NVIDIA GeForce RTX 3060", 8.0, "RTX 3060 8GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.99, "RTX 4090 Laptop"),
        ("NVIDIA RTX 2000 Ada Generation", 15.99, "RTX 2000 Ada"),
        ("NVIDIA RTX A4000", 15.7, "RTX A4000"),
        ("NVIDIA TITAN RTX", 23.6, "Titan RTX"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100"),
        ("NVIDIA A100 80GB PCIe", 79.3, "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("Tesla T4", 14.6, "T4"),
        ("NVIDIA GeForce RTX 9090", 64.0, None),
        ("NVIDIA GeForce RTX 4080 Mystery", 16.0, None),
        ("AMD Radeon RX 7900", 24.0, None),
    ],
)
def test_what_a_driver_calls_a_card(driver: str, total: float, name: str | None) -> None:
    found = spec_of(driver, round(total * GIB))
    assert found is None if name is None else found is not None and (found.bandwidth, found.flops) == (SPECS[name].bandwidth, SPECS[name].flops)


def test_this_machines_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """(What torch asks the driver is replaced: there is no GPU here.) A desktop that holds 2 GiB is subtracted; an unknown card has no speed."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (13 * GIB, 16 * GIB))
    for told, known in (("NVIDIA GeForce RTX 5080", True), ("NVIDIA GeForce RTX 9090", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda told=told: told)
        card = Card.of(None, "cuda")
        assert card.usable == 13 * GIB - CONTEXT // 2 and (card.bandwidth is not None) == known and card.assumed is None


def test_overheads_of_cards_of_machines_and_of_budgets() -> None:
    card, machine, budget = Card.of("16GiB", "cuda").overheads, Card.of("16GiB", "cpu").overheads, Card.budget(5 * GIB)
    assert (card.context, card.heap) == (CONTEXT, 0) and card.libraries == round(0.1 * GIB)
    assert (machine.context, machine.heap, machine.fragmentation) == (0, HEAP, FRAGMENTATION) and machine.libraries == GIB // 2
    assert budget.overheads == Overheads(0, 0, 0.01) and budget.usable == budget.total == 5 * GIB and budget.name == "5.0 GiB"
