"""Loads a GGUF with llama.cpp and compares it with what the trained model said. Run as a script, in a child process: a bad file aborts it.

    python -P check_worker.py job.json logits.npy result.json

It imports nothing of localrl (no torch), so that it starts in a fifth of a second. What the job and the result hold is told by `check.py`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

DECIDED = 0.5
"""Nats by which a first choice leads the second for it to count as decided."""


def load(job: dict[str, Any]) -> llama_cpp.Llama:
    """The file in strict mode: no flash attention, keys and values in F32, so that nothing but the file can differ."""
    width = max([len(s["tokens"]) for s in job["sequences"]] + [len(p) + job["count"] for p in job["prompts"]])
    llama = llama_cpp.Llama(
        job["model"],
        n_ctx=width,
        n_batch=width,
        n_ubatch=width,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        flash_attn=False,
        swa_full=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    if job["adapter"]:
        adapter = llama_cpp.llama_adapter_lora_init(llama.model, job["adapter"].encode())
        if not adapter:
            raise SystemExit("llama.cpp refuses the adapter: it does not fit the base")
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, 1, scales):
            raise SystemExit("llama.cpp could not apply the adapter")
    return llama


def logits_of(llama: llama_cpp.Llama, tokens: list[int], keep: int, start: int = 0) -> NDArray[np.float32]:
    """Logits after each of the last `keep` tokens: (keep, V). `start` > 0: these continue what was read before."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = i >= len(tokens) - keep
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        if code := llama_cpp.llama_decode(llama.ctx, batch):
            raise SystemExit(f"llama_decode returned {code}")
        address = llama_cpp.llama_get_logits(llama.ctx)
        return np.ctypeslib.as_array(address, shape=(keep, llama.n_vocab())).copy()
    finally:
        llama_cpp.llama_batch_free(batch)


def log_softmax(x: NDArray[Any]) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare_logits(llama: llama_cpp.Llama, job: dict[str, Any], reference: NDArray[np.float32]) -> dict[str, float | int]:
    """Distances over all positions kept: of the logits, of the distributions (nats), of the first choices."""
    if reference.shape[-1] != llama.n_vocab():
        raise SystemExit(f"the file has {llama.n_vocab()} tokens, the model {reference.shape[-1]}")
    kl, gaps, same, decided, at, scale = [], [0.0], 0, [0, 0], 0, 0.0
    for sequence in job["sequences"]:
        want = reference[at : at + sequence["keep"]]
        got = logits_of(llama, sequence["tokens"], sequence["keep"])
        at += sequence["keep"]
        gaps.append(float(np.abs(want - got).max()))
        scale = max(scale, float(np.abs(want).max()))
        p, q = log_softmax(want), log_softmax(got)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agree = want.argmax(-1) == got.argmax(-1)
        top = np.partition(p, -2, axis=-1)
        clear = top[:, -1] - top[:, -2] >= DECIDED
        same += int(agree.sum())
        decided = [decided[0] + int((agree & clear).sum()), decided[1] + int(clear.sum())]
    every = np.concatenate(kl)
    return {
        "positions": len(every),
        "max_abs": max(gaps),
        "largest_logit": scale,
        "kl_mean": float(every.mean()),
        "kl_p99": float(np.quantile(every, 0.99)),
        "top1": same / len(every),
        "decided": decided[1],
        "decided_top1": decided[0] / max(1, decided[1]),
    }


def compare_tokens(llama: llama_cpp.Llama, texts: list[list[Any]]) -> list[list[Any]]:
    """Texts that tokenise differently, bare or with what the tokenizer puts around them: [text, wanted, got]."""
    wrong = []
    for text, bare, dressed in texts:
        for want, special in ((bare, False), (dressed, True)):
            if want is None:
                continue
            got = llama.tokenize(text.encode(), add_bos=special, special=True)
            if got != want:
                wrong.append([text, want, got])
    return wrong


def compare_pieces(llama: llama_cpp.Llama, pieces: list[list[Any]], space_in_front: bool) -> list[list[Any]]:
    """Token sequences that read differently: [tokens, wanted, got]. `space_in_front`: one there is the tokenizer's own, and may be left out."""
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    wrong = []
    for tokens, want in pieces:
        got = b"".join(piece(vocab, token) for token in tokens).decode("utf-8", "replace")
        if want not in (got, got.removeprefix(" ") if space_in_front else got):
            wrong.append([tokens, want, got])
    return wrong


def piece(vocab: Any, token: int) -> bytes:
    """The bytes of one token, special ones written out."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, True)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def compare_dialogues(llama: llama_cpp.Llama, dialogues: list[dict[str, Any]]) -> list[list[Any]]:
    """Dialogues that the file's own template renders, or its vocabulary tokenises, differently: [messages, wanted, got]."""
    template = llama.metadata.get("tokenizer.chat_template", "")
    vocab, wrong = llama_cpp.llama_model_get_vocab(llama.model), []
    bos, eos = (piece(vocab, i).decode() if i >= 0 else "" for i in (llama.token_bos(), llama.token_eos()))
    for dialogue in dialogues:
        render = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos, add_generation_prompt=dialogue["add_generation_prompt"])
        try:
            text = render(messages=dialogue["messages"]).prompt
        except (jinja2.TemplateError, ValueError) as error:
            text = f"{type(error).__name__}: {error}"
        got = llama.tokenize(text.encode(), add_bos=False, special=True)
        if text != dialogue["text"]:
            wrong.append([dialogue["messages"], dialogue["text"], text])
        elif got != dialogue["ids"]:
            wrong.append([dialogue["messages"], dialogue["ids"], got])
    return wrong


def specials(vocab: Any) -> dict[str, int | bool]:
    """Special tokens as llama.cpp understood the file, by GGUF key."""
    ids = {"bos": llama_cpp.llama_vocab_bos, "eos": llama_cpp.llama_vocab_eos, "padding": llama_cpp.llama_vocab_pad}
    adds = {"bos": llama_cpp.llama_vocab_get_add_bos, "eos": llama_cpp.llama_vocab_get_add_eos}
    found: dict[str, int | bool] = {f"{name}_token_id": int(ask(vocab)) for name, ask in ids.items()}
    return found | {f"add_{name}_token": bool(ask(vocab)) for name, ask in adds.items()}


def greedy(llama: llama_cpp.Llama, prompt: list[int], count: int, ends: list[int]) -> list[int]:
    """`count` first choices, fewer if the text ends."""
    written: list[int] = []
    logits = logits_of(llama, prompt, 1)
    while len(written) < count:
        written.append(int(logits[0].argmax()))
        if written[-1] in ends:
            break
        logits = logits_of(llama, written[-1:], 1, start=len(prompt) + len(written) - 1)
    return written


def main(job_file: str, logits_file: str, result_file: str) -> None:
    """Everything, into one JSON file."""
    job = json.loads(Path(job_file).read_text())
    llama = load(job)
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    ends = [i for i in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    result = {
        "tokens": compare_tokens(llama, job["texts"]),
        "pieces": compare_pieces(llama, job["pieces"], job["space_in_front"]),
        "dialogues": compare_dialogues(llama, job["dialogues"]),
        "template": llama.metadata.get("tokenizer.chat_template", ""),
        "specials": specials(vocab),
        "ends": ends,
        "eos": llama.token_eos(),
        "logits": compare_logits(llama, job, np.load(logits_file, mmap_mode="r", allow_pickle=False)),
        "greedy": [greedy(llama, prompt, job["count"], ends) for prompt in job["prompts"]],
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
