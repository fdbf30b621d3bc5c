"""The C library: loaded weights, adapters that are swapped, and sequences that are decoded side by side.

Few functions, no `Llama` class: that one keeps logits of every token and knows one sequence. What a person can put right is UserError, memory
that the library could not get is MemoryError, anything else is our own mistake.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localrl.settings import INSTALL_LLAMA_CPP, UserError

BATCH = 512
"""Most tokens of one pass."""
MOST_ROWS = 256
"""llama.cpp's limit of sequences side by side."""
CELLS = 256
"""A sequence's room is a multiple of so many tokens."""
NO_MEMORY = -2
"""What llama_decode returns when there was no memory to compute in."""

Numbers = NDArray[np.int32]
_said: deque[str] = deque(maxlen=8)
"""The library's last complaints."""


def missing() -> str | None:
    """One sentence where llama-cpp-python is not there, and how to get it."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return f"rollout.engine = 'llama_cpp' needs llama-cpp-python, which is not installed: {INSTALL_LLAMA_CPP}"
    return None


def library() -> Any:
    """llama_cpp, which complains to nobody but us. UserError if it is missing."""
    if sentence := missing():
        raise UserError(sentence)
    import llama_cpp

    global _listener
    if _listener is None:
        _listener = llama_cpp.llama_log_callback(_hear)              # kept: the library calls it as long as it lives
    llama_cpp.llama_log_set(_listener, ctypes.c_void_p(0))
    return llama_cpp


_listener: Any = None


def _hear(level: int, text: bytes, user_data: Any) -> None:
    if level >= 2:                                                   # of warnings and errors; 5 goes on with what came before
        _said.append(text.decode("utf-8", "replace").strip())


def complaint() -> str:
    """What the library said last, in short."""
    lines = [line for line in _said if line.strip(". ")]
    return lines[-1][:200] if lines else "it said nothing"


class Weights:
    """A loaded GGUF, and the adapter that is on. Trust the file: llama.cpp aborts the process on a bad one (`localrl.engines.llama.check`)."""

    def __init__(self, path: Path, gpu_layers: int = 0) -> None:
        """`gpu_layers`: layers that go to the GPU; the output layer counts as one more."""
        self.lib = library()
        self.path = path
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        self._model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path} ({complaint()}): delete it, it will be made again")
        self._adapter: Any = None
        self._context: weakref.ref[Context] | None = None
        self._free = weakref.finalize(self, self.lib.llama_model_free, self._model)
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self._model)))
        self.layers = int(self.lib.llama_model_n_layer(self._model))

    @property
    def model(self) -> Any:
        """The library's handle."""
        if not self._free.alive:                                     # llama.cpp would crash
            raise RuntimeError(f"{self.path} has been closed")
        return self._model

    def swap(self, adapter: Path) -> None:
        """Another adapter from here on. UserError if it does not fit; then the one before stays on.

        The new one is loaded and set before the old one is freed. In the other order its handle may be the old one's address, llama.cpp
        takes it for unchanged, and goes on with a graph that reads freed memory. Whatever is cached belongs to the old weights: it is forgotten.
        """
        new = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode())
        if not new:
            raise UserError(f"llama.cpp refuses the adapter {adapter} ({complaint()}): take rollout.engine=torch")
        if context := self.context:
            context.set_adapter(new)
            context.clear()
        old, self._adapter = self._adapter, new
        if old:
            self.lib.llama_adapter_lora_free(old)

    @property
    def context(self) -> Context | None:
        """The one that is open."""
        return self._context() if self._context else None

    def open(self, rows: int, length: int, threads: int, *, eight_bit: bool = False) -> Context:
        """Room for `rows` sequences of `length` tokens each; the only one at a time. MemoryError if there is none."""
        if self.context:
            raise RuntimeError("one context at a time: close the other first")
        context = Context(self, rows, length, threads, eight_bit)
        if self._adapter:
            context.set_adapter(self._adapter)
        self._context = weakref.ref(context)
        return context

    def close(self) -> None:
        """Let go of everything; adapters go with their model."""
        if context := self.context:
            context.close()
        self._adapter = None
        self._free()


