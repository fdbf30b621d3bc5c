"""A phase's peak as the largest of a few sums: exact where every tensor's size is one, and so for any size of work, not only those tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

Variables = Mapping[str, float]
Feature = tuple[str, ...]
"""Names of variables that are multiplied with each other; (): the constant 1."""


@dataclass(frozen=True)
class Lines:
    """Peaks are maxima of linear pieces, so the pieces are kept: a line through two peaks would be wrong beyond the next kink.

    >>> lines = Lines(((), ("tokens",)), ((10.0, 1.0), (0.0, 3.0)))
    >>> lines.at({"tokens": 4}), lines.at({"tokens": 100}), Lines.from_dict(lines.to_dict()) == lines
    (14, 300, True)
    """

    features: tuple[Feature, ...]
    pieces: tuple[tuple[float, ...], ...]
    """Of each piece, bytes for every feature."""

    def at(self, variables: Variables) -> int:
        """Bytes."""
        values = [prod(variables[name] for name in feature) for feature in self.features]
        return round(max(sum(c * v for c, v in zip(piece, values, strict=True)) for piece in self.pieces))

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"features": ["*".join(feature) for feature in self.features], "pieces": [[round(c, 4) for c in piece] for piece in self.pieces]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[object]]) -> Lines:
        """The way back. Raises ValueError or TypeError for what is none."""
        features = tuple(tuple(part for part in str(name).split("*") if part) for name in values["features"])
        pieces = tuple(tuple(float(c) for c in piece) for piece in values["pieces"])  # type: ignore[attr-defined]
        if not pieces or any(len(piece) != len(features) for piece in pieces):
            raise ValueError("pieces and features do not fit each other")
        return cls(features, pieces)
