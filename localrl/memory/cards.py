"""How much memory there is: cards by name or by bytes, this machine's own, and the share of it that a run may plan with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import psutil

from localrl.allocator import expands, under_wsl
from localrl.memory.specs import BY_KEY, SPECS, Spec, key, slowest, spec_of
from localrl.settings import UserError

Device = Literal["cuda", "cpu"]
GIB = 2**30
CONTEXT = round(0.6 * GIB)
"""What the driver keeps for a process that runs PyTorch, bitsandbytes and Triton kernels."""
CARD_SHARE = 0.975
"""Of a card's bytes, what is left beside the driver's own and a desktop's."""
FRAGMENTATION, FRAGMENTATION_OF_FIXED = 0.04, 0.13
"""Of what is allocated, lost between blocks: with segments that grow (simulated: 2 to 4 %), and with segments of fixed size (9 to 17 %)."""
HEAP = 2.0
"""On a CPU, measured with glibc in the fullest phase: 0.4 to 2.0. Smaller ones keep what it has freed, and so have more, but never more than it."""
BUDGET_MARGIN = 0.01
PINNED_SHARE = {"wsl": 0.4, "linux": 0.8}
"""Of the available memory. Windows lets a guest pin only part of it."""

CARDS: Mapping[str, int] = MappingProxyType({name: spec.total for name, spec in SPECS.items()})
"""Total bytes of common cards. Where one name was sold with two sizes, the bare name is the smaller one."""


@dataclass(frozen=True)
class Overheads:
    """What a run's own tensors do not explain. A plan asks its card for these and adds them to what it counts."""

    context: int
    """Bytes that the driver keeps for the process; `Card.usable` lacks them already."""
    libraries: int
    """Bytes: workspaces of cuBLAS and kernels; on a CPU the interpreter with PyTorch, transformers and bitsandbytes imported."""
    fragmentation: float
    """Of everything counted: what the caching allocator loses between its blocks, and a reserve."""
    heap: float = 0.0
    """What a C library's heap keeps beyond the live bytes of short-lived tensors, as a multiple of them."""

    @classmethod
    def on(cls, device: Device) -> Overheads:
        """As measured, with the allocator that a run here will have (`localrl.allocator`)."""
        if device == "cpu":
            return cls(0, round(0.5 * GIB), FRAGMENTATION, HEAP)
        return cls(CONTEXT, round(0.1 * GIB), FRAGMENTATION if expands() else FRAGMENTATION_OF_FIXED, 0.0)


@dataclass(frozen=True)
class Card:
    """What a plan is held against. For a CPU run "the card" is the machine's memory."""

    name: str
    total: int
    """Bytes."""
    usable: int
    """Bytes that a run's own data may take, the libraries' scratch and the margin among them."""
    device: Device
    overheads: Overheads
    bandwidth: float | None = None
    """Bytes a second; None: not known, or no card."""
    flops: float | None = None
    """A second, half precision with fp32 sums, dense; None as above."""
    pinned: int | None = None
    """Bytes of the host's memory that may be pinned for it; None: not known."""
    assumed: str | None = None
    """A size has no speed: the card whose bandwidth and FLOP/s stand here, the slowest common one of that size."""

    @classmethod
    def of(cls, memory: int | str | None, device: Device) -> Card:
        """From bytes, a text ("16GiB", "RTX 4080"), or None: what this machine has free.

        >>> Card.of("16GiB", "cuda").usable / 2**30
        15.0
        """
        if memory is None:
            return _this_gpu() if device == "cuda" else _this_machine()
        total, spec = card_bytes(memory), _named(memory)
        name = memory if isinstance(memory, str) else gib(total)
        if device == "cpu":
            return cls(name, total, total, device, Overheads.on(device))
        fast = spec or slowest(total)
        return cls(name, total, usable_bytes(total), device, Overheads.on(device), fast.bandwidth, fast.flops, assumed=None if spec else fast.name)

    @classmethod
    def budget(cls, count: int, device: Device = "cpu") -> Card:
        """Exactly that many bytes of an allocator, and a run's tensors alone in them: no context, no libraries, no heap, a margin of 1 %.

        >>> Card.budget(10**9).overheads
        Overheads(context=0, libraries=0, fragmentation=0.01, heap=0.0)
        """
        return cls(gib(count), count, count, device, Overheads(0, 0, BUDGET_MARGIN))


