"""Optimisers by name, the learning rate as a function of the step, and optimiser state that travels without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from localrl.sections import OptimSettings
from localrl.settings import UserError

NamedParameters = list[tuple[str, nn.Parameter]]


def make_optimizer(settings: OptimSettings, groups: Iterable[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW as the settings name it: torch's, or bitsandbytes' with 8-bit or paged state. One parameter group for each of `groups`."""
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    optimizer = kinds[settings.optimizer]([{"params": group} for group in groups], **common)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """At `step` (from 0) of `steps`: a linear warm-up, then constant, linear or cosine down to 0.

    >>> [learning_rate(OptimSettings(learning_rate=1.0, warmup_steps=2, lr_scheduler_type="linear"), s, 6) for s in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.learning_rate * factor[settings.lr_scheduler_type]


def state_tensors(optimizer: torch.optim.Optimizer, named: NamedParameters) -> dict[str, Tensor]:
    """Everything the optimiser remembers as flat tensors, "<parameter>|<entry>"; plain numbers become tensors of no dimension."""
    flat = {}
    for name, parameter in named:
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor | int | float):
                flat[f"{name}|{entry}"] = value.detach().cpu().contiguous().clone() if isinstance(value, Tensor) else torch.tensor(value)
    return flat


def restore_state(optimizer: torch.optim.Optimizer, named: NamedParameters, flat: dict[str, Tensor]) -> None:
    """The way back. Raises UserError if the state belongs to another adapter or optimiser."""
    if not flat:                                                     # saved before the first update
        return
    places = {p: (group, g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    for name, parameter in named:
        entries = {key.split("|", 1)[1]: value for key, value in flat.items() if key.startswith(f"{name}|")}
        if not entries:
            raise UserError(f"the checkpoint's optimiser state lacks {name}: it was written with other adapter settings")
        if hasattr(optimizer, "init_state"):                        # bitsandbytes: let it allocate (paged, 8 bit), then fill in
            group, g, i = places[parameter]
            optimizer.init_state(group, parameter, g, i)
        state = optimizer.state[parameter]
        for entry, value in entries.items():
            if isinstance(state.get(entry), Tensor) and state[entry].shape == value.shape:
                state[entry].copy_(value)
            elif isinstance(state.get(entry), int):
                state[entry] = int(value)
            else:
                state[entry] = value if entry == "step" else value.to(parameter.device)
