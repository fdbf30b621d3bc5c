"""One run as the live page shows it: everything in words, from its folder and the command that was started for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.algorithms.base import Algorithm
from localrl.config import Run
from localrl.folder import read_run
from localrl.runs import Summary, duration, summarise, time_left
from localrl.settings import UserError

from . import charts, findings
from .html import complaint, notice, text
from .jobs import Job
from .place import Place
from .runs import Row, badge, job_of, last_line, link, loading, progress
from .tail import Tail, tail

LOG_LINES = 40


@dataclass(frozen=True)
class View:
    """A run that is looked at."""

    row: Row
    folder: Path

    @property
    def summary(self) -> Summary | None:
        """None: its folder is not there yet."""
        return self.row.summary

    @property
    def there(self) -> bool:
        """Is there a run folder that can be read?"""
        return self.row.summary is not None and self.row.summary.status is not None


def view(place: Place, name: str) -> View:
    """UserError if there is no such run, and no command that is to become it."""
    folder, job = place.inside(name), job_of(place, name)
    if (folder / "run.toml").is_file():
        summary = summarise(folder)
        return View(Row(name, "starting" if loading(summary, job) else summary.stands, summary, job), folder)
    if job is None:
        raise UserError(f"there is no run {name} in {place.root}: it was deleted or renamed; pick another above")
    return View(Row(name, "starting" if job.state == "running" else "not started", None, job), folder)


def settings(folder: Path) -> Run | None:
    """Its run.toml; None if this version does not understand it."""
    try:
        return read_run(folder)
    except (UserError, OSError, UnicodeError):
        return None


# -- what stands at the top -----------------------------------------------------------------------------------------------------


def header(seen: View) -> str:
    """State, progress, time left, and where to go from here."""
    row, summary = seen.row, seen.summary
    parts = [f'<div class="title"><h2>{text(row.name)}</h2>{badge(row.stands)}</div>']
    if summary is not None and summary.status is not None:
        left = time_left([*tail(seen.folder).recent][-20:], summary.steps) if row.alive else None
        told = [f"step {summary.step:,} of {summary.steps:,}"]
        told += [f"about {duration(left)} left"] if left is not None else []
        saved = summary.status.saved
        told += [f"{summary.algorithm} on {summary.model}", "no checkpoint yet" if saved is None else f"checkpoint of step {saved:,}"]
        parts.append(progress(summary.step, summary.steps) + f'<p class="told">{text(" · ".join(told))}</p>')
        parts += [_last(row) if row.alive else "", _fate(seen), _links(seen)]
    elif row.stands == "starting":
        parts.append(notice("It is loading: its folder appears once everything has been checked."))
        parts.append(_last(row))
    elif row.message:
        parts.append(complaint(f"It did not start: {row.message}"))
    return "".join(parts)


def _fate(seen: View) -> str:
    """How it ended, if it did."""
    row, status = seen.row, seen.summary.status if seen.summary else None
    if status is None:
        return ""
    wrong = complaint(seen.summary.wrong) if seen.summary is not None and seen.summary.wrong else ""
    if row.stands == "crashed":
        since = f" since {_clock(status.beat)}" if status.beat else ""
        who = f"pid {status.pid} is gone{since} without a word" if status.pid else "its process is gone without a word"
        way = f"resume goes on from step {status.saved}" if status.resumable else "nothing was saved to go on from: clone it and start afresh"
        return wrong + complaint(f"crashed: {who} (killed, out of memory, or the machine went down); {way}")
    if row.stands == "silent":
        quiet = duration(time.time() - (status.beat or time.time()))
        return wrong + complaint(f"pid {status.pid} lives and has said nothing for {quiet} (at most 2 min are normal): a long phase, or it hangs; "
                                 "stop it if this goes on, and if it does not hear, end it on the page of all runs")
    if not row.alive and row.message and row.message != (seen.summary.wrong if seen.summary else ""):
        return wrong + complaint(row.message)
    return wrong


def _last(row: Row) -> str:
    """What a living one printed last; all of it is further down."""
    said = last_line(row.job)
    return f'<p class="told">It last said: {text(said)}</p>' if said else ""


def _clock(when: float) -> str:
    """A moment, by the date too if it is not today's."""
    then = time.localtime(when)
    return time.strftime("%H:%M:%S" if time.time() - when < 12 * 3600 else "%Y-%m-%d %H:%M", then)


def _links(seen: View) -> str:
    status = seen.summary.status if seen.summary else None
    saved = status is not None and status.saved is not None
    pages = [("export", "run", "Export"), ("chat", "run", "Chat")] if saved else []
    pages += [("new", "from", "Clone"), ("lab", "run", "Rewards in the lab")]
    return '<p class="links">' + "".join(f'<a class="do" href="{link(page, seen.row.name, key)}">{word}</a>' for page, key, word in pages) + "</p>"


def log(job: Job | None) -> str:
    """The last lines that its command printed."""
    if job is None:
        return '<p class="quiet">It was not started from these pages: what it says stands in the terminal that it was started in.</p>'
    lines = [line.rstrip() for line in job.output().splitlines() if line.strip()]
    dropped = f'<p class="quiet">The last {LOG_LINES} of {len(lines)} lines of <code>{text(job.command)}</code>.</p>' if len(lines) > LOG_LINES else (
        f'<p class="quiet">All that <code>{text(job.command)}</code> has printed.</p>')
    return dropped + f'<pre class="text">{text(chr(10).join(lines[-LOG_LINES:]) or "nothing yet")}</pre>'


# -- numbers --------------------------------------------------------------------------------------------------------------------


def numbers(seen: View, followed: Tail) -> tuple[list[dict[str, Any]], str, str]:
    """The board of charts, the panel on learning and its numbers. The run's metrics were read before."""
    run = settings(seen.folder)
    algorithm: Algorithm | None = findings.calibrated(seen.folder, run.algorithm) if run is not None else None
    with followed.lock:
        names = reward_names(run, followed)
        drawing = charts.Drawing(followed.curves, followed.evaluations, names, algorithm)
        board = [section.as_dict() for section in charts.sections(drawing)]
        if algorithm is None:
            return board, notice("This run's settings are not understood by this version: nothing can be said on why it learns or does not."), ""
        found = findings.find(followed, names, algorithm)
        panel, details = findings.panel(found, bool(followed.recent)), findings.details(found, findings.plain_numbers(followed))
    if followed.damaged:
        panel = complaint(f"{followed.damaged} damaged lines in its metrics were passed over (a full disk, or an edit by hand)") + panel
    return board, panel, details


def reward_names(run: Run | None, followed: Tail) -> list[str]:
    """In the settings' order, else in that of the metrics."""
    there = [name.split("/")[1] for name in followed.curves.names if name.startswith("rewards/") and name.endswith("/mean")]
    labels: Sequence[str] = run.rewards.names if run is not None else ()
    return [*(label for label in labels if label in there), *(name for name in there if name not in labels)]
