"""A searcher, seen from inside: a copy of the model in a process of its own, that samples what it is asked for and says so in JSON.

Three threads, so that nobody waits for the trainer, which is away learning most of the time: one hears requests and new weights, one says
what was found, and the main one samples. The hearing one also ends the process as soon as the trainer is gone, even by `kill -9`: then
standard input hangs up, whatever the main thread is doing.

Messages in: {"run", "concurrent", "with_reference", "kv_cache", "llama", "folder"} once, then {"adapter", "folder", "version"} and {"share", "groups"}.
Messages out: {"ready"} once, then {"taken"} and {"share", "version", "rollouts", "busy", "idle"}; {"failed"} if a person must put something right.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

from localrl.quiet import quiet_libraries
from localrl.rewards.wire import HEAD, Message, frame, unframe
from localrl.settings import UserError

if TYPE_CHECKING:
    # Loaded only after the process listens, so that it ends with the trainer from the start.
    from localrl.batch import Request, Rollout
    from localrl.engines import Engine

REFERENCE_TOKENS = 1024
"""Of one pass that reads the reference, padding included, where the settings do not say. Without gradients more is no faster."""
HEAD_CHUNK = 256
"""Tokens whose logits exist at the same time, where the settings do not say."""


class Searcher:
    """The model, its sampler, and the weights that it has. Raises UserError if the model cannot be loaded."""

    def __init__(self, start: Message) -> None:
        import torch

        from localrl.config import Run
        from localrl.engines.llama.engine import LlamaEngine
        from localrl.engines.torch import TorchEngine
        from localrl.policy.policy import Policy

        run = Run.model_validate(tomllib.loads(start["run"]))
        torch.set_num_threads(run.search.threads)
        self.policy = Policy.create(run, critic=False, checkpointing=False, head_chunk=run.memory.head_chunk or HEAD_CHUNK)
        settings = run.rollout.model_copy(update={"concurrent": start["concurrent"]})
        model, tokenizer = self.policy.model, self.policy.tokenizer
        self.engine: Engine
        if start["llama"] is None:
            self.engine = TorchEngine(model, tokenizer, settings, run.seed, kv_cache=start["kv_cache"])
        else:
            threads = min(run.rollout.threads or run.search.threads, run.search.threads)
            self.engine = LlamaEngine(model, tokenizer, settings, run.seed, kind=start["llama"], threads=threads, kv_cache=start["kv_cache"], say=tell)
            self.engine.follow(self.policy.save_adapter, 0)
        self.with_reference: bool = start["with_reference"]
        self.at_once = run.memory.micro_batch_tokens or REFERENCE_TOKENS
        self.version = 0

    def take(self, message: Message) -> Message:
        """Other weights from here on."""
        self.policy.load_adapter(Path(message["folder"]))
        self.version = message["version"]
        self.engine.follow(self.policy.save_adapter, self.version)
        return {"taken": message["adapter"]}

    def answer(self, message: Message, idle: float) -> Message:
        """A share's rollouts, in its order. `idle`: seconds since the last one in which there was nothing to do."""
        start = time.monotonic()
        rollouts = self.engine.generate(requests_of(message["groups"]), self.version)
        if self.with_reference:
            rollouts = self._with_reference(rollouts)
        rows = [[r.tokens, r.text, r.done, r.logp, r.more, r.ref] for r in rollouts]
        return {"share": message["share"], "version": self.version, "rollouts": rows, "busy": time.monotonic() - start, "idle": idle}

    def _with_reference(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The reference's log-probability of every token, whichever window wrote it."""
        from localrl.batch import Request, collate

        whole = [replace(r, request=Request(r.request.prompt)) for r in rollouts]
        batch = collate(whole, (), self.policy.run.rollout.max_completion_length)
        order = batch.sequence_length.argsort(descending=True, stable=True)
        rows = max(1, self.at_once // int(batch.sequence_length[order[0]]))
        ref = self.policy.read_whole(batch, {"ref"}, order.split(rows)).ref
        assert ref is not None
        return [replace(r, ref=tuple(row[: len(r.tokens)])) for r, row in zip(rollouts, ref.tolist(), strict=True)]


def tell(text: str) -> None:
    """To the searchers' log."""
    print(text, file=sys.stderr, flush=True)


def groups_of(groups: Sequence[Sequence[Request]]) -> list[list[Any]]:
    """Requests as they travel, each prompt once: [number, tokens, [[sample, so_far], ...]]. The prompt's text and columns stay at home.

    >>> from localrl.batch import Prompt, Request
    >>> p = Prompt(7, (1, 2), "hi", {"answer": 3})
    >>> groups_of([[Request(p), Request(p, 1, (5,))]])
    [[7, (1, 2), [[0, ()], [1, (5,)]]]]
    """
    return [[group[0].prompt.id, group[0].prompt.tokens, [[r.sample, r.so_far] for r in group]] for group in groups]


def requests_of(groups: Sequence[Sequence[Any]]) -> list[Request]:
    """The way back, in the same order, as far as sampling needs it.

    >>> requests_of([[7, [1, 2], [[1, [5]]]]])
    [Request(prompt=Prompt(id=7, tokens=(1, 2), content='', columns={}), sample=1, so_far=(5,))]
    """
    from localrl.batch import Prompt, Request

    return [Request(Prompt(number, tuple(tokens), ""), sample, tuple(so_far)) for number, tokens, samples in groups for sample, so_far in samples]


def serve(searcher: Searcher, inbox: SimpleQueue[Message], outbox: Queue[Message]) -> None:
    """Sample share after share. New weights are taken between two of them, the newest ones, and before anything that was asked earlier."""
    shares: deque[Message] = deque()
    adapter: Message | None = None
    idle = 0.0
    while True:
        while not inbox.empty() or not (adapter or shares):
            start = time.monotonic()
            message = inbox.get()
            idle += time.monotonic() - start
            if "share" in message:
                shares.append(message)
            else:
                adapter = message
        if adapter:
            outbox.put(searcher.take(adapter))
            adapter = None
        else:
            outbox.put(searcher.answer(shares.popleft(), idle))
            idle = 0.0


def _hear(requests: BinaryIO, inbox: SimpleQueue[Message]) -> None:
    """Everything that is said to this process; at the end of it, the end of this process and of what is left of the trainer's folder."""
    folder = ""
    while (message := _receive(requests)) is not None:
        if "run" in message:
            folder = message["folder"]
        inbox.put(message)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)              # the trainer kills us before it hangs up: it had no time to tidy
    os.killpg(0, signal.SIGKILL)


def _receive(requests: BinaryIO) -> Message | None:
    head = requests.read(HEAD)
    return unframe(head + requests.read(int.from_bytes(head, "big"))) if len(head) == HEAD else None


def _tell(replies: int, outbox: Queue[Message]) -> None:
    while True:
        out = memoryview(frame(outbox.get()))
        with suppress(BrokenPipeError):                        # the trainer is gone, and the other thread sees it too
            while out:
                out = out[os.write(replies, out) :]
        outbox.task_done()


def main() -> None:
    """Become a searcher: messages on stdin and stdout, everything that is printed on stderr."""
    requests, replies = os.dup(0), os.dup(1)                   # dup: not inherited by what libraries start
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    with suppress(OSError):                                    # where there is no such file the kernel has no such choice
        Path("/proc/self/oom_score_adj").write_text("500")     # should memory run out, rather this process than the trainer
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    inbox: SimpleQueue[Message] = SimpleQueue()
    outbox: Queue[Message] = Queue()
    threading.Thread(target=_hear, args=(os.fdopen(requests, "rb"), inbox), daemon=True).start()
    threading.Thread(target=_tell, args=(replies, outbox), daemon=True).start()
    quiet_libraries()
    try:
        searcher = Searcher(inbox.get())
        outbox.put({"ready": True})
        serve(searcher, inbox, outbox)
    except UserError as error:
        outbox.put({"failed": str(error)})
        outbox.join()
        sys.exit(2)


if __name__ == "__main__":
    main()
