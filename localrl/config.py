"""`Run`: the one declaration behind presets, command line, UI and Python. Frozen, closed, dumped whole into the run folder."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.data import DataSettings
from localrl.rewards import RewardSettings
from localrl.rewards.sets import read_set
from localrl.sections import (
    AdapterSettings,
    EvalSettings,
    ExportSettings,
    LogSettings,
    MemorySettings,
    ModelSettings,
    OptimSettings,
    ReplaySettings,
    RolloutSettings,
    SearchSettings,
)
from localrl.settings import Settings, UserError, explain, nearest

if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
else:
    AnyAlgorithm = Annotated[Union[tuple(ALGORITHMS.values())], Field(discriminator="name")]  # noqa: UP007  (built from what was found)


class Run(Settings):
    """Everything that decides a run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Short name: of the run folder and of exported files."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of sampling, data order and adapter initialisation."""
    steps: int = Field(100, ge=1)
    """Steps: sample, score, update."""
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings
    rewards: RewardSettings
    algorithm: AnyAlgorithm
    rollout: RolloutSettings = RolloutSettings()
    replay: ReplaySettings = ReplaySettings()
    search: SearchSettings = SearchSettings()
    optim: OptimSettings = OptimSettings()
    memory: MemorySettings = MemorySettings()
    eval: EvalSettings = EvalSettings()
    export: ExportSettings = ExportSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        least = self.algorithm.group_size
        if self.rollout.num_generations < least:
            raise ValueError(
                f"rollout.num_generations={self.rollout.num_generations} but {self.algorithm.name} compares rollouts of one prompt: at least {least}"
            )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature=0 samples the same response every time, nothing can be learned: above 0, 1.0 is usual")
        if not self.rewards.functions and not self.data.from_log:
            raise ValueError("rewards.functions is empty: name at least one, e.g. [[rewards.functions]] function = \"exact_answer\"")
        self._check_sources()
        return self

    @property
    def own_samples(self) -> bool:
        """Every step learns from rollouts of the policy as it is at that step."""
        return not (self.replay.capacity or self.search.processes or self.data.from_log)

    def _check_sources(self) -> None:
        """Where rollouts come from, and whether the algorithm may learn from them."""
        name, window, algorithm = self.algorithm.name, self.rollout.window, self.algorithm
        if window and not algorithm.learns_from_unfinished:
            raise ValueError(f"rollout.window={window} but {name} needs finished responses: leave it out, or take {_those('learns_from_unfinished')}")
        if objection := algorithm.objection(window, len(self.rewards.functions)):
            raise ValueError(objection)
        if not window and algorithm.needs_window:
            raise ValueError(f"algorithm.name={name} learns window by window: set rollout.window, a quarter of max_completion_length is usual")
        if window and self.replay.capacity:
            raise ValueError(f"rollout.window={window} and replay.capacity={self.replay.capacity}: a response that grows cannot be kept for replay, "
                             "leave one of them out")
        if lost := [condition.reward for condition in self.replay.filters if condition.reward not in self.rewards.names]:
            raise ValueError(f"replay.filters: there is no reward '{lost[0]}': {nearest(lost[0], self.rewards.names)}")
        if self.search.processes and not self.replay.capacity:
            raise ValueError(f"search.processes={self.search.processes} needs somewhere to keep what the searchers find: set replay.capacity")
        if self.rollout.dynamic_sampling:
            taken = {"rollout.window": window, "replay.capacity": self.replay.capacity, "data.from_log": self.data.from_log}
            if other := next((key for key, value in taken.items() if value), None):
                raise ValueError(f"rollout.dynamic_sampling replaces groups of this step's own samples: it does not go with {other}, leave one of them out")
            if self.rollout.num_generations < 2:
                raise ValueError("rollout.dynamic_sampling compares rollouts of one prompt: rollout.num_generations must be at least 2")
        if self.data.from_log and (other := next((k for k, v in {"replay.capacity": self.replay.capacity, "rollout.window": window}.items() if v), None)):
            raise ValueError(f"data.from_log samples nothing, so that {other} has no meaning: leave it out")
        if self.data.from_log and not algorithm.learns_from_old:
            raise ValueError(f"data.from_log: {name} learns from its own samples only; for logs take {_those('learns_from_old')}")
        if self.rollout.engine != "torch" and not algorithm.learns_from_old and not algorithm.for_sampler(exact=False).corrects:
            raise ValueError(f"rollout.engine='{self.rollout.engine}' samples from a rounded copy, which {name} takes for the policy: "
                             f"take rollout.engine='torch', or {_those('learns_from_old')}")
        if not self.own_samples and not algorithm.learns_from_old and not algorithm.corrects:
            raise ValueError(f"replay.capacity={self.replay.capacity} hands {name} rollouts of older policies, which it takes for its own: "
                             f"leave it out, or take {_those('learns_from_old')}")

    def dump(self) -> str:
        """The whole of it as TOML, every default spelled out. What is unset (None) is left out: TOML has no null."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _those(what: str) -> str:
    """Algorithms that declare something, for hints."""
    return " or ".join(name for name, kind in ALGORITHMS.items() if getattr(kind, what))


def load_run(preset: str | None = None, config: Path | None = None, overrides: Sequence[str] = (), rewards: str | None = None) -> Run:
    """Preset, then file, then a set of rewards (its name, or its file), then overrides ("rollout.temperature=0.8"), each on top of the one before.

    Raises UserError for an unknown preset, file, set or key (with the nearest valid one) or a value out of its bounds.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        values = _merge(values, _read_toml(preset_path(preset)))
    if config is not None:
        values = _merge(values, _read_toml(config))
    if rewards is not None:
        values = _merge(values, read_set(rewards, Path.cwd()))
    above: dict[str, Any] = {}
    for line in overrides:                                          # first with each other, so that their order does not matter
        above = _merge(above, parse_override(line))
    return build(_merge(values, above))


