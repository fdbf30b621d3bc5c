"""Lines for a plan: those that travel with the package, those that this machine has found before, or found now."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from localrl.config import Run, preset_folder
from localrl.devices import Kind
from localrl.memory.fit import Mode, Part, shares_prompts
from localrl.memory.lines import Lines
from localrl.memory.reality import store
from localrl.memory.shape import ModelShape
from localrl.memory.work import Work
from localrl.simulate.scratch import tiles

VERSION = 3
"""Counts up when the code that is simulated needs other memory than before; a test compares what travels with what is found."""
NOT_SIZES = ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "architectures", "bos_token_id", "eos_token_id", "pad_token_id",
             "num_hidden_layers", "layer_types", "max_window_layers", "max_position_embeddings", "use_cache", "quantization_config")
"""Parts of a config that change no tensor of one layer."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Simulated:
    """`localrl.memory.fit.Fits`, for the model of one config and the run that is planned."""

    def __init__(self, config: Any, run: Run, dtype: torch.dtype, device: Kind, say: Callable[[str], None] = lambda text: None) -> None:
        """`say` hears when something has to be simulated, which takes seconds."""
        self.config, self.run, self.dtype, self.device, self.say = config, run, dtype, device, say
        self.shape = ModelShape.read(config.to_dict())
        self._known: dict[str, dict[str, Lines]] = {}

    def training(self, work: Work, mode: Mode) -> Mapping[Part, Lines]:
        """Of every part of training that way."""

        def simulate(run: Run) -> dict[str, Lines]:
            from localrl.simulate.fits import training_lines

            return training_lines(_unwindowed(self.config) if within else self.config, run, self.dtype, self.device, mode, depths, row)

        depths = mode.depths(self.shape)
        row, within = self._row(work), bool(self.shape.window and work.longest <= self.shape.window)
        about = {**vars(mode), "reads": _reads(self.run), "optimizer": work.optimizer, **({"row": row} if row else {}), **({"within": True} if within else {})}
        about |= {"directions": work.gradients} if work.gradients else {}
        about |= {"layers": depths[0]} if len(depths) == 1 else {}
        return self._lines(work, "training", about, simulate)  # type: ignore[return-value]

    def rollout(self, work: Work, kv_cache: Literal["full", "int8"]) -> Lines:
        """Of a wave."""

        def simulate(run: Run) -> dict[str, Lines]:
            from localrl.simulate.fits import rollout_lines

            return {"rollout": rollout_lines(self.config, run, self.dtype, self.device, kv_cache, lengths)}

        own = shares_prompts(self.shape, work)
        lengths = None if own else (work.max_prompt_length, work.max_completion_length)
        greedy = self.run.rollout.temperature == 0
        about: dict[str, Any] = {"kv_cache": kv_cache, "unpacked": work.unpacked, "truncated": work.truncated, "own": own, "greedy": greedy}
        about |= {"lengths": lengths} if lengths else {}
        about |= {"layers": 1} if self.shape.layers == 1 else {}
        return self._lines(work, "rollout", about, simulate)["rollout"]

    def _row(self, work: Work) -> int | None:
        """Tokens of a row, where its length decides what attention does and not only how much of it: scores of its own, or a window that is passed."""
        shape = self.shape
        return -(-work.longest // 4) * 4 if shape.eager or (shape.window and work.longest > shape.window) else None

    def _lines(self, work: Work, what: str, about: Mapping[str, Any], simulate: Callable[[Run], dict[str, Lines]]) -> dict[str, Lines]:
        key = self._key(work, what, about)
        if key not in self._known:
            self._known[key] = _read(key) or self._make(key, work, simulate)
        return self._known[key]

    def _make(self, key: str, work: Work, simulate: Callable[[Run], dict[str, Lines]]) -> dict[str, Lines]:
        self.say(f"simulating two layers of this {self.shape.family} once, to know what it needs (a few seconds)")
        lines = simulate(_as_asked(self.run, work))
        _write(key, lines)
        return lines

    def _key(self, work: Work, what: str, about: Mapping[str, Any]) -> str:
        told = {
            "model": self._model, "what": what, "about": dict(about), "quantization": work.quantization, "dtype": str(self.dtype), "device": self.device,
            "r": work.lora_r, "targets": sorted(set(_targets(work))), "critic": work.critic, "version": VERSION,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]

    @cached_property
    def _model(self) -> str:
        """What decides a layer's tensors, as text."""
        known = {name: value for name, value in self.config.to_dict().items() if name not in NOT_SIZES}
        return json.dumps(known, sort_keys=True, default=str)


def shipped() -> Path:
    """Lines that travel with the presets, so that their models are planned at once."""
    return preset_folder() / "lines"


def _unwindowed(config: Any) -> Any:
    """The model as it is for rows that its window is never too short for: those that are simulated may be longer."""
    config = copy.deepcopy(config)
    config.get_text_config().sliding_window = 2**30
    return config


def _reads(run: Run) -> list[list[str]]:
    """What training keeps of a pass: columns read before learning, then those of each reading. Algorithms that read the same need the same, to 0.01 %;
    an entropy or a log-sum-exp rides along with the log-probability."""
    algorithm = run.algorithm.for_sampler(exact=run.own_samples)
    return [sorted(set(columns or {"logp"}) - {"entropy", "lse"}) for columns in (algorithm.reads_before, *algorithm.readings)]


def _targets(work: Work) -> tuple[str, ...]:
    return (work.lora_targets,) if isinstance(work.lora_targets, str) else work.lora_targets


def _as_asked(run: Run, work: Work) -> Run:
    """The run with what a plan may have changed."""
    return run.model_copy(update={
        "model": run.model.model_copy(update={"quantization": work.quantization}),
        "optim": run.optim.model_copy(update={"optimizer": work.optimizer}),
        "adapter": run.adapter.model_copy(update={"lora_r": work.lora_r, "lora_target_modules": work.lora_targets}),
        "rollout": run.rollout.model_copy(update={"weights": "unpacked" if work.unpacked else "live"}),
    })  # fmt: skip


@cache
def _libraries() -> str:
    """Their minor versions, which decide what tensors there are, and whether this processor has tiles, in a few letters."""
    told = {name: ".".join(version(name).split("+")[0].split(".")[:2]) for name in LIBRARIES} | {"tiles": str(tiles(torch.bfloat16))}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _found(key: str) -> Path:
    """Where this machine keeps lines, by the libraries that they were found with."""
    return store().parent / "lines" / f"{key}-{_libraries()}.json"


def _read(key: str) -> dict[str, Lines] | None:
    """What was found here, else what travels: the tests see that it fits newer libraries too. A file that is damaged counts as none."""
    for file in (_found(key), shipped() / f"{key}.json"):
        try:
            values = json.loads(file.read_text("utf-8"))
            return {name: Lines.from_dict(lines) for name, lines in values.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return None


def _write(key: str, lines: Mapping[str, Lines]) -> None:
    """Whole or not at all; a folder that cannot be written to only costs the next plan some seconds."""
    place = _found(key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump({name: part.to_dict() for name, part in lines.items()}, file)
        os.replace(file.name, place)
    except OSError:
        return
