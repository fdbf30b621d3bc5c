"""The peaks of a whole model from simulations of two and three layers of it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from localrl.config import Run
from localrl.devices import Kind
from localrl.memory.fit import NORM_TOKENS, SAMPLED_AT_ONCE, Mode, pass_variables, wave_variables
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
    (), ("at once",), ("prompts", "prompt"), ("prompts",), ("rows",), ("rows", "prompt"), ("rows", "joined"), ("rows", "response"), ("longest",), ("staying",),
    ("staying", "joined"), ("layers",), ("layers", "prompts", "prompt"), ("layers", "rows"), ("layers", "rows", "joined"), ("layers", "rows", "response"),
    ("sampled",),
)  # fmt: skip
OWN_FORWARD: tuple[Feature, ...] = (
    (), ("rows",), ("prompts",), ("sampled",), ("full",), ("full", "rows"), ("full", "prompts"), ("windowed",), ("windowed", "rows"), ("windowed", "prompts"),
)  # fmt: skip
"""Through a model's own forward pass, for prompts and responses of given lengths: masks grow with their square, windows forget."""
LAYERED = {"layers", "full", "windowed"}
Points = list[tuple[Variables, list[Event]]]


def training_lines(
    config: Any, run: Run, dtype: torch.dtype, device: Kind, mode: Mode, depths: tuple[int, ...], row: int | None = None
) -> dict[str, Lines]:
    """Peaks of scoring, backward and the optimiser's step, and what lasts. `depths`: layers of the models that are simulated (`Mode.depths`); `row`:
    tokens of every row, a multiple of 4, where that decides what is done.

    Scoring and backward are counted with gradients there, "first" is a backward pass that makes them."""
    changes = _design(depths, mode.tiled, row)
    rehearsals = {layers: _ready(config, run, dtype, device, mode, layers) for layers in depths}
    points: dict[str, Points] = {"scoring": [], "backward": [], "first": []}
    columns = rehearsals[depths[0]].algorithm.reads_before or frozenset({"logp"})
    for point in changes:
        rehearsal = rehearsals[point["layers"]]
        rehearsal.counter.skips = True
        rehearsal.turn(head_chunk=point["chunk"], mlp_tile=point["tile"])
        rows = point["tokens"] // row if row else 2
        work = Pass(rows, (point["tokens"] - point["read"]) // rows, point["read"] // rows)
        at = pass_variables(point["layers"], point["tokens"], point["read"], point["chunk"], point["tile"])
        points["scoring"].append((at, rehearsal.scoring(work, columns).events))
        points["backward"].append((at, rehearsal.backward(work).events))
        points["first"].append((at, [event._replace(live=event.live - event.owed) for event in points["backward"][-1][1]]))
    deep = len(depths) > 1
    features = tuple(feature for feature in TRAINING + TILED * mode.tiled if deep or "layers" not in feature)
    lines = {name: lines_of(found, features, partial(_any_pass, tiled=mode.tiled)) for name, found in points.items()}
    updates = [({"layers": layers}, rehearsal.update().peak) for layers, rehearsal in rehearsals.items()]
    lasting = {
        "loaded": [({"layers": layers}, rehearsal.loaded) for layers, rehearsal in rehearsals.items()],
        "tried": [({"layers": layers}, rehearsal.tried) for layers, rehearsal in rehearsals.items()],
        "kept": [({"layers": layers}, rehearsal.kept) for layers, rehearsal in rehearsals.items()],
        "gradients": [({"layers": layers}, rehearsal.gradients) for layers, rehearsal in rehearsals.items()],
        "optimiser": updates,
    }
    return lines | {name: straight(found, LASTING[: len(depths)]) for name, found in lasting.items()}


def _design(depths: tuple[int, ...], tiled: bool, row: int | None) -> list[dict[str, int]]:
    """Passes that differ in one thing at a time. All tiles and chunks are of one size, and two rows of each pass as long as asked."""
    few, *more = depths
    unit, rest = (row, row // 4) if row else (256, 64)
    base = {"layers": few, "tokens": 4 * unit, "read": 4 * rest, "chunk": 2 * rest, "tile": 2 * unit if tiled else 0}
    short = 3 * unit // 2 if not row else unit if 2 * unit > NORM_TOKENS else 2 * unit      # fewer than a norm takes at a time, if rows can be
    few_tokens = {"tokens": short, "read": 4 * rest, "tile": short // 2 if tiled else 0}
    longer = {"tokens": 6 * unit, "read": 6 * rest}
    changes: list[dict[str, int]] = [{}, longer, {"read": 8 * rest}, {"chunk": 4 * rest, "read": 8 * rest}, few_tokens]
    changes += [{"layers": layers, **change} for layers in more for change in ({}, longer)]
    changes += [{"tile": 3 * unit, **longer}] if tiled else []
    return [{**base, **change} for change in changes]


def _ready(config: Any, run: Run, dtype: torch.dtype, device: Kind, mode: Mode, layers: int) -> Rehearsal:
    rehearsal = Rehearsal(cut(config, layers), run, dtype, device, checkpointing=mode.gradient_checkpointing, offload=mode.offload)
    rehearsal.make_gradients()
    return rehearsal


def _any_pass(draw: np.random.Generator, tiled: bool) -> Variables:
    tokens = _any(draw, 8, 300_000)
    read = max(1, int(tokens * draw.uniform(0.02, 1)))
    return pass_variables(_any(draw, 1, 120), tokens, read, 2 ** int(draw.integers(0, 12)), 2 ** int(draw.integers(4, 14)) if tiled else 0)


def _any(draw: np.random.Generator, low: int, high: int) -> int:
    """Small ones as often as large ones: each of the lines is the largest somewhere, some of them only where there is little to do."""
    return round(float(np.exp(draw.uniform(np.log(low), np.log(high)))))


def rollout_lines(
    config: Any, run: Run, dtype: torch.dtype, device: Kind, kv_cache: Literal["full", "int8"], lengths: tuple[int, int] | None = None
) -> Lines:
    """Peaks of a wave. `lengths`: of prompts and responses, through the model's own forward pass; None: any, by the engine's own decoder."""
    vocab, window = config.get_text_config().vocab_size, getattr(config.get_text_config(), "sliding_window", None)
    kinds = _layer_counts(config) if lengths else ((2, 0), (3, 0))
    if config.get_text_config().num_hidden_layers == 1:              # as it is: its first layer is its last
        kinds = ((min(1, kinds[0][0]), min(1, kinds[0][1])),)
    features = tuple(f for f in OWN_FORWARD if _told(f, kinds)) if lengths else ROLLOUT
    features = tuple(f for f in features if len(kinds) > 1 or not LAYERED & set(f))
    rehearsals = {kind: Rehearsal(cut(config, sum(kind), kind[1] if lengths else None), run, dtype, device, checkpointing=True) for kind in kinds}
    with_layers, draw = sum(bool(LAYERED & set(feature)) for feature in features), np.random.default_rng(1)
    waves = [_a_wave(draw, vocab if number < 2 else None, lengths) for number in range(len(features) - with_layers + 1)]
    points: Points = []
    for kind in kinds:
        rehearsal = rehearsals[kind]
        state = rehearsal.kept - rehearsal.loaded                    # of the optimiser: no part of a wave
        for wave in waves if kind == kinds[0] else waves[: with_layers + 1]:
            events = [event._replace(live=event.live - state) for event in rehearsal.rollout(wave, kv_cache).events]
            variables = wave_variables(sum(kind), vocab, wave.rows, wave.prompts, wave.prompt, wave.response, window, device, kind[1])
            points.append((variables, events))

    def box(draw: np.random.Generator) -> Variables:
        prompts, each = _any(draw, 1, 64), _any(draw, 1, 64)
        prompt, response = lengths or (_any(draw, 1, 40_000), _any(draw, 1, 40_000))
        full, windowed = (_any(draw, 1, 120) if any(kind[i] for kind in kinds) else 0 for i in (0, 1))
        return wave_variables(full + windowed, vocab, prompts * each, prompts, prompt, response, window, device, windowed)

    return lines_of(points, features, box)


def _layer_counts(config: Any) -> tuple[tuple[int, int], ...]:
    """(full, windowed) layers of the models that are simulated: of each kind that the config has, once two and once three."""
    text = config.get_text_config()
    kinds = {name == "sliding_attention" for name in getattr(text, "layer_types", None) or [""]}
    if kinds == {False} and getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None):
        kinds = {True}                                               # no list of kinds: all layers have the window
    return ((1, 1), (2, 1), (1, 2)) if len(kinds) > 1 else ((0, 2), (0, 3)) if True in kinds else ((2, 0), (3, 0))


def _told(feature: Feature, kinds: tuple[tuple[int, int], ...]) -> bool:
    """Whether there are layers of the kind that it speaks of."""
    return all(any(kind[i] for kind in kinds) for i, name in enumerate(("full", "windowed")) if name in feature)


def _a_wave(draw: np.random.Generator, vocab: int | None, lengths: tuple[int, int] | None) -> WaveOf:
    """Groups of two at least: one row for each prompt does less. `vocab`: of more rows than are sampled at once."""
    prompts, each = int(draw.integers(2 if lengths else 1, 5)), int(draw.integers(2, 9))
    each += min(2048, SAMPLED_AT_ONCE // vocab) // prompts if vocab else 0
    prompt, response = lengths or (_any(draw, 40, 4000), _any(draw, 40, 4000))
    return WaveOf(prompts * each, prompts, prompt, response)


def cut(config: Any, layers: int, windowed: int | None = None) -> Any:
    """The same model with fewer layers; of two kinds, all but the last are windowed, or as many as told."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "no_rope_layers", None):                      # an entry for every layer
        config.no_rope_layers = (list(config.no_rope_layers) * layers)[:layers]
    if kinds := getattr(config, "layer_types", None):
        count = (layers - 1 if len(set(kinds)) > 1 else layers * ("sliding_attention" in kinds)) if windowed is None else windowed
        full = next((kind for kind in kinds if kind != "sliding_attention"), "full_attention")
        config.layer_types = ["sliding_attention"] * count + [full] * (layers - count)
    return config
