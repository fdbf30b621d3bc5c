"""Curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localrl.folder import read_lines

COLOURS = ("#2563eb", "#16a34a", "#d97706", "#9333ea", "#dc2626", "#0891b2")


def curves(folder: Path, title: str = "") -> Path:
    """`curves.png` in the run folder: rewards with held-out marks, entropy, completion length. Returns its path."""
    from matplotlib.figure import Figure

    rows, evaluations = read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl")
    steps = [row["step"] for row in rows]
    names = [key.split("/")[1] for key in rows[0] if key.startswith("rewards/") and key.endswith("/mean")]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rewards, entropy, length = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, colour in zip(names, COLOURS, strict=False):
        values = [row[f"rewards/{name}/mean"] for row in rows]
        rewards.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        rewards.plot(steps, smooth(values), color=colour, linewidth=2, label=name)
        held = [(row["step"], row[f"eval/rewards/{name}/mean"], row.get(f"eval/rewards/{name}/stderr")) for row in evaluations]
        rewards.errorbar([h[0] for h in held], [h[1] for h in held], yerr=[2 * (h[2] or 0) for h in held], fmt="o", color=colour, capsize=3)
    rewards.set(title=title or "rewards (dots: held out, two standard errors)", xlabel="step")
    rewards.legend(loc="lower right", frameon=False)
    _line(entropy, steps, [row["entropy"] for row in rows], "entropy (nats a token)")
    _line(length, steps, [row["completions/mean_length"] for row in rows], "completion length (tokens)")
    for axis in (rewards, entropy, length):
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    return path


def smooth(values: Sequence[float | None], span: int = 9) -> list[float | None]:
    """Centred moving average; missing values are passed over.

    >>> smooth([0.0, None, 2.0], 3)
    [0.0, 1.0, 2.0]
    """
    half = span // 2
    windows = [[v for v in values[max(0, i - half) : i + half + 1] if v is not None] for i in range(len(values))]
    return [sum(window) / len(window) if window else None for window in windows]


def _line(axis: Any, steps: list[int], values: list[float], title: str) -> None:
    axis.plot(steps, values, color="#6b7280", alpha=0.3, linewidth=1)
    axis.plot(steps, smooth(values), color="#111827", linewidth=2)
    axis.set(title=title, xlabel="step")
    axis.set_ylim(bottom=0)
