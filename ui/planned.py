"""The memory plan beside the form: worked out by `localrl plan --json` in a process of its own, the newest request wins."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrl.config import Run
from localrl.memory.cards import gib
from localrl.memory.show import KINDS, REST, WORK, duration, setting
from localrl.memory.work import PHASES

from .html import complaint, text
from .place import Place

COLOURS = dict(zip((kind.name for kind in KINDS), ("#0891b2", "#16a34a", "#d97706", "#be185d", "#2563eb", "#8795a5"), strict=True))


@dataclass
class Asked:
    """One plan under way, or done."""

    process: subprocess.Popen[str]
    files: tuple[Path, Path]
    answer: str = ""
    done: bool = field(default=False)


class Planner:
    """For each tab the newest request; an older one is ended."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._asked: dict[str, Asked] = {}
        self._lock = threading.Lock()

    def ask(self, tab: str, run: Run, card: str) -> None:
        """Begin to work out the plan of this run, and forget the one before."""
        folder = Path(tempfile.mkdtemp(prefix="localrl-plan-"))
        (folder / "draft.toml").write_text(run.dump(), "utf-8")
        out, err = folder / "out", folder / "err"
        command = [sys.executable, "-P", "-m", "localrl", "plan", "--json", "--config", str(folder / "draft.toml"), *(["--card", card] if card else [])]
        with out.open("w") as to, err.open("w") as errors:
            process = subprocess.Popen(command, cwd=self.place.root, stdin=subprocess.DEVNULL, stdout=to, stderr=errors, text=True)
        with self._lock:
            before = self._asked.get(tab)
            self._asked[tab] = Asked(process, (out, err))
            while len(self._asked) > 64:                             # tabs that are long closed
                self._end(self._asked.pop(next(iter(self._asked))))
        if before is not None:
            self._end(before)

    def look(self, tab: str) -> str | None:
        """The plan as HTML; None: it is still being worked out. Empty: nobody asked."""
        with self._lock:
            asked = self._asked.get(tab)
        if asked is None:
            return ""
        if asked.done:
            return asked.answer
        if asked.process.poll() is None:
            return None
        asked.answer, asked.done = _answer(asked), True
        self._end(asked)
        return asked.answer

    @staticmethod
    def _end(asked: Asked) -> None:
        if asked.process.poll() is None:
            asked.process.kill()
            asked.process.wait()
        for path in (*asked.files, asked.files[0].with_name("draft.toml")):
            path.unlink(missing_ok=True)
        if asked.files[0].parent.is_dir() and not any(asked.files[0].parent.iterdir()):
            asked.files[0].parent.rmdir()


def _answer(asked: Asked) -> str:
    out, err = (path.read_text("utf-8", "replace") for path in asked.files)
    try:
        return shown(json.loads(out))
    except ValueError:
        said = [line.partition("localrl:")[2].strip() for line in err.splitlines() if line.startswith("localrl:")]
        return complaint(said[-1] if said else (err.strip().splitlines() or ["the plan could not be worked out"])[-1])


def shown(plan: dict[str, Any]) -> str:
    """A plan as `localrl plan --json` gives it: verdict, a bar for each phase, the knobs with their reasons, the speed."""
    card, phases = plan["card"], plan["phases"]
    worst = max(phases, key=lambda phase: phases[phase])
    verdict = f'{gib(phases[worst])} at most ({worst}), of {gib(card["usable"])} usable on {card["name"]}'
    head = f'<p><span class="good">It fits</span>: {text(verdict)}.</p>' if plan["fits"] else \
        f'<p><span class="bad">It does not fit</span>: {text(verdict)}.</p>' + complaint(f'Try: {plan.get("way_out") or "a smaller model"}')
    return head + bars(plan) + knobs(plan) + speed(plan)


def kind_of(plan: dict[str, Any], name: str) -> str:
    """As `localrl.memory.show.kind_of`, of a plan that is plain values."""
    for kind in KINDS:
        if kind.starts and name.startswith(kind.starts):
            return kind.name
    return WORK.name if len({phase for item in plan["items"] if item["name"] == name for phase in item["phases"]}) == 1 else REST.name


def parts(plan: dict[str, Any], phase: str) -> dict[str, int]:
    """Bytes of one phase by kind, in the order of the bars."""
    found = dict.fromkeys((kind.name for kind in KINDS), 0)
    for item in plan["items"]:
        if phase in item["phases"]:
            found[kind_of(plan, item["name"])] += item["bytes"]
    return {name: size for name, size in found.items() if size}


def bars(plan: dict[str, Any]) -> str:
    """A stacked bar for each phase, with a mark where the card's usable memory ends."""
    usable = plan["card"]["usable"]
    most = max(usable, *plan["phases"].values())
    rows = []
    for phase in PHASES:
        each, total = parts(plan, phase), plan["phases"][phase]
        cells = "".join(
            f'<span style="width:{100 * size / most:.3f}%;background:{COLOURS[name]}" title="{text(name)}: {text(gib(size))}"></span>'
            for name, size in each.items()
        )
        over = ' class="bad"' if total > usable else ""
        told = f"{phase}: " + ", ".join(f"{name} {gib(size)}" for name, size in each.items())
        rows.append(f'<div class="phase"><span class="name">{text(phase)}</span><span class="plan-bar" role="img" aria-label="{text(told)}">{cells}'
                    f'<i style="left:{100 * usable / most:.3f}%"></i></span><span{over}>{text(gib(total))}</span></div>')
    used = {name for phase in PHASES for name in parts(plan, phase)}
    legend = "".join(f'<span><b style="background:{COLOURS[kind.name]}"></b>{text(kind.name)}</span>' for kind in KINDS if kind.name in used)
    return f'<div class="plan">{"".join(rows)}<div class="legend">{legend}<span><i class="mark"></i>usable memory ends</span></div></div>'


def knobs(plan: dict[str, Any]) -> str:
    """What the plan sets, each with its reason."""
    rows = "".join(
        f"<li><code>{text(setting(name, knob['value']))}</code> <span class=quiet>{text(knob['reason'])}</span></li>" for name, knob in plan["knobs"].items()
    )
    return f"<details><summary>What the plan sets, and why</summary><ul>{rows}</ul></details>"


def speed(plan: dict[str, Any]) -> str:
    """Tokens a second that are to be expected, where the card is known."""
    told = plan.get("speed")
    if not told:
        return ""
    rates = ", ".join(f"{name} {part['tokens_per_second']:,.0f} tokens/s" for name, part in told["parts"].items() if part.get("tokens_per_second"))
    whose = f" on a card like the {told['assumed']}" if told.get("assumed") else ""
    return f"<p class=quiet>Expected{text(whose)}: {text(duration(told['seconds']))} a step; {text(rates)}.</p>"


CSS = """
.plan { display: grid; gap: 5px; margin: .5rem 0; }
.phase { display: grid; grid-template-columns: 80px 1fr 80px; gap: 8px; align-items: center; font-size: .9rem; font-variant-numeric: tabular-nums; }
.phase > :last-child { text-align: right; }
.plan-bar { position: relative; display: flex; height: 18px; background: var(--background-fill-secondary); border-radius: 3px; }
.plan-bar > span { height: 100%; } .plan-bar > i { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--body-text-color); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: .8rem; } .legend b { display: inline-block; width: 10px; height: 10px; margin-right: 5px; }
.legend i.mark { display: inline-block; height: 12px; border-left: 2px solid var(--body-text-color); margin-right: 5px; }
details summary { cursor: pointer; padding: .3rem 0; } .old { opacity: .45; }
details ul { padding-left: 1.2rem; margin: .2rem 0; }
"""
