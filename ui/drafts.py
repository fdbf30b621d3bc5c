"""A run that is being made up: as a command line, as TOML, and as a command that has begun."""

from __future__ import annotations

import shlex
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localrl.config import Run, build, load_run, presets
from localrl.folder import read_run, write_whole
from localrl.settings import UserError

from .form import Item, entered, fill, shown, toml
from .jobs import Job, jobs, start
from .place import Place
from .runs import TRAIN

TWICE = 5.0
"""Seconds in which the very same draft is not started a second time: a double click."""


def beginning(place: Place, preset: str = "", clone: str = "", rewards: str = "") -> Run:
    """What a form starts from: a run's settings, or a preset's, with the rewards of a set. UserError for one that is not there."""
    if clone:
        run = read_run(place.inside(clone))
        run = run.model_copy(update={"log": run.log.model_copy(update={"dir": None})})
    else:
        run = load_run(preset or default_preset())
    return with_rewards(run, place, rewards) if rewards else run


def default_preset() -> str:
    """The embedded model's, which needs nothing."""
    return next(name for name in presets() if load_run(name).model.path == "demo")


def reward_sets(place: Place) -> list[str]:
    """Names of the workspace's reward sets."""
    return sorted(path.stem for path in (place.root / "rewards").glob("*.toml"))


def with_rewards(run: Run, place: Place, name: str) -> Run:
    """The same run, judged by the set `rewards/NAME.toml`. UserError if there is none, or it is none."""
    path = place.inside(f"rewards/{name}.toml")
    try:
        section = tomllib.loads(path.read_text("utf-8"))["rewards"]
    except FileNotFoundError:
        raise UserError(f"there is no reward set {place.shown(path)}: make one in the Reward lab") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"{place.shown(path)} is no reward set: {error}") from None
    functions = [_beside(f, path.parent, place) for f in section.get("functions", ())]
    return build(run.model_dump(mode="json", exclude_none=True) | {"rewards": {**section, "functions": functions}})


def _beside(function: Any, folder: Path, place: Place) -> Any:
    """file.py:function, from the workspace on instead of from the set's folder."""
    values = {"function": function} if isinstance(function, str) else dict(function)
    file, colon, rest = str(values.get("function", "")).partition(":")
    if file.endswith(".py") and colon and (folder / file).is_file():
        values["function"] = f"{place.shown((folder / file).resolve())}:{rest}"
    return values


def command(run: Run, base: str, items: Sequence[Item]) -> str:
    """The command line that trains this run: the preset, and what differs. A comment where only a file can say it (what a preset sets and this does not)."""
    start_ = load_run(base) if base else None
    mine, its = (dict(zip(items, fill(r, items), strict=True)) if r is not None else {} for r in (run, start_))
    own = [item for item in items if not item.algorithm or item.algorithm == run.algorithm.name]
    changed = [item for item in own if not its or mine[item] != its[item]]
    for extra in ([], [i for i in own if i.section in {c.section for c in changed}], own):
        lines = [f"{item.key}={_as_line(item, mine[item])}" for item in dict.fromkeys([*changed, *extra]) if entered(item, mine[item]) is not None]
        try:
            if load_run(base or None, None, lines) == run:
                words = ["localrl", "train", *(["--preset", base] if base else []), *lines]
                return " \\\n  ".join([" ".join(map(shlex.quote, words[:4])), *map(shlex.quote, words[4:])])
        except UserError:
            continue
    return "# a command line cannot unset what the preset sets: save the TOML below as mine.toml\nlocalrl train --config mine.toml"


def _as_line(item: Item, value: Any) -> str:
    got = entered(item, value)
    return toml(list(got) if isinstance(got, tuple) else got)


def toml_of(run: Run) -> str:
    """Everything that is not as it would be anyway."""
    import tomli_w

    values = run.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    values["algorithm"] = {"name": run.algorithm.name, **values.get("algorithm", {})}
    if values.get("rewards", {}).get("functions"):
        values["rewards"]["functions"] = [f.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for f in run.rewards.functions]
    return tomli_w.dumps(values)


def save(place: Place, run: Run) -> Path:
    """The draft as a file that `--config` takes."""
    path = place.own("drafts") / f"{run.name}-{time.time_ns()}.toml"
    write_whole(path, run.dump())
    return path


def check(place: Place, run: Run) -> Job:
    """`--dry-run`: data, rewards, model and memory, and the first prompt as the model sees it."""
    return start(place, "check", ["train", "--config", str(save(place, run)), "--dry-run"])


def begin(place: Place, run: Run) -> str:
    """Start it. -> the run folder's name, which may not be there yet. The same draft within a few seconds is one run. UserError if its folder is taken."""
    dumped = run.dump()
    for job in jobs(place, TRAIN)[:3]:
        about = job.about
        argv = about.get("argv")
        if isinstance(argv, list) and len(argv) > 2 and argv[1] == "--config" and time.time() - float(str(about.get("started", 0))) < TWICE:
            draft = Path(str(argv[2]))
            if draft.is_file() and draft.read_text("utf-8") == dumped:
                return str(about["subject"])
    folder = place.inside(run.log.dir) if run.log.dir else _free(place, run.name)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"log.dir = {place.shown(folder)} is in use: leave it empty for a new one")
    name = place.shown(folder)
    start(place, TRAIN, ["train", "--config", str(save(place, run)), f"log.dir={toml(str(folder))}"], name)
    return name


def _free(place: Place, name: str) -> Path:
    taken = {str(job.about.get("subject")) for job in jobs(place, TRAIN)}
    number = 1
    while (folder := place.runs / f"{name}-{number:03d}").exists() or place.shown(folder) in taken:
        number += 1
    return folder


def started(place: Place, name: str) -> tuple[str, str]:
    """(state, complaint) of a run that was begun here: "starting", "there" once it has a folder, "failed"."""
    if (place.inside(name) / "run.toml").is_file():
        return "there", ""
    newest = next(iter(jobs(place, TRAIN, name)), None)
    if newest is None or newest.state == "running":
        return "starting", ""
    return "failed", newest.complaint() or "it ended before its first step and said nothing"


__all__ = ["begin", "beginning", "check", "command", "default_preset", "reward_sets", "shown", "started", "toml_of", "with_rewards"]
