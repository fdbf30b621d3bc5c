"""Answers many prompts through a GGUF, with random numbers that were drawn elsewhere. Run as a script, in a child process.

    python -P answer_worker.py job.json uniforms.npy result.json

Column i of `uniforms` (tokens, prompts) holds the numbers of prompt i: a token is where the running sum of probabilities passes its number,
which is how the trainer samples. A file that says what the model says then answers word for word as the model did with these numbers. llama.cpp
runs with its own defaults here (flash attention, keys and values in F16), as a person will run it.

It imports nothing of localrl (no torch). Prompts that are alike stand side by side and are read once. New waves are begun only as long as
`seconds` have not passed; the result holds null for prompts that nobody came to.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

LOG_LEVEL = 4
"""llama.cpp's errors are this and are passed on: they are the last words of a child that dies."""


@llama_cpp.llama_log_callback
def only_errors(level: int, text: bytes, _: Any) -> None:
    """What llama.cpp says of itself is not asked for."""
    if level == LOG_LEVEL:
        sys.stderr.write(text.decode("utf-8", "replace"))


class Reader:
    """The model with room for a wave: `rows` sequences of `width` tokens."""

    def __init__(self, job: dict[str, Any], rows: int, width: int) -> None:
        llama_cpp.llama_log_set(only_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0  # the card belongs to the model that is compared with
        self.model = llama_cpp.llama_model_load_from_file(job["model"].encode(), options)
        if not self.model:
            raise SystemExit("llama.cpp cannot load the file")
        room = llama_cpp.llama_context_default_params()
        each = -(-width // 256) * 256
        room.n_ctx, room.n_seq_max, room.n_batch, room.n_ubatch = each * rows, rows, max(512, width), 512
        room.n_threads = room.n_threads_batch = job["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, room)
        if not self.context:
            raise SystemExit("llama.cpp has no room for a context")
        if job["adapter"]:
            self._attach(job["adapter"])
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def _attach(self, path: str) -> None:
        adapter = llama_cpp.llama_adapter_lora_init(self.model, path.encode())
        if not adapter:
            raise SystemExit("llama.cpp refuses the adapter: it does not fit the base")
        pointers, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(self.context, pointers, 1, scales):
            raise SystemExit("llama.cpp could not apply the adapter")

    def read(self, tokens: list[int], positions: list[int], rows: list[int], *, last: bool) -> NDArray[np.float32]:
        """Logits behind each token, or behind the last one alone: (n, V), n is 1 or the number of tokens."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, position, row) in enumerate(zip(tokens, positions, rows, strict=True)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
                batch.logits[i] = not last or i == len(tokens) - 1
            if code := llama_cpp.llama_decode(self.context, batch):
                raise SystemExit(f"llama_decode returned {code}")
            address = llama_cpp.llama_get_logits(self.context)
            return np.ctypeslib.as_array(address, shape=(1 if last else len(tokens), self.size)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)

    def prefill(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """Every prompt into its row; one that is like the row before is copied. -> (n, V) logits behind the prompts."""
        llama_cpp.llama_memory_clear(self.memory, True)
        found: list[NDArray[np.float32]] = []
        for row, prompt in enumerate(prompts):
            if row and prompt == prompts[row - 1]:
                llama_cpp.llama_memory_seq_cp(self.memory, row - 1, row, -1, -1)
                found.append(found[-1])
            else:
                found.append(self.read(prompt, list(range(len(prompt))), [row] * len(prompt), last=True))
        return np.concatenate(found)

    def ends(self, token: int) -> bool:
        """Whether the file says that a reply is over here."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def text(self, token: int) -> bytes:
        """Its bytes; none of a special token."""
        buffer = ctypes.create_string_buffer(512)
        return buffer.raw[: max(0, llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 512, 0, False))]


def draw(logits: NDArray[np.float32], uniform: NDArray[np.float64], temperature: float) -> list[int]:
    """(n, V) logits and (n,) numbers of [0, 1) -> n tokens. Temperature 0: the likeliest."""
    if temperature == 0:
        return [int(i) for i in logits.argmax(-1)]
    p = logits.astype(np.float64) / temperature
    p = np.exp(p - p.max(-1, keepdims=True)).cumsum(-1)
    return [min(int(np.searchsorted(row, u * row[-1], side="right")), len(row) - 1) for row, u in zip(p, uniform, strict=True)]


def wave(reader: Reader, prompts: list[list[int]], uniforms: NDArray[np.float64], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers to some prompts, decoded together: tokens (with the one that ends it), and whether it ended."""
    stops = [stop.encode() for stop in job["stop"]]
    answers: list[dict[str, Any]] = [{"tokens": [], "done": False} for _ in prompts]
    texts = [b""] * len(prompts)
    running, logits = list(range(len(prompts))), reader.prefill(prompts)
    for at in range(job["limit"]):
        for row, token in zip(running, draw(logits, uniforms[at, running], job["temperature"]), strict=True):
            answers[row]["tokens"].append(token)
            texts[row] += reader.text(token)
            answers[row]["done"] = reader.ends(token) or any(stop in texts[row] for stop in stops)
        running = [row for row in running if not answers[row]["done"]]
        if not running or at + 1 == job["limit"]:
            break
        newest = [answers[row]["tokens"][-1] for row in running]
        logits = reader.read(newest, [len(prompts[row]) + at for row in running], running, last=False)
    return answers


def main(job_file: str, uniforms_file: str, result_file: str) -> None:
    """Everything, into one JSON file."""
    job, start = json.loads(Path(job_file).read_text()), time.monotonic()
    uniforms = np.load(uniforms_file, mmap_mode="r", allow_pickle=False)
    prompts = job["prompts"]
    rows = min(job["rows"], len(prompts))
    reader = Reader(job, rows, max(map(len, prompts)) + job["limit"])
    answers: list[dict[str, Any] | None] = []
    while len(answers) < len(prompts) and (not answers or time.monotonic() - start < job["seconds"]):
        part = slice(len(answers), len(answers) + rows)
        answers += wave(reader, prompts[part], uniforms[:, part], job)
    answers += [None] * (len(prompts) - len(answers))
    Path(result_file).write_text(json.dumps({"answers": answers, "seconds": time.monotonic() - start}))


if __name__ == "__main__":
    main(*sys.argv[1:])
