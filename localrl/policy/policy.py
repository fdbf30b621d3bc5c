"""Read, update, save, load: all that the loop asks of a model."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localrl.batch import Batch, Loss, Readout
from localrl.config import Run
from localrl.memory.work import DirectionKind
from localrl.policy.adapters import checkpoint_layers, using
from localrl.policy.directions import Directions
from localrl.policy.head import Head, read_tokens
from localrl.policy.load import ADAPTER, CRITIC, attach, load_base, load_tokenizer
from localrl.policy.lora import fold_adapters
from localrl.policy.optim import NamedParameters, learning_rate, make_optimizer, restore_state, state_tensors
from localrl.settings import UserError

ADAPTER_FILE, OPTIMIZER_FILE, CRITIC_FILE = "adapter_model.safetensors", "optimizer.safetensors", "critic.safetensors"
DIRECTIONS_FILE = "directions.safetensors"
PAST = 20
"""Steps whose steering is remembered."""


class Policy:
    """One frozen base with the adapter "policy" (and "critic" where values are read), and what updates them.

    The base's bytes never change: adapters stay live and are never merged into it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, run: Run, *, checkpointing: bool, head_chunk: int, directions: Sequence[float] = (),
        kept_as: DirectionKind = "float32",
    ) -> None:  # fmt: skip
        """`directions`: the gradients that are kept apart, if any, by their first weights; `kept_as`: in which form."""
        self.model, self.tokenizer, self.run = model, tokenizer, run
        self.step = 0
        """Steps of the loop that are behind it; with `run.steps` it decides the learning rate."""
        self.head = Head.of(model)
        self.head.verify(model)
        fold_adapters(model)
        self.head_chunk = head_chunk
        self.device = next(model.parameters()).device
        self.critic = nn.Linear(self.head.weight.shape[1], 1, device=self.device) if CRITIC in model.peft_config else None
        if self.critic is not None:
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)
        checkpoint_layers(model, checkpointing)
        self.optimizer = make_optimizer(run.optim, self._groups())
        self.directions = Directions(model, ADAPTER, len(directions), kept_as, directions) if directions else None
        """Gradients that are kept apart until the algorithm says how they add up."""
        self.past: deque[dict[str, float]] = deque(maxlen=PAST)
        """What was said of the last steps' directions."""

    @classmethod
    def create(
        cls, run: Run, *, critic: bool, checkpointing: bool, head_chunk: int, directions: Sequence[float] = (), kept_as: DirectionKind = "float32"
    ) -> Policy:
        """The run's model with fresh adapters."""
        tokenizer = load_tokenizer(run.model)
        model = attach(load_base(run.model), run.adapter, run.seed, critic)
        return cls(model, tokenizer, run, checkpointing=checkpointing, head_chunk=head_chunk, directions=directions, kept_as=kept_as)

    def trainable(self) -> NamedParameters:
        """Everything that learns, by name, in a fixed order."""
        own = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return own + ([(f"critic.{n}", p) for n, p in self.critic.named_parameters()] if self.critic is not None else [])

    def _groups(self) -> list[list[nn.Parameter]]:
        """What learns at one rate and is clipped together: the policy, and the critic if there is one."""
        named = self.trainable()
        critic = [p for n, p in named if n.startswith("critic.") or f".{CRITIC}." in n]
        policy = [p for n, p in named if not any(p is q for q in critic)]
        return [policy, critic] if critic else [policy]

    # -- reading ------------------------------------------------------------------------------------------------------------

    def read(self, batch: Batch, columns: Iterable[str]) -> Readout:
        """One forward pass over a micro-batch: the columns asked for, (B, T) float32, 0 elsewhere. Values are read of all the response's
        tokens, the others of the fresh ones; a reference that the batch carries is not read again.

        Gradients flow if they are enabled where it is called (never through `ref`). Log-probabilities, entropies and log-sum-exps are
        those of the tempered distribution that the run samples from. This is the only place that shifts: token t is predicted by the
        hidden state one position before it.
        """
        columns = frozenset(columns)
        batch = batch.to(self.device)
        out: dict[str, Tensor] = {}
        if columns & {"logp", "entropy", "lse"}:
            with using(self.model, ADAPTER):
                out |= self._tokens(batch, columns)
        if "ref" in columns and batch.ref is not None:
            out["ref"] = batch.ref
        elif "ref" in columns:
            with torch.no_grad(), using(self.model, None):
                out["ref"] = self._tokens(batch, frozenset({"logp"}))["logp"]
        if "value" in columns:
            if self.critic is None:
                raise RuntimeError("this policy was built without a critic")
            with using(self.model, CRITIC):
                out["value"] = _spread(self.critic(self._hidden(batch, batch.mask).float()).squeeze(1), batch.mask)
        return Readout(**out)

    def read_whole(self, batch: Batch, columns: Iterable[str], parts: Iterable[Tensor]) -> Readout:
        """The same for a whole step without gradient, micro-batch by micro-batch (`parts`: the rows of each)."""
        columns = frozenset(columns)
        whole = {name: torch.zeros(batch.mask.shape, device=self.device) for name in columns}
        with torch.no_grad():
            for rows in parts:
                readout = self.read(batch[rows], columns)
                for name in columns:
                    piece = getattr(readout, name)
                    whole[name][rows.to(self.device), : piece.shape[1]] = piece
        return Readout(**whole)

    def _hidden(self, batch: Batch, mask: Tensor) -> Tensor:
        """Hidden states that predict the tokens in `mask` (B, T). -> (N, H), row by row.

        Rows are right-padded and no padding mask is passed: attention is causal, so padding cannot reach a real token, and a mask would
        cost B * S * S bytes and the fused attention kernels.
        """
        width = int(batch.sequence_length.max())
        columns = torch.arange(width, device=self.device)
        context, length = batch.context_length[:, None], batch.sequence_length[:, None]
        inputs = torch.zeros(len(batch), width, dtype=torch.int64, device=self.device)
        inputs[columns < context] = batch.context[torch.arange(batch.context.shape[1], device=self.device) < context]
        inside = torch.arange(batch.tokens.shape[1], device=self.device) < batch.response_length[:, None]
        inputs[(columns >= context) & (columns < length)] = batch.tokens[inside]
        states = self.model.get_base_model().get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
        rows, tokens = mask.nonzero(as_tuple=True)
        return states[rows, batch.context_length[rows] + tokens - 1]

    def _tokens(self, batch: Batch, columns: frozenset[str]) -> dict[str, Tensor]:
        tokens = read_tokens(
            self._hidden(batch, batch.fresh), batch.tokens[batch.fresh], self.head,
            temperature=self.run.rollout.temperature, chunk=self.head_chunk, want_entropy="entropy" in columns,
        )  # fmt: skip
        return {name: _spread(value, batch.fresh) for name in ("logp", "entropy", "lse") if name in columns and (value := getattr(tokens, name)) is not None}

    # -- learning -----------------------------------------------------------------------------------------------------------

    def backward(self, loss: Loss) -> None:
        """Gather the gradients of one micro-batch: of the loss, or of each direction apart."""
        if self.directions is not None:
            self.directions.backward(loss.seeds)
        elif loss.value.requires_grad:                               # a part may have nothing to teach yet
            loss.value.backward()

    def turn(self, weights: Sequence[float], stats: Mapping[str, float]) -> dict[str, float]:
        """Add the directions up to one gradient, and remember what was said of them. Returns it, with the cosine to the update before."""
        assert self.directions is not None
        self.directions.combine(weights)
        turn = self.directions.turn()
        known = dict(stats) if math.isnan(turn) else {**stats, "steering/turn": turn}
        self.past.append(known)
        return known

    def update(self, rate: float = 1.0) -> dict[str, float]:
        """One optimiser step on the gradients gathered so far, which it clears, at `rate` times the scheduled learning rate.

        Returns `grad_norm` and `learning_rate`, and `critic_grad_norm` if there is a critic: each is clipped by itself. A gradient that is not
        finite is thrown away: nothing is updated, and the metric says so. Rate 0 updates nothing.
        """
        scheduled = learning_rate(self.run.optim, self.step, self.run.steps)
        own = {"critic_grad_norm": self.run.optim.critic_learning_rate or self.run.optim.learning_rate}
        norms = {}
        for name, group in zip(("grad_norm", "critic_grad_norm"), self.optimizer.param_groups, strict=False):
            norms[name] = nn.utils.clip_grad_norm_(group["params"], self.run.optim.max_grad_norm).item()
            group["lr"] = rate * scheduled * own.get(name, self.run.optim.learning_rate) / self.run.optim.learning_rate
        if all(math.isfinite(norm) for norm in norms.values()) and rate > 0:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**norms, "learning_rate": rate * scheduled}

    def drop_gradients(self) -> None:
        """Forget what was gathered since the last update."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.directions is not None:
            self.directions.drop()

    # -- keeping ------------------------------------------------------------------------------------------------------------

    def save_adapter(self, folder: Path) -> None:
        """What PEFT loads: `adapter_model.safetensors`, `adapter_config.json`, and the tokenizer with its chat template."""
        self.save_weights(folder)
        self.model.peft_config[ADAPTER].save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def save_weights(self, folder: Path) -> None:
        """The adapter's tensors alone, as `load_adapter` reads them."""
        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / ADAPTER_FILE)

    def save(self, folder: Path) -> None:
        """The adapter, the critic if there is one, and the optimiser, into an existing folder."""
        self.save_adapter(folder)
        if self.critic is not None:
            state = get_peft_model_state_dict(self.model, adapter_name=CRITIC, save_embedding_layers=False)
            save_file({k: v.detach().cpu().contiguous() for k, v in (state | self.critic.state_dict(prefix="head.")).items()}, folder / CRITIC_FILE)
        save_file(state_tensors(self.optimizer, self.trainable()), folder / OPTIMIZER_FILE)
        if self.directions is not None:
            save_file(self.directions.state(), folder / DIRECTIONS_FILE)
        (folder / "policy.json").write_text(json.dumps({"step": self.step, "past": list(self.past)}))

    def load_adapter(self, folder: Path) -> None:
        """Weights of the adapter "policy" from a checkpoint. Raises UserError if they do not fit or cannot be read."""
        result = set_peft_model_state_dict(self.model, _read(folder / ADAPTER_FILE), adapter_name=ADAPTER)
        lost = [k for k in result.missing_keys if "lora_" in k and f".{ADAPTER}." in k]
        if result.unexpected_keys or lost:
            found = f"{len(lost)} tensors missing, {len(result.unexpected_keys)} unknown"
            raise UserError(f"the adapter in {folder} does not fit this run's model and adapter settings ({found})")

    def load(self, folder: Path) -> None:
        """The way back from `save`, bit for bit."""
        self.load_adapter(folder)
        if self.critic is not None:
            state = _read(folder / CRITIC_FILE)
            self.critic.load_state_dict({k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")})
            set_peft_model_state_dict(self.model, {k: v for k, v in state.items() if not k.startswith("head.")}, adapter_name=CRITIC)
        restore_state(self.optimizer, self.trainable(), _read(folder / OPTIMIZER_FILE))
        if self.directions is not None:
            self.directions.restore(_read(folder / DIRECTIONS_FILE))
        state = json.loads((folder / "policy.json").read_text())
        self.step, self.past = int(state["step"]), deque(state.get("past", ()), maxlen=PAST)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Back to the rows and columns they came from, 0 elsewhere. (N,), (B, T) bool -> (B, T)."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"the checkpoint lacks {path.name}: {path.parent} is incomplete, resume from another one") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): resume from another checkpoint") from None
