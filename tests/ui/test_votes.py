"""Votes: counted as by hand, kept, and written as preferences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import localrl
from ui.place import Place
from ui.votes import Answer, Pair, Vote, file_of, keep, preferences, read, tally, wilson


def vote(best: int | None, *models: str) -> Vote:
    return Vote("2 + 2?", tuple(Answer(name, f"of {name}") for name in models), best, {"seed": 3})


def test_wilson_against_hand_values() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_pairs_do_not_depend_on_the_side() -> None:
    votes = [vote(0, "a", "b"), vote(0, "b", "a"), vote(1, "b", "a"), vote(None, "a", "b")]
    assert tally(votes) == [Pair("a", "b", wins=2, losses=1, ties=1)]
    assert tally(votes)[0].share == 0.625


def test_only_the_best_of_three_is_known_to_be_better() -> None:
    assert tally([vote(1, "a", "b", "c")]) == [Pair("a", "b", 0, 1, 0), Pair("b", "c", 1, 0, 0)]
    assert tally([vote(0, "a", "a")]) == []


def test_each_pair_stands_once_and_each_answer_has_its_reward() -> None:
    rows = preferences([vote(1, "a", "b", "c"), vote(None, "a", "b")])
    assert [row["rewards"] for row in rows] == [{"preferred": share} for share in (0.0, 1.0, 0.0, 0.5, 0.5)]
    assert [(row["chosen"], row["rejected"]) for row in rows if row["chosen"]] == [("of b", "of a"), ("of b", "of c")]
    assert all(row["about"] == {"seed": 3} for row in rows)


def test_kept_votes_come_back_and_a_broken_line_is_counted(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    file = file_of(place, tmp_path / "runs" / "a")
    assert read(file) == ([], 0)
    keep(file, vote(0, "a", "b\u2028"))
    with file.open("a") as out:
        out.write('{"prompt": "cut\n{"prompt": "x", "answers": [], "best": 4, "about": {}}\n')
    keep(file, vote(None, "a", "b"))
    assert read(file) == ([vote(0, "a", "b\u2028"), vote(None, "a", "b")], 2)
    assert file != file_of(place, tmp_path / "runs-a")


@pytest.mark.parametrize("prompt", ["2 + 2?", [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]])
def test_preferences_are_a_log_to_learn_from(tmp_path: Path, prompt: str | list[dict[str, str]]) -> None:
    log = tmp_path / "votes.jsonl"
    rows = preferences([Vote(prompt, vote(best, "a", "b").answers, best, {"seed": 3}) for best in (0, 1, None)])
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Path(localrl.__file__).parent / "demo" / "model"
    command = [sys.executable, "-m", "localrl", "train", "--from-log", str(log), "--dry-run", f"model.path={model}", f"log.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "400"})
    assert done.returncode == 0, done.stdout + done.stderr
