"""The plan held against what is measured: each phase's peak over its plan, remembered for the next plan, and who else takes memory.

What a run has taught lies in one small file in the user's cache folder, by card, model and types: no prompt, no path, no name of a run.
A file that cannot be read or written costs a sentence, never a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from localrl import __version__
from localrl.memory.cards import Card
from localrl.memory.shape import ModelShape
from localrl.memory.work import PHASES, Phase, Work

if TYPE_CHECKING:
    import torch

PHASE_OF: Mapping[str, Phase] = MappingProxyType(
    {"rollout": "rollout", "scoring": "scoring", "reference": "scoring", "learn": "backward", "update": "optimiser"}
)
"""The clock's phases, and what the plan calls them."""
LEAST, MOST = 0.5, 2.0
"""A correction is never smaller or larger: beyond, something else than the plan is wrong."""
Say = Callable[[str], None]


def tensors(phases: Mapping[Phase, int], card: Card) -> dict[Phase, int]:
    """Of a plan's peaks, what should be measured: all lines but the margin. Bytes.

    On a GPU the allocator does not see the libraries' own. On a CPU the process is measured, and its heap keeps what the fullest phase has
    freed, so that every phase is held against that one.
    """
    if card.overheads.heap:
        phases = dict.fromkeys(phases, max(phases.values(), default=0))
    libraries = card.overheads.libraries if card.device == "cuda" else 0
    return {phase: max(0, round(size / (1 + card.overheads.fragmentation)) - libraries) for phase, size in phases.items()}


def compare(planned: Mapping[Phase, int], peaks: Mapping[str, int]) -> dict[str, float]:
    """Of every phase of the clock that is planned: `memory/<phase>_planned` (bytes) and `memory/<phase>_ratio` (measured / planned).

    >>> compare({"backward": 1000}, {"learn": 900, "rewards": 5})
    {'memory/learn_planned': 1000.0, 'memory/learn_ratio': 0.9}
    """
    metrics: dict[str, float] = {}
    for name, peak in peaks.items():
        if size := planned.get(PHASE_OF[name], 0) if name in PHASE_OF else 0:
            metrics |= {f"memory/{name}_planned": float(size), f"memory/{name}_ratio": peak / size}
    return metrics


def ratios(metrics: Mapping[str, float]) -> dict[Phase, float]:
    """The plan's phases in a step's metrics: the largest ratio of each."""
    found: dict[Phase, float] = {}
    for name, phase in PHASE_OF.items():
        if (ratio := metrics.get(f"memory/{name}_ratio")) is not None:
            found[phase] = max(ratio, found.get(phase, 0.0))
    return found


# -- what past runs have taught ---------------------------------------------------------------------------------------------------


def key(card: Card, shape: ModelShape, work: Work) -> str:
    """What a correction belongs to: the card, the model's numbers, its quantisation and compute type, and this version's plan."""
    numbers = hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode()).hexdigest()[:12]
    return f"{card.name} | {shape.family} {numbers} | {work.quantization} | {8 * work.compute_bytes} bit | {__version__}"


@dataclass(frozen=True)
class Lesson:
    """What the runs of one key have taught."""

    ratios: Mapping[Phase, float]
    """Of each phase the largest measured / planned."""
    count: int
    """How often it was written."""
    date: str
    """Of the last time, as 2026-01-31."""


def store() -> Path:
    """Where lessons lie: LOCALRL_CACHE, or localrl/ in XDG_CACHE_HOME, or in ~/.cache."""
    own = os.environ.get("LOCALRL_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "localrl"
    return folder.expanduser() / "memory.json"


def correction(key: str, say: Say | None = None) -> dict[Phase, float]:
    """What each phase's prediction should be multiplied with; 1 where nothing is known."""
    lesson = lessons(say).get(key)
    return {phase: lesson.ratios.get(phase, 1.0) if lesson else 1.0 for phase in PHASES}


def lessons(say: Say | None = None) -> dict[str, Lesson]:
    """All of them, by key. A file that is damaged counts as empty, and is said to be."""
    try:
        values = json.loads(store().read_text("utf-8"))
        return {str(name): _lesson(value) for name, value in values.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if say is not None:
            say(f"{store()} cannot be read ({type(error).__name__}): what past runs taught about memory is ignored, and written anew")
        return {}


def remember(key: str, seen: Mapping[Phase, float], worst_case: bool = False, say: Say | None = None) -> bool:
    """Keep the largest ratio of each phase, within bounds. Whether anything was written.

    A step whose responses were short needs less than planned and says nothing about the plan: ratios below 1 count only from the
    worst case (`worst_case`), longest prompts and responses in the largest wave and pass.
    """
    known = lessons(say)
    old = known.get(key)
    before: dict[Phase, float] = dict(old.ratios) if old else {}
    new = {phase: min(MOST, max(LEAST, ratio)) for phase, ratio in seen.items() if worst_case or ratio > 1}
    raised = {phase: ratio for phase, ratio in new.items() if ratio > before.get(phase, 0.0)}
    if not raised:
        return False
    lesson = Lesson({**before, **raised}, (old.count if old else 0) + 1, time.strftime("%Y-%m-%d"))
    return _write({**known, key: lesson}, say)


class Teacher:
    """Keeps what one run teaches: a phase's ratio is remembered when it is larger than any before it in this run."""

    def __init__(self, key: str, say: Say | None = None) -> None:
        self.key, self.say = key, say
        self._most: dict[Phase, float] = {}

    def look(self, metrics: Mapping[str, float], worst_case: bool = False) -> None:
        """A step's metrics, or the probe's (`remember`)."""
        least = 0.0 if worst_case else 1.0
        raised = {phase: ratio for phase, ratio in ratios(metrics).items() if ratio > max(least, self._most.get(phase, 0.0))}
        self._most |= raised
        if raised:
            remember(self.key, raised, worst_case, self.say)


def _lesson(value: Mapping[str, Any]) -> Lesson:
    """Raises what `lessons` catches for anything else than what `remember` writes."""
    seen = {phase: float(value["ratios"][phase]) for phase in PHASES if phase in value["ratios"]}
    if not all(LEAST <= ratio <= MOST for ratio in seen.values()):
        raise ValueError("a ratio out of bounds")
    return Lesson(seen, int(value["count"]), str(value["date"]))


def _write(known: Mapping[str, Lesson], say: Say | None) -> bool:
    """Beside its place and renamed, so that two runs that end at once lose a lesson at most, never the file."""
    path = store()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({name: asdict(lesson) for name, lesson in known.items()}, indent=1), "utf-8")
        os.replace(part, path)
        return True
    except OSError as error:
        if say is not None:
            say(f"what this run taught about memory could not be kept in {path}: {error.strerror or type(error).__name__}")
        return False


# -- who else is there ------------------------------------------------------------------------------------------------------------


class Others:
    """What other programs have taken of the card since this was made: free memory then, less our own growth, less free memory now."""

    def __init__(self, device: torch.device) -> None:
        """`device`: nothing is ever measured but on CUDA. Make it when everything is loaded: kernels that are loaded later count as others'."""
        self.device = device
        self._start = self._unclaimed()

    def metrics(self) -> dict[str, float]:
        """`memory/others` (bytes, 0 or more); nothing on a CPU."""
        now = self._unclaimed()
        return {} if self._start is None or now is None else {"memory/others": float(max(0, self._start - now))}

    def _unclaimed(self) -> int | None:
        """Bytes that are free or ours."""
        if self.device.type != "cuda":
            return None
        import torch

        return int(torch.cuda.mem_get_info(self.device)[0]) + int(torch.cuda.memory_reserved(self.device))
