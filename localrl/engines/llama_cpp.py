"""A GGUF file that talks: llama.cpp through llama-cpp-python, for chat and for comparing.

A file is first opened in a child process, because a bad one aborts the interpreter that holds it. Prompts are rendered by the template
within the file. Not for several threads at once, and not beside torch's threads at work: both spin while they wait, and each starves the
other.

Left out: sampling many rows at a time (rollouts need that, chat does not), and truncation after tempering. llama.cpp applies top-k and
top-p before the temperature, the trainer after it; at temperature 1 there is no difference.
"""

from __future__ import annotations

import codecs
import ctypes
import json
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from localrl.batch import Message
from localrl.settings import UserError

PROBE = """
import ctypes, json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=32, n_batch=32, n_threads=1, n_threads_batch=1)
if len(sys.argv) > 2:
    adapter = llama_cpp.llama_adapter_lora_init(model.model, sys.argv[2].encode())
    if not adapter:
        sys.exit("failed to fit the adapter")
    if llama_cpp.llama_set_adapters_lora(model.ctx, (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)):
        sys.exit("failed to apply the adapter")
model.eval(model.tokenize(b"Hello", add_bos=True, special=True)[:8] or [0])
print(json.dumps({"context": model._model.n_ctx_train()}))
"""
"""What the child does: load, tokenise, compute. It tells for how long a context the model was trained."""

PROBE_SECONDS = 1800.0
INSTALL = 'CMAKE_ARGS="-DLLAVA_BUILD=OFF" pip install "localrl[chat]"'


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. The defaults are the distribution itself, as training samples it."""

    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Strings that end a reply, beside the file's own end tokens; they are not part of its text."""


