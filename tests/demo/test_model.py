"""The shipped base model: what it weighs, that tools load it as it is, and that it is torn between its habits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from localrl.demo import build, card, task

FOLDER = build.HERE / "model"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_the_model_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4_000_000


def test_weights_are_half_precision_values_in_float32() -> None:
    for name, weight in load_file(FOLDER / "model.safetensors").items():
        assert weight.dtype == torch.float32, name
        assert torch.equal(weight, weight.half().float()), name


def test_shapes_suit_the_quantisers() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert all(module.in_features % 64 == 0 for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_the_tokenizer_is_what_the_script_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    made = build.make_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    for question in islice(task.questions(9, False), 20):
        opening = [t.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False) for t in (made, tokenizer)]
        assert opening[0] == opening[1]
        assert made.encode(opening[0]) == tokenizer.encode(opening[0])


def test_the_tokenizer_keeps_every_text_and_every_digit(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<think>7+8=15, 4 + 3 + 1 = 8</think>\n<answer>85</answer> Zürich 東京 🙂\t\r\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.decode([i]).strip() in set("0123456789") - {""} for i in ids) == sum(c.isdigit() for c in text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(build.START)}) == 3
    assert tokenizer.encode(build.START + "user\n")[0] == tokenizer.convert_tokens_to_ids(build.START)


def test_the_base_is_torn_between_its_habits(tokenizer: PreTrainedTokenizerFast) -> None:
    """In NF4, as a run holds it: head-room for every reward, and a careful habit that is worth choosing."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(FOLDER, quantization_config=config, device_map="cpu", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    questions = list(islice(task.questions(build.SEED + 3, held_out=True), 200))
    figures = card.measure(model, tokenizer, questions, seed=1)
    assert 0.3 < figures.right < 0.5
    assert 0.40 < figures.tagged < 0.60
    assert 0.2 < figures.entropy < 0.55
    assert 15 < figures.tokens < 40
    assert figures.tokens_95 <= 72
    assert figures.ended > 0.98
    assert figures.reliability > 0.95
    assert card.measure(model, tokenizer, questions[:50], seed=None).right < 0.3


def test_training_teaches_and_is_reproducible() -> None:
    tokenizer = build.make_tokenizer()
    question = task.Question(47, 38)
    row = build.encode(tokenizer, question, "<think>7+8=15, 4+3+1=8</think><answer>85</answer>")
    assert tokenizer.decode(row[0][row[1] :]) == "<think>7+8=15, 4+3+1=8</think><answer>85</answer>" + build.END
    models = [build.make_model(tokenizer) for _ in range(2)]
    with torch.no_grad():
        before, count = build.answer_loss(models[0], [row], tokenizer.pad_token_id)
    assert count == len(row[0]) - row[1]
    for model in models:
        build.train(model, tokenizer, steps=2, rows_per_step=40)
    with torch.no_grad():
        after, _ = build.answer_loss(models[0], [row], tokenizer.pad_token_id)
    assert after < before
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
