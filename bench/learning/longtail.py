"""A base model whose answers have a long tail of lengths: the demo's, taught to dither. Most answers are short, some fill 400 tokens.

It answers as the demo's base does, right or wrong, in the format or not, and now and then it dithers first ("hmm, hmm, hmm, ..."), for as long
as a coin says. Dithering has nothing to do with being right, so that there is the same to learn whatever the lengths.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from localrl.demo import task
from localrl.demo.build import answer_loss, encode
from localrl.policy.load import DEMO_MODEL

LIMIT = 400
SEED, STEPS, ROWS = 7, 300, 24
OFTEN, LONG = 0.25, 45
"""Share of answers that dither, and how many times they say hmm, on average."""


def said(rng: random.Random, question: task.Question) -> str:
    """One of the base's answers, perhaps late."""
    answer = task.respond(rng, question)
    if rng.random() > OFTEN:
        return answer
    dither = "hmm, " * min(110, 1 + int(rng.expovariate(1 / LONG)))
    return f"<think>{dither}{answer.removeprefix('<think>')}" if answer.startswith("<think>") else dither + answer


def build(folder: Path) -> Path:
    """The model, in a folder; made once."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    rng, optimizer = random.Random(SEED), torch.optim.AdamW(model.parameters(), lr=1e-3)
    questions = task.questions(SEED, held_out=False)
    for step in range(STEPS):
        rows = [encode(tokenizer, question, said(rng, question)) for question in islice(questions, ROWS)]
        loss, count = answer_loss(model, rows, tokenizer.pad_token_id)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