def usable_bytes(total: int) -> int:
    """Of a card of `total` bytes: 97.5 % (the rest is the driver's and the desktop's) less the process' own context.

    The bill adds the card's other overheads, 0.1 GiB for the libraries' scratch and 4 % for fragmentation, so that a run's own tensors get
    (0.975 total - 0.6 GiB) / 1.04 - 0.1 GiB: 14.3 of 16 GiB.
    """
    return max(0, round(CARD_SHARE * total) - CONTEXT)


def card_bytes(memory: str | int) -> int:
    """Total bytes of a card, from its name, a size, or bytes. Cards' gigabytes are binary, so "16GB" and "16GiB" are the same.

    Raises UserError with the nearest known name.

    >>> card_bytes("RTX 4080") == card_bytes("nvidia geforce rtx4080") == card_bytes("16 gib") == card_bytes(17179869184)
    True
    """
    if isinstance(memory, int):
        return _positive(memory, str(memory))
    size = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(?:i?b)?\s*", memory, re.IGNORECASE)
    if size and re.fullmatch(r"\d+(\.\d+)?|\.\d+", size[1]):
        if not size[2] and float(size[1]) < 2**20 and _named(memory) is None:
            raise UserError(f"card '{memory}' is no card's name and too small for bytes: write '{memory.strip()}GiB' if that is meant")
        if size[2] or float(size[1]) >= 2**20:
            return _positive(round(float(size[1]) * 1024 ** " kmgt".index(size[2].lower() or " ")), memory)
    if spec := _named(memory):
        return spec.total
    close = difflib.get_close_matches(key(memory), BY_KEY, n=1, cutoff=0.5) or difflib.get_close_matches(f"rtx{key(memory)}", BY_KEY, n=1, cutoff=0.5)
    hint = f"did you mean '{BY_KEY[close[0]]}'?" if close else "for example 'RTX 4080'"
    raise UserError(f"no card '{memory}' is known: {hint} Or write its memory, for example '16GiB'")


def gib(count: int) -> str:
    """Bytes for people.

    >>> gib(17 * 2**30), gib(300 * 2**20), gib(5000)
    ('17.0 GiB', '300 MiB', '0.0 MiB')
    """
    if abs(count) >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / 2**20:.0f} MiB" if abs(count) >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"


def machine_memory() -> tuple[int, int]:
    """(available, total) bytes of this machine's memory, within the container's limit where there is one."""
    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is None:                                               # the older layout
        limit, used = _number("/sys/fs/cgroup/memory/memory.limit_in_bytes"), _number("/sys/fs/cgroup/memory/memory.usage_in_bytes")
    if limit is not None and limit < total:
        return min(available, max(0, limit - (used or 0))), limit
    return available, total


def pinnable() -> int:
    """Bytes of this machine's available memory that a run may pin: a rule of thumb, since drivers name no limit before they refuse."""
    return round(PINNED_SHARE["wsl" if under_wsl() else "linux"] * machine_memory()[0])


def _this_machine() -> Card:
    available, total = machine_memory()
    return Card("this machine's memory", total, available, "cpu", Overheads.on("cpu"))


def _this_gpu() -> Card:
    import torch

    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device: name a card (memory.card='16GiB'), or train on the CPU (model.device=cpu)")
    free, total = torch.cuda.mem_get_info()
    # Asking made our own context, so `free` lacks it already, but not yet what bitsandbytes and Triton will load into it.
    name, usable = torch.cuda.get_device_name(), max(0, min(usable_bytes(total), free - CONTEXT // 2))
    spec = spec_of(name, total)
    card = Card(name, total, usable, "cuda", Overheads.on("cuda"), pinned=pinnable())
    return card if spec is None else replace(card, bandwidth=spec.bandwidth, flops=spec.flops)


def _positive(count: int, told: str) -> int:
    if count < 2**20:
        raise UserError(f"a card of {told} is no card: write its memory, for example '16GiB'")
    return count


def _named(memory: int | str) -> Spec | None:
    """The card of that name, with or without what makers put before it."""
    wanted = key(memory) if isinstance(memory, str) else ""
    return next((SPECS[BY_KEY[name]] for name in (wanted, f"rtx{wanted}", f"gtx{wanted}") if name in BY_KEY), None)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):                                   # no such limit, or the word "max"
        return None
