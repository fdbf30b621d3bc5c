"""The nouns: what travels between the rooms. All frozen.

Notation, everywhere in this code base: B rollouts, T response tokens, P context tokens, G rollouts of one prompt, R rewards,
V vocabulary, H hidden width.

The one alignment rule: **column t of every (B, T) tensor speaks about response token t**, be it its id, its log-probability, the
value of the state just before it, or its weight. Context (prompt) tokens have columns of their own and never appear in (B, T).
`localrl.policy.packing` does the only shift in the code base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One question. `id` (not the text) is what makes a group; `columns` go to the rewards untouched."""

    id: int
    tokens: tuple[int, ...]
    """Rendered and tokenised, chat template included."""
    content: str | list[Message]
    """As the data file has it, with the system prompt if there is one: text, or chat messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """Please continue this prompt. `so_far` holds the tokens an earlier window wrote (none: start afresh)."""

    prompt: Prompt
    sample: int = 0
    """Which of the prompt's rollouts in this step this is: with the prompt and the step it names the random stream."""
    so_far: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One response, as sampled, and later its rewards."""

    request: Request
    tokens: tuple[int, ...]
    """The whole response, `so_far` included, the end token included where it was sampled."""
    text: str
    """The response decoded without special tokens: what a reward sees."""
    done: bool
    """False: cut by the length limit or the window, no end token and no stop string."""
    version: int
    """The step of the policy that sampled it."""
    logp: tuple[float, ...] | None = None
    """The sampler's own log-probability of each token, nats, after temperature and before top-k / top-p."""
    rewards: tuple[float, ...] = ()
    """One a reward function; NaN: does not apply, or could not be had."""
    more: bool = False
    """The window ended, not the response: the next step goes on with it, and until then there is nothing to score."""
    ref: tuple[float, ...] | None = None
    """The reference's log-probability of each token, nats, for rollouts that are kept; None: nobody read it yet."""


@dataclass(frozen=True)
class Batch:
    """A step's rollouts as tensors; `batch[rows]` is a micro-batch with the same columns, trimmed to its own longest row."""

    context: Tensor
    """(B, P) int64, right-padded: the prompts' tokens."""
    context_length: Tensor
    """(B,) int64."""
    tokens: Tensor
    """(B, T) int64, right-padded: the responses' tokens."""
    mask: Tensor
    """(B, T) bool: a token that the model wrote. Masks decide, never ids: a padding id may equal an end id."""
    fresh: Tensor
    """(B, T) bool, within mask: written by this step's window."""
    group: Tensor
    """(B,) int64: rows of one prompt share a number."""
    done: Tensor
    """(B,) bool."""
    version: Tensor
    """(B,) int64: policy step that sampled the row."""
    rewards: Tensor
    """(B, R) float32, NaN where a reward does not apply."""
    weights: Tensor
    """(R,) float32: the rewards' weights."""
    limit: int
    """The longest response that the run allows, tokens (max_completion_length)."""
    sampler: Tensor | None = None
    """(B, T) float32: the sampler's log-probabilities, 0 outside mask; None if any row lacks them."""
    ref: Tensor | None = None
    """(B, T) float32: stored log-probabilities under the reference, 0 outside mask; None if any row lacks them."""
    more: Tensor | None = None
    """(B,) bool: the window ended, the response goes on in the next step. None: no row does."""
    step: int = 0
    """Updates that the policy has behind it: `step - version` is a row's age."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> Batch:
        part = {f.name: getattr(self, f.name) for f in fields(self)}
        part = {k: v if v is None or k in ("weights", "limit", "step") else v[rows] for k, v in part.items()}
        width, depth = int(lengths(part["mask"]).max()), int(part["context_length"].max())
        part["context"] = part["context"][:, :depth]
        for name in ("tokens", "mask", "fresh", "sampler", "ref"):
            if part[name] is not None:
                part[name] = part[name][:, :width]
        return Batch(**part)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    @property
    def finished(self) -> Tensor:
        """(B,) bool: ended by itself or at the run's limit, so that its rewards are known."""
        return torch.ones_like(self.done) if self.more is None else ~self.more

    @property
    def age(self) -> Tensor:
        """(B,) int64: updates since the row was sampled."""
        return self.step - self.version

    @property
    def response_length(self) -> Tensor:
        """(B,) int64: one past the last response token, holes in the mask included."""
        return lengths(self.mask)

    @property
    def sequence_length(self) -> Tensor:
        """(B,) int64: context and response together, the tokens a row costs the policy."""
        return self.context_length + self.response_length


