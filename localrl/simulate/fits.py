"""The peaks of a whole model from simulations of two and three layers of it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from localrl.config import Run
from localrl.devices import Kind
from localrl.memory.fit import Mode, pass_variables, wave_variables
from localrl.memory.lines import Feature, Lines, Variables
from localrl.simulate.counter import Event
from localrl.simulate.phases import Pass, Rehearsal, WaveOf
from localrl.simulate.solve import lines_of, straight

TRAINING: tuple[Feature, ...] = ((), ("layers",), ("tokens",), ("layers", "tokens"), ("read",), ("chunk",), ("normed",))
"""`tokens` of a micro-batch, those `read` by the output layer among them, `chunk` of the output layer, and tokens that are `normed` at a time."""
TILED: tuple[Feature, ...] = (("tile",),)
"""Of the MLP."""
LASTING: tuple[Feature, ...] = ((), ("layers",))
ROLLOUT: tuple[Feature, ...] = (
    (), ("at once",), ("prompts", "prompt"), ("prompts",), ("rows",), ("rows", "prompt"), ("rows", "joined"), ("rows", "response"), ("longest",),
    ("layers",), ("layers", "prompts", "prompt"), ("layers", "rows"), ("layers", "rows", "joined"), ("layers", "rows", "response"),
)  # fmt: skip
OWN_FORWARD: tuple[Feature, ...] = (
    (), ("prompts", "prompt"), ("prompts",), ("rows",), ("rows", "prompt"), ("rows", "response"), ("longest",), ("layers",), ("layers", "rows"),
    ("layers", "rows", "longest"), ("layers", "prompts", "prompt"), ("rows", "seen"), ("layers", "rows", "seen"),
)  # fmt: skip
"""Through a model's own forward pass, which lets layers with a window forget."""
Points = list[tuple[Variables, list[Event]]]


def training_lines(config: Any, run: Run, dtype: torch.dtype, device: Kind, mode: Mode, length: int | None) -> dict[str, Lines]:
    """Peaks of scoring, backward and the optimiser's step, and what lasts. `length`: of a row, where it decides what is done."""
    few, more = (4, 5) if mode.offload else (2, 3)                  # inputs on their way: the first layers are not like the others
    base: dict[str, int] = {"layers": few, "tokens": 1024, "read": 256, "chunk": 128, "tile": 512 if mode.tiled else 0}
    changes: list[dict[str, int]] = [{}, {"layers": more}, {"tokens": 1536}, {"layers": more, "tokens": 1536}, {"read": 384}, {"chunk": 192, "read": 384},
                                     {"tokens": 384, "tile": 192 if mode.tiled else 0}]
    changes += [{"tile": 768, "tokens": 1536}] if mode.tiled else []
    rehearsals = {layers: _ready(config, run, dtype, device, mode, layers) for layers in (few, more)}
    points: dict[str, Points] = {"scoring": [], "backward": []}
    columns = rehearsals[few].algorithm.reads_before or frozenset({"logp"})
    for change in changes:
        point = {**base, **change}
        rehearsal = rehearsals[point["layers"]]
        rehearsal.counter.skips = True
        rehearsal.turn(head_chunk=point["chunk"], mlp_tile=point["tile"])
        work = Pass(2, (point["tokens"] - point["read"]) // 2, point["read"] // 2)
        at = pass_variables(point["layers"], point["tokens"], point["read"], point["chunk"], point["tile"])
        points["scoring"].append((at, rehearsal.scoring(work, columns).events))
        points["backward"].append((at, rehearsal.backward(work).events))
    features = TRAINING + TILED if mode.tiled else TRAINING
    lines = {name: lines_of(found, features, partial(_any_pass, tiled=mode.tiled)) for name, found in points.items()}
    updates = [({"layers": layers}, rehearsal.update().peak) for layers, rehearsal in rehearsals.items()]
    lasting = {
        "loaded": [({"layers": layers}, rehearsal.loaded) for layers, rehearsal in rehearsals.items()],
        "kept": [({"layers": layers}, rehearsal.kept) for layers, rehearsal in rehearsals.items()],
        "gradients": [({"layers": layers}, rehearsal.gradients) for layers, rehearsal in rehearsals.items()],
        "optimiser": updates,
    }
    return lines | {name: straight(found, LASTING) for name, found in lasting.items()}


def _ready(config: Any, run: Run, dtype: torch.dtype, device: Kind, mode: Mode, layers: int) -> Rehearsal:
    rehearsal = Rehearsal(cut(config, layers), run, dtype, device, checkpointing=mode.gradient_checkpointing, offload=mode.offload)
    rehearsal.make_gradients()
    return rehearsal


def _any_pass(draw: np.random.Generator, tiled: bool) -> Variables:
    tokens = int(np.exp(draw.uniform(np.log(64), np.log(300_000))))
    read = max(1, int(tokens * draw.uniform(0.02, 1)))
    return pass_variables(int(draw.integers(2, 120)), tokens, read, 2 ** int(draw.integers(4, 12)), 2 ** int(draw.integers(8, 14)) if tiled else 0)


def rollout_lines(config: Any, run: Run, dtype: torch.dtype, device: Kind, kv_cache: Literal["full", "int8"], own: bool) -> Lines:
    """Peaks of a wave. `own`: by the engine's own decoder."""
    rehearsals = {layers: Rehearsal(cut(config, layers), run, dtype, device, checkpointing=True) for layers in (2, 3)}
    vocab, window = config.get_text_config().vocab_size, getattr(config.get_text_config(), "sliding_window", None)
    draw, features = np.random.default_rng(1), ROLLOUT if own else OWN_FORWARD
    points: Points = []
    while len(points) < len(features) + 5:
        prompts, each = int(draw.integers(1, 7)), int(draw.integers(1, 9))
        prompt, response = (int(np.exp(draw.uniform(np.log(40), np.log(4000)))) for _ in range(2))
        wave = WaveOf(prompts * each, prompts, prompt, response)
        layers = 2 + len(points) % 2
        variables = wave_variables(layers, vocab, wave.rows, prompts, prompt, response, window)
        points.append((variables, rehearsals[layers].rollout(wave, kv_cache).events))

    def box(draw: np.random.Generator) -> Variables:
        prompts, each = int(draw.integers(1, 64)), int(draw.integers(1, 64))
        prompt, response = (int(np.exp(draw.uniform(np.log(16), np.log(40_000)))) for _ in range(2))
        return wave_variables(int(draw.integers(2, 120)), vocab, prompts * each, prompts, prompt, response, window)

    return lines_of(points, features, box)


def cut(config: Any, layers: int) -> Any:
    """The same model with fewer layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        kinds = list(config.layer_types)
        config.layer_types = (kinds * layers)[:layers]
    return config
