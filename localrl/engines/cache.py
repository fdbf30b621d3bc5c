"""Keys and values of a wave: each prompt's once for its whole group, each response's for its own row.

A group's rows ask the same prompt, so their queries are multiplied with its keys together: G times less memory for prompts, and G times
less of it to read at every step, which is what decoding waits for. Responses lie in two pieces without gaps, a small block that is being
filled and everything before it: on a CPU, reading the front part of larger buffers takes twice as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16
"""Columns of the block that is being filled. When it is full it is copied behind the others, 2 / BLOCK of what reading them costs."""
FIRST_WIDTH = 256
"""Columns that a captured step reads at first; when they are full it is captured again with twice as many."""


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
    """Of what is kept."""


class Cache:
    """Keys and values of U prompts of `lengths` (U,) and of the n rows that continue them, each its `owner` (n,), by up to `room` tokens.

    All rows write the same column at a step, so a write is one copy; a row's true position (for the rotation) is its own. Columns that
    are not written yet are masked. With `fixed` shapes one block has all the room and the column to write is a tensor, so that a step can
    be captured once and replayed.
    """

    foldable = True
    """Rows can leave it."""

    def __init__(self, shape: Shape, lengths: Tensor, owner: Tensor, room: int, device: torch.device, fixed: bool = False) -> None:
        self.shape, self.fixed = shape, fixed
        self.lengths = lengths.to(device)
        self.depth = int(lengths.max())
        self.block = max(1, room) if fixed else BLOCK
        self.column = 0
        """Columns of the block that are filled, the one of the step under way included."""
        self.width = min(FIRST_WIDTH, self.block)
        """Columns of the block that a step reads."""
        self.position = (lengths[owner] - 1).to(device)              # (n,) of the token read last
        self.at = torch.tensor([-1], device=device)                  # `column` - 1, for steps that are replayed
        self.future = torch.full((1, 1, self.block), -math.inf, dtype=shape.dtype, device=device)
        self.nothing = torch.zeros(1, 1, 1, dtype=shape.dtype, device=device)
        self.prompts = [self._zeros(len(lengths), self.depth) for _ in range(shape.layers)]
        self.blocks = [self._zeros(len(owner), self.block) for _ in range(shape.layers)]
        self.full: list[Tensor | None] = [None] * shape.layers       # blocks before this one
        self._seat(owner.to(device))

    def _zeros(self, rows: int, columns: int) -> Tensor:
        """(2, Hkv, rows, columns, D): keys and values. Zeros, because what is masked must be finite nevertheless."""
        shape = self.shape
        return torch.zeros(2, shape.kv_heads, rows, columns, shape.width, dtype=shape.dtype, device=self.lengths.device)

    @property
    def state(self) -> list[Tensor]:
        """What a step both reads and writes, keys and values aside: writing those twice does no harm."""
        return [self.position, self.at, self.future]

    @property
    def form(self) -> tuple[int, ...]:
        """All that a captured step depends on besides the contents of tensors."""
        return (len(self.owner), len(self.lengths), self.seats, self.width)

    def _seat(self, owner: Tensor) -> None:
        """Where each row's queries stand among its prompt's: prompts have as many seats as the largest group, some may be empty."""
        self.owner = owner                                           # (n,)
        prompts, numbers = len(self.lengths), torch.arange(len(owner), device=owner.device)
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=prompts)
        self.seats = int(counts.max())
        place = torch.empty_like(owner)
        place[order] = numbers - (counts.cumsum(0) - counts)[owner[order]]
        seat = owner * self.seats + place
        sitter = owner.new_zeros(prompts * self.seats)
        sitter[seat] = numbers
        moved = len(owner) < len(sitter) or bool((seat != numbers).any())
        self.seat: Tensor | None = seat if moved else None                               # whole groups in order: nothing to move about
        self.sitter: Tensor | None = sitter if moved else None
        outside = torch.arange(self.depth, device=owner.device) >= self.lengths[:, None]
        bias = torch.where(outside, -math.inf, 0.0).to(self.shape.dtype)
        self.hole = bias.repeat(self.shape.kv_heads, 1)[:, None] if bool(outside.any()) else None    # (Hkv * U, 1, P)

    def keep_prompt(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of prompts from number `start` on, (u, Hkv, P, D) each."""
        for kept, part in zip(self.prompts[layer], (k, v), strict=True):
            kept[:, start : start + len(part), : part.shape[2]] = part.transpose(0, 1)

    def grow(self) -> None:
        """Room for one more token a row: before every step, on the host."""
        if self.column == self.block:
            for layer, block in enumerate(self.blocks):
                before = self.full[layer]
                self.full[layer] = block.clone() if before is None else torch.cat((before, block), 3)
            self.column = 0
            self.at.fill_(-1)
            self.future.fill_(-math.inf)
        self.column += 1
        if self.column > self.width:
            self.width = min(self.block, 2 * self.width)

    def advance(self) -> None:
        """Every row's next token: at the start of every step, on the device."""
        self.position += 1
        self.at += 1
        self.future.index_fill_(2, self.at, 0.0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token a row: keep its keys and values, and read. (n, Hq, D), (n, Hkv, D), (n, Hkv, D) -> (n, Hq * D)."""
        shape, prompts, rows, depth = self.shape, self.lengths.shape[0], q.shape[0], self.depth
        kv, each = shape.kv_heads, shape.heads // shape.kv_heads
        for kept, part in zip(self.blocks[layer], (k, v), strict=True):                              # (Hkv, n, block, D)
            if self.fixed:
                kept.index_copy_(2, self.at, part.to(shape.dtype).transpose(0, 1).unsqueeze(2))
            else:
                kept.select(2, self.column - 1).copy_(part.transpose(0, 1))
        shared, full = self.prompts[layer].flatten(1, 2), self.full[layer]                           # shared: (2, Hkv * U, P, D)
        block = self.blocks[layer][:, :, :, : self.width].flatten(1, 2)                              # (2, Hkv * n, columns, D)
        q = q.to(shape.dtype).view(rows, kv, each, -1).transpose(0, 1).contiguous()                 # (Hkv, n, each, D)
        own = q.flatten(0, 1)                                                                        # (Hkv * n, each, D)

        asked = self._seated(q).view(kv * prompts, -1, shape.width)                                  # (Hkv * U, seats * each, D)
        bias, beta = (self.nothing, 0) if self.hole is None else (self.hole, 1)
        scores = torch.baddbmm(bias, asked, shared[0].transpose(1, 2), beta=beta, alpha=shape.scale)
        pieces = [self._risen(scores.view(kv, -1, each, depth)).flatten(0, 1)]                       # (Hkv * n, each, P)
        if full is not None:
            full = full.flatten(1, 2)                                                                # (2, Hkv * n, columns, D)
            pieces.append(torch.baddbmm(self.nothing, own, full[0].transpose(1, 2), beta=0, alpha=shape.scale))
        pieces.append(torch.baddbmm(self.future[:, :, : self.width], own, block[0].transpose(1, 2), alpha=shape.scale))
        p = torch.softmax(torch.cat(pieces, -1), -1, dtype=torch.float32).to(shape.dtype)

        near = self._seated(p[..., :depth].view(kv, rows, each, depth)).reshape(kv * prompts, -1, depth)
        read = self._risen(torch.bmm(near, shared[1]).view(kv, -1, each, shape.width)).flatten(0, 1)
        if full is not None:
            read = torch.baddbmm(read, p[..., depth : -self.width], full[1])
        read = torch.baddbmm(read, p[..., -self.width :], block[1])                                  # (Hkv * n, each, D)
        return read.view(kv, rows, each, -1).transpose(0, 1).reshape(rows, -1)

    def _seated(self, x: Tensor) -> Tensor:
        """Rows to seats, dimension 1."""
        return x if self.sitter is None else x.index_select(1, self.sitter)

    def _risen(self, x: Tensor) -> Tensor:
        """Seats to rows, dimension 1."""
        return x if self.seat is None else x.index_select(1, self.seat)

    def keep(self, rows: Tensor) -> None:
        """Only these rows (k,) from now on, and only the prompts that they ask."""
        self.position = self.position[rows]
        asked, owner = self.owner[rows].unique(return_inverse=True)
        for layer, full in enumerate(self.full):
            self.blocks[layer] = self.blocks[layer].index_select(2, rows)
            self.full[layer] = None if full is None else full.index_select(2, rows)
        if len(asked) < len(self.lengths):
            self.lengths = self.lengths[asked]
            self.prompts = [prompt.index_select(2, asked) for prompt in self.prompts]
        self._seat(owner)
