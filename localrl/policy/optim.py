"""Optimisers by name, the learning rate as a function of the step, and optimiser state that travels without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from localrl.devices import kind_of
from localrl.oom import Limits
from localrl.sections import OptimSettings
from localrl.settings import UserError

NamedParameters = list[tuple[str, nn.Parameter]]


def make_optimizer(settings: OptimSettings, groups: Iterable[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW as the settings name it: torch's, or bitsandbytes' with 8-bit or paged state. One parameter group for each of `groups`.

    Its state is there from the start: what does not fit is known before the first step, and no step allocates any. Torch's is the fused
    one, which needs no temporary copies.
    """
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    kinds: dict[str, Any] = {
        "adamw": partial(torch.optim.AdamW, fused=True),
        "auto": partial(torch.optim.AdamW, fused=True),              # of a policy that no plan was made for
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    optimizer = kinds[settings.optimizer]([{"params": group} for group in groups], **common)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):                     # bitsandbytes
                optimizer.init_state(group, parameter, g, i)
            else:
                nothing = torch.zeros((), dtype=torch.float32, device=parameter.device)
                optimizer.state[parameter] = {"step": nothing, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer, limits: Limits) -> None:
    """One step on the gradients that are there: of every parameter exactly once, also where memory runs out on the way.

    Torch's fused step allocates nothing once it has begun to change something, so it can be called again as a whole. bitsandbytes goes from
    parameter to parameter. Its kernels for a GPU allocate nothing at all; those for a CPU do while they work, so there a parameter's
    numbers are kept until its own step is done, and put back if it was not.
    """
    if not hasattr(optimizer, "update_step"):
        limits.again("updating", optimizer.step)
        return
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                limits.again("updating", partial(_step_of_one, optimizer, group, parameter, g, i))
    if getattr(optimizer, "is_paged", False) and torch.cuda.is_initialized():
        torch.cuda.synchronize()                                     # managed memory: the host may look at it next


def _step_of_one(optimizer: Any, group: dict[str, Any], parameter: nn.Parameter, g: int, i: int) -> None:
    state = optimizer.state[parameter]
    changing = [parameter.data, *(state[name] for name in ("state1", "state2", "absmax1", "absmax2") if name in state)]
    count, before = state["step"], [tensor.clone() for tensor in changing] if kind_of(parameter.device) == "cpu" else []
    done = False
    try:
        optimizer.prefetch_state(parameter)
        optimizer.update_step(group, parameter, g, i)
        done = True
    finally:
        if not done:
            state["step"] = count
            for tensor, value in zip(changing, before, strict=False):
                tensor.copy_(value)


def total_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Length of all their gradients together. Changes nothing."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def scale_down(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Gradients times `factor` in place if it is below 1. Allocates nothing."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and factor < 1:
        torch._foreach_mul_(gradients, factor)


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
    for name, parameter in named:
        entries = {key.split("|", 1)[1]: value for key, value in flat.items() if key.startswith(f"{name}|")}
        if not entries:
            raise UserError(f"the checkpoint's optimiser state lacks {name}: it was written with other adapter settings")
        state = optimizer.state[parameter]
        for entry, value in entries.items():
            if isinstance(state.get(entry), Tensor) and state[entry].shape == value.shape:
                state[entry].copy_(value)
            elif isinstance(state.get(entry), int):
                state[entry] = int(value)
            else:
                raise UserError(f"the checkpoint's optimiser state does not fit {name} ({entry}): it was written with another optimiser or adapter")
