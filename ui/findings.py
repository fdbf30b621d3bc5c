"""Why is it not learning? `localrl.health`, asked again from a run's files, and the plain numbers beside their limits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.folder import checkpoints
from localrl.health import MEMORY, PATIENCE, Health

from . import html
from .tail import Tail

LOOKED_AT = 200
"""Steps that are gone through again."""
FAILURES = {"errors": "raised an error", "timeouts": "ran out of time", "deaths": "lost its process", "invalid": "returned no usable number"}


@dataclass(frozen=True)
class Findings:
    """What is the matter with a run."""

    standing: tuple[str, ...] = ()
    """Now, a sentence each, with the number, its limit and what to do."""
    earlier: tuple[tuple[int, str], ...] = ()
    """(step, sentence): within the last steps, and over."""


def find(tail: Tail, names: Sequence[str], algorithm: Algorithm) -> Findings:
    """From the last steps' metrics."""
    rows = [*tail.recent][-LOOKED_AT:]
    if not rows:
        return Findings()
    if rows[0] != tail.first:
        rows = [tail.first, *rows]
    health = Health(names, algorithm)
    news = [(int(row.get("step", 0)), key, text) for row in rows if "step" in row for key, text in health.news(row)]
    standing = health.standing()
    now = {key for key, _ in standing}
    return Findings((*(text for _, text in standing), *_failing(rows, names)), tuple((step, text) for step, key, text in news if key not in now))


def calibrated(folder: Path, algorithm: Algorithm) -> Algorithm:
    """The algorithm with what it measured on the untrained model, if a checkpoint tells."""
    kept = checkpoints(folder)
    if not kept:
        return algorithm
    try:
        state: Any = json.loads((kept[-1] / "trainer.json").read_text("utf-8"))["algorithm"]
        return ALGORITHMS[state["name"]].model_validate(state)
    except (OSError, ValueError, KeyError, TypeError):               # it is being removed, or damaged: resume will say so
        return algorithm


def _failing(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
    """Rewards that failed within the last steps."""
    last = rows[-MEMORY:]
    for name in names:
        told = {how: sum(row.get(f"rewards/{name}/{key}", 0.0) for row in last) for key, how in FAILURES.items()}
        said = ", ".join(f"{how} {count:.0f} times" for how, count in told.items() if count > 0)
        if said:
            yield (f"the reward '{name}' {said} within the last {len(last)} steps (0 is normal); such answers go without it: rewards.log in the run folder has "
                   "the reasons, and the reward lab tries it on real answers")


# -- plain numbers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """One line of the table."""

    what: str
    now: str
    start: str
    normal: str
    verdict: str
    """good, look (worth a look), or empty."""


def plain_numbers(tail: Tail) -> list[Number]:
    """The few that explain most runs that do not learn; what was never measured says so."""
    if not tail.recent:
        return []
    now, start = _average([*tail.recent][-PATIENCE:]), tail.first
    entropy = start.get("entropy", math.nan)
    lines = (
        ("prompts whose answers all got the same reward", "frac_reward_zero_std", "below 80%: such prompts teach nothing", lambda v: v < 0.8, True),
        ("answers without any reward", "frac_unscored", "0%", lambda v: v < 0.05, True),
        ("answers cut at the length limit", "completions/clipped_ratio", "below 50%", lambda v: v < 0.5, True),
        ("clipped updates", "clip_ratio", "below 20%", lambda v: v < 0.2, True),
        ("entropy, nats a token", "entropy", "above a tenth of the start", lambda v: not v < 0.1 * entropy, False),
        ("gradient length", "grad_norm", "finite, and not 0", lambda v: math.isfinite(v) and v > 0, False),
        ("KL from the start, nats a token", "kl", "grows slowly", lambda v: v < 10, False),
        ("sampler against policy, nats", "sampler/mean_difference", "below 0.1", lambda v: v < 0.1, False),
    )  # fmt: skip
    return [_number(what, name, normal, fine(now.get(name, math.nan)), share, now, start) for what, name, normal, fine, share in lines]


def _number(what: str, name: str, normal: str, fine: bool, share: bool, now: Mapping[str, float], start: Mapping[str, float]) -> Number:
    if name not in start and name not in now:
        return Number(what, "not measured", "", normal, "")
    unknown = math.isnan(now.get(name, math.nan)) and name != "grad_norm"
    return Number(what, _said(now.get(name, math.nan), share), _said(start.get(name, math.nan), share), normal, "" if unknown else "good" if fine else "look")


def _said(value: float, share: bool) -> str:
    return "unknown" if math.isnan(value) else f"{value:.0%}" if share else f"{value:.3g}"


def _average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the last steps; unknown values are left out, but one that is not finite in the last step stays so."""
    names = {name for row in rows for name in row}
    found = {}
    for name in names:
        known = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
        found[name] = sum(known) / len(known) if known else math.nan
    return found


# -- as a page has it -----------------------------------------------------------------------------------------------------------


CHECKED = (
    "the gradient is finite; answers end by themselves; the sampler agrees with the policy; memory keeps to its plan and does not creep; rewards differ within "
    "groups and do not cancel; no reward fails; entropy has not collapsed; the own alarms of the algorithm"
)


def panel(findings: Findings, measured: bool) -> str:
    """HTML: what is the matter now, or what was checked."""
    if not measured:
        return html.notice("Nothing to judge yet: the first step is not done.")
    said = "".join(f'<div class="complaint finding">{html.text(_sentence(one))}</div>' for one in findings.standing)
    return said or f'<div class="notice finding"><span class="good">All well.</span> Checked: {CHECKED}.</div>'


def details(findings: Findings, numbers: Sequence[Number]) -> str:
    """HTML: the plain numbers, and what was the matter before."""
    marks = {"good": '<span class="good">good</span>', "look": '<span class="bad">look here</span>', "": ""}
    rows = [(n.what, n.now, n.start, n.normal, html.Markup(marks[n.verdict])) for n in numbers]
    caption = f"Means of the last {PATIENCE} steps, beside the first step."
    table = html.table(("what", "now", "at first", "normal", "verdict"), rows, numbers=(1, 2), caption=caption)
    items = "".join(f"<li>step {step}: {html.text(said)}</li>" for step, said in findings.earlier[-10:])
    return table + (f"<p>Earlier, and over by now:</p><ul>{items}</ul>" if items else "")


def _sentence(said: str) -> str:
    return said[:1].upper() + said[1:] + ("" if said.endswith(".") else ".")
