"""The list of runs, and what can be done to one: stop, resume, delete."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from localrl.runs import Summary, duration, leftovers, summaries
from localrl.settings import UserError
from localrl.status import end, interrupt, look

from .html import text
from .jobs import Job, jobs, start
from .place import Place

TRAIN = "train"
WORDS = {
    "running": ("running", "good", "It trains."),
    "silent": ("silent", "bad", "Its process lives, and has said nothing for minutes: a long phase, or it hangs. Stop asks it, End kills it."),
    "finished": ("finished", "done", "It did all its steps."),
    "stopped": ("stopped", "quiet", "It was stopped and can be resumed."),
    "failed": ("failed", "bad", "It ended with an error."),
    "crashed": ("crashed", "bad", "Its process is gone without a word."),
    "new": ("new", "quiet", "It has not begun."),
    "unreadable": ("unreadable", "bad", "Its files cannot be read."),
    "starting": ("starting", "good", "It loads; its folder appears in a moment."),
    "not started": ("not started", "bad", "It ended before its first step and left nothing behind."),
}
"""(word, class, what it means) of each way a run can stand."""
ENDING = 20.0
"""Seconds that a command may take from its last word to its end."""
SPARK = 120, 30
"""Width and height of a curve in miniature, pixels."""


@dataclass(frozen=True)
class Row:
    """A run in the list, or a command that was to become one."""

    name: str
    """Its folder, as the workspace has it: what links and buttons carry."""
    stands: str
    summary: Summary | None = None
    job: Job | None = None
    """The last command that was started for it here."""

    @property
    def alive(self) -> bool:
        """Is there a process that works on it?"""
        return self.stands in ("running", "silent", "starting")

    @property
    def resumable(self) -> bool:
        """Could it go on?"""
        status = self.summary.status if self.summary else None
        return not self.alive and status is not None and status.resumable

    @property
    def message(self) -> str:
        """What is the matter, or what it last said."""
        if self.summary is not None and self.summary.wrong:
            return self.summary.wrong
        if self.alive:
            return last_line(self.job)
        status = self.summary.status if self.summary else None
        failed = self.job.complaint() if self.job is not None else ""
        if failed and (status is None or status.beat is None or _began(self.job) > status.beat or status.stands == "crashed"):
            return failed                                            # a command that failed after the run had spoken last
        if status is None:
            return ""
        if status.stands == "crashed":
            way = f"resume goes on from step {status.saved}" if status.resumable else "nothing was saved to go on from"
            return f"its process is gone without a word; {way}"
        return "" if status.message == "interrupted" else status.message


def rows(place: Place) -> list[Row]:
    """Everything there is to see, newest first."""
    newest = _newest_jobs(place)
    found = []
    for summary in summaries(place.root):
        name = place.shown(summary.folder)
        job = newest.pop(name, None)
        found.append((summary.begun, Row(name, "starting" if loading(summary, job) else summary.stands, summary, job)))
    for name, job in newest.items():
        if job.state != "done":
            found.append((_began(job), Row(name, "starting" if job.state == "running" else "not started", None, job)))
    return [row for _, row in sorted(found, key=lambda pair: pair[0], reverse=True)]


def loading(summary: Summary, job: Job | None) -> bool:
    """Is it about to go on, and has not taken hold of its folder yet? (One that has just ended has spoken since its command began.)"""
    status = summary.status
    if job is None or status is None or status.alive or _began(job) < (status.beat or 0.0):
        return False
    return job.state == "running"


def last_line(job: Job | None) -> str:
    """What its command printed last."""
    return next((line.strip() for line in reversed(job.output().splitlines()) if line.strip()), "") if job is not None else ""


def job_of(place: Place, name: str) -> Job | None:
    """The newest command that trains this run."""
    return next(iter(jobs(place, TRAIN, name)), None)


def _newest_jobs(place: Place) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for job in jobs(place, TRAIN):
        found.setdefault(str(job.about.get("subject") or job.folder.name), job)
    return found


def _began(job: Job | None) -> float:
    try:
        return float(str(job.about["started"])) if job is not None else 0.0
    except (KeyError, ValueError):
        return 0.0


# -- what can be done -----------------------------------------------------------------------------------------------------------


def stop(place: Place, name: str) -> str:
    """Ctrl-C, to the run or to the command that is about to begin it. Returns what to tell; UserError if there is nobody."""
    folder, job = place.inside(name), job_of(place, name)
    if (folder / "run.toml").is_file() and look(folder).alive:
        interrupt(folder)
        return f"{name} was asked to stop: it ends its step and saves a checkpoint"
    if job is not None and job.state == "running":
        job.interrupt()
        return f"{name} was asked to stop before its first step"
    raise UserError(f"{name} is not running: there is nothing to stop")


def kill(place: Place, name: str) -> str:
    """End the process of a run that no longer answers. Returns what to tell; UserError if there is none, or if it does answer."""
    status = look(place.inside(name))
    if status.stands == "running":
        raise UserError(f"{name} runs and answers: stop it, so that it saves where it is")
    end(place.inside(name))
    kept = f"resume goes on from step {status.saved}" if status.saved is not None else "nothing was saved to go on from"
    return f"{name} was ended; {kept}"


def resume(place: Place, name: str, steps: float | None = None) -> Job:
    """Go on with a run, to so many steps in all. UserError if it cannot be."""
    folder = place.inside(name)
    if _at_work(place, name):
        raise UserError(f"{name} is running already: open it to watch")
    status = look(folder)
    if status.saved is None:
        raise UserError(f"{name} holds no checkpoint to go on from: clone it and start afresh")
    if steps is not None and (steps != int(steps) or steps < 1):
        raise UserError(f"{steps:g} is no number of steps: give a whole one, more than the {status.saved} that are done")
    owed = status.saved == status.steps and status.stands != "finished"          # its last evaluation
    if steps is not None and steps <= status.saved and not (owed and steps == status.saved):
        raise UserError(f"{name} has done {status.saved} steps: give more than that to lengthen it")
    more = [] if steps is None or int(steps) == status.steps else ["--steps", str(int(steps))]
    return start(place, TRAIN, ["resume", str(folder), *more], name)


def delete(place: Place, name: str) -> str:
    """A run's folder, with everything in it. UserError for one that runs, and for a folder that is no run's."""
    folder = place.inside(name)
    if folder == place.root or not ((folder / "run.toml").is_file() or folder in leftovers(folder)):
        raise UserError(f"{name} is no run folder: nothing was deleted")
    if place.root.joinpath(name).is_symlink():
        raise UserError(f"{name} is a link to a folder elsewhere: delete it by hand")
    if _at_work(place, name):
        raise UserError(f"{name} is running: stop it first, then delete it")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(f"{name} was deleted in part only ({error.strerror}): see who may write to it") from None
    return f"{name} is deleted"


def dismiss(place: Place, name: str) -> None:
    """Forget commands that never became a run."""
    for job in jobs(place, TRAIN, name) or [job for job in jobs(place, TRAIN) if job.folder.name == name]:
        if job.state != "running":
            shutil.rmtree(job.folder, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of all files in there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except OSError:                                              # gone in between
            continue
    return total


def _at_work(place: Place, name: str) -> bool:
    """Does a process work on it, or is about to? One that has said its last word may take some seconds to be gone: they are waited for."""
    folder, job = place.inside(name), job_of(place, name)
    until = time.monotonic() + ENDING
    while True:
        status = look(folder) if (folder / "run.toml").is_file() else None
        if status is not None and status.alive:
            return True
        if job is None or job.state != "running":
            return False
        if status is None or _began(job) >= (status.beat or 0.0) or time.monotonic() > until:
            return True
        time.sleep(0.1)


# -- as a page has it -----------------------------------------------------------------------------------------------------------


def listed(found: Sequence[Row]) -> str:
    """HTML of the whole list."""
    if not found:
        return EMPTY
    return f'<ul class="runs">{"".join(map(_item, found))}</ul>'


EMPTY = (
    '<div class="empty"><h2>No runs here yet</h2><p>A run teaches a language model with rewards. The embedded demo model learns to add in a few minutes '
    'on any machine, and shows everything these pages can do.</p><p><a class="do first" href="/new">Start the demo run</a></p>'
    '<p class="quiet">With a model and data of your own: first define what is good in the <a href="/lab">reward lab</a>.</p></div>'
)


def badge(stands: str) -> str:
    """How it stands, as a word with a colour and a meaning."""
    word, kind, meaning = WORDS[stands]
    return f'<span class="badge {kind}" title="{text(meaning)}">{text(word)}</span>'


def sparkline(values: Sequence[float]) -> str:
    """A curve in miniature, as SVG."""
    if len(values) < 2:
        return ""
    (width, height), low, high = SPARK, min(values), max(values)
    points = " ".join(
        f"{2 + i * (width - 4) / (len(values) - 1):.1f},{height - 3 - (v - low) / ((high - low) or 1.0) * (height - 6):.1f}" for i, v in enumerate(values)
    )
    told = f"reward from {values[0]:.3g} to {values[-1]:.3g}"
    return (f'<svg class="spark" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
            f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1.5" stroke-linejoin="round"/></svg>')


def progress(step: int, steps: int) -> str:
    """A bar, with its numbers in words."""
    share = min(1.0, step / steps) if steps else 0.0
    return (f'<span class="bar" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="{steps}" aria-valuenow="{step}">'
            f'<span style="width:{100 * share:.1f}%"></span></span>')


def link(page: str, name: str, key: str = "run") -> str:
    """Address of a page about a run."""
    return f"/{page}?{key}={quote(name)}"


def _item(row: Row) -> str:
    summary = row.summary
    title = f'<a href="{link("live", row.name)}">{text(row.name)}</a>' if summary is None or summary.status is not None else text(row.name)
    reward, about, steps = "", "", ""
    if summary is not None and summary.status is not None:
        last = f' <b>{summary.rewards[-1]:.3f}</b>' if summary.rewards else '<span class="quiet">no reward yet</span>'
        reward = f'{sparkline(summary.rewards)}<span class="label">reward</span>{last}'
        left = f", {duration(summary.seconds_left)} left" if summary.seconds_left is not None else ""
        steps = f'{progress(summary.step, summary.steps)}<span>step {summary.step:,} of {summary.steps:,}{left}</span>'
        about = f'<b>{text(summary.algorithm)}</b> on {text(_short(summary.model))}'
    elif row.job is not None:
        about = f'<code>{text(row.job.command)}</code>'
    kind = "" if row.stands in ("running", "starting", "finished", "stopped") else "bad-said"
    told = f'<p class="said {kind}">{text(row.message)}</p>' if row.message else ""
    return (f'<li data-run="{text(row.name)}"><div class="name"><h2>{title}</h2>{badge(row.stands)}</div><div class="reward">{reward}</div>'
            f'<div class="steps">{steps}</div><div class="about">{about}</div><div class="acts">{_acts(row)}</div>{told}</li>')


def _acts(row: Row) -> str:
    def button(act: str, word: str, kind: str = "") -> str:
        return f'<button type="button" class="do {kind}" data-act="{act}" data-run="{text(row.name)}" aria-label="{word} {text(row.name)}">{word}</button>'

    parts = []
    if row.alive:
        parts.append(button("stop", "Stop"))
    if row.stands == "silent":
        parts.append(button("end", "End", "danger"))
    if row.resumable:
        parts.append(button("resume", "Resume"))
    if row.summary is not None and row.summary.status is not None:
        parts.append(f'<a class="do" href="{link("new", row.name, "from")}" aria-label="Clone {text(row.name)}">Clone</a>')
    if row.stands == "not started":
        parts.append(button("dismiss", "Dismiss"))
    elif not row.alive:
        parts.append(button("delete", "Delete", "danger"))
    return "".join(parts)


def _short(model: str) -> str:
    """A model's name without the folders that it lies in."""
    return Path(model).name if model.startswith("/") else model
