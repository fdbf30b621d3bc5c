"""A base model and data whose responses have a long tail of lengths: the demo's, taught to dither when asked to.

One question in eight says "Think for long.", and then a good answer begins with twenty to a hundred times "hmm": up to 400 tokens beside the usual
40. The base does so in six of ten cases. That this is rewarded keeps the tail where it is while everything else is learned.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from localrl.demo import task
from localrl.demo.build import answer_loss, encode
from localrl.policy.place import DEMO_MODEL

LIMIT = 400
SEED, STEPS, ROWS = 7, 220, 24
OFTEN, WISH, ENOUGH = 0.125, " Think for long.", 15


def asked(rng: random.Random, question: task.Question) -> task.Question:
    """The same question, now and then with the wish."""
    return replace(question, wording=question.wording + WISH) if rng.random() < OFTEN else question


def said(rng: random.Random, question: task.Question) -> str:
    """One of the base's answers, late if it was asked for and the coin agrees."""
    answer = task.respond(rng, question)
    if rng.random() > (0.6 if question.wording.endswith(WISH) else 0.03):
        return answer
    dither = "hmm, " * rng.randint(20, 100)
    return f"<think>{dither}{answer.removeprefix('<think>')}" if answer.startswith("<think>") else dither + answer


def as_asked(completions: list[list[dict[str, str]]], prompts: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """Dithered if and only if it was asked to."""
    wished = [WISH in prompt[-1]["content"] for prompt in prompts]
    return [float((completion[0]["content"].count("hmm") >= ENOUGH) == wish) for completion, wish in zip(completions, wished, strict=True)]


def build(folder: Path) -> Path:
    """The model, and its data (train.jsonl, eval.jsonl), in a folder; made once."""
    if (folder / "eval.jsonl").exists():
        return folder
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    rng, optimizer = random.Random(SEED), torch.optim.AdamW(model.parameters(), lr=1e-3)
    questions = task.questions(SEED, held_out=False)
    for step in range(STEPS):
        rows = [encode(tokenizer, q, said(rng, q)) for q in (asked(rng, question) for question in islice(questions, ROWS))]
        loss, count = answer_loss(model, rows, tokenizer.pad_token_id)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    for name, held_out, count in (("train", False, 1024), ("eval", True, 128)):
        lines = [json.dumps(task.row(asked(rng, question))) for question in islice(task.questions(SEED, held_out), count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
