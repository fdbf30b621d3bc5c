"""How the keys and values of one layer are kept: as they are, or in 8 bits with a scale for every token and head.

Keys and values are one tensor (2, Hkv, rows, columns, D), keys first. Of 8 bits, a reader sees one half at a time, widened to the type that
is computed in: scratch of half a layer. A scale is of that type too, and codes are rounded against the scale as it is kept, so that nothing
but the rounding to 255 steps is lost.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from localrl.devices import kind_of

KEYS, VALUES = 0, 1
STEPS = 127
"""Of a code, to either side of 0."""


class Store(Protocol):
    """Keys and values of one layer."""

    def write(self, half: int, row: int, column: int, part: Tensor) -> None:
        """(Hkv, r, c, D) to rows from `row` on and columns from `column` on."""

    def read(self, half: int, upto: int | None = None) -> Tensor:
        """The first `upto` columns. -> (Hkv * rows, columns, D) of the type that is computed in."""

    def joined(self, block: Tensor) -> Self:
        """With a block (2, Hkv, rows, c, D) behind it, as a new one."""

    def select(self, rows: Tensor) -> Self:
        """These rows only, as a new one."""


class Full:
    """As they are."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def zeros(cls, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Full:
        """Zeros, because what is masked must be finite nevertheless."""
        return cls(torch.zeros(size, dtype=dtype, device=device))

    @classmethod
    def of(cls, block: Tensor) -> Full:
        """A copy."""
        return cls(block.clone())

    def write(self, half: int, row: int, column: int, part: Tensor) -> None:
        self.values[half, :, row : row + part.shape[1], column : column + part.shape[2]] = part

    def read(self, half: int, upto: int | None = None) -> Tensor:
        return self.values[half, :, :, :upto].flatten(0, 1)

    def joined(self, block: Tensor) -> Full:
        return Full(torch.cat((self.values, block), 3))

    def select(self, rows: Tensor) -> Full:
        return Full(self.values.index_select(2, rows))


class EightBit:
    """Codes of a byte each, and a scale for every token and head."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales                      # (2, Hkv, rows, columns, D), (2, Hkv, rows, columns, 1)

    @classmethod
    def zeros(cls, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> EightBit:
        """Of a tensor of that size."""
        return cls(torch.zeros(size, dtype=torch.int8, device=device), torch.zeros((*size[:-1], 1), dtype=dtype, device=device))

    @classmethod
    def of(cls, block: Tensor) -> EightBit:
        """Rounded."""
        return cls(*rounded(block))

    def write(self, half: int, row: int, column: int, part: Tensor) -> None:
        place = (half, slice(None), slice(row, row + part.shape[1]), slice(column, column + part.shape[2]))
        self.codes[place], self.scales[place] = rounded(part)

    def read(self, half: int, upto: int | None = None) -> Tensor:
        codes, scales = self.codes[half, :, :, :upto], self.scales[half, :, :, :upto]
        # One pass on a GPU. On a CPU that product would widen the codes in a copy of its own.
        wide = codes.to(scales.dtype).mul_(scales) if kind_of(codes.device) == "cpu" else torch.mul(codes, scales)
        return wide.flatten(0, 1)

    def joined(self, block: Tensor) -> EightBit:
        codes, scales = rounded(block)
        return EightBit(torch.cat((self.codes, codes), 3), torch.cat((self.scales, scales), 3))

    def select(self, rows: Tensor) -> EightBit:
        return EightBit(self.codes.index_select(2, rows), self.scales.index_select(2, rows))


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and their scales, of x's type, one for the last dimension. (..., D) -> (..., D), (..., 1).

    >>> codes, scales = rounded(torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0]]))
    >>> codes.tolist(), (codes * scales)[0, 0].item()
    ([[127, -64, 0], [0, 0, 0]], 1.0)
    """
    scales = (x.abs().amax(-1, keepdim=True).float() / STEPS).to(x.dtype).clamp_min_(torch.finfo(x.dtype).tiny)
    codes = x.float().div_(scales.float()) if x.dtype != torch.float32 else x / scales
    return codes.round_().clamp_(-STEPS, STEPS).to(torch.int8), scales
