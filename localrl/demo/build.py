"""Make the demo's base model, tokenizer and data files again: `python -m localrl.demo.build` (eight to ten minutes of one core).

Supervised training from scratch on the answers of `task.respond`, with a fixed seed and on one thread, in two stages: first the
careful habits alone, until the arithmetic is safe, then all habits by their shares, so that the model is left torn between them.
The same machine gives the same bytes; another CPU may differ in the last digits of the arithmetic, and so in the weights.

What it must come to, at temperature 1 on held-out questions, quantised or not (measured in NF4 in brackets; model/README.md has the rest):
right about four times in ten (0.41), well-formed about half the time (0.55), mean entropy between 0.2 and 0.5 nats (0.44), and right nearly
always when the whole working is written out (0.99), for that is as far as a run can get. Greedily it pretends to know (0.16 right), so that
before and after differ in a chat as well.

The weights are rounded to half precision and stored as float32: the file loads anywhere without a cast, and a GGUF in F16 holds
exactly this base.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from itertools import islice
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from localrl.demo import task
from localrl.demo.card import measure, table

HERE = Path(__file__).parent
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# A small model that adds badly on purpose

The embedded default of localrl: a Llama of 0.9 million parameters with a byte-level BPE tokenizer and a chat template, taught from
scratch, on made-up text alone, to add two numbers of two digits. It has several habits: it may work the sum out column by column
and be right, or guess, or forget the carry; it may keep to `<think>...</think><answer>...</answer>`, or not; it may be brief or
long-winded. Reinforcement learning has to find out which of these is wanted. It is good for nothing else.

{figures}

(Unquantised; 400 questions whose numbers it was never trained on.) Made by `python -m localrl.demo.build` from a fixed seed; no
data but what `localrl/demo/task.py` writes. The weights are float16 values stored as float32. Licence: Apache-2.0.
"""
SEED = 2026
PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STEPS, CAREFUL_STEPS, ROWS, PEAK_LR = 700, 250, 128, 3e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in GPT-2's fashion, trained on the task's own words with the digits taken out, so that every digit is a token."""
    rng, pool = random.Random(SEED), task.questions(SEED, held_out=False)
    texts = []
    for question in islice(pool, 4000):
        said = "user\n" + question.text + "assistant\n" + task.respond(rng, question)
        texts += re.split(r"\d+", said)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[START],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about a million parameters, at random. Every in_features is a multiple of 64: bitsandbytes' NF4 blocks."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, question: task.Question, said: str) -> tuple[list[int], int]:
    """A conversation's tokens up to the end token, and where the answer starts."""
    opening = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
    head, tail = tokenizer.encode(opening), tokenizer.encode(said + END)
    return head + tail, len(head)


def answer_loss(model: LlamaForCausalLM, rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the answers' tokens, and their number. Rows are right-padded: causal attention needs no mask."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in rows])
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted], reduction="sum")
    return loss, int(wanted.sum())


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rows_per_step: int = ROWS) -> None:
    """Teach the habits: `steps` steps of AdamW on that many answers each, warm-up then cosine to nothing."""
    rng, pool = random.Random(SEED + 1), task.questions(SEED + 1, held_out=False)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98))
    model.train()
    for step in track(range(steps), description="teaching the base model"):
        lr = PEAK_LR * min(1, (step + 1) / 60) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = lr
        careful = step < CAREFUL_STEPS * steps / STEPS
        rows = [encode(tokenizer, question, task.respond(rng, question, careful)) for question in islice(pool, rows_per_step)]
        rows.sort(key=lambda row: len(row[0]))
        count = sum(len(ids) - start for ids, start in rows)
        total = 0.0
        for first in range(0, rows_per_step, 32):                      # rows of like length: hardly any padding, the same gradient
            loss, _ = answer_loss(model, rows[first : first + 32], tokenizer.pad_token_id)
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {total:.3f} nats a token", flush=True)
    model.eval()


def round_to_half(model: LlamaForCausalLM) -> None:
    """Every weight to the nearest float16, in place, still stored as float32."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())


def write_data(folder: Path, train_rows: int = 1000, eval_rows: int = 200) -> None:
    """The task as JSONL: train and held-out questions have no pair of numbers in common."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, held_out in (("train", train_rows, False), ("eval", eval_rows, True)):
        lines = [json.dumps(task.row(question)) for question in islice(task.questions(SEED + 2, held_out), rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets model/ and data/")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of 128 answers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write_data(arguments.out / "data")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, arguments.steps)
    round_to_half(model)
    model.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")
    questions = list(islice(task.questions(SEED + 3, held_out=True), 400))
    figures = table({"at temperature 1": measure(model, tokenizer, questions, SEED), "greedy": measure(model, tokenizer, questions, None)})
    (arguments.out / "model" / "README.md").write_text(CARD.format(figures=figures), encoding="utf-8")
    print(figures)


if __name__ == "__main__":
    main()
