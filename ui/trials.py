"""Trials of rewards: a folder each in `.localrl/lab/`, a `localrl try` in the background, and what the form holds of a set of rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from localrl.config import presets
from localrl.folder import write_whole
from localrl.lab.blocks import Block, blocks
from localrl.lab.drafts import checked
from localrl.lab.trial import Trial
from localrl.rewards import RewardSettings, RewardSpec
from localrl.rewards.sets import read_set
from localrl.settings import UserError

from . import jobs, runs
from .place import Place

KIND = "try"
SAMPLE, RUN, PASTE = "Sample the untrained model", "Completions of a run", "Paste completions"
SOURCES = (SAMPLE, RUN, PASTE)
Item = dict[str, Any]
"""One reward in the form: `id`, `function`, `name`, `weight`, `args` as the form shows them, `given`, `at_least`."""


# -- the form ---------------------------------------------------------------------------------------------------------------------


def item_of(number: int, spec: RewardSpec) -> Item:
    """A reward as the form shows it."""
    block = blocks().get(spec.function)
    args: Any = json.dumps(spec.args) if block is None else {p.name: p.shown(spec.args.get(p.name, p.default)) for p in block.parameters}
    return {"id": number, "function": spec.function, "name": spec.name or "", "weight": spec.weight, "args": args, "given": spec.given or "",
            "at_least": spec.at_least}  # fmt: skip


def added(items: Sequence[Item], function: str) -> list[Item]:
    """One more, under a name of its own."""
    number = 1 + max((item["id"] for item in items), default=0)
    spec = RewardSpec(function=function)
    taken = {label(item) for item in items}
    name = next((f"{spec.label}_{n}" for n in range(2, len(items) + 3) if f"{spec.label}_{n}" not in taken), None) if spec.label in taken else None
    return [*items, item_of(number, spec.model_copy(update={"name": name}))]


def label(item: Item) -> str:
    """The reward's name in tables."""
    return item["name"] or RewardSpec(function=item["function"]).label


def settings_of(items: Sequence[Item], limits: Mapping[str, Any]) -> RewardSettings:
    """What the form holds. UserError in one sentence for what cannot be."""
    if not items:
        raise UserError("there are no rewards yet: add a built-in one, or write your own")
    return checked([_spec(item) for item in items], **{k: v for k, v in limits.items() if v is not None})


def _spec(item: Item) -> dict[str, Any]:
    block = blocks().get(item["function"])
    try:
        args = _own_args(item["args"]) if block is None else _args(block, item["args"])
    except UserError as error:
        raise UserError(f"reward '{label(item)}': {error}") from None
    spec = {"function": item["function"], "weight": float(item["weight"] or 0), "args": args}
    spec |= {"name": item["name"]} if item["name"] else {}
    return spec | ({"given": item["given"], "at_least": float(item["at_least"])} if item["given"] else {})


