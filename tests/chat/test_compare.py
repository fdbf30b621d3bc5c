"""Models side by side: one loaded base for all adapters, the run's rewards, means that can be checked by hand, a page that is only a page."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from localrl.batch import Prompt, Rollout
from localrl.comparison import Answer, Comparison, Entry, Mean, Row, compare, compare_run, comparison_table, page, summary_table
from localrl.comparison.entries import wanted
from localrl.engines import llama_cpp
from localrl.engines.llama_cpp import LlamaModel, Sampling, TooLong
from localrl.exports import Files, exported, find
from localrl.settings import UserError
from tests.chat.conftest import Shell, sentence
from tests.displays import Silent

ASK = [{"role": "user", "content": "What is 2+2? Grüße"}]
GREEDY = Sampling(temperature=0.0, max_tokens=12)


def test_answers_and_rewards_side_by_side(merged: LlamaModel, trained: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, out = trained[1:]
    base, whole = out / "model-base-f32.gguf", out / "model-merged-f32.gguf"
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
    prompts = [Prompt(3, tuple(ids), ASK, {"answer": "4"}), Prompt(4, (), ASK), Prompt(5, (), "plain text")]
    entries = [
        Entry("base", Files(base)), Entry("file", Files(whole)), Entry("adapter", Files(base, out / "model-adapter-f32.gguf")),
        Entry("another", Files(base, out / "another-adapter-f32.gguf"), own=False),
    ]  # fmt: skip
    seen: list[tuple[int, int, str]] = []
    opened: list[Path] = []
    real = llama_cpp.LlamaModel.__init__

    def counted(self: LlamaModel, path: Path, *given: Any, **named: Any) -> None:
        opened.append(path)
        real(self, path, *given, **named)

    monkeypatch.setattr(llama_cpp.LlamaModel, "__init__", counted)

    def reward(rollouts: list[Rollout]) -> list[Rollout]:
        assert [r.request.prompt.columns for r in rollouts] == [{"answer": "4"}, {}, {}]
        return [replace(r, rewards=(float(len(r.tokens)), math.nan)) for r in rollouts]

    rows = compare(entries, prompts, reward, GREEDY, progress=lambda *p: seen.append(p), threads=1)
    assert opened == [base, whole], "one base for all its adapters"
    assert [row.prompt.id for row in rows] == [3, 4, 5]
    assert list(rows[0].answers) == ["base", "file", "adapter", "another"]
    assert rows[0].answers["file"].text == rows[1].answers["file"].text == merged.chat(ASK, GREEDY).finish().text
    assert [row.answers["adapter"].text for row in rows] == [row.answers["file"].text for row in rows]
    assert len({rows[0].answers[name].text for name in ("base", "adapter", "another")}) == 3
    assert rows[0].answers["another"].text == rows[1].answers["another"].text, "rendered by the file's own template"
    assert seen[-1][:2] == (12, 12)
    as_json = json.loads(json.dumps(rows[0].to_dict()))
    assert as_json["answers"]["file"]["rewards"][1] is None and as_json["columns"] == {"answer": "4"}
    with pytest.raises(UserError, match="nothing to compare"):
        compare(entries, [])
    with pytest.raises(TooLong, match="prompt 9: a prompt of 600 tokens"):
        compare(entries[:1], [Prompt(9, (5,) * 600, "x")], threads=1)


def made(values: Sequence[tuple[float, float]], names: Sequence[str] = ("good", "short")) -> Comparison:
    """Two models; the first always earns (0, 1)."""
    rows = [
        Row(Prompt(i, (1,), f"<b>{i}</b>"), {"base": Answer("x", 4, True, 0.5, (0.0, 1.0)), "<i>new": Answer("<script>alert(1)</script>", 2, False, 0.5, pair)})
        for i, pair in enumerate(values)
    ]
    return Comparison(tuple(rows), tuple(names), (1.0, 0.5))


def test_means_and_intervals() -> None:
    found = made([(1.0, 1.0), (0.0, math.nan), (1.0, 0.0), (1.0, 1.0)])
    new, base = found.summary("<i>new"), found.summary("base")
    assert new.rewards[0] == Mean(0.75, 0.25, 4)                      # sqrt(3/16 * 4/3 / 4)
    assert new.rewards[1].count == 3 and new.rewards[1].value == pytest.approx(2 / 3)
    assert found.totals("<i>new") == [1.5, 0.0, 1.0, 1.5] and base.total.value == 0.5
    assert new.gain.value == pytest.approx(0.5) and new.gain.error == pytest.approx(new.total.error)
    assert base.gain == Mean(0.0, 0.0, 4)
    assert (new.tokens, new.done, new.tokens_per_second, base.done) == (2.0, 0.0, 4.0, 1.0)


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "onclick", "onload"} & {name for name, _ in attrs}
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_only_a_page() -> None:
    text = page(made([(1.0, 1.0), (0.0, math.nan)]))
    parsed = Page()
    parsed.feed(text)
    assert not parsed.open
    assert not {"script", "b", "i", "link", "img", "iframe"} & set(parsed.tags)
    assert "<script>alert(1)</script>" in parsed.text and "<b>0</b>" in parsed.text and "<i>new" in parsed.text
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    assert "0.50 ± 1.00" in parsed.text and "cut at the limit" in parsed.text
    lone = replace(made([(1.0, 1.0)]), names=(), weights=())
    assert "<svg" not in page(lone) and "±" not in page(lone)


def test_tables_show_every_answer() -> None:
    found = made([(1.0, 1.0), (0.0, math.nan)])
    wide = replace(found, rows=tuple(replace(row, answers={f"{k}{n}": v for n in range(3) for k, v in row.answers.items()}) for row in found.rows))
    for comparison in (found, wide):
        file = io.StringIO()
        console = Console(file=file, width=100)
        console.print(comparison_table(comparison))
        console.print(summary_table(comparison))
        text = file.getvalue()
        assert text.count("<script>alert(1)") == sum(len(row.answers) for row in comparison.rows) // 2
        assert "<b>0</b>" in text and "(cut)" in text and "± 1.00" in text and "short -" in text


def test_a_run_its_checkpoints_and_files(run: Path, tmp_path: Path, shell: Shell) -> None:
    """Exports what is missing, once; then everything on one base; the table, the rows and the page by command."""
    display = Silent()
    found = compare_run(run, display, names=["base", "checkpoints", "trained"], count=3)
    assert found.models == ["base", "checkpoint-1", "checkpoint-2"], "trained is checkpoint-2 once more"
    assert any("lacks the base, the adapter of checkpoint-1, the adapter of checkpoint-2" in text for text in display.said)
    assert {(e.kind, e.checkpoint) for e in exported(run)} == {("base", "checkpoint-1"), ("adapter", "checkpoint-1"), ("adapter", "checkpoint-2")}
    assert found.names == ("correct", "format", "brevity") and len(found.rows) == 3
    assert all(len(answer.rewards) == 3 for row in found.rows for answer in row.answers.values())
    assert found.facts["checkpoint-1"].startswith("export/")

    again = Silent()
    adapter = find(run / "checkpoint-1").adapter
    assert adapter is not None and find(run).adapter == find(run / "checkpoint-2").adapter
    later = compare_run(run, again, names=["trained", str(adapter)], also=["base"], count=3)
    assert again.said == [], "nothing is exported twice"
    assert [row.answers["base"].text for row in later.rows] == [row.answers["base"].text for row in found.rows]
    assert [row.answers[adapter.stem].text for row in later.rows] == [row.answers["checkpoint-1"].text for row in found.rows]

    code, out, _ = shell("compare", str(run), "1", "2", "--prompts", "2", "--out", str(tmp_path / "r.jsonl"), "--html", str(tmp_path / "p.html"))
    assert code == 0 and "checkpoint-1" in out and "means of 2 prompts" in out
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2 and list(rows[0]["answers"]) == ["checkpoint-1", "checkpoint-2"]
    assert "checkpoint-2" in (tmp_path / "p.html").read_text("utf-8")
    code, out, _ = shell("chat", str(run / "checkpoint-2"), "--prompt", "What is 1 + 2?")
    assert code == 0 and "tok/s" in out


def test_questions_of_ones_own(run: Path) -> None:
    display = Silent()
    found = compare_run(run, display, names=["base"], texts=["What is 1 + 2?"], sampling=Sampling(temperature=0, max_tokens=20))
    assert len(found.rows) == 1 and found.rows[0].question == "What is 1 + 2?" and found.facts["prompts"] == "1 given"
    assert found.names == () and "not scored: reward 'correct' needs the column" in display.said[-1]


def test_a_runs_system_prompt_stands_above_chat_and_own_questions(run: Path, shell: Shell, tmp_path: Path) -> None:
    compare_run(run, Silent(), names=["base", "trained"], count=1)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    settings = (copy / "run.toml").read_text()
    (copy / "run.toml").write_text(settings.replace("[data]\n", '[data]\nsystem_prompt = "Add."\n'))
    assert (find(run).system, find(copy).system) == (None, "Add.")
    found = compare_run(copy, Silent(), names=["base"], texts=["1 + 2?"], sampling=Sampling(temperature=0, max_tokens=4))
    assert found.rows[0].prompt.content == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2?"}]
    saved = copy / "talk.jsonl"
    for words, first in (((), "system"), (("--system", ""), "user")):
        saved.unlink(missing_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(f"1 + 2?\n/save {saved}\n"))
            assert shell("chat", str(copy), *words)[0] == 0
        assert json.loads(saved.read_text())["messages"][0]["role"] == first


def test_names_that_stand_for_nothing(run: Path, trained: tuple[Any, Any, Path], tmp_path: Path, shell: Shell) -> None:
    for name, words in (("checkpoint-7", "holds no checkpoint-7: it has checkpoint-1, checkpoint-2"), ("bse", "nothing to compare is called 'bse'"),
                        (str(tmp_path / "no.gguf"), "no file"), (str(tmp_path), "neither a run folder")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            wanted(run, run / "checkpoint-2", [name])
    other = str(trained[2] / "model-merged-f32.gguf")
    (tmp_path / "model-merged-f32.gguf").write_bytes(Path(other).read_bytes())
    labels = [w.label for w in wanted(run, run / "checkpoint-2", [other, other, str(tmp_path / "model-merged-f32.gguf")])]
    assert labels == ["model-merged-f32", "model-merged-f32 (2)"], "the same file once, another of that name under another"
    assert "holds no checkpoint-9" in sentence(*shell("compare", str(run), "9"))


def test_a_run_without_exports_says_how_to_make_them(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "run.toml").write_text((run / "run.toml").read_text())
    with pytest.raises(UserError, match=r"holds no exported model: run `localrl export .*bare` first"):
        find(bare)
    with pytest.raises(UserError, match="--adapter goes on a base GGUF file"):
        find(bare, tmp_path / "x.gguf")
