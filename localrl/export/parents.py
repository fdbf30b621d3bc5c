"""What a model is first written as, in what order its other types follow, and how large it is."""

from __future__ import annotations

from collections.abc import Sequence

from localrl.export.weights import Source
from localrl.export.writer import DType

LARGE = 2**31
"""Parameters above which the parent is F16: in F32 it would take more than 8 GiB of the disk."""


def parent_type(parameters: int, dtypes: Sequence[DType]) -> DType:
    """What a model is first written as: F32, or above LARGE what takes half of it, if nothing is asked for that would be rounded twice.

    >>> parent_type(10**6, ["bf16"]), parent_type(8 * 10**9, ["q8_0", "f16"]), parent_type(8 * 10**9, ["bf16"]), parent_type(8 * 10**9, ["bf16", "q8_0"])
    ('f32', 'f16', 'bf16', 'f32')
    """
    if parameters <= LARGE or "f32" in dtypes:
        return "f32"
    return "f16" if "bf16" not in dtypes else "bf16" if set(dtypes) == {"bf16"} else "f32"


def ordered(dtypes: Sequence[DType], parent: DType) -> list[DType]:
    """The parent's own type last: it gets its name then, and is no longer a parent."""
    return sorted(dtypes, key=lambda dtype: dtype == parent)


def size(source: Source) -> int:
    """Entries of a tensor."""
    count = 1
    for n in source.shape:
        count *= n
    return count
