"""What cards can do, from their makers' specification sheets: memory, its bandwidth, and what half precision multiplies with.

TFLOP/s are dense, of half precision with fp32 sums, at the boost clock. GeForce cards sum in fp32 at half the rate of their tensor cores
(no professional card does); GTX cards have none and multiply in fp32, the 16 series in fp16. Laptop cards run at what their maker's power
limit allows: the middle of the range stands here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# GiB  GB/s  TFLOP/s  names. Where one name was sold with two sizes, the bare name is the smaller one, but the RTX 3060's and 3080's are the common one.
_TABLE = """
6      192     4.4    GTX 1060
6      192    10.0    GTX 1660
6      336    10.0    GTX 1660 Super
6      288    10.9    GTX 1660 Ti
6      336    25.8    RTX 2060
6      336    22      RTX 3060 Laptop
6      192    20      RTX 4050 Laptop
8      256     6.5    GTX 1070
8      256     8.2    GTX 1070 Ti
8      320     8.9    GTX 1080
8      448    28.7    RTX 2060 Super
8      448    29.9    RTX 2070
8      448    36.3    RTX 2070 Super
8      448    40.3    RTX 2080
8      496    44.6    RTX 2080 Super
8      224    18.2    RTX 3050
8      240    25.5    RTX 3060 8GB
8      448    32.4    RTX 3060 Ti
8      448    40.6    RTX 3070
8      608    43.5    RTX 3070 Ti
8      448    33      RTX 3070 Laptop
8      272    30.2    RTX 4060
8      256    24.6    RTX 4060 Laptop
8      288    44.1    RTX 4060 Ti, RTX 4060 Ti 8GB
8      256    35      RTX 4070 Laptop
8      320    26.3    RTX 5050
8      448    38.4    RTX 5060
8      384    25      RTX 5060 Laptop
8      448    47.4    RTX 5060 Ti, RTX 5060 Ti 8GB
8      384    35      RTX 5070 Laptop
10     760    59.5    RTX 3080, RTX 3080 10GB
11     484    11.3    GTX 1080 Ti
11     616    53.8    RTX 2080 Ti
12     548    12.1    Titan Xp
12     336    28.7    RTX 2060 12GB
12     360    25.5    RTX 3060, RTX 3060 12GB
12     912    61.3    RTX 3080 12GB
12     912    68.2    RTX 3080 Ti
12     504    58.3    RTX 4070
12     504    71      RTX 4070 Super
12     504    80.2    RTX 4070 Ti
12     432    56      RTX 4080 Laptop
12     672    61.7    RTX 5070
12     672    45      RTX 5070 Ti Laptop
12     288    32      RTX A2000 12GB
15     320    65      T4, Tesla T4
16     448    42      RTX 3080 Laptop
16     512    47      RTX 3080 Ti Laptop
16     288    44.1    RTX 4060 Ti 16GB
16     672    88.2    RTX 4070 Ti Super
16     717    97.5    RTX 4080
16     736   104      RTX 4080 Super
16     576    70      RTX 4090 Laptop
16     448    47.4    RTX 5060 Ti 16GB
16     896    87.9    RTX 5070 Ti
16     960   113      RTX 5080
16     896    58      RTX 5080 Laptop
16     448    76.7    RTX A4000
16     224    48      RTX 2000 Ada
16     900   125      V100, Tesla V100
16     732    18.7    P100, Tesla P100
20     640    94.6    RTX A4500
20     360    82      RTX 4000 Ada
22.5   300   121      L4
22.5   600   125      A10
22.5   600    70      A10G
24     672   130.5    Titan RTX
24     936    71.2    RTX 3090
24    1008    80      RTX 3090 Ti
24    1008   165      RTX 4090
24     896    80      RTX 5090 Laptop
24     768   111      RTX A5000
24     432   158      RTX 4500 Ada
32    1792   209      RTX 5090
32     576   261      RTX 5000 Ada
40    1555   312      A100, A100 40GB
48     768   155      RTX A6000
48     960   364      RTX 6000 Ada
48     864   181      L40
48     864   362      L40S
80    2039   312      A100 80GB
80    3350   989      H100
139   4800   989      H200
"""


@dataclass(frozen=True)
class Spec:
    """One card."""

    name: str
    total: int
    """Bytes of memory."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """Multiplications and additions a second, half precision with fp32 sums, dense."""


def _read(table: str) -> dict[str, Spec]:
    rows = (line.split(maxsplit=3) for line in table.strip().splitlines())
    return {
        name.strip(): Spec(name.strip(), round(float(size) * 2**30), float(bandwidth) * 1e9, float(tera) * 1e12)
        for size, bandwidth, tera, names in rows
        for name in names.split(",")
    }


SPECS: Mapping[str, Spec] = MappingProxyType(_read(_TABLE))
"""By name."""


def key(name: str) -> str:
    """A card's name without what makers, drivers and people write around it.

    >>> key("NVIDIA GeForce RTX 4090 Laptop GPU"), key("nvidia rtx 2000 ada generation"), key("rtx-4080 super")
    ('rtx4090laptop', 'rtx2000ada', 'rtx4080super')
    """
    return re.sub(r"nvidia|geforce|generation|gpu|[^a-z0-9]", "", name.lower())


BY_KEY: Mapping[str, str] = MappingProxyType({key(name): name for name in SPECS})


def spec_of(name: str, total: int) -> Spec | None:
    """Of the card that a driver calls so, with `total` bytes of memory; None: it is not in the table.

    Where a name was sold with several sizes the nearest counts. Of a server's card the form it was built in may follow ("A100-SXM4-80GB").

    >>> spec_of("NVIDIA GeForce RTX 4060 Ti", 16 * 2**30).name, spec_of("NVIDIA A100-SXM4-80GB", 79 * 2**30).name, spec_of("Radeon", 2**34)
    ('RTX 4060 Ti 16GB', 'A100 80GB', None)
    """
    server = re.match(r"(?:NVIDIA |Tesla )*([A-Z]\d+S?)[ -]", name)
    for wanted in (key(name), server and key(server[1])):
        same = [spec for spec in SPECS.values() if wanted and re.fullmatch(rf"{wanted}(\d+gb)?", key(spec.name))]
        if same:
            return min(same, key=lambda spec: abs(spec.total - total))
    return None


def slowest(total: int) -> Spec:
    """The slowest common card of that size, or of the size nearest to it: a desktop's RTX where there is one.

    >>> [slowest(size * 2**30).name for size in (8, 12, 16, 24)]
    ['RTX 3050', 'RTX 3060', 'RTX 4060 Ti 16GB', 'RTX 3090']
    """
    nearest = min((spec.total for spec in SPECS.values()), key=lambda size: abs(size - total))
    same = [spec for spec in SPECS.values() if spec.total == nearest]
    common = [spec for spec in same if re.fullmatch(r"RTX \d0\d0( Ti)?( Super)?( \d+GB)?", spec.name)]
    return min(common or same, key=lambda spec: spec.bandwidth * spec.flops)
