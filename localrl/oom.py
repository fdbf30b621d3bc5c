"""Out of memory is not the end: what counts as it, how to let go of what it pinned, and what is learned from it.

An exception that was caught keeps its traceback, the traceback its frames, and the frames every activation of the pass that failed: whoever
tries again inside the `except` block has less memory than before. So `attempt` comes back first, with everything let go, and says whether it
went well; what is smaller then is the caller's to know. Nothing here undoes what the work had done: it must be work that changes nothing before
its last allocation, or that knows how far it came (`localrl.policy.atomic`).
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from localrl.settings import UserError

T = TypeVar("T")
SENTENCES = re.compile(
    r"out of memory"                                                 # CUDA's own, bitsandbytes' ("CUDA error: out of memory"), HIP's
    r"|can't allocate memory|not enough memory"                      # torch's allocators on a CPU: POSIX, Windows
    r"|ALLOC(?:ATION)?_FAILED"                                       # CUBLAS_STATUS_ALLOC_FAILED and its like
    r"|CUBLAS_STATUS_NOT_INITIALIZED",                               # a handle that found no room
    re.IGNORECASE,
)


class OutOfMemory(UserError):
    """Even the smallest part does not fit. What was done before it stands, and the part itself has changed nothing."""


def failure(what: str, way_out: str) -> OutOfMemory:
    """The sentence for what was being done when even its smallest part did not fit."""
    return OutOfMemory(f"out of memory while {what}: {way_out}, or free memory that other programs hold")


class Done(NamedTuple, Generic[T]):
    """What a piece of work came to."""

    value: T


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a device or on the host.

    >>> out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), out_of_memory(MemoryError())
    (True, True)
    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")), out_of_memory(RuntimeError("shape"))
    (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and SENTENCES.search(str(error)) is not None


def release() -> None:
    """Give back what can be: garbage in cycles, and blocks that the caching allocator holds for nobody."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def attempt(work: Callable[[], T]) -> Done[T] | None:
    """Do it; None if memory ran out, and then nothing that only the failed work held is there any more. Other exceptions pass."""
    try:
        return Done(work())
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    release()                                                        # only here: the exception, its traceback and their frames are gone
    return None


def cut(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Runs of consecutive items, (start, end) each, that are at most `most` together; a larger item goes alone.

    >>> cut([40, 30, 20, 20, 10], 50), cut([70], 50)
    ([(0, 1), (1, 3), (3, 5)], [(0, 1)])
    """
    runs, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > most:
            runs.append((start, index))
            start, total = index, 0
        total += size
    return [*runs, (start, len(sizes))]


def middle(sizes: Sequence[int]) -> int:
    """Where two or more items fall into two parts as equal as can be.

    >>> middle([40, 30, 20, 20, 10]), middle([90, 5]), middle([1, 1, 90])
    (2, 1, 2)
    """
    return min(range(1, len(sizes)), key=lambda at: max(sum(sizes[:at]), sum(sizes[at:])))


def silent(text: str) -> None:
    """Nobody listens."""


@dataclass
class Limits:
    """How much is done at once, as far as running out of memory has taught it. Limits only ever shrink; None: nothing was learned yet."""

    micro_batch_tokens: int | None = None
    """Most tokens of one pass that reads or learns; a longer row goes alone."""
    concurrent: int | None = None
    """Most rows that are decoded together."""
    retries: int = field(default=0, compare=False)
    """Times that memory ran out since the last `count`."""
    say: Callable[[str], None] = field(default=silent, compare=False, repr=False)
    """Hears a sentence whenever a limit falls."""

    def attempt(self, work: Callable[[], T]) -> Done[T] | None:
        """`attempt`, counted."""
        done = attempt(work)
        self.retries += done is None
        return done

    def again(self, doing: str, work: Callable[[], T]) -> T:
        """Work that cannot be made smaller, and that changes nothing before its last allocation: a second time if memory ran out.

        OutOfMemory: not then either.
        """
        for _ in range(2):
            if (done := self.attempt(work)) is not None:
                return done.value
        raise failure(f"{doing}, which cannot be done in smaller parts", "lower rollout.num_generations or rollout.max_completion_length")

    def cut(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """The rows of one pass, as many passes as the limit makes of it. Tokens of each row -> (start, end) of each pass."""
        return [(0, len(sizes))] if self.micro_batch_tokens is None else cut(sizes, self.micro_batch_tokens)

    def halve(self, doing: str, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """A pass over rows of so many tokens each has failed: two passes instead, and none larger than these from here on."""
        at = middle(sizes)
        now = max(sum(sizes[:at]), sum(sizes[at:]))
        if self.micro_batch_tokens is None or now < self.micro_batch_tokens:
            self.micro_batch_tokens = now
            self.say(f"out of memory while {doing} with {sum(sizes)} tokens a pass: going on with {now}")
        return [(0, at), (at, len(sizes))]

    def narrow(self, rows: int) -> None:
        """A wave that began with so many rows, more than one, has failed: half as many from here on."""
        now = (rows + 1) // 2
        if self.concurrent is None or now < self.concurrent:
            self.concurrent = now
            self.say(f"out of memory while sampling {rows} responses at once: going on with {now}")

    def count(self) -> int:
        """Times that memory ran out since this was asked last."""
        count, self.retries = self.retries, 0
        return count

    def to_dict(self) -> dict[str, int | None]:
        """What was learned, as plain values."""
        return {"micro_batch_tokens": self.micro_batch_tokens, "concurrent": self.concurrent}

    def learn(self, known: dict[str, int | None]) -> None:
        """Take over what an earlier part of the run had learned (`to_dict`)."""
        for name in self.to_dict():
            told, own = known.get(name), getattr(self, name)
            setattr(self, name, min((n for n in (told, own) if n is not None), default=None))
