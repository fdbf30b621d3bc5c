"""Exported files talk: rendered, tokenised and continued as the trained model would, with history, stops, seeds and rewards."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from localrl.batch import Prompt, Rollout
from localrl.chat import Chat, compare, summarise
from localrl.engines.llama_cpp import Held, LlamaModel, Sampling
from localrl.export import Sample, export
from localrl.settings import UserError

ASK = [{"role": "user", "content": "What is 2+2? Grüße"}]
GREEDY = Sampling(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="session", autouse=True)
def _close_null_files() -> Iterator[None]:
    """llama-cpp-python never closes its two /dev/null, which Python mentions at exit."""
    yield
    from llama_cpp import _utils

    _utils.outnull_file.close()
    _utils.errnull_file.close()


@pytest.fixture(scope="module")
def trained(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(live model, tokenizer, folder with model-merged-f32, model-base-f32 and model-adapter-f32)."""
    folder = make_model("llama")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"), adapter_name="policy").train()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    out = tmp_path_factory.mktemp("gguf")
    told = [Sample(tuple(tokenizer("Hello there")["input_ids"]))]
    for what in ("merged", "adapter"):
        export(model, tokenizer, out, what=what, dtype="f32", samples=told)  # type: ignore[arg-type]
    return model, tokenizer, out


@pytest.fixture(scope="module")
def merged(trained: tuple[Any, Any, Path]) -> LlamaModel:
    return LlamaModel(trained[2] / "model-merged-f32.gguf", threads=1)


@pytest.fixture(scope="module")
def base(trained: tuple[Any, Any, Path]) -> LlamaModel:
    return LlamaModel(trained[2] / "model-base-f32.gguf", threads=1)


def first_choices(model: Any, tokens: list[int], count: int) -> list[int]:
    """Greedy text of the live model, the slow way."""
    with torch.no_grad():
        for _ in range(count):
            tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
    return tokens[-count:]


def test_a_chat_is_what_the_trained_model_says(trained: tuple[Any, Any, Path], merged: LlamaModel, base: LlamaModel) -> None:
    model, tokenizer, out = trained
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
    assert merged.tokenize(merged.render(ASK), whole=False) == prompt
    reply = merged.chat(ASK, GREEDY).finish()
    wanted = first_choices(model, prompt, 12)
    assert reply.tokens == wanted
    assert reply.prompt_tokens == len(prompt)
    assert reply.tokens_per_second > 0
    assert base.chat(ASK, GREEDY).finish().tokens != wanted
    with LlamaModel(out / "model-base-f32.gguf", out / "model-adapter-f32.gguf", threads=1) as both:
        assert both.chat(ASK, GREEDY).finish().tokens == wanted


