"""How much memory there is: cards by name or by bytes, this machine's own, and the share of it that a run may plan with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import psutil

from localrl.settings import UserError

Device = Literal["cuda", "cpu"]
GIB = 2**30
CONTEXT = round(0.6 * GIB)
"""What the driver keeps for a process that runs PyTorch, bitsandbytes and Triton kernels."""
CARD_SHARE = 0.975
"""Of a card's bytes, what is left beside the driver's own and a desktop's."""

_GIB_OF: dict[float, str] = {
    6: "GTX 1060, GTX 1660, GTX 1660 Super, GTX 1660 Ti, RTX 2060, RTX 3060 Laptop, RTX 4050 Laptop",
    8: "GTX 1070, GTX 1070 Ti, GTX 1080, RTX 2060 Super, RTX 2070, RTX 2070 Super, RTX 2080, RTX 2080 Super, RTX 3050, RTX 3060 8GB, "
       "RTX 3060 Ti, RTX 3070, RTX 3070 Ti, RTX 3070 Laptop, RTX 4060, RTX 4060 Laptop, RTX 4060 Ti, RTX 4060 Ti 8GB, RTX 4070 Laptop, "
       "RTX 5050, RTX 5060, RTX 5060 Laptop, RTX 5060 Ti, RTX 5060 Ti 8GB, RTX 5070 Laptop",
    10: "RTX 3080, RTX 3080 10GB",
    11: "GTX 1080 Ti, RTX 2080 Ti",
    12: "Titan Xp, RTX 2060 12GB, RTX 3060, RTX 3060 12GB, RTX 3080 12GB, RTX 3080 Ti, RTX 4070, RTX 4070 Super, RTX 4070 Ti, "
        "RTX 4080 Laptop, RTX 5070, RTX 5070 Ti Laptop, RTX A2000 12GB",
    15: "T4, Tesla T4",
    16: "RTX 3080 Laptop, RTX 3080 Ti Laptop, RTX 4060 Ti 16GB, RTX 4070 Ti Super, RTX 4080, RTX 4080 Super, RTX 4090 Laptop, "
        "RTX 5060 Ti 16GB, RTX 5070 Ti, RTX 5080, RTX 5080 Laptop, RTX A4000, RTX 2000 Ada, V100, Tesla V100, P100, Tesla P100",
    20: "RTX A4500, RTX 4000 Ada",
    22.5: "L4, A10, A10G",
    24: "Titan RTX, RTX 3090, RTX 3090 Ti, RTX 4090, RTX 5090 Laptop, RTX A5000, RTX 4500 Ada",
    32: "RTX 5090, RTX 5000 Ada",
    40: "A100, A100 40GB",
    48: "RTX A6000, RTX 6000 Ada, L40, L40S",
    80: "A100 80GB, H100",
    139: "H200",
}  # fmt: skip
CARDS: Mapping[str, int] = MappingProxyType(
    {name.strip(): round(size * GIB) for size, names in _GIB_OF.items() for name in names.split(",")}
)
"""Total bytes of common cards. Where one name was sold with two sizes, the bare name is the smaller one."""


@dataclass(frozen=True)
class Card:
    """What a plan is held against. For a CPU run "the card" is the machine's memory."""

    name: str
    total: int
    """Bytes."""
    usable: int
    """Bytes that a run's own data may take, the libraries' scratch and the margin among them."""
    device: Device = "cuda"

    @classmethod
    def of(cls, memory: int | str | None, device: Device) -> Card:
        """From bytes, a text ("16GiB", "RTX 4080"), or None: what this machine has free.

        >>> Card.of("16GiB", "cuda").usable / 2**30
        15.0
        """
        if memory is None:
            return _this_gpu() if device == "cuda" else _this_machine()
        total = card_bytes(memory)
        name = memory if isinstance(memory, str) else gib(total)
        return cls(name, total, usable_bytes(total) if device == "cuda" else total, device)


def usable_bytes(total: int) -> int:
    """Of a card of `total` bytes: 97.5 % (the rest is the driver's and the desktop's) less the process' own context.

    The bill adds 0.1 GiB for the libraries' scratch and 4 % for fragmentation, so that a run's own tensors get
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
        if not size[2] and float(size[1]) < 2**20 and f"rtx{size[1]}" not in _BY_KEY and f"gtx{size[1]}" not in _BY_KEY:
            raise UserError(f"card '{memory}' is no card's name and too small for bytes: write '{memory.strip()}GiB' if that is meant")
        if size[2] or float(size[1]) >= 2**20:
            return _positive(round(float(size[1]) * 1024 ** " kmgt".index(size[2].lower() or " ")), memory)
    key = _key(memory)
    for candidate in (key, f"rtx{key}", f"gtx{key}"):
        if candidate in _BY_KEY:
            return CARDS[_BY_KEY[candidate]]
    close = difflib.get_close_matches(key, _BY_KEY, n=1, cutoff=0.5) or difflib.get_close_matches(f"rtx{key}", _BY_KEY, n=1, cutoff=0.5)
    hint = f"did you mean '{_BY_KEY[close[0]]}'?" if close else "for example 'RTX 4080'"
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


def _this_machine() -> Card:
    available, total = machine_memory()
    return Card("this machine's memory", total, available, "cpu")


def _this_gpu() -> Card:
    import torch

    if not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device: name a card (memory.card='16GiB'), or train on the CPU (model.device=cpu)")
    free, total = torch.cuda.mem_get_info()
    # Asking made our own context, so `free` lacks it already, but not yet what bitsandbytes and Triton will load into it.
    return Card(torch.cuda.get_device_name(), total, max(0, min(usable_bytes(total), free - CONTEXT // 2)), "cuda")


def _positive(count: int, told: str) -> int:
    if count < 2**20:
        raise UserError(f"a card of {told} is no card: write its memory, for example '16GiB'")
    return count


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):                                   # no such limit, or the word "max"
        return None


_BY_KEY: Mapping[str, str] = MappingProxyType({_key(name): name for name in CARDS})
