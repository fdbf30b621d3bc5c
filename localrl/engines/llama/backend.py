"""Prompts and rows of a wave as llama.cpp's sequences.

A prompt is read once, by the first row that asks it, and copied to the others of its group. llama.cpp computes sequences together only where
their numbers follow one another in the batch: every gap, and every step back, begins another pass (half of 32 rows as every other sequence took
twice the time of 16 neighbours). So rows are sequences 0 to n - 1 and are sent in that order. When some leave, the last ones move into their
places, which copies the keys and values of one sequence: less than its row costs in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from localrl.engines.llama.binding import BATCH, Context, Numbers


class Rows:
    """Where the rows of a wave are: row i is sequence `sequences[i]`, its last token read stood at `positions[i]`."""

    foldable, moves = True, False

    def __init__(self, context: Context, positions: Numbers) -> None:
        self.context, self.positions = context, positions
        self.sequences: Numbers = np.arange(len(positions), dtype=np.int32)
        self.moved = False
        """Rows are no longer in their sequences' order."""

    def grow(self) -> None:
        """One more token a row."""
        self.positions += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows (k,) from now on, as sequences 0 to k - 1."""
        before, count = self.sequences, len(rows)
        self.positions, self.sequences = self.positions[list(rows)], before[list(rows)]
        free = sorted(set(range(count)) - set(self.sequences.tolist()), reverse=True)
        for row in np.flatnonzero(self.sequences >= count).tolist():
            target = free.pop()
            self.context.copy(int(self.sequences[row]), target)
            self.sequences[row] = target
        self.context.drop([s for s in before.tolist() if s >= count])
        self.moved = bool((np.diff(self.sequences) < 0).any())

    def read(self, tokens: Numbers) -> Tensor:
        """(n,), a token a row -> (n, V) float32 in the rows' order."""
        if not self.moved:
            return torch.from_numpy(self.context.decode(tokens, self.positions, self.sequences))
        order = np.argsort(self.sequences)
        logits = torch.from_numpy(self.context.decode(tokens[order], self.positions[order], self.sequences[order]))
        return logits.index_select(0, torch.from_numpy(self.sequences.astype(np.int64)))         # row i stands at its sequence's number


class Llama:
    """A backend (`localrl.engines.call`): reads contexts, and then one token a row."""

    apart = True

    def __init__(self, room_for: Callable[[int], Context]) -> None:
        """`room_for`: a context for so many rows at least."""
        self._room_for = room_for

    def prefill(self, contexts: Sequence[Sequence[int]], owner: Sequence[int], room: int) -> tuple[Tensor, Rows]:
        """(logits after each row's context (n, V) float32, where the rows are). Row i asks contexts[owner[i]]; every context is asked."""
        asked = np.asarray(owner)
        first = np.array([int(np.flatnonzero(asked == i)[0]) for i in range(len(contexts))], dtype=np.int32)
        lengths = np.array([len(c) for c in contexts], dtype=np.int32)
        context = self._room_for(len(owner))
        context.clear()
        logits = _read(context, np.concatenate([np.asarray(c, dtype=np.int32) for c in contexts]), first, lengths)
        for row, prompt in enumerate(owner):
            if row != first[prompt]:
                context.copy(int(first[prompt]), row)
        return torch.from_numpy(logits).index_select(0, torch.tensor(owner)), Rows(context, (lengths[asked] - 1).astype(np.int32))

    def step(self, tokens: Tensor, cache: Rows) -> Tensor:
        """(n,) int64 -> (n, V) float32, in the library's memory until the next step."""
        return cache.read(tokens.numpy().astype(np.int32))


def _read(context: Context, tokens: Numbers, first: Numbers, lengths: Numbers) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Contexts end to end, BATCH tokens at a time. -> (U, V) logits after each one's last token."""
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    sequences, last = np.repeat(first, lengths), np.zeros(len(tokens), dtype=np.bool_)
    last[lengths.cumsum() - 1] = True
    logits, done = np.empty((len(lengths), context.weights.vocabulary), dtype=np.float32), 0
    for start in range(0, len(tokens), BATCH):
        part = slice(start, start + BATCH)
        found = context.decode(tokens[part], positions[part], sequences[part], last[part])
        logits[done : done + len(found)] = found
        done += len(found)
    return logits