class Context:
    """Keys and values of sequences 0 to `rows` - 1, and one batch of tokens at a time."""

    def __init__(self, weights: Weights, rows: int, length: int, threads: int, eight_bit: bool) -> None:
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"{rows} sequences: llama.cpp decodes 1 to {MOST_ROWS} side by side")
        self.weights, self.lib, self.rows = weights, weights.lib, rows
        self.length = -(-length // CELLS) * CELLS
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * self.length, rows
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_outputs_max = rows
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = False                                  # a store of its own for each sequence: no row reads past others' cells
        settings.swa_full = True                                     # layers with a window keep all: a sequence's copy is whole at any time
        if eight_bit:
            settings.type_k = settings.type_v = self.lib.GGML_TYPE_Q8_0
        self._context = self.lib.llama_init_from_model(weights.model, settings)
        if not self._context:
            raise MemoryError(f"llama.cpp could not make room for {rows} sequences of {self.length} tokens: {complaint()}")
        self._free = weakref.finalize(self, self.lib.llama_free, self._context)
        self._memory = self.lib.llama_get_memory(self._context)
        self._token, self._position, self._sequence = (np.zeros(BATCH, dtype=np.int32) for _ in range(3))
        self._ones, self._wanted = np.ones(BATCH, dtype=np.int32), np.zeros(BATCH, dtype=np.int8)
        self._pointers = (self._sequence.ctypes.data + self._sequence.itemsize * np.arange(BATCH)).astype(np.uintp)
        self._batch = self.lib.llama_batch()
        parts: dict[str, NDArray[Any]] = {"token": self._token, "pos": self._position, "n_seq_id": self._ones, "seq_id": self._pointers, "logits": self._wanted}
        kinds = dict(self.lib.llama_batch._fields_)
        for name, array in parts.items():
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def decode(self, tokens: Numbers, positions: Numbers, sequences: Numbers, wanted: NDArray[np.bool_] | bool = True) -> NDArray[np.float32]:
        """Read n tokens, each behind the last one of its sequence. (n,) each, n <= BATCH -> (k, V), the logits after the k wanted ones, in order.

        A view of the library's own memory, until the next call. MemoryError if there was none to compute in.
        """
        n = len(tokens)
        self._token[:n], self._position[:n], self._sequence[:n], self._wanted[:n] = tokens, positions, sequences, wanted
        self._batch.n_tokens = n
        if code := self.lib.llama_decode(self.handle, self._batch):
            self.clear()
            if code == NO_MEMORY:
                raise MemoryError(f"llama.cpp had no memory to compute in: {complaint()}")
            raise RuntimeError(f"llama_decode returned {code}: {complaint()}")
        count = int(np.count_nonzero(self._wanted[:n]))
        if not count:
            return np.zeros((0, self.weights.vocabulary), dtype=np.float32)
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self._context), shape=(count, self.weights.vocabulary))

    def copy(self, source: int, target: int) -> None:
        """The target sequence becomes what the source is."""
        self.lib.llama_memory_seq_rm(self._memory, target, -1, -1)
        self.lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def drop(self, sequences: Sequence[int]) -> None:
        """Forget what these hold."""
        for sequence in sequences:
            self.lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def clear(self) -> None:
        """Forget what all of them hold."""
        self.lib.llama_memory_clear(self._memory, False)

    def set_adapter(self, adapter: Any) -> None:
        """Of a handle that `Weights` keeps."""
        handles, scales = (self.lib.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if self.lib.llama_set_adapters_lora(self.handle, handles, 1, scales):
            raise RuntimeError(f"llama.cpp could not apply the adapter: {complaint()}")

    def use_threads(self, count: int) -> None:
        """From the next call on. They sleep between calls."""
        self.lib.llama_set_n_threads(self.handle, count, count)

    @property
    def handle(self) -> Any:
        """The library's own."""
        if not self._free.alive:
            raise RuntimeError("this context has been closed")
        return self._context

    def close(self) -> None:
        """Give its memory back."""
        self._free()
        if self.weights._context and self.weights._context() is self:
            self.weights._context = None
