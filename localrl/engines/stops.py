"""Where a response ends: tokens that end one, and strings that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def end_tokens(model: Any, tokenizer: Any, strings: Sequence[str] = ()) -> set[int]:
    """The model's and the tokenizer's end tokens, and those that a stop string names as a whole ("<|im_end|>")."""
    ends: set[int] = set()
    for found in (getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id):
        ends.update([] if found is None else [int(found)] if isinstance(found, int) else [int(token) for token in found])
    return ends | {token for token, added in tokenizer.added_tokens_decoder.items() if added.special and added.content in strings}


def end_table(ends: set[int], vocabulary: int, device: torch.device) -> Tensor:
    """(V,) bool."""
    table = torch.zeros(vocabulary, dtype=torch.bool)
    table[[token for token in ends if token < vocabulary]] = True
    return table.to(device)


class StopStrings:
    """Finds the token that completes a stop string, wherever in the string the tokens' borders fall."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(s for s in strings if s)
        self.reach = max((len(s.encode()) for s in self.strings), default=0) + 8
        """Tokens that a stop string may span (a token is a byte at least), and some: decoded alone, a tail's first character may break."""

    def __bool__(self) -> bool:
        return bool(self.strings)

    def within(self, text: str) -> bool:
        """Whether the text holds a stop string."""
        return any(s in text for s in self.strings)

    def suspects(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """Which of the rows may have met one within their last `new` tokens: a look at the tails alone."""
        tails = [row[-(new + self.reach) :] for row in rows]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True) if rows else []
        return [index for index, text in enumerate(texts) if self.within(text)]

    def cut(self, tokens: Sequence[int], start: int) -> int | None:
        """How many of the tokens to keep: up to and including the one that completes the first stop string. None: there is none.

        `start` tokens are known to hold none.
        """
        if not self.within(self._decode(tokens)):
            return None
        low, high = start, len(tokens)
        while high - low > 1:                                        # the text of fewer tokens holds none, of more holds one
            middle = (low + high) // 2
            low, high = (low, middle) if self.within(self._decode(tokens[:middle])) else (middle, high)
        return high

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text
