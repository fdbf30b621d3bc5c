"""The chat page's logic without a browser: prompts per column, votes, what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrl.settings import UserError
from ui import talking, votes
from ui.place import Place
from ui.talking import Said, Talk, Turn

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def talk(**more: object) -> Talk:
    said = [Said("one", 3, 1.0, True, True, rewards={"ok": 1.0}), Said("two", 3, 1.0, True, True)]
    return Talk(models=["a", "b"], turns=[Turn("question", None, None, said)], **more)  # type: ignore[arg-type]


def test_each_column_goes_on_with_its_own_answers() -> None:
    it = talk()
    it.turns.append(Turn("and then?", None, None, [Said(), Said()]))
    assert it.prompt(1, 1, "be kind") == [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "question"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "and then?"},
    ]  # fmt: skip


def test_a_held_out_prompt_is_asked_as_the_data_have_it() -> None:
    content = [{"role": "system", "content": "of the data"}, {"role": "user", "content": "q"}]
    it = Talk(models=["a"], turns=[Turn("q", content, 4, [Said("r")]), Turn("more", None, None, [Said()])])
    assert it.prompt(0, 0, "another") == content
    assert it.prompt(0, 1, "another") == [*content, {"role": "assistant", "content": "r"}, {"role": "user", "content": "more"}]


def test_models_answers_are_text() -> None:
    it = Talk(models=[HOSTILE], turns=[Turn(HOSTILE, None, None, [Said(HOSTILE, wrong=HOSTILE, rewards={HOSTILE: 1.0})])], note=HOSTILE)
    shown = talking.picture(it)
    assert "<img" not in shown and "<script" not in shown and "&lt;img" in shown


def test_blind_hides_names_until_the_vote(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    it = talk(blind=True, shown=False)
    assert ">a<" not in talking.picture(it) and "Model A" in talking.picture(it)
    assert "ok 1.00" not in talking.picture(it) and "tok/s" not in talking.picture(it)           # they would sway the vote
    talking.vote(place, it, "B", "")
    assert ">a<" in talking.picture(it) and "ok 1.00" in talking.picture(it)
    (vote,), bad = votes.read(talking.votes_on(place, ""))
    assert (vote.best, [a.model for a in vote.answers], vote.answers[0].rewards, bad) == (1, ["a", "b"], {"ok": 1.0}, 0)
    assert "0% (0% to 79%)" in talking.told(place, "")
    with pytest.raises(UserError, match="one vote an answer"):
        talking.vote(place, it, "B", "")


def test_no_vote_with_an_answer_that_is_not_there(tmp_path: Path) -> None:
    it = talk(blind=True, shown=False)
    it.turns[0].said[1] = Said(wrong="died", ended=True)
    with pytest.raises(UserError, match="an answer from each"):
        talking.vote(Place.at(tmp_path), it, "tie", "")


def test_sampling_comes_from_its_class() -> None:
    given = {name: default for name, default, _ in talking.options()} | {"stop": "a\nb"}
    assert talking.sampling(given)["stop"] == ("a", "b")
    assert {name: told for name, _, told in talking.options()}["top_k"] == "0: off."
    with pytest.raises(UserError, match="temperature = -1"):
        talking.sampling(given | {"temperature": -1})
    with pytest.raises(UserError, match=r"top_k = 1\.5"):
        talking.sampling(given | {"top_k": 1.5})


def test_what_there_is_to_open(trained_run: Path) -> None:
    place = Place.at(trained_run.parent)
    found = {model.label: model.files for model in talking.models(place, trained_run)}
    assert found["base"] is None and found["checkpoint-3"] is None
    assert talking.exporting(place, trained_run, ["base", "checkpoint-3"]) == ["compare", "tiny", "base", "checkpoint-3", "--prompts", "1"]


def test_held_out_answers_are_scored_by_all_rewards_own_questions_by_some(trained_run: Path) -> None:
    judge = talking.Judge(trained_run, trained_run.parent)
    held_out = judge.prompts[0]
    right = f"<answer>{held_out.columns['answer']}</answer>"
    turn = Turn(talking.said_last(held_out.content), held_out.content, 0, [Said(right, 9, 1.0, True, True), Said("", ended=True, wrong="died")])
    assert judge.score(turn, [held_out.content] * 2) == ""
    assert turn.said[0].rewards["correct"] == 1.0 and set(turn.said[0].rewards) == {"correct", "format", "brevity"}
    assert turn.said[1].rewards == {}
    own = Turn("?", None, None, [Said(right, 9, 1.0, True, True)])
    assert "not scored by correct" in judge.score(own, [[{"role": "user", "content": "?"}]])
    assert set(own.said[0].rewards) == {"format", "brevity"}