def _args(block: Block, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for parameter in block.parameters:
        value = parameter.read(values.get(parameter.name))
        if value is None and parameter.required:
            raise UserError(f"{parameter.name} is missing: {block.summary}")
        if value is not None and value != parameter.default:
            found[parameter.name] = value
    return found


def _own_args(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f'its arguments are no JSON ({error}): as in {{"limit": 3}}') from None
    if not isinstance(found, dict):
        raise UserError('its arguments must be an object, as in {"limit": 3}')
    return found


def limits() -> dict[str, Any]:
    """What may be set of all rewards' processes: name -> default."""
    return {name: field.default for name, field in RewardSettings.model_fields.items() if name != "functions"}


def weights_for(trial: Trial, items: Sequence[Item]) -> tuple[float, ...]:
    """The form's weights where a reward is still in it, else those of the trial."""
    now = {label(item): float(item["weight"] or 0) for item in items}
    return tuple(now.get(name, weight) for name, weight in zip(trial.names, trial.weights, strict=True))


def opened(place: Place, name: str) -> tuple[list[Item], dict[str, Any]]:
    """(rewards, limits) of a set: `rewards/<name>.toml`, a preset, or a run's. UserError if it is none."""
    kind, _, rest = name.partition(": ")
    if kind == "set":
        values = read_set(rest, place.root)["rewards"]
    else:
        import tomllib

        path = presets().get(rest) if kind == "preset" else place.inside(rest) / "run.toml"
        if path is None or not path.is_file():
            raise UserError(f"there is no {name}")
        values = tomllib.loads(path.read_text("utf-8")).get("rewards", {})
    settings = checked(values.get("functions", ()), **{k: v for k, v in values.items() if k != "functions"})
    return from_settings(settings)


def from_settings(settings: RewardSettings) -> tuple[list[Item], dict[str, Any]]:
    """The form's contents for a set."""
    return [item_of(n, spec) for n, spec in enumerate(settings.functions, 1)], settings.model_dump(exclude={"functions"})


def known(place: Place) -> list[str]:
    """What `opened` can open: own sets first."""
    from localrl.rewards.sets import sets

    return [*(f"set: {name}" for name in sets(place.root)), *(f"run: {row.name}" for row in runs.rows(place)), *(f"preset: {name}" for name in presets())]


# -- trials -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Which completions, and what of them."""

    source: str
    base: str
    """Whose model and data, where they are sampled or pasted: "preset: x" or "run: x"."""
    data: str = ""
    """A data file, or nothing: that of `base`."""
    prompts: str = ""
    """Typed prompts, a line each; before `data`."""
    count: int = 8
    each: int = 8
    run: str = ""
    pasted: str = ""
    gradients: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the trial's folder."""
        return dict(vars(self))


@dataclass(frozen=True)
class Tried:
    """One trial's folder."""

    folder: Path
    job: jobs.Job | None

    @property
    def state(self) -> str:
        """running, done, failed, stopped."""
        if (self.folder / "stopped").exists():
            return "stopped"
        return self.job.state if self.job else "failed"

    @property
    def trial(self) -> Trial | None:
        """What there is so far."""
        path = self.folder / "result.json"
        return Trial.read(path) if path.is_file() else None

    @property
    def changed(self) -> float:
        """When the result was last written; 0: not yet."""
        path = self.folder / "result.json"
        return path.stat().st_mtime if path.is_file() else 0.0

    def stop(self) -> None:
        """At once, with every worker."""
        if self.job is not None and self.job.state == "running":
            (self.folder / "stopped").touch()
            self.job.kill()


def begin(place: Place, settings: RewardSettings, asked: Asked) -> str:
    """Start a trial; its number. UserError before anything is started for what can be seen from here."""
    source = _source(place, asked)
    folder = _next(place.own("lab"))
    values = settings.model_dump(mode="json", exclude_none=True)
    write_whole(folder / "set.toml", tomli_w.dumps({"rewards": values}))
    write_whole(folder / "asked.json", json.dumps(asked.as_dict()))
    argv = [KIND, *source]
    if asked.source == PASTE:
        write_whole(folder / "samples.jsonl", asked.pasted)
        argv += ["--samples", str(folder / "samples.jsonl")]
    if asked.source == SAMPLE:
        if asked.prompts.strip():
            write_whole(folder / "prompts.jsonl", typed(asked.prompts))
            argv += [f"data.path={json.dumps(str(folder / 'prompts.jsonl'))}", "data.holdout=0"]
        argv += ["--prompts", str(asked.count), "--each", str(asked.each)]
    argv += ["--rewards", str(folder / "set.toml"), "--out", str(folder / "result.json"), *(["--gradients"] if asked.gradients else [])]
    jobs.start(place, KIND, argv, folder.name)
    return folder.name


def _source(place: Place, asked: Asked) -> list[str]:
    """Whose model and data, as options of the command."""
    if asked.source == RUN:
        if not asked.run:
            raise UserError("which run's completions? Pick one")
        return ["--run", str(_run_folder(place, asked.run))]
    if asked.source == PASTE and not asked.pasted.strip():
        raise UserError('there is nothing to score: give lines such as {"prompt": "2 + 2?", "completions": ["4", "5"], "answer": "4"}')
    kind, _, name = asked.base.partition(": ")
    base = ["--config", str(_run_folder(place, name) / "run.toml")] if kind == "run" else ["--preset", name]
    if kind != "run" and name not in presets():
        raise UserError(f"there is no {asked.base or 'base'}: pick one of the list")
    if asked.source == SAMPLE and asked.data.strip() and not asked.prompts.strip():
        path = place.inside(asked.data.strip())
        if not path.is_file():
            raise UserError(f"there is no data file {asked.data.strip()} in {place.root}")
        return [*base, f"data.path={json.dumps(str(path))}"]
    return base


def _run_folder(place: Place, name: str) -> Path:
    folder = place.inside(name)
    if not (folder / "run.toml").is_file():
        raise UserError(f"{name} is no run: it has no run.toml")
    return folder


def typed(text: str) -> str:
    """Prompts as a person types them, as a data file: a line each, JSON objects (with columns for the rewards) as they are.

    >>> typed("hi")
    '{"prompt": [{"role": "user", "content": "hi"}]}\\n'
    """
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            row = json.loads(line)
        except ValueError:
            row = line
        prompt = row if isinstance(row, dict) and "prompt" in row else {"prompt": line}
        if isinstance(prompt["prompt"], str):
            prompt = {**prompt, "prompt": [{"role": "user", "content": prompt["prompt"]}]}
        rows.append(prompt)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def find(place: Place, number: str) -> Tried:
    """UserError if there is none of that number."""
    folder = place.own("lab") / number
    if not number.isdigit() or not folder.is_dir():
        raise UserError(f"there is no trial {number[:40]}: it may have been deleted; try again")
    return Tried(folder, next(iter(jobs.jobs(place, KIND, number)), None))


def settings_in(tried: Tried) -> tuple[list[Item], dict[str, Any]]:
    """The set that a trial was begun with, for the form."""
    values = read_set(str(tried.folder / "set.toml"), tried.folder)["rewards"]
    return from_settings(RewardSettings.model_validate(values))


def asked_in(tried: Tried) -> Asked:
    """Which completions it was begun with."""
    try:
        return Asked(**json.loads((tried.folder / "asked.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return Asked(SAMPLE, "preset: demo")


def _next(where: Path) -> Path:
    number = 1 + max((int(p.name) for p in where.iterdir() if p.name.isdigit()), default=0)
    while True:
        folder = where / f"{number:05d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