@dataclass(frozen=True)
class Readout:
    """What one forward pass said of a batch: (B, T) float32 columns at the run's temperature; None: nobody asked."""

    logp: Tensor | None = None
    """log pi(token t | all before it), nats."""
    entropy: Tensor | None = None
    """Of the whole vocabulary's distribution at t, nats."""
    lse: Tensor | None = None
    """log sum exp of the logits that predict token t."""
    value: Tensor | None = None
    """The critic's value of the state just before token t."""
    ref: Tensor | None = None
    """log-probability under the reference: the same base, adapters off. Never has a gradient."""

    def __getitem__(self, rows: Tensor) -> Readout:
        return Readout(**{f.name: None if (v := getattr(self, f.name)) is None else v[rows] for f in fields(self)})


COLUMNS = frozenset(f.name for f in fields(Readout))


class Seed(NamedTuple):
    """Where a backward pass for several gradients at once starts: a sum over rows whose parts count differently in each of D directions."""

    value: Tensor
    """() a sum over the micro-batch's rows, with gradient; no row's part depends on another row."""
    coefficients: Tensor
    """(B, D): direction d's gradient is the sum over rows of coefficients[row, d] * (gradient of the row's part)."""


class Loss(NamedTuple):
    """What an algorithm hands back for one micro-batch. All are sums over its rows, so any split of a step adds up to the same."""

    value: Tensor
    """() the micro-batch's share of the step's loss, with gradient."""
    stats: dict[str, Tensor]
    """() each, detached: shares of the step's metrics (for a mean: the sum of share * quantity)."""
    seeds: tuple[Seed, ...] = ()
    """For a step whose gradient is steered between directions: what to differentiate instead of `value`."""


Credit = TypeVar("Credit", bound=NamedTuple)


def rows_of(credit: Credit, rows: Tensor, width: int | None = None) -> Credit:
    """The same NamedTuple for some rows; (B, T) members are trimmed to `width` columns: whatever has a second dimension is taken for one. None stays None.

    >>> class C(NamedTuple):
    ...     advantage: Tensor
    >>> rows_of(C(torch.arange(3)), torch.tensor([2, 0]))
    C(advantage=tensor([2, 0]))
    """
    parts: list[Any] = [None if v is None else v[rows] if v.dim() < 2 or width is None else v[rows][:, :width] for v in credit]
    return type(credit)._make(parts)


def lengths(mask: Tensor) -> Tensor:
    """One past each row's last True column. (B, T) bool -> (B,) int64.

    >>> lengths(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool())
    tensor([3, 0])
    """
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * columns).amax(1) if mask.shape[1] else mask.new_zeros(len(mask), dtype=torch.int64)


def pad(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
    """Right-padded rows. B sequences of up to T -> (B, T).

    >>> pad([[1, 2], [3]], 0, torch.int64)
    tensor([[1, 2],
            [3, 0]])
    """
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)


def collate(rollouts: Sequence[Rollout], weights: Sequence[float], limit: int, step: int = 0) -> Batch:
    """Rollouts become a batch, in their order. `weights` has one entry a reward, `limit` is the run's max_completion_length.

    >>> p = Prompt(7, (1, 2), "hi")
    >>> b = collate([Rollout(Request(p), (5, 6), "", True, 0, rewards=(1.0,)), Rollout(Request(p, 1), (5,), "", True, 0, rewards=(0.0,))], [1.0], 8)
    >>> b.tokens.tolist(), b.mask.tolist(), b.group.tolist()
    ([[5, 6], [5, 0]], [[True, True], [True, False]], [0, 0])
    """
    number: dict[int, int] = {}
    group = [number.setdefault(r.request.prompt.id, len(number)) for r in rollouts]
    tokens = pad([r.tokens for r in rollouts], 0, torch.int64)
    columns = torch.arange(tokens.shape[1])
    mask = columns < torch.tensor([len(r.tokens) for r in rollouts])[:, None]
    told, known = all(r.logp is not None for r in rollouts), all(r.ref is not None for r in rollouts)
    return Batch(
        context=pad([r.request.prompt.tokens for r in rollouts], 0, torch.int64),
        context_length=torch.tensor([len(r.request.prompt.tokens) for r in rollouts]),
        tokens=tokens,
        mask=mask,
        fresh=mask & (columns >= torch.tensor([len(r.request.so_far) for r in rollouts])[:, None]),
        group=torch.tensor(group),
        done=torch.tensor([r.done for r in rollouts]),
        version=torch.tensor([r.version for r in rollouts]),
        rewards=torch.tensor([r.rewards for r in rollouts], dtype=torch.float32).reshape(len(rollouts), len(weights)),
        weights=torch.tensor(list(weights), dtype=torch.float32),
        limit=limit,
        sampler=pad([r.logp or () for r in rollouts], 0.0, torch.float32) if told else None,
        ref=pad([r.ref or () for r in rollouts], 0.0, torch.float32) if known else None,
        more=torch.tensor([r.more for r in rollouts]) if any(r.more for r in rollouts) else None,
        step=step,
    )