def test_pieces_are_the_text_and_special_tokens_are_not_shown(merged: LlamaModel, trained: tuple[Any, Any, Path]) -> None:
    reply = merged.complete("Hi", Sampling(max_tokens=200), seed=5)
    pieces = list(reply)
    assert "".join(pieces) == reply.text
    assert reply.text == trained[1].decode(reply.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert reply.done == (reply.tokens[-1] == trained[1].eos_token_id)


def test_seeds_and_nothing_is_cut_off_the_distribution_unasked(merged: LlamaModel) -> None:
    again = [merged.complete("Once", Sampling(max_tokens=20), seed=seed).finish().tokens for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    firsts = {merged.complete("Once", Sampling(max_tokens=1, temperature=5.0), seed=seed).finish().tokens[0] for seed in range(150)}
    assert len(firsts) > 60, "llama-cpp-python's own defaults keep 40"
    assert len({merged.complete("Once", Sampling(max_tokens=1, top_k=1), seed=seed).finish().tokens[0] for seed in range(20)}) == 1


def test_limits_and_stops(merged: LlamaModel) -> None:
    free = merged.complete("Once", GREEDY).finish()
    assert len(free.tokens) == 12
    assert not free.done
    assert len(free.text) > 4
    stop = free.text[3:5]
    cut = merged.complete("Once", replace(GREEDY, stop=("never this", stop))).finish()
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.done
    with pytest.raises(UserError, match="600 tokens does not fit a context of 512"):
        merged.complete([5] * 600)
    full = merged.complete([5] * 508, Sampling(max_tokens=50)).finish()
    assert len(full.tokens) <= 4


@given(st.text("abEND ", max_size=30), st.lists(st.integers(0, 30), max_size=5))
def test_stop_strings_are_found_however_the_text_comes(text: str, cuts: list[int]) -> None:
    held, shown, over = Held(("END", "bb")), "", False
    edges = [0, *sorted(cuts), len(text)]
    for start, end in pairwise(edges):
        if not over and start < end:
            piece, over = held.add(text[start:end])
            shown += piece
    shown += held.rest("")
    at = min((i for s in ("END", "bb") if (i := text.find(s)) >= 0), default=len(text))
    assert shown == text[:at]
    assert over == (at < len(text))


def test_quiet(trained: tuple[Any, Any, Path], capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaModel(trained[2] / "model-base-f32.gguf", trained[2] / "model-adapter-f32.gguf", n_ctx=64, threads=1) as model:
        model.chat(ASK, GREEDY).finish()
    assert capfd.readouterr() == ("", "")


def test_files_that_cannot_talk_say_why(trained: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = trained[2]
    model, adapter = out / "model-merged-f32.gguf", out / "model-adapter-f32.gguf"
    text = tmp_path / "x.gguf"
    text.write_text("hello")
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:2000])
    failed = tmp_path / "x.gguf.failed"
    failed.write_bytes(model.read_bytes())
    cases = [
        (tmp_path / "none.gguf", None, "no file"),
        (text, None, "not a GGUF"),
        (short, None, "cannot load .*short.gguf"),
        (failed, None, "did not pass"),
        (adapter, None, "an adapter is not a model"),
        (model, model, "cannot put .* on .*the very base"),
    ]
    for path, on_top, words in cases:
        with pytest.raises(UserError, match=words):
            LlamaModel(path, on_top)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"pip install \"localrl\[chat\]\""):
        LlamaModel(model)


def test_a_conversation_remembers_takes_back_and_begins_again(merged: LlamaModel) -> None:
    chat = Chat(merged, system="Be brief.", sampling=GREEDY)
    first = "".join(chat.say("Hello"))
    assert chat.messages == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": first},
    ]  # fmt: skip
    assert chat.last is not None
    before = chat.last.prompt_tokens
    second = "".join(chat.say("More"))
    assert chat.turns == 2
    assert chat.last.prompt_tokens > before
    assert chat.undo() == "More"
    assert "".join(chat.say("More")) == second
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.undo() is None
    assert "".join(chat.say("Hello")) == first


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(merged: LlamaModel) -> None:
    chat = Chat(merged, sampling=Sampling(max_tokens=100), seed=2)
    stream = chat.say("Hello")
    piece = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert chat.messages[-1] == {"role": "assistant", "content": piece}
    older = merged.complete("a", Sampling(max_tokens=9))
    next(older.pieces)
    merged.complete("b", GREEDY).finish()
    with pytest.raises(ValueError, match="another reply"):
        older.finish()
    untouched = Chat(merged)
    untouched.say("never read")
    assert untouched.messages == []


def test_compare_puts_answers_and_rewards_side_by_side(merged: LlamaModel, trained: tuple[Any, Any, Path]) -> None:
    tokenizer, out = trained[1:]
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
    prompts = [Prompt(3, tuple(ids), ASK, {"answer": "4"}), Prompt(4, (), ASK), Prompt(5, (), "plain text")]
    seen: list[tuple[int, int, str]] = []
    opened: list[LlamaModel] = []

    def open_base() -> LlamaModel:
        opened.append(LlamaModel(out / "model-base-f32.gguf", threads=1))
        return opened[0]

    def reward(rollouts: list[Rollout]) -> list[Rollout]:
        assert [r.request.prompt.columns for r in rollouts] == [{"answer": "4"}, {}, {}]
        return [replace(r, rewards=(float(len(r.tokens)), math.nan)) for r in rollouts]

    rows = compare({"base": open_base, "trained": merged}, prompts, reward, GREEDY, progress=lambda *p: seen.append(p))
    assert [row.prompt.id for row in rows] == [3, 4, 5]
    assert rows[0].answers["trained"].text == rows[1].answers["trained"].text == merged.chat(ASK, GREEDY).finish().text
    assert rows[0].answers["base"].text != rows[0].answers["trained"].text
    assert seen[-1] == (6, 6, "trained")
    with pytest.raises(ValueError, match="has been closed"):
        opened[0].complete("x")
    means = summarise(rows)
    assert means["base"].rewards[0] == means["base"].tokens
    assert math.isnan(means["base"].rewards[1])
    as_json = json.loads(json.dumps(rows[0].to_dict()))
    assert as_json["answers"]["trained"]["rewards"][1] is None
    assert as_json["columns"] == {"answer": "4"}
    with pytest.raises(UserError, match="nothing to compare"):
        compare({"a": merged}, [])


def test_without_rewards(merged: LlamaModel) -> None:
    rows = compare({"a": merged}, [Prompt(0, (), "x")], sampling=GREEDY)
    assert rows[0].answers["a"].rewards == ()
    assert summarise(rows)["a"].rewards == ()
    assert summarise([]) == {}
