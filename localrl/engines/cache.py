"""Keys and values of a wave: each prompt's once for its whole group, each response's for its own row.

A group's rows ask the same prompt, so their queries are multiplied with its keys together: G times less memory for prompts, and G times
less of it to read at every step, which is what decoding waits for. Responses lie in two pieces without gaps, a small block that is being
filled and everything before it: on a CPU, reading the front part of larger buffers takes twice as long.

Whatever decides shapes is known to the host, so that no step waits for a device, and a wave can be rehearsed with tensors that hold nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localrl.engines.store import KEYS, VALUES, EightBit, Full, Store
from localrl.pieces import watched

BLOCK = 16
"""Columns of the block that is being filled. When it is full it is copied behind the others, 2 / BLOCK of what reading them costs."""
FIRST_WIDTH = 256
"""Columns that a captured step reads at first; when they are full it is captured again with twice as many."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """Of the attention of every layer."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    """Of one head."""
    scale: float
    dtype: torch.dtype
    """Of what is computed with."""


class Cache:
    """Keys and values of U prompts of `lengths` (U,) and of the n rows that continue them, each its `owner` (n,), by up to `room` tokens.

    All rows write the same column at a step, so a write is one copy; a row's true position (for the rotation) is its own. Columns that
    are not written yet are masked. With `fixed` shapes there is all the room from the start and the column to write is a tensor, so that a
    step can be captured once and replayed. With `eight_bit`, all but the block that is being filled is kept in 8 bits (`localrl.engines.store`):
    a token is rounded at the same moment of its row's life in every wave, so that waves of any size write the same.
    """

    foldable = moves = True
    """Rows can leave it, and then the others move up."""

    def __init__(
        self, shape: Shape, lengths: Sequence[int], owner: Sequence[int], room: int, device: torch.device, fixed: bool = False, eight_bit: bool = False
    ) -> None:
        self.shape, self.fixed, self.device, self.kind = shape, fixed, device, EightBit if eight_bit else Full
        self.lengths: Numbers = np.asarray(lengths, dtype=np.int64)
        self.depth = int(self.lengths.max())
        self.block = max(1, room) if fixed and not eight_bit else BLOCK
        self.column = 0
        """Columns of the block that are filled, the one of the step under way included."""
        self.width = self.block if eight_bit else min(FIRST_WIDTH, self.block)
        """Columns of the block that a step reads."""
        self.joined = 0
        """Columns before the block that are filled."""
        self.behind = 0
        """Columns before the block that a step reads."""
        asking: Numbers = np.asarray(owner, dtype=np.int64)
        self.position = self._indices(self.lengths[asking] - 1)      # (n,) of the token read last
        self.at = self._indices(np.array([-1]))                      # `column` - 1, for steps that are replayed
        self.future = torch.full((1, 1, self.block), -math.inf, dtype=shape.dtype, device=device)
        self.nothing = torch.zeros(1, 1, 1, dtype=shape.dtype, device=device)
        self.prompts: list[Store] = [self._zeros(len(self.lengths), self.depth) for _ in watched("layer", range(shape.layers))]
        self.blocks = [torch.zeros(self._size(len(owner), self.block), dtype=shape.dtype, device=device) for _ in watched("layer", range(shape.layers))]
        self.full: list[Store | None] = [None] * shape.layers        # blocks before this one
        self.past = self.nothing                                     # (1, 1, columns) mask of theirs, where all of them are there from the start
        reserved = max(0, room - 1) // BLOCK * BLOCK
        if fixed and eight_bit and reserved:
            self.full = [self._zeros(len(owner), reserved) for _ in watched("layer", range(shape.layers))]
            self.past = torch.full((1, 1, reserved), -math.inf, dtype=shape.dtype, device=device)
        self._seat(asking)

    def _size(self, rows: int, columns: int) -> tuple[int, ...]:
        return 2, self.shape.kv_heads, rows, columns, self.shape.width

    def _zeros(self, rows: int, columns: int) -> Store:
        return self.kind.zeros(self._size(rows, columns), self.shape.dtype, self.device)

    def _indices(self, numbers: Numbers) -> Tensor:
        return torch.tensor(numbers.tolist(), dtype=torch.int64, device=self.device)

    @property
    def state(self) -> list[Tensor]:
        """What a step both reads and writes, keys and values aside: writing those twice does no harm."""
        return [self.position, self.at, self.future]

    @property
    def form(self) -> tuple[int, ...]:
        """All that a captured step depends on besides the contents of tensors."""
        return (len(self.owner), len(self.lengths), self.seats, self.width, self.behind)

    def _seat(self, owner: Numbers) -> None:
        """Where each row's queries stand among its prompt's: prompts have as many seats as the largest group, some may be empty."""
        self.owner = owner                                           # (n,)
        prompts, numbers = len(self.lengths), np.arange(len(owner))
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=prompts)
        self.seats = int(counts.max())
        place = np.empty_like(owner)
        place[order] = numbers - (counts.cumsum() - counts)[owner[order]]
        seat = owner * self.seats + place
        sitter = np.zeros(prompts * self.seats, dtype=np.int64)
        sitter[seat] = numbers
        moved = len(owner) < len(sitter) or bool((seat != numbers).any())
        self.seat = self._indices(seat) if moved else None           # whole groups in order: nothing to move about
        self.sitter = self._indices(sitter) if moved else None
        self.hole: Tensor | None = None                              # (Hkv * U, 1, P), minus infinity past a prompt's end
        if (self.lengths < self.depth).any():
            outside = torch.arange(self.depth, device=self.device) >= self._indices(self.lengths)[:, None]
            bias = torch.zeros(outside.shape, dtype=self.shape.dtype, device=self.device).masked_fill_(outside, -math.inf)
            self.hole = bias.repeat(self.shape.kv_heads, 1)[:, None]

    def keep_prompt(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of prompts from number `start` on, (u, Hkv, P, D) each."""
        for half, part in ((KEYS, k), (VALUES, v)):
            self.prompts[layer].write(half, start, 0, part.transpose(0, 1))

    def grow(self) -> None:
        """Room for one more token a row: before every step, on the host."""
        if self.column == self.block:
            self._join()
        self.column += 1
        if self.column > self.width:
            self.width = min(self.block, 2 * self.width)

    def _join(self) -> None:
        """The block is full: behind the others with it, one layer after the other."""
        for layer, block in enumerate(watched("layer", self.blocks)):
            before = self.full[layer]
            if before is None:
                self.full[layer] = self.kind.of(block)
            elif self.fixed:
                for half in (KEYS, VALUES):
                    before.write(half, 0, self.joined, block[half])
            else:
                self.full[layer] = before.joined(block)
        self.joined += self.block
        self._mask()
        self.column = 0
        self.at.fill_(-1)
        self.future.fill_(-math.inf)

    def _mask(self) -> None:
        """What lies behind the block may be read."""
        if not self.fixed:
            self.behind = self.joined
            return
        self.past[:, :, : self.joined] = 0
        while self.behind < self.joined:
            self.behind = min(self.past.shape[2], max(FIRST_WIDTH, 2 * self.behind))

    def fill(self, columns: int) -> None:
        """As after `columns` steps in which every key and value was 0, without the steps: the same tensors. Called once, on an empty cache."""
        blocks = max(0, columns - 1) // self.block
        self.joined, self.column = blocks * self.block, columns - blocks * self.block
        if blocks:
            if not self.fixed:
                self.full = [self._zeros(len(self.owner), self.joined) for _ in watched("layer", self.full)]
            self._mask()
        while self.width < self.column:
            self.width = min(self.block, 2 * self.width)
        self.position += columns
        self.at.fill_(self.column - 1)
        self.future[:, :, : self.column] = 0

    def advance(self) -> None:
        """Every row's next token: at the start of every step, on the device."""
        self.position += 1
        self.at += 1
        self.future.index_fill_(2, self.at, 0.0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a row: keep its keys and values, and read. (n, Hq, D), (n, Hkv, D), (n, Hkv, D) -> (n, Hq * D)."""
        shape, prompts, rows, depth = self.shape, len(self.lengths), q.shape[0], self.depth
        kv, each = shape.kv_heads, shape.heads // shape.kv_heads
        for kept, part in zip(self.blocks[layer], (k, v), strict=True):                              # (Hkv, n, block, D)
            if self.fixed:
                kept.index_copy_(2, self.at, part.to(shape.dtype).transpose(0, 1).unsqueeze(2))
            else:
                kept.select(2, self.column - 1).copy_(part.transpose(0, 1))
        shared, full = self.prompts[layer], self.full[layer] if self.behind else None                # read: (Hkv * U, P, D), (Hkv * n, columns, D)
        block = self.blocks[layer][:, :, :, : self.width].flatten(1, 2)                              # (2, Hkv * n, columns, D)
        q = q.to(shape.dtype).view(rows, kv, each, -1).transpose(0, 1).contiguous()                 # (Hkv, n, each, D)
        own = q.flatten(0, 1)                                                                        # (Hkv * n, each, D)

        asked = self._seated(q).view(kv * prompts, -1, shape.width)                                  # (Hkv * U, seats * each, D)
        bias, beta = (self.nothing, 0) if self.hole is None else (self.hole, 1)
        scores = torch.baddbmm(bias, asked, shared.read(KEYS).transpose(1, 2), beta=beta, alpha=shape.scale)
        pieces = [self._risen(scores.view(kv, -1, each, depth)).flatten(0, 1)]                       # (Hkv * n, each, P)
        if full is not None:
            bias, beta = (self.past[:, :, : self.behind], 1) if self.fixed else (self.nothing, 0)
            pieces.append(torch.baddbmm(bias, own, full.read(KEYS, self.behind).transpose(1, 2), beta=beta, alpha=shape.scale))
        pieces.append(torch.baddbmm(self.future[:, :, : self.width], own, block[0].transpose(1, 2), alpha=shape.scale))
        joined = torch.cat(pieces, -1)
        del scores, pieces                                           # as long as all that was written, for every head
        p = torch.softmax(joined, -1, dtype=torch.float32).to(shape.dtype)
        del joined

        near = self._seated(p[..., :depth].view(kv, rows, each, depth)).reshape(kv * prompts, -1, depth)
        read = self._risen(torch.bmm(near, shared.read(VALUES)).view(kv, -1, each, shape.width)).flatten(0, 1)
        if full is not None:
            read = torch.baddbmm(read, p[..., depth : -self.width], full.read(VALUES, self.behind))
        read = torch.baddbmm(read, p[..., -self.width :], block[1])                                  # (Hkv * n, each, D)
        return read.view(kv, rows, each, -1).transpose(0, 1).reshape(rows, -1)

    def _seated(self, x: Tensor) -> Tensor:
        """Rows to seats, dimension 1."""
        return x if self.sitter is None else x.index_select(1, self.sitter)

    def _risen(self, x: Tensor) -> Tensor:
        """Seats to rows, dimension 1."""
        return x if self.seat is None else x.index_select(1, self.seat)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows (k,) from now on, and only the prompts that they ask. Old and new of one layer's piece at a time."""
        asked, owner = np.unique(self.owner[np.asarray(rows, dtype=np.int64)], return_inverse=True)
        places, fewer = self._indices(np.asarray(rows, dtype=np.int64)), self._indices(asked) if len(asked) < len(self.lengths) else None
        self.position = self.position.index_select(0, places)
        for layer in watched("layer", range(self.shape.layers)):
            self.blocks[layer] = self.blocks[layer].index_select(2, places)
            full = self.full[layer]
            self.full[layer] = None if full is None else full.select(places)
            del full
            if fewer is not None:
                self.prompts[layer] = self.prompts[layer].select(fewer)
        self.lengths = self.lengths[asked]
        self._seat(owner)
