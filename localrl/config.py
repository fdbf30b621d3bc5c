"""`Run`: the one declaration behind presets, command line, UI and Python. Frozen, closed, dumped whole into the run folder."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Algorithm
from localrl.data import DataSettings
from localrl.rewards import RewardSettings
from localrl.settings import Settings, UserError, explain, nearest

if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
else:
    AnyAlgorithm = Annotated[Union[tuple(ALGORITHMS.values())], Field(discriminator="name")]  # noqa: UP007  (built from what was found)


class ModelSettings(Settings):
    """Which model learns, and in which form its frozen weights are held."""

    path: str = "demo"
    """A local folder, a hub id ("Qwen/Qwen3-4B"), or "demo" for the embedded one."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """Of the frozen base: nf4 (4 bit, double quantisation), int8 (LLM.int8), none."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and of what is not quantised. auto: bfloat16 on a GPU that has it, float32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train. auto: the GPU if there is one."""


class AdapterSettings(Settings):
    """The LoRA adapter, the only thing that learns. Always held in float32."""

    lora_r: int = Field(16, ge=1, le=1024)
    """Rank."""
    lora_alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one; all-linear: every one but the output layer."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA)."""
    lora_dropout: float = 0.0
    """Must be 0: with dropout, the log-probabilities of sampling and of learning are not those of one policy."""

    @field_validator("lora_dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("must be 0: with dropout the sampled policy and the trained one differ; leave it out")
        return value


class RolloutSettings(Settings):
    """How responses are sampled."""

    prompts_per_step: int = Field(8, ge=1)
    """Prompts of one step."""
    num_generations: int = Field(8, ge=1)
    """Rollouts of each prompt: the group."""
    max_completion_length: int = Field(256, ge=1)
    """Longest response, tokens."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Of sampling, and of the log-probabilities that are trained. 0 (greedy) is for evaluation only."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1: off. Truncation makes the sampled policy differ from the trained one."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0: off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, beside the model's own end tokens."""
    concurrent: int | None = Field(None, ge=1)
    """Most sequences decoded at once; unset: what the memory plan finds."""
    window: int | None = Field(None, ge=1)
    """Most tokens that a response grows by in one step; an unfinished one goes on in the next, a finished one makes room. Unset: whole responses."""
    dynamic_sampling: bool = False
    """Sample on until prompts_per_step groups are together whose rewards differ within the group (DAPO)."""
    max_resamples: int = Field(4, ge=0)
    """Most additional rounds of dynamic_sampling; after that the step makes do with what there is."""
    weights: Literal["auto", "live", "unpacked"] = "auto"
    """live: decode with the quantised layers. unpacked: with a scratch copy of the very same weights, freed before learning (faster on a CPU)."""


class ReplayFilter(Settings):
    """A condition on a reward."""

    reward: str = Field(min_length=1)
    """The reward's name."""
    at_least: float = 0.0
    """A rollout with less, or without this reward, is not kept."""


class ReplaySettings(Settings):
    """Learning from rollouts more than once, and from those of older policies. Nothing of it is on while `capacity` is 0."""

    capacity: int = Field(0, ge=0)
    """Rollouts kept of each prompt, the newest ones. 0: each rollout is learned from once, in the step that sampled it."""
    recent: float = Field(0.5, ge=0, le=1)
    """Share of the drawn groups that take the newest rollouts of a prompt which was just sampled; the others draw from all that is kept."""
    draw: Literal["reward", "uniform"] = "reward"
    """How rollouts of the others are drawn: likelier the higher their reward, or all alike."""
    inverse_temperature: float = Field(1.0, ge=0)
    """reward: a rollout's probability is proportional to exp(inverse_temperature * total reward)."""
    sync_every: int = Field(1, ge=1)
    """Updates between two times that the sampler gets the policy's weights."""
    max_staleness: int | None = Field(None, ge=0)
    """Rollouts older than this many updates are dropped. Unset: age does not matter."""
    prefill: int = Field(0, ge=0)
    """Rollouts that must be there before the first update."""
    filters: tuple[ReplayFilter, ...] = ()
    """What a rollout must have to be kept, for instance [{ reward = "safe", at_least = 1.0 }]."""


class SearchSettings(Settings):
    """Sampling in processes of its own, beside the trainer."""

    processes: int = Field(0, ge=0, le=64)
    """Searchers: each loads a copy of the model and samples while the trainer learns. 0: the trainer samples and learns in turn."""
    threads: int = Field(1, ge=1)
    """Threads of each searcher, on a CPU."""
    ahead: int = Field(2, ge=1)
    """Most steps' worth of requests under way at once: the trainer waits when there are more."""
    restarts: int = Field(3, ge=0)
    """How often a searcher that died is started again before the run gives up."""


class OptimSettings(Settings):
    """How the adapter is updated."""

    learning_rate: float = Field(2e-5, gt=0, le=1)
    """LoRA wants 1e-5 to 5e-5 on real models: at 1e-6 hardly a weight moves."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """adamw is torch's; the others are bitsandbytes'."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient is scaled down to this norm."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to 0 at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    critic_learning_rate: float | None = Field(None, gt=0, le=1)
    """Of the critic, where the algorithm has one. Unset: the same as learning_rate."""
    num_iterations: int = Field(1, ge=1, le=64)
    """Updates on each step's rollouts. Above 1, old log-probabilities are read first (one more forward pass)."""


class MemorySettings(Settings):
    """What the memory plan may use, and knobs that you would rather set yourself. Unset: the plan chooses."""

    card: str | None = None
    """"16GiB", or a card's name ("RTX 4080"); unset: what this machine has."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens (prompt and response, padding included) of one forward and backward pass."""
    gradient_checkpointing: bool | None = None
    """Keep only each layer's input and compute the rest again in the backward pass."""
    head_chunk: int | None = Field(None, ge=1)
    """Tokens whose logits exist at the same time."""
    directions: Literal["auto", "float32", "bfloat16", "int8", "two_pass", "lagged"] = "auto"
    """How the gradients of several directions are kept, where the algorithm steers between them: whole, in blocks of 8 bits, or only their
    sketches (two_pass: a second backward pass applies the weights; lagged: the last step's weights apply). auto: what costs at most 10 % of the peak."""


class EvalSettings(Settings):
    """Held-out evaluation."""

    every: int = Field(0, ge=0)
    """Steps between two evaluations; there is always one before and one after. 0: only those."""
    num_generations: int = Field(4, ge=1)
    """Responses to each held-out prompt (pass@k up to this k)."""
    limit: int = Field(64, ge=0)
    """Most held-out prompts used. 0: no evaluation."""
    temperature: float = Field(1.0, ge=0, le=5)
    """0: greedy, one response."""


class LogSettings(Settings):
    """The run folder."""

    dir: str | None = None
    """Where everything of this run goes; unset: runs/<name>-<number>."""
    save_steps: int = Field(25, ge=1)
    """Steps between two checkpoints."""
    save_total_limit: int = Field(3, ge=1)
    """Checkpoints kept, the newest ones."""
    completions: bool = True
    """Keep every step's completions with their rewards."""


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
        if not self.own_samples and not algorithm.learns_from_old and not algorithm.corrects:
            raise ValueError(f"replay.capacity={self.replay.capacity} hands {name} rollouts of older policies, which it takes for its own: "
                             f"leave it out, or take {_those('learns_from_old')}")

    def dump(self) -> str:
        """The whole of it as TOML, every default spelled out. What is unset (None) is left out: TOML has no null."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _those(what: str) -> str:
    """Algorithms that declare something, for hints."""
    return " or ".join(name for name, kind in ALGORITHMS.items() if getattr(kind, what))


def load_run(preset: str | None = None, config: Path | None = None, overrides: Sequence[str] = ()) -> Run:
    """Preset, then file, then overrides ("rollout.temperature=0.8"), each on top of the one before.

    Raises UserError for an unknown preset, file or key (with the nearest valid one) or a value out of its bounds.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        values = _merge(values, _read_toml(preset_path(preset)))
    if config is not None:
        values = _merge(values, _read_toml(config))
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
