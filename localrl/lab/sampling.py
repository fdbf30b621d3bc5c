"""What takes a model: completions of the untrained one, and the rewards' gradients on them. For a process of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from localrl.algorithms.base import Algorithm
from localrl.batch import Readout, Request, Rollout, collate
from localrl.config import Run
from localrl.engines.torch import TorchEngine
from localrl.folder import clean, write_whole
from localrl.lab.samples import Samples, as_row, of_row, with_prompt_tokens
from localrl.policy.adapters import using
from localrl.policy.policy import Policy
from localrl.prepare import Prepared, prepare
from localrl.record import Display
from localrl.settings import UserError
from localrl.train import accumulate

CACHE = Path(".localrl") / "samples"
"""Within the folder that one works in; may be deleted at any time."""


class Model:
    """The run's untrained policy, loaded when somebody first asks for it."""

    def __init__(self, run: Run, algorithm: Algorithm | None, display: Display) -> None:
        """`algorithm`: whose directions are kept apart, if gradients will be wanted."""
        self.run = run if algorithm is None else run.model_copy(update={"algorithm": algorithm})
        self.display = display
        self.prepared: Prepared = prepare(self.run, display.say)
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        """Loaded at the first call."""
        if self._policy is None:
            self.display.phase("load")
            plan, ones = self.prepared.plan, [1.0] * len(self.run.rewards.functions)
            self._policy = Policy.create(
                self.run, critic=False, checkpointing=plan.gradient_checkpointing, head_chunk=plan.head_chunk, directions=self.run.algorithm.directions(ones),
                kept_as="float32", mlp_tile=plan.choice.mlp_tile, offload=plan.choice.offload, embedding_on_host=plan.choice.embedding_on_host,
            )  # fmt: skip
        return self._policy

    def sample(self, prompts: int, each: int) -> Samples:
        """Of the first training prompts, `each` completions: the numbers of a run's first step. Kept, so that other rewards need no other samples."""
        chosen = self.prepared.data.train[:prompts]
        path = CACHE / f"{self._key([p.tokens for p in chosen], each)}.jsonl"
        source = f"{len(chosen) * each} completions of {self.run.model.path}, untrained"
        if path.is_file():
            try:
                rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                by_id = {p.id: p for p in chosen}
                kept = [of_row(row) for row in rows]
                mine = [replace(r, request=replace(r.request, prompt=by_id[r.request.prompt.id])) for r in kept]
            except (OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)                          # damaged: sampled again
            else:
                self.display.say(f"{source} (kept from before)")
                return Samples(tuple(mine), self.run.rollout.max_completion_length, source)
        rollouts = self._generate([Request(prompt, at) for prompt in chosen for at in range(each)])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(clean(as_row(r)), ensure_ascii=False) + "\n" for r in rollouts))
        return Samples(tuple(rollouts), self.run.rollout.max_completion_length, source)

    def _generate(self, requests: list[Request]) -> list[Rollout]:
        policy, run = self.policy, self.run
        self.display.phase("sampling")
        settings = run.rollout.model_copy(update={"concurrent": self.prepared.plan.concurrent, "window": None})
        with using(policy.model, None):
            return TorchEngine(policy.model, policy.tokenizer, settings, run.seed, self.display.part).generate(requests, 0)

    def _key(self, prompts: Sequence[Sequence[int]], each: int) -> str:
        run = self.run
        sampling = run.rollout.model_dump(mode="json", include={"temperature", "top_p", "top_k", "max_completion_length", "stop"})
        what = [run.model.model_dump(mode="json"), sampling, run.seed, prompts, [p.id for p in self.prepared.data.train[: len(prompts)]], each]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]

    def gram(self, rollouts: Sequence[Rollout]) -> tuple[tuple[float, ...], ...]:
        """Inner products of the rewards' gradients, as a first training step on these scored rollouts has them. (R, R)"""
        algorithm, policy = self.run.algorithm.for_sampler(exact=True), self.policy
        if policy.directions is None:
            raise UserError("gradients are compared from two rewards on: add another")
        count = len(self.run.rewards.functions)
        self.display.phase("gradients")
        whole = with_prompt_tokens(rollouts, policy.tokenizer, self.run.data.chat_template_kwargs)
        kept = [r for r in whole if r.tokens]                           # nothing was written, there is nothing to learn
        batch = collate(kept, [1.0] * count, self.run.rollout.max_completion_length).to(policy.device)
        parts = self.prepared.plan.split(batch.sequence_length)
        before = algorithm.reads_before
        readout = policy.read_whole(batch, before, parts) if before else Readout()
        accumulate(algorithm, policy, batch, algorithm.credit(batch, readout), parts)
        gram = policy.directions.gram()[:count, :count]
        policy.drop_gradients()
        if not bool(torch.isfinite(gram).all()):
            raise UserError("the gradients are not finite: look at the completions, or take another model.compute_dtype")
        return tuple(tuple(row) for row in gram.tolist())
