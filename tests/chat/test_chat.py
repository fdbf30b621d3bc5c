"""Exported files talk: rendered, tokenised and continued as the trained model would, with history, stops, seeds and rewards."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from localrl.chat import Chat, changed
from localrl.engines.files import facts, is_adapter
from localrl.engines.llama_cpp import Held, LlamaModel, Sampling, TooLong
from localrl.settings import UserError

ASK = [{"role": "user", "content": "What is 2+2? Grüße"}]
GREEDY = Sampling(temperature=0.0, max_tokens=12)


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
    assert not free.full
    for wrong in (600, 512, 0):
        with pytest.raises(TooLong, match=f"{wrong} tokens does not fit a context of 512: it may hold 1 to 511"):
            merged.complete([5] * wrong)
    full = merged.complete([5] * 508, Sampling(max_tokens=50, temperature=0)).finish()
    assert len(full.tokens) == 4 and full.full


def test_min_p_keeps_what_is_likely_enough(merged: LlamaModel) -> None:
    likeliest = merged.complete("Once", GREEDY).finish().tokens
    assert merged.complete("Once", replace(GREEDY, temperature=1.0, min_p=1.0), seed=7).finish().tokens == likeliest
    firsts = [{merged.complete("Once", Sampling(max_tokens=1, min_p=p), seed=seed).finish().tokens[0] for seed in range(60)} for p in (0.0, 0.3)]
    assert len(firsts[1]) < len(firsts[0])


WRONG = [("temperature", -0.1), ("temperature", math.nan), ("top_p", 1.1), ("min_p", -1.0), ("top_k", -1), ("max_tokens", 0)]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_sampling_has_ranges(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} = .*: it lies between"):
        replace(Sampling(), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "text", "words"), [
    ("temprature", "1", "did you mean 'temperature'"), ("top_k", "1.5", "a whole number"), ("top_p", "much", "wants a number"),
    ("top_p", "7", "between 0 and 1"),
])  # fmt: skip
def test_settings_that_cannot_be(name: str, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        changed(Sampling(), name, text)


def test_adapters_are_exchanged_on_the_loaded_base(trained: tuple[Any, Any, Path], merged: LlamaModel, base: LlamaModel) -> None:
    """Also for a prompt of one token, which is computed with the graph of the token before if llama.cpp takes the new adapter for the old one.

    It knows them by their address, and gives the address of one that was freed to the next."""
    out = trained[2]
    first, second = out / "model-adapter-f32.gguf", out / "another-adapter-f32.gguf"
    with LlamaModel(out / "model-base-f32.gguf", others=[first, second], threads=1) as model:
        plain = model.chat(ASK, GREEDY).finish().tokens
        assert plain == base.chat(ASK, GREEDY).finish().tokens
        model.attach(second)
        other = model.chat(ASK, GREEDY).finish().tokens
        wanted = merged.chat(ASK, GREEDY).finish().tokens
        assert len({tuple(plain), tuple(other), tuple(wanted)}) == 3
        short = {}
        for adapter in (None, first, second):
            with LlamaModel(out / "model-base-f32.gguf", adapter, threads=1) as alone:
                short[adapter] = alone.complete([70], GREEDY).finish().tokens
        assert len({tuple(tokens) for tokens in short.values()}) == 3
        for _ in range(10):
            for adapter, tokens in ((first, wanted), (second, other), (first, wanted), (None, plain)):
                model.attach(adapter)
                assert model.adapter == adapter
                assert model.complete([70], GREEDY).finish().tokens == short[adapter]
                assert model.chat(ASK, GREEDY).finish().tokens == tokens
        begun = model.chat(ASK, GREEDY)
        next(begun.pieces)
        model.attach(first)
        with pytest.raises(ValueError, match="another reply"):
            begun.finish()


def test_a_header_is_read_as_gguf_reads_it(trained: tuple[Any, Any, Path]) -> None:
    for name in ("model-merged-f32", "model-adapter-f32"):
        path = trained[2] / f"{name}.gguf"
        said = facts(path)
        scalars = {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.") and len(field.types) == 1}
        assert said.keys() == scalars.keys() and len(said) > 5
        assert {k: v for k, v in said.items() if not isinstance(v, float)} == {k: v for k, v in scalars.items() if not isinstance(v, float)}
        assert is_adapter(path) == ("adapter" in name)


@given(st.data())
def test_a_header_that_is_cut_or_scrambled_is_no_crash(trained: tuple[Any, Any, Path], data: st.DataObject) -> None:
    whole = (trained[2] / "model-adapter-f32.gguf").read_bytes()[:700]
    cut = whole[: data.draw(st.integers(4, len(whole)))]
    at = data.draw(st.integers(4, len(cut)))
    broken = cut[:at] + data.draw(st.binary(max_size=12)) + cut[at + 12 :]
    path = trained[2] / "broken.bin"
    path.write_bytes(broken)
    with suppress(UserError):                                        # and nothing else
        facts(path)


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
    model, adapter, base = out / "model-merged-f32.gguf", out / "model-adapter-f32.gguf", out / "model-base-f32.gguf"
    text = tmp_path / "x.gguf"
    text.write_text("hello")
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:2000])
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(model.read_bytes()[:-5000])
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(adapter.read_bytes().replace(b"blk.0.attn_q", b"blk.7.attn_q"))
    failed = tmp_path / "x.gguf.failed"
    failed.write_bytes(model.read_bytes())
    cases = [
        (tmp_path / "none.gguf", None, "no file"),
        (text, None, "not a GGUF"),
        (short, None, "header of .*short.gguf is damaged or cut short"),
        (torn, None, "llama.cpp cannot load .*torn.gguf .*: export it again"),
        (base, short, "header of .*short.gguf"),
        (base, foreign, "cannot put .*foreign.* on .*the very base"),
        (failed, None, "did not pass"),
        (adapter, None, "is an adapter, not a model: it goes on top"),
        (model, model, "is a whole model, not an adapter"),
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
    chat.system = "Be long."
    assert chat.turns == 2 and chat.messages[0]["content"] == "Be long."
    assert chat.undo() == "More"
    assert "".join(chat.say("More")) != second, "the system prompt is read"
    chat.system = "Be brief."
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


def test_another_answer_to_the_same_question(merged: LlamaModel) -> None:
    chat = Chat(merged, sampling=Sampling(max_tokens=12), seed=1)
    with pytest.raises(UserError, match="nothing has been answered"):
        chat.regenerate()
    first = "".join(chat.say("Hello"))
    second, third = ("".join(chat.regenerate()) for _ in range(2))
    assert len({first, second, third}) == 3
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": third}]
    chat.regenerate().close()
    assert chat.messages[-1]["content"] == third, "nothing came: the old answer stays"
    chat.undo()
    assert "".join(chat.say("Hello")) == first, "the same seed and the same words"
    chat.set("temperature", "0")
    assert "".join(chat.regenerate()) == "".join(chat.regenerate())


def test_a_conversation_that_no_longer_fits_stays_as_it_was(merged: LlamaModel) -> None:
    chat = Chat(merged, sampling=GREEDY)
    "".join(chat.say("Hello"))
    before = list(chat.messages)
    with pytest.raises(TooLong):
        chat.say("x" * 600)
    assert chat.messages == before


def test_a_conversation_is_saved(merged: LlamaModel, tmp_path: Path) -> None:
    chat = Chat(merged, system="Be *brief*.", sampling=replace(GREEDY, stop=("END",)))
    with pytest.raises(UserError, match="nothing has been said"):
        chat.save(tmp_path / "a.jsonl")
    said = "".join(chat.say("Grüße"))
    for _ in range(2):
        chat.save(tmp_path / "a.jsonl")
        chat.save(tmp_path / "a.md")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2 and rows[0] == rows[1]
    assert rows[0]["messages"] == chat.messages and rows[0]["model"] == "model-merged-f32.gguf" and rows[0]["sampling"]["stop"] == ["END"]
    text = (tmp_path / "a.md").read_text("utf-8")
    assert text.count("## model-merged-f32.gguf") == 2 and "**user**\n\nGrüße" in text and said.strip() in text
    for path, words in ((tmp_path / "a.txt", "as .jsonl .* or as .md"), (tmp_path / "no" / "a.md", "cannot be written")):
        with pytest.raises(UserError, match=words):
            chat.save(path)
