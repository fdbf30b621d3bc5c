"""Plan against measurement, and what is remembered of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from localrl.memory.cards import GIB, Card
from localrl.memory.reality import LEAST, MOST, Others, Teacher, compare, correction, key, lessons, ratios, remember, store, tensors
from localrl.memory.work import PHASES, Work
from tests.memory.models import MODELS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRL_CACHE", str(tmp_path / "cache"))


def test_the_clocks_phases_are_held_against_the_plans() -> None:
    metrics = compare({"rollout": 100, "scoring": 200, "backward": 400, "optimiser": 300}, {"rollout": 90, "reference": 100, "learn": 440, "rewards": 1})
    assert metrics == {
        "memory/rollout_planned": 100, "memory/rollout_ratio": 0.9, "memory/reference_planned": 200, "memory/reference_ratio": 0.5,
        "memory/learn_planned": 400, "memory/learn_ratio": 1.1,
    }  # fmt: skip
    assert ratios(metrics) == {"rollout": 0.9, "scoring": 0.5, "backward": 1.1}
    assert compare({}, {"learn": 5}) == {}


def test_what_the_allocator_should_show() -> None:
    """On a GPU a plan's lines without its margin and without what the libraries take past the allocator."""
    card = Card.of("16GiB", "cuda")
    own = tensors({"rollout": 5 * GIB, "backward": 9 * GIB}, card)
    assert (own["backward"] + card.overheads.libraries) * (1 + card.overheads.fragmentation) == pytest.approx(9 * GIB, abs=2)
    assert own["rollout"] < own["backward"]
    exact = Card.budget(10**9)
    assert tensors({"backward": 1010}, exact) == {"backward": 1000}


def test_resident_memory_is_held_against_the_fullest_phase() -> None:
    """A heap keeps what the fullest phase has freed."""
    assert tensors({"rollout": 104, "backward": 520}, Card.of("8GiB", "cpu")) == {"rollout": 500, "backward": 500}
    assert tensors({"rollout": 101, "backward": 505}, Card.budget(600)) == {"rollout": 100, "backward": 500}


def test_the_largest_ratio_is_kept_within_bounds() -> None:
    assert correction("a") == dict.fromkeys(PHASES, 1.0)
    assert remember("a", {"backward": 1.1, "rollout": 1.02})
    assert remember("a", {"backward": 1.3, "rollout": 1.01})
    assert not remember("a", {"backward": 1.2})
    assert remember("b", {"scoring": 7.0})
    assert correction("a") == {"load": 1.0, "rollout": 1.02, "scoring": 1.0, "backward": 1.3, "optimiser": 1.0, "export": 1.0}
    assert correction("b")["scoring"] == MOST
    assert lessons()["a"].count == 2 and len(lessons()["a"].date) == 10
    assert not list(store().parent.glob(".*"))                      # what was written beside is gone


def test_short_responses_teach_nothing_but_the_worst_case_does() -> None:
    assert not remember("a", {"backward": 0.7})
    assert correction("a")["backward"] == 1.0
    assert remember("a", {"backward": 0.96, "rollout": 0.1}, worst_case=True)
    assert correction("a")["backward"] == 0.96 and correction("a")["rollout"] == LEAST
    assert remember("a", {"backward": 1.01})
    assert correction("a")["backward"] == 1.01


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": {"ratios": {"backward": 50}, "count": 1, "date": ""}}', '{"a": {"count": 1}}', "\x00"])
def test_a_damaged_file_is_ignored_with_a_sentence_and_written_anew(text: str) -> None:
    store().parent.mkdir(parents=True)
    store().write_text(text)
    said: list[str] = []
    assert correction("a", said.append) == dict.fromkeys(PHASES, 1.0)
    assert len(said) == 1 and str(store()) in said[0]
    assert remember("a", {"backward": 1.2}) and correction("a", said.append)["backward"] == 1.2
    assert len(said) == 1 and json.loads(store().read_text())


def test_a_place_that_cannot_be_written_costs_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCALRL_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    assert not remember("a", {"backward": 1.2}, say=said.append)
    assert any("could not be kept" in text for text in said)


def test_where_lessons_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert store() == Path("/some/cache/localrl/memory.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store() == Path.home() / ".cache" / "localrl" / "memory.json"


def test_a_lesson_belongs_to_card_model_and_types() -> None:
    card, shape = Card.of("16GiB", "cuda"), MODELS["Qwen3-8B"]
    work = Work("nf4", 2, 16, "all-linear", False, "adamw", 8, 8, 512, 1536, False, "cuda", False, 1, False)
    own = key(card, shape, work)
    assert own == key(card, shape, replace(work, prompts_per_step=3, max_completion_length=9))
    others = {
        key(Card.of("RTX 4080", "cuda"), shape, work),
        key(card, replace(shape, layers=35), work),
        key(card, shape, replace(work, quantization="int8")),
        key(card, shape, replace(work, compute_bytes=4)),
    }
    assert len(others | {own}) == 5


def test_a_run_teaches_when_it_has_news() -> None:
    teacher = Teacher("a")
    for ratio in (0.8, 1.1, 1.05, 1.2):
        teacher.look({"memory/learn_ratio": ratio, "memory/learn_planned": 5.0})
    assert correction("a")["backward"] == 1.2 and lessons()["a"].count == 2
    teacher.look({"memory/rollout_ratio": 0.9}, worst_case=True)
    assert correction("a")["rollout"] == 0.9


def test_what_others_take_is_what_is_missing_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """(What the driver says is replaced: there is no GPU here.)"""
    free, own = 10 * GIB, 2 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: own)
    others = Others(torch.device("cuda"))
    free, own = 7 * GIB, 5 * GIB                                    # ours has grown
    assert others.metrics() == {"memory/others": 0.0}
    free -= GIB
    assert others.metrics() == {"memory/others": GIB}
    free, own = 12 * GIB, 2 * GIB                                   # somebody has left
    assert others.metrics() == {"memory/others": 0.0}
    assert Others(torch.device("cpu")).metrics() == {}