@dataclass
class Reply:
    """A reply while it is being written: iterate to get its text piece by piece, then read what it was."""

    pieces: Iterator[str]
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    """As sampled, the end token included."""
    text: str = ""
    """So far, without special tokens."""
    done: bool = False
    """It ended by itself, not at the length limit."""
    seconds: float = 0.0
    """From the first call to the last token, reading the prompt included."""

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def finish(self) -> Self:
        """Read it to its end without looking at the pieces."""
        for _ in self.pieces:
            pass
        return self

    @property
    def tokens_per_second(self) -> float:
        """Written tokens a second, reading the prompt included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


class LlamaModel:
    """One loaded GGUF, with an adapter on top if given."""

    def __init__(self, path: Path, adapter: Path | None = None, *, n_ctx: int = 4096, threads: int | None = None) -> None:
        """`n_ctx`: tokens of prompt and reply together, at most what the model was trained for. `threads`: None for what is free.

        UserError if llama-cpp-python is missing, a file is no GGUF, llama.cpp refuses it, or the adapter does not fit.
        """
        try:
            import llama_cpp
            from llama_cpp.llama_chat_format import Jinja2ChatFormatter
        except ImportError:
            raise UserError(f"chatting needs llama-cpp-python, which is not installed: {INSTALL}") from None
        for file in (path, adapter):
            if file is not None:
                require_gguf(file)
        self.path, self.adapter = path, adapter
        self._writing: Reply | None = None  # there is one context: a reply ends where the next begins
        self.n_ctx = min(n_ctx, probe(path, adapter))
        cores = threads or free_cores()
        self._cpp: Any = llama_cpp
        self._formatter: Any = Jinja2ChatFormatter
        self._loaded: Any = llama_cpp.Llama(
            str(path),
            n_ctx=self.n_ctx,
            n_batch=min(512, self.n_ctx),
            n_threads=cores,
            n_threads_batch=cores,
            n_gpu_layers=-1,
            verbose=False,
        )
        self._free = weakref.finalize(self, self._loaded.close)  # at the latest before the interpreter takes itself apart
        if adapter is not None:
            self._attach(adapter)

    def _attach(self, adapter: Path) -> None:
        """The adapter belongs to the model from here on, and is freed with it. (llama_cpp's own lora_path gives up memory mapping.)"""
        handle = self._cpp.llama_adapter_lora_init(self._llama.model, str(adapter).encode())
        if not handle:
            raise UserError(f"{adapter} does not fit {self.path}: take the base GGUF that was exported with it")
        self._handles = (self._cpp.llama_adapter_lora_p_ctypes * 1)(handle), (ctypes.c_float * 1)(1.0)
        if self._cpp.llama_set_adapters_lora(self._llama.ctx, self._handles[0], 1, self._handles[1]):
            raise UserError(f"llama.cpp could not apply {adapter} to {self.path}: export it again")

    @property
    def _llama(self) -> Any:
        if self._loaded is None:  # llama.cpp would crash
            raise ValueError(f"{self.path} has been closed")
        return self._loaded

    def close(self) -> None:
        """Give its memory back; the model is of no use afterwards."""
        self._free()
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def template(self) -> str | None:
        """The chat template within the file."""
        template = self._llama.metadata.get("tokenizer.chat_template")
        return None if template is None else str(template)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the next reply, by the file's own template. UserError if there is none, or if it refuses these."""
        import jinja2

        if self.template is None:
            raise UserError(f"{self.path} holds no chat template: give the whole prompt as text")
        bos, eos = (self.piece(i).decode("utf-8", "replace") if i >= 0 else "" for i in (self._llama.token_bos(), self._llama.token_eos()))
        try:
            return str(self._formatter(self.template, eos_token=eos, bos_token=bos)(messages=list(messages)).prompt)
        except (jinja2.TemplateError, ValueError) as error:
            raise UserError(f"the chat template of {self.path} refuses these messages ({error}): mind the order of the roles") from None

    def tokenize(self, text: str, *, whole: bool) -> list[int]:
        """Token ids; special tokens in the text count as such. `whole`: add what the file puts around a text (bos, eos)."""
        return list(self._llama.tokenize(text.encode(), add_bos=whole, special=True))

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of one token; `special` = False: none for a special one."""
        size, vocab = 64, self._cpp.llama_model_get_vocab(self._llama.model)
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None, seed: int = 0) -> Reply:
        """The next reply of a conversation. What it shares with the one before is not computed again."""
        return self.complete(self.tokenize(self.render(messages), whole=False), sampling, seed, fresh=False)

    def complete(self, prompt: str | Sequence[int], sampling: Sampling | None = None, seed: int = 0, *, fresh: bool = True) -> Reply:
        """What follows a text or token ids. `fresh`: nothing is kept from before, the same arguments give the same reply.

        UserError if the prompt leaves no room.
        """
        tokens = self.tokenize(prompt, whole=True) if isinstance(prompt, str) else list(prompt)
        if not tokens or len(tokens) >= self.n_ctx:
            raise UserError(f"a prompt of {len(tokens)} tokens does not fit a context of {self.n_ctx}: shorten it (at least 1), or raise n_ctx")
        reply = Reply(iter(()), len(tokens))
        reply.pieces = self._write(reply, tokens, sampling or Sampling(), seed, fresh)
        return reply

    def _write(self, reply: Reply, prompt: list[int], sampling: Sampling, seed: int, fresh: bool) -> Iterator[str]:
        start, self._writing = time.perf_counter(), reply
        if fresh:
            self._llama.reset()
        self._llama.set_seed(seed)
        stream = self._llama.generate(
            prompt, temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=0.0, typical_p=1.0, repeat_penalty=1.0
        )
        held, decoder = Held(sampling.stop), codecs.getincrementaldecoder("utf-8")("replace")
        room = min(sampling.max_tokens, self.n_ctx - len(prompt))
        while len(reply.tokens) < room and not reply.done:
            if self._writing is not reply:
                raise ValueError("another reply of this model has begun: read one to its end first")
            vocab = self._cpp.llama_model_get_vocab(self._llama.model)
            token = int(next(stream))
            reply.tokens.append(token)
            reply.seconds = time.perf_counter() - start
            if self._cpp.llama_vocab_is_eog(vocab, token):
                reply.done = True
                break
            text, reply.done = held.add(decoder.decode(self.piece(token, special=False)))
            if text:
                reply.text += text
                yield text
        stream.close()
        if rest := held.rest(decoder.decode(b"", final=True)):
            reply.text += rest
            yield rest


class Held:
    """Text that might be the beginning of a stop string waits here until it is known.

    >>> held = Held(("END",))
    >>> held.add("a E"), held.add("N x E"), held.add("ND b"), held.rest("")
    (('a ', False), ('EN x ', False), ('', True), '')
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.waiting, self.over = tuple(stop), "", False

    def add(self, text: str) -> tuple[str, bool]:
        """(what may be shown, has a stop string come)."""
        self.waiting += text
        places = [at for s in self.stop if (at := self.waiting.find(s)) >= 0]
        if places:
            text, self.waiting, self.over = self.waiting[: min(places)], "", True
            return text, True
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.waiting.endswith(s[:n])), default=0)
        text, self.waiting = self.waiting[: len(self.waiting) - keep], self.waiting[len(self.waiting) - keep :]
        return text, False

    def rest(self, text: str) -> str:
        """What was held back for a stop string that never came."""
        return "" if self.over else self.waiting + text


def free_cores() -> int:
    """Physical cores that nobody is using, 8 at most: threads that share a core with others wait for each other, spinning."""
    return max(1, min(8, psutil.cpu_count(logical=False) or 1) - round(psutil.getloadavg()[0]))


def require_gguf(path: Path) -> None:
    """UserError unless this is a GGUF file by its first bytes: llama.cpp is not shown anything else."""
    if not path.is_file():
        raise UserError(f"no file {path}: export one with `localrl export`")
    if path.suffix == ".failed":
        raise UserError(f"{path} did not pass its self-check and may say anything: export again, the report lies beside it")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: export one with `localrl export`")


def probe(path: Path, adapter: Path | None) -> int:
    """Open the files in a child process. -> tokens of context the model was trained for; UserError with llama.cpp's reason otherwise."""
    command = [sys.executable, "-P", "-c", PROBE, str(path), *([str(adapter)] if adapter else [])]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS, check=False)
    if child.returncode == 0:
        return int(json.loads(child.stdout.splitlines()[-1])["context"])
    said = [line.strip() for line in child.stderr.splitlines() if re.search("error|failed|assert", line, re.IGNORECASE)]
    reason = said[0][:200] if said else f"exit code {child.returncode}"
    if adapter is not None and "adapter" in " ".join(said):
        raise UserError(f"llama.cpp cannot put {adapter} on {path} ({reason}): an adapter needs the very base it was exported with")
    raise UserError(f"llama.cpp cannot load {path} ({reason}): export it again (an adapter is not a model, it goes on top of its base)")
