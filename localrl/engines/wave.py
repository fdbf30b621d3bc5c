"""The rows that are decoded together: their random numbers, what they have written, and which of them are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from localrl.batch import Request
from localrl.engines.sampling import Sampler, Words, uniforms
from localrl.engines.stops import StopStrings


class Finished(NamedTuple):
    """What one row wrote."""

    row: int
    """Its number in the wave, as it began."""
    tokens: list[int]
    """New ones only."""
    logp: list[float]
    done: bool
    """False: cut by the length limit."""


class Wave:
    """n rows that each may write `limits` (n,) tokens. Tensors of what is written are (room, n): a step's tokens stand side by side."""

    def __init__(self, requests: Sequence[Request], keys: Words, limits: Sequence[int], ends: Tensor, stops: StopStrings) -> None:
        self.requests, self.ends, self.stops = list(requests), ends, stops
        device = ends.device
        self.room = max(limits)
        self.count = 0
        """Tokens that every row has written (or, past its end, wasted)."""
        self.settled = 0
        """Tokens that have been searched for an end."""
        self.limits = np.array(limits, dtype=np.int64)               # (n,) here and below: on the host, what decides how many rows there are
        self.rows = np.arange(len(requests))                         # numbers as the wave began
        self.running = np.ones(len(requests), dtype=np.bool_)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)   # `count`, for steps that are replayed
        self.uniform = torch.from_numpy(uniforms(keys, [len(r.so_far) for r in requests], self.room)).to(device)
        self.tokens = torch.zeros(self.room, len(requests), dtype=torch.int64, device=device)
        self.logp = torch.zeros(self.room, len(requests), device=device)
        self.last = torch.zeros(len(requests), dtype=torch.int64, device=device)
        self.next_limit = min(limits)
        self.alive = len(requests)
        """Rows that are running."""

    @property
    def state(self) -> list[Tensor]:
        """What `take` both reads and writes."""
        return [self.at, self.last]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, logits: Tensor, sampler: Sampler) -> None:
        """Sample every row's next token. (n, V) float32. On the device only: the host adds to `count`."""
        tokens, logp = sampler(logits, self.uniform.index_select(0, self.at).squeeze(0))
        self.tokens.index_copy_(0, self.at, tokens[None])
        self.logp.index_copy_(0, self.at, logp[None])
        self.last.copy_(tokens)
        self.at += 1

    def settle(self) -> list[Finished]:
        """Look for ends in what was written since the last time. Rows that end are no longer `running`, and are returned."""
        fresh = self.tokens[self.settled : self.count]
        ended = self.ends[fresh]                                     # (new, n)
        before = self.settled
        if not (self.stops or self.count >= self.next_limit or bool(ended.any())):
            self.settled = self.count
            return []
        first = torch.where(ended.any(0), before + 1 + ended.int().argmax(0), self.room + 1).cpu().numpy()
        length = np.minimum(first, self.limits)                      # (n,) of the response if it ends here
        over = np.flatnonzero(self.running & (length <= self.count)).tolist()
        found = {place: (int(length[place]), bool(first[place] <= self.limits[place])) for place in over}
        if self.stops:
            self._find_strings(before, found)
        return self._finish(found)

    def _find_strings(self, before: int, found: dict[int, tuple[int, bool]]) -> None:
        """Stop strings that are complete before the row's end, if it has one: they come first. Every row's whole text at its end."""
        places = np.flatnonzero(self.running).tolist()
        texts = [[*self.requests[row].so_far, *self.tokens[: found.get(place, (self.count,))[0], place].tolist()]
                 for place, row in zip(places, self.rows[places].tolist(), strict=True)]  # fmt: skip
        suspects = set(self.stops.suspects(texts, self.count - before)) | {i for i, place in enumerate(places) if place in found}
        for index in sorted(suspects):
            given = len(self.requests[int(self.rows[places[index]])].so_far)
            kept = self.stops.cut(texts[index], given)
            if kept is not None:
                found[places[index]] = (kept - given, True)

    def _finish(self, found: dict[int, tuple[int, bool]]) -> list[Finished]:
        """Everything is read before anything is changed: should memory run out here, it can be asked again."""
        finished = []
        for place, (length, done) in found.items():
            written, logp = self.tokens[:length, place].tolist(), self.logp[:length, place].tolist()
            finished.append(Finished(int(self.rows[place]), written, logp, done))
        self.running[list(found)] = False
        self.settled = self.count
        self.alive -= len(found)
        left = self.limits[self.running]
        self.next_limit = int(left.min()) if len(left) else self.room
        return finished

    def keep_running(self) -> list[int]:
        """Let finished rows go. -> (k,) places of those that stay."""
        places = np.flatnonzero(self.running).tolist()
        index = torch.tensor(places, device=self.last.device)
        kept = [self.last.index_select(0, index), *(t.index_select(1, index) for t in (self.uniform, self.tokens, self.logp))]
        self.last, self.uniform, self.tokens, self.logp = kept       # all or nothing, should memory run out: 24 bytes a token and row
        self.rows, self.limits, self.running = self.rows[places], self.limits[places], self.running[places]
        return places

    def unfinished(self) -> list[Finished]:
        """What the rows that are running have written so far."""
        tokens, logp = self.tokens[: self.count].cpu(), self.logp[: self.count].cpu()
        return [Finished(int(self.rows[p]), tokens[:, p].tolist(), logp[:, p].tolist(), False) for p in np.flatnonzero(self.running).tolist()]
