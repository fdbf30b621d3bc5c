"""Read, update, save, load: all that the loop asks of a model."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localrl.batch import Batch, Loss, Readout
from localrl.config import Run
from localrl.engines.weights import compute_device
from localrl.memory.work import DirectionKind
from localrl.oom import Limits
from localrl.policy.adapters import checkpoint_layers, using
from localrl.policy.atomic import Ledger, in_pieces, way_out
from localrl.policy.directions import Directions
from localrl.policy.head import Head, read_tokens
from localrl.policy.lean import make_lean
from localrl.policy.load import ADAPTER, CRITIC, attach, keep_embedding_on_host, load_base, load_tokenizer
from localrl.policy.lora import fold_adapters
from localrl.policy.offload import offloading
from localrl.policy.optim import NamedParameters, learning_rate, make_optimizer, restore_state, scale_down, state_tensors, take_step, total_norm
from localrl.policy.packing import Index, Layout, can_pack, laid_out
from localrl.settings import UserError

ADAPTER_FILE, OPTIMIZER_FILE, CRITIC_FILE = "adapter_model.safetensors", "optimizer.safetensors", "critic.safetensors"
DIRECTIONS_FILE = "directions.safetensors"
T = TypeVar("T")
PAST = 20
"""Steps whose steering is remembered."""


class Policy:
    """One frozen base with the adapter "policy" (and "critic" where values are read), and what updates them.

    The base's bytes never change: adapters stay live and are never merged into it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, run: Run, *, checkpointing: bool, head_chunk: int, directions: Sequence[float] = (),
        kept_as: DirectionKind = "float32", mlp_tile: int = 0, offload: bool = False,
    ) -> None:  # fmt: skip
        """`directions`: the gradients that are kept apart, if any, by their first weights; `kept_as`: in which form. The other knobs are those of
        the memory plan (`localrl.memory.work.Choice`)."""
        self.model, self.tokenizer, self.run = model, tokenizer, run
        self.step = 0
        """Steps of the loop that are behind it; with `run.steps` it decides the learning rate."""
        self.head = Head.of(model)
        fold_adapters(model)
        make_lean(model, mlp_tile)
        self.head_chunk, self.offload = head_chunk, offload
        self.device = compute_device(model)
        self.critic = nn.Linear(self.head.weight.shape[1], 1, device=self.device) if CRITIC in model.peft_config else None
        if self.critic is not None:
            nn.init.zeros_(self.critic.weight)
            nn.init.zeros_(self.critic.bias)
        checkpoint_layers(model, checkpointing)
        self.optimizer = make_optimizer(run.optim, self._groups())
        self.updates = 0
        """Of the step under way; 0: the state is that between two steps."""
        self.limits = Limits()
        """What running out of memory has taught about passes."""
        self.ledger = Ledger(p for _, p in self.trainable())
        self._way_out = way_out(run, checkpointing=checkpointing, offload=offload, mlp_tile=mlp_tile, head_chunk=head_chunk)
        self.directions = Directions(model, ADAPTER, len(directions), kept_as, directions) if directions else None
        """Gradients that are kept apart until the algorithm says how they add up."""
        self.past: deque[dict[str, float]] = deque(maxlen=PAST)
        """What was said of the last steps' directions."""
        self._layout: Layout
        """Of the last reading."""

    @classmethod
    def create(
        cls, run: Run, *, critic: bool, checkpointing: bool, head_chunk: int, directions: Sequence[float] = (), kept_as: DirectionKind = "float32",
        mlp_tile: int = 0, offload: bool = False, embedding_on_host: bool = False,
    ) -> Policy:  # fmt: skip
        """The run's model with fresh adapters."""
        tokenizer = load_tokenizer(run.model)
        model = attach(load_base(run.model), run.adapter, run.seed, critic)
        if embedding_on_host:
            keep_embedding_on_host(model)
        Head.of(model).verify(model)
        return cls(
            model, tokenizer, run, checkpointing=checkpointing, head_chunk=head_chunk, directions=directions, kept_as=kept_as, mlp_tile=mlp_tile,
            offload=offload,
        )  # fmt: skip

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
        those of the tempered distribution that the run samples from. Rows are laid end to end (`localrl.policy.packing`): nothing is padded.
        """
        columns = frozenset(columns)
        layout = self._layout = Layout.of(batch)
        batch = batch.to(self.device)
        out: dict[str, Tensor] = {}
        if columns & {"logp", "entropy", "lse"}:
            with using(self.model, ADAPTER):
                out |= self._tokens(batch, layout, columns)
        if "ref" in columns and batch.ref is not None:
            out["ref"] = batch.ref
        elif "ref" in columns:
            with torch.no_grad(), using(self.model, None):
                out["ref"] = self._tokens(batch, layout, frozenset({"logp"}))["logp"]
        if "value" in columns:
            if self.critic is None:
                raise RuntimeError("this policy was built without a critic")
            with using(self.model, CRITIC):
                out["value"] = self._spread(self.critic(self._hidden(layout, False).float()).squeeze(1), layout, False)
        return Readout(**out)

    def read_whole(self, batch: Batch, columns: Iterable[str], parts: Iterable[Tensor]) -> Readout:
        """The same for a whole step without gradient, micro-batch by micro-batch (`parts`: the rows of each)."""
        columns = frozenset(columns)
        whole = self.limits.again("scoring", lambda: {name: torch.zeros(batch.mask.shape, device=self.device) for name in columns})

        def read_some(rows: Tensor) -> None:
            readout = self.read(batch[rows], columns)
            for name in columns:
                piece = getattr(readout, name)
                whole[name][rows.to(self.device), : piece.shape[1]] = piece

        with torch.no_grad():
            for rows in parts:
                self.in_pieces("scoring", read_some, rows, batch)
        return Readout(**whole)

    def _hidden(self, layout: Layout, only_fresh: bool) -> Tensor:
        """Hidden states that predict the response's tokens (the fresh ones, or all). -> (n, H), row by row."""
        bare = self.model.get_base_model()
        decoder, tokens, positions = bare.get_decoder(), self._index(layout.tokens), self._index(layout.positions)
        moving = offloading(self.model) if self.offload and torch.is_grad_enabled() else nullcontext()
        if can_pack(bare):
            with laid_out(bare.config, layout), moving:
                states = decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
        else:                                                        # its attention cannot be told where rows end: one by one
            states = torch.cat([decoder(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in tokens.split(layout.lengths)])
        return states.index_select(0, self._index(layout.predicting(only_fresh)))

    def _tokens(self, batch: Batch, layout: Layout, columns: frozenset[str]) -> dict[str, Tensor]:
        targets = batch.tokens.flatten().index_select(0, self._cells(layout, True))
        tokens = read_tokens(
            self._hidden(layout, True), targets, self.head,
            temperature=self.run.rollout.temperature, chunk=self.head_chunk, want_entropy="entropy" in columns,
        )  # fmt: skip
        found = {name: getattr(tokens, name) for name in ("logp", "entropy", "lse") if name in columns}
        return {name: self._spread(value, layout, True) for name, value in found.items() if value is not None}

    @property
    def token_rows(self) -> Tensor:
        """(N,) int64: of the tokens that the layers read last, each one's row."""
        return self._index(self._layout.rows)

    def _index(self, places: Index) -> Tensor:
        return torch.from_numpy(places).to(self.device)

    def _cells(self, layout: Layout, only_fresh: bool) -> Tensor:
        """Flat places in a (B, T) column of the tokens that are read, (n,)."""
        rows, columns = layout.cells(only_fresh)
        return self._index(rows * layout.sampled.shape[1] + columns)

    def _spread(self, values: Tensor, layout: Layout, only_fresh: bool) -> Tensor:
        """Back to the rows and columns they came from, 0 elsewhere. (n,) -> (B, T)."""
        column = torch.zeros(layout.sampled.size, dtype=values.dtype, device=values.device)
        return column.index_copy(0, self._cells(layout, only_fresh), values).view(layout.sampled.shape)

    # -- learning -----------------------------------------------------------------------------------------------------------

    def in_pieces(self, doing: str, work: Callable[[Tensor], T], rows: Tensor, batch: Batch) -> list[T]:
        """`work` on some rows (n,) of a batch: all at once, or in pieces if memory runs out, with every gradient added once. -> what each piece
        came to. Raises OutOfMemory if a single row is too much."""
        return in_pieces(doing, work, rows, batch, self.limits, self.ledger, self._way_out)

    def backward(self, loss: Loss) -> None:
        """Gather the gradients of one micro-batch: of the loss, or of each direction apart. Where a pass over the same rows was broken off, what it owes."""
        if self.directions is not None:
            self.directions.backward(loss.seeds, self.token_rows, self.ledger)
        elif loss.value.requires_grad:                               # a part may have nothing to teach yet
            if not self.ledger.paid:
                loss.value.backward()
            elif owing := [p for _, p in self.trainable() if self.ledger.owes(id(p))]:
                torch.autograd.backward(loss.value, inputs=owing)

    def turn(self, weights: Sequence[float], stats: Mapping[str, float]) -> dict[str, float]:
        """Add the directions up to one gradient, and remember what was said of them. Returns it, with the cosine to the update before."""
        assert self.directions is not None
        self.limits.again("adding up directions", partial(self.directions.combine, weights))
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
            norms[name] = self.limits.again("updating", partial(total_norm, group["params"]))
            group["lr"] = rate * scheduled * own.get(name, self.run.optim.learning_rate) / self.run.optim.learning_rate
        if all(math.isfinite(norm) for norm in norms.values()) and rate > 0:
            for norm, group in zip(norms.values(), self.optimizer.param_groups, strict=True):        # all norms are known by now: nothing is scaled twice
                scale_down(group["params"], self.run.optim.max_grad_norm / (norm + 1e-6))
            self.updates += 1
            take_step(self.optimizer, self.limits)
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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"the checkpoint lacks {path.name}: {path.parent} is incomplete, resume from another one") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): resume from another checkpoint") from None
