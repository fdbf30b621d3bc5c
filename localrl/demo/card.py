"""What the demo's base model does on held-out questions, in figures, and the model card that states them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from localrl.demo.task import Question, columns
from localrl.rewards.builtin import numeric_answer, tagged_format


@dataclass(frozen=True)
class Figures:
    """Means over held-out questions, one answer each."""

    right: float
    """Share of answers whose number is the sum."""
    tagged: float
    """Share in the asked-for format."""
    worked_out: float
    """Share whose text holds the whole working, column by column, the carry included."""
    reliability: float
    """Share of right ones among those."""
    entropy: float
    """Nats: mean over answers of the mean over their tokens."""
    tokens: float
    """Length with the end token."""
    tokens_95: float
    """95 % of the answers are no longer."""
    ended: float
    """Share that ends by itself within the limit."""


def is_worked_out(text: str, question: Question) -> bool:
    """Whether both columns are added, the carry included, be the results right or not.

    >>> is_worked_out("4 + 3 + 1 = 8 after 7+8=15", Question(47, 38)), is_worked_out("7+8=15, 4+3=7", Question(47, 38))
    (True, False)
    """
    dense = text.replace(" ", "")
    return all(column.partition("=")[0] + "=" in dense for column in columns(question))


@torch.no_grad()
def measure(model: Any, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], seed: int | None, limit: int = 96) -> Figures:
    """Answer every question once: at temperature 1 with that seed, or greedily with None. Sets torch's global seed."""
    prompts = [tokenizer.apply_chat_template(q.messages, add_generation_prompt=True, tokenize=False) for q in questions]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(seed or 0)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if seed is not None:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(**inputs, max_new_tokens=limit, output_logits=True, return_dict_in_generate=True, **how)
    said = out.sequences[:, inputs.input_ids.shape[1] :]
    end = said == tokenizer.eos_token_id
    mask = end.cumsum(1) - end.long() == 0
    logp = torch.stack(out.logits, 1).float().log_softmax(-1)
    nats = -(logp.exp() * logp).sum(-1) * mask
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    right = torch.tensor(numeric_answer(completions=texts, answer=[q.answer for q in questions]))
    tagged = torch.tensor(tagged_format(completions=texts))
    lengths = mask.sum(1).float()
    worked = torch.tensor([is_worked_out(text, question) for text, question in zip(texts, questions, strict=True)])
    return Figures(
        right=right.mean().item(),
        tagged=tagged.mean().item(),
        worked_out=worked.float().mean().item(),
        reliability=(right * worked).sum().item() / max(1, int(worked.sum())),
        entropy=(nats.sum(1) / lengths).mean().item(),
        tokens=lengths.mean().item(),
        tokens_95=lengths.quantile(0.95).item(),
        ended=end.any(1).float().mean().item(),
    )


def table(figures: dict[str, Figures]) -> str:
    """Figures side by side, as a Markdown table."""
    words = {
        "right": "right answers",
        "tagged": "well-formed",
        "worked_out": "with the whole working written out",
        "reliability": "of those, right",
        "entropy": "mean entropy, nats a token",
        "tokens": "mean length, tokens",
        "tokens_95": "95 % are no longer than",
        "ended": "ends by itself",
    }
    lines = ["| on held-out questions | " + " | ".join(figures) + " |", "|---|" + "---|" * len(figures)]
    for name, label in words.items():
        lines.append(f"| {label} | " + " | ".join(f"{asdict(column)[name]:.3g}" for column in figures.values()) + " |")
    return "\n".join(lines)
