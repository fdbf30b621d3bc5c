"""A GGUF file that talks: llama.cpp through llama-cpp-python, for chat and for comparing.

A file is first opened in a child process (`files`). Prompts are rendered by the template within the file. Adapters are exchanged on the
loaded base. Not for several threads at once, and not beside torch's threads at work: both spin while they wait, and each starves the other.

Left out: sampling many rows at a time (rollouts need that, chat does not), and truncation after tempering. llama.cpp applies top-k and
top-p before the temperature, the trainer after it; at temperature 1 there is no difference.
"""

from __future__ import annotations

import codecs
import ctypes
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from localrl.batch import Message
from localrl.engines.files import probe
from localrl.settings import UserError


class TooLong(UserError):
    """A prompt that leaves no room for a reply."""


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. The defaults are the distribution itself, as training samples it."""

    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    """Least probability that is kept, as a share of the likeliest token's. 0: off."""
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Strings that end a reply, beside the file's own end tokens; they are not part of its text."""

    def __post_init__(self) -> None:
        """UserError for a value out of its range."""
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("top_k", 0, 2**31), ("max_tokens", 1, 2**31)):
            value = getattr(self, name)
            if not low <= value <= high:                             # NaN, too
                raise UserError(f"{name} = {value}: it lies between {low:g} and {high:g}")
        if "" in self.stop:
            raise UserError("stop = '': a stop string has at least one character")


@dataclass
class Reply:
    """A reply while it is being written: iterate to get its text piece by piece, then read what it was."""

    pieces: Generator[str, None, None]
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    """As sampled, the end token included."""
    text: str = ""
    """So far, without special tokens."""
    done: bool = False
    """It ended by itself, not at a limit."""
    full: bool = False
    """It ended because the context is used up."""
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

    def __init__(
        self, path: Path, adapter: Path | None = None, *, others: Sequence[Path] = (), n_ctx: int = 4096, threads: int | None = None
    ) -> None:
        """`others`: adapters that will be attached later, looked at now. `n_ctx`: tokens of prompt and reply together, at most what the model
        was trained for. `threads`: None for what is free.

        UserError if llama-cpp-python is missing, a file is no GGUF, llama.cpp refuses it, or an adapter does not fit.
        """
        if n_ctx < 2:
            raise UserError(f"a context of {n_ctx} tokens holds no prompt and reply: at least 2")
        self._probed = {*([adapter] if adapter else []), *others}
        self.path, self.adapter = path, adapter
        self.n_ctx = min(n_ctx, probe(path, sorted(self._probed)))
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._writing: Reply | None = None                           # there is one context: a reply ends where the next begins
        self._handle: Any = None                                     # of the adapter
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
        self._free = weakref.finalize(self, self._loaded.close)      # at the latest before the interpreter takes itself apart
        if adapter is not None:
            self.attach(adapter)

    def attach(self, adapter: Path | None) -> None:
        """Another adapter on the loaded base, or none. What was computed with the one before is forgotten.

        The new one is made and set before the old one is freed: llama.cpp tells adapters apart by their address, and the other way round
        the new one may get the old one's, be taken for it, and be computed with memory that is gone. (llama_cpp's own lora_path gives up
        memory mapping.) UserError if it does not fit.
        """
        if adapter is not None and adapter not in self._probed:
            probe(self.path, [adapter])
            self._probed.add(adapter)
        new = None if adapter is None else self._cpp.llama_adapter_lora_init(self._llama.model, str(adapter).encode())
        if adapter is not None and not new:
            raise UserError(f"{adapter} does not fit {self.path}: take the base GGUF that was exported with it")
        handles = None if new is None else (self._cpp.llama_adapter_lora_p_ctypes * 1)(new)
        if self._cpp.llama_set_adapters_lora(self._llama.ctx, handles, int(new is not None), (ctypes.c_float * 1)(1.0)):
            raise UserError(f"llama.cpp could not apply {adapter} to {self.path}: export it again")
        if self._handle is not None:
            self._cpp.llama_adapter_lora_free(self._handle)
        self._handle, self.adapter, self._writing = new, adapter, None
        self._llama.reset()

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

        TooLong if the prompt leaves no room.
        """
        tokens = self.tokenize(prompt, whole=True) if isinstance(prompt, str) else list(prompt)
        self.check_room(len(tokens))
        reply = Reply((_ for _ in ()), len(tokens))
        reply.pieces = self._write(reply, tokens, sampling or Sampling(), seed, fresh)
        return reply

    def check_room(self, tokens: int) -> None:
        """TooLong if a prompt of so many tokens leaves no room for a reply."""
        if not 1 <= tokens < self.n_ctx:
            raise TooLong(f"a prompt of {tokens} tokens does not fit a context of {self.n_ctx}: it may hold 1 to {self.n_ctx - 1}")

    def _write(self, reply: Reply, prompt: list[int], sampling: Sampling, seed: int, fresh: bool) -> Generator[str, None, None]:
        start, self._writing = time.perf_counter(), reply
        if fresh:
            self._llama.reset()
        self._llama.set_seed(seed)
        stream = self._llama.generate(
            prompt, temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p, typical_p=1.0, repeat_penalty=1.0
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
        reply.full = not reply.done and len(prompt) + len(reply.tokens) >= self.n_ctx
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
