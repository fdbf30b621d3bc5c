"""A file between its writing and its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localrl.export.check import Agree
from localrl.export.expected import Expected
from localrl.export.heldout import Graded, compare_totals
from localrl.export.report import Row
from localrl.export.tensors import Weights
from localrl.export.writer import DType


@dataclass(frozen=True)
class Made:
    """A file that is written and has been looked at, still under its temporary name."""

    file: Path
    dtype: DType
    rows: tuple[Row, ...]
    figures: Mapping[str, float]
    weights: Weights
    expected: Expected
    agree: Agree
    graded: Graded | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything was as it must be."""
        return all(row.passed for row in self.rows)


def loads(rows: Sequence[Row]) -> bool:
    """Whether llama.cpp could read the file at all."""
    return any(row.name == "loads" and row.passed for row in rows)


PROVEN = ("logits", "mean KL", "greedy text", "weights")
"""What a file's report repeats of its parent's: that was compared strictly."""
MERGED = {
    "only": "The base is not quantised: there is only one way to merge.",
    "dequantized": "Merged into the de-quantised weights, which are those that the adapter was trained on.",
    "original": "Merged into the original weights, from before they were quantised for training.",
}


def better(ours: Made, theirs: Made) -> Made:
    """De-quantised or original, by the rewards that they keep: the original only if it is certainly better."""
    first, second = (made.graded.totals if made.graded else {} for made in (ours, theirs))
    gain = compare_totals(first, second)
    if gain is None:
        return replace(ours, notes=(*ours.notes, "Chosen without comparing: too few prompts were answered."))
    chosen = theirs if gain.mean - gain.half > 0 else ours
    means = " against ".join(f"{sum(t.values()) / len(t):.3f}" for t in (first, second))
    why = "the original is certainly better" if chosen is theirs else "the original is not certainly better"
    return replace(chosen, notes=(*chosen.notes, f"Held-out reward of the two merges, de-quantised {means} original, difference {gain}: {why}."))
