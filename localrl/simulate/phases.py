"""The work of each phase on a fake model: the real policy, loss and engine, counted."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from localrl.algebra import token_mean
from localrl.algorithms.base import Algorithm
from localrl.batch import Batch, Prompt, Readout, Request, Rollout, collate
from localrl.config import Run
from localrl.devices import Kind, pretending
from localrl.engines.rehearsal import rehearse
from localrl.engines.torch import TorchEngine
from localrl.pieces import watched
from localrl.policy.lean import make_lean
from localrl.policy.optim import take_step
from localrl.policy.output_layer import Head
from localrl.policy.policy import Policy
from localrl.simulate.counter import Counter, Event
from localrl.simulate.fakes import fake_model, real_tables
from localrl.train import one_reading


@dataclass(frozen=True)
class Pass:
    """One micro-batch: rows of `prompt` and `response` tokens."""

    rows: int
    prompt: int
    response: int


@dataclass(frozen=True)
class WaveOf:
    """One wave: `rows` responses to `prompts` different contexts."""

    rows: int
    prompts: int
    prompt: int
    response: int


@dataclass(frozen=True)
class Trace:
    """What one phase did."""

    events: list[Event]
    start: int
    """Bytes that lived before it."""
    peak: int


LATE = 10**6
"""Updates behind the policy: whatever warms up is warm."""


class MicroBatch(Batch):
    """A batch whose one part is itself: its numbers are real, since they decide shapes, and no copy is made of them."""

    def __getitem__(self, rows: Tensor) -> Batch:
        return self

    @property
    def tensors(self) -> list[Tensor]:
        """What a copy would take."""
        return [value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)]


def a_batch(work: Pass, rewards: int, group: int) -> MicroBatch:
    """Rows as long as they may be, with rewards that differ."""
    rows = [
        Rollout(Request(Prompt(i // group, (0,) * work.prompt, ""), i % group), (0,) * work.response, "", True, 0, (0.0,) * work.response,
                tuple(float((i + r) % 2) for r in range(rewards)))
        for i in range(work.rows)
    ]  # fmt: skip
    return MicroBatch(**vars(collate(rows, (1.0,) * rewards, work.response, LATE)))


class Rehearsal:
    """A fake policy of `config`'s model and what happens to it. Not the whole step: one micro-batch stands for all.

    Gradients of several directions are kept as sketches beside the ordinary one ("lagged"): what other kinds keep instead is a matter of multiplying.
    """

    def __init__(self, config: Any, run: Run, dtype: torch.dtype, device: Kind, *, checkpointing: bool, offload: bool = False) -> None:
        self.run, self.algorithm, self.device = run, calibrated(run.algorithm.for_sampler(exact=run.own_samples)), device
        self.mode, self.counter = FakeTensorMode(allow_non_fake_inputs=True), Counter(device)
        critic = "value" in self.algorithm.reads_before | self.algorithm.reads_during
        model = fake_model(config, run, dtype, critic, self.mode)
        with self.mode, self.counter, pretending(device):
            self.counter.adopt([*model.parameters(), *model.buffers(), *_of_quantisation(model)])
            self.loaded = self.counter.now
            self.tried = self.counter.peak_of(lambda: Head.of(model).trial(model))
            """Bytes while the output layer is compared with the model's own."""
            with real_tables():
                directions = self.algorithm.directions(run.rewards.weights)
                self.policy = Policy(
                    model, None, run, checkpointing=checkpointing, head_chunk=256, offload=offload, directions=directions, kept_as="lagged"
                )  # fmt: skip
        self.kept = self.gradients = self.counter.now
        self._watch_layers(model.get_base_model().get_decoder().layers, checkpointing)
        self._owing: dict[Tensor, int] = {}
        """Gradients that the pass under way has yet to add to, and their bytes."""
        for _, parameter in self.policy.trainable():
            parameter.register_post_accumulate_grad_hook(self._paid)

    def turn(self, *, head_chunk: int, mlp_tile: int) -> None:
        """Set the knobs that change sizes only."""
        self.policy.head_chunk = head_chunk
        make_lean(self.policy.model, mlp_tile)

    def make_gradients(self) -> None:
        """As a first micro-batch leaves them."""
        with self.mode, self.counter:
            for _, parameter in self.policy.trainable():
                parameter.grad = torch.zeros_like(parameter)
        self.gradients = self.counter.now

    def _paid(self, parameter: Tensor) -> None:
        """Once: a loss of several sums adds to a gradient several times."""
        self.counter.owed -= self._owing.pop(parameter, 0)

    def _watch_layers(self, layers: Any, checkpointing: bool) -> None:
        """Layers are no loop of ours: their hooks tell. When the backward pass computes them again (the last one first), our checkpointing does, and
        where it only goes back through them, the gradient that reaches what a layer returned."""
        count = len(layers)
        self.counter.counts["layer again"] = count

        def enter(number: int) -> None:                              # what a hook returns would take the input's place
            self.counter.enter("layer", number, count)

        def back(number: int, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]

            def reached(gradient: Tensor) -> None:                   # what it returns would take the gradient's place
                self.counter.enter("layer back", count - 1 - number, count)

            if states.requires_grad:
                states.register_hook(reached)

        for number, layer in enumerate(layers):
            if not checkpointing:
                layer.register_forward_hook(lambda module, inputs, output, number=number: back(number, output))
            layer.register_forward_pre_hook(lambda *_, number=number: enter(number))
        layers[-1].register_forward_hook(lambda *_: enter(count))

    def scoring(self, work: Pass, columns: frozenset[str]) -> Trace:
        """Old and reference log-probabilities and values of one micro-batch."""
        batch = a_batch(work, self._rewards, work.rows)
        with self.mode, self.counter, pretending(self.device), self.counter.holding(batch.tensors), self.counter.recording() as events, torch.no_grad():
            start = self.counter.now
            self.policy.read(batch, columns)
        return Trace(events, start, self.counter.peak)

    def backward(self, work: Pass) -> Trace:
        """Forward and backward of one micro-batch, every reading of it. Gradients stay."""
        batch, rows = a_batch(work, self._rewards, work.rows), torch.arange(work.rows)
        credit = self.algorithm.credit(batch, Readout(*[torch.zeros(batch.mask.shape)] * 5))
        share = token_mean(batch.fresh)
        with self.mode, self.counter, pretending(self.device), self.counter.holding(batch.tensors), self.counter.recording() as events:
            self._owing = {p: p.nbytes for _, p in self.policy.trainable() if p.grad is not None}
            start, self.counter.owed = self.counter.now, sum(self._owing.values())
            for columns in watched("reading", self.algorithm.readings):
                one_reading(self.algorithm, self.policy, batch, credit, share, columns, rows)
        return Trace(events, start, self.counter.peak)

    def update(self) -> Trace:
        """The optimiser's step, but for what it asks the device."""
        with self.mode, self.counter, pretending(self.device), self.counter.recording() as events:
            start = self.counter.now
            for group in self.policy.optimizer.param_groups:
                torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
            take_step(self.policy.optimizer, self.policy.limits)
        return Trace(events, start, self.counter.peak)

    def rollout(self, wave: WaveOf, kv_cache: Literal["full", "int8"]) -> Trace:
        """The fullest moments of one wave (`localrl.engines.rehearsal`)."""
        engine = TorchEngine(self.policy.model, None, self.run.rollout, 0, kv_cache=kv_cache)
        with self.mode, self.counter, pretending(self.device), self.counter.recording() as events, torch.no_grad():
            start = self.counter.now
            rehearse(engine, wave.prompt, wave.response, wave.rows, wave.prompts)
        return Trace(events, start, self.counter.peak)

    @property
    def _rewards(self) -> int:
        return max(1, len(self.run.rewards.functions))


def calibrated(algorithm: Algorithm) -> Algorithm:
    """As if it had measured something on the untrained policy."""
    if not algorithm.calibrates:
        return algorithm
    batch = a_batch(Pass(2, 1, 2), 1, 2)
    return algorithm.calibrate(batch, Readout(*[torch.ones(batch.mask.shape)] * 5))


def _of_quantisation(model: Any) -> list[Tensor]:
    """Scales and codes, which are neither parameters nor buffers."""
    found: list[Tensor] = []
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        scales = getattr(getattr(module, "state", None), "SCB", None)
        found += [scales] if scales is not None else []
    return found