def build(values: dict[str, Any]) -> Run:
    """A `Run` from plain values, or one sentence about what is wrong with them."""
    kind = (values.get("algorithm") or {}).get("name")
    if kind is not None and kind not in ALGORITHMS:
        raise UserError(f"algorithm.name = '{kind}': {nearest(str(kind), ALGORITHMS)}")
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, known_keys(kind), frozenset({kind} if kind else ()))) from None


def parse_override(line: str) -> dict[str, Any]:
    """One line of TOML; a bare word is taken as a string, because shells eat quotes.

    >>> parse_override("rollout.temperature=0.8"), parse_override("algorithm.name=gdpo")
    ({'rollout': {'temperature': 0.8}}, {'algorithm': {'name': 'gdpo'}})
    """
    key, found, value = line.partition("=")
    if not found or not re.fullmatch(r"\s*[A-Za-z_][\w.-]*\s*", key):
        raise UserError(f"'{line}' is no setting: write section.key=value, for example rollout.temperature=0.8")
    try:
        return tomllib.loads(line)
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"\s*[^\s\"'\[\]{}#]+\s*", value):
            return tomllib.loads(f"{key} = '{value.strip()}'")
        raise UserError(f"'{line}' is no line of TOML ({error}): strings with blanks need quotes, as in '{key.strip()}=\"two words\"'") from None


def preset_folder() -> Path:
    """Presets lie inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "presets"


def presets() -> dict[str, Path]:
    """Every preset by name."""
    return {path.stem: path for path in sorted(preset_folder().glob("*.toml"))}


def preset_model_config(path: str) -> Path | None:
    """The `config.json` of a preset's model, which travels with the presets so that a plan needs no network. None: not one of them."""
    file = preset_folder() / "models" / f"{path.replace('/', '--')}.json"
    return file if file.is_file() else None


def preset_path(name: str) -> Path:
    """Where a preset lies, or a UserError with the nearest name."""
    found = presets()
    if name not in found:
        raise UserError(f"no preset '{name}': {nearest(name, found)}")
    return found[name]


def known_keys(algorithm: str | None = None) -> dict[str, list[str]]:
    """Dotted section -> its keys, for hints; '' is the top."""
    known: dict[str, list[str]] = {}

    def walk(kind: type[BaseModel], place: str) -> None:
        known[place] = list(kind.model_fields)
        for name, item in kind.model_fields.items():
            inner = next(iter(get_args(item.annotation)), item.annotation) if get_origin(item.annotation) is tuple else item.annotation
            if name == "algorithm" and not place:
                inner = ALGORITHMS.get(algorithm or "")
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                walk(inner, f"{place}.{name}".lstrip("."))

    walk(Run, "")
    return known


def settings_table() -> list[tuple[str, str, str]]:
    """(key, default, help) of every setting, every algorithm's own ones included, in the schema's order."""
    rows: list[tuple[str, str, str]] = []

    def walk(kind: type[BaseModel], place: str, note: str = "") -> None:
        for name, item in kind.model_fields.items():
            inner = item.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and name != "algorithm":
                walk(inner, f"{place}{name}.")
            elif name == "algorithm":
                for chosen, algorithm in ALGORITHMS.items():
                    walk(algorithm, "algorithm.", f" ({chosen})")
            else:
                default = "" if item.is_required() or item.default is None else str(item.default)
                rows.append((f"{place}{name}", default, " ".join((item.description or "").split()) + note))

    walk(Run, "")
    return rows


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid TOML: {error}") from None


OF_ONE_DATA_SET = ("subset", "split", "eval_path", "eval_split", "rename", "prompt_column")
"""What describes one data file: another `data.path` starts these afresh."""


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Section by section, the upper value wins. Another algorithm, or another data file, does not inherit what was said of the old one."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if key == "algorithm" and "name" in old and value.get("name", old["name"]) != old["name"]:
                old = {}
            if key == "data" and "path" in old and value.get("path", old["path"]) != old["path"]:
                old = {k: v for k, v in old.items() if k not in OF_ONE_DATA_SET}
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value
