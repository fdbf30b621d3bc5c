"""A new run from the page: plan, data, command line, and a training that really begins; bad input said where it is given."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from localrl.config import build, load_run, presets
from localrl.memory.cards import gib
from localrl.memory.show import as_dict
from localrl.planning import plan_for_card
from localrl.settings import UserError
from localrl.status import look
from tests.ui.conftest import PATIENCE, Served
from ui import drafts, form, planned, preview
from ui.place import Place

ITEMS = form.items()
SMALL = {"steps": "2", "rollout-prompts_per_step": "2", "rollout-num_generations": "4", "rollout-max_completion_length": "16"}


def setting(page: Any, key: str) -> Any:
    return page.locator(f"#set-run-{key} input, #set-run-{key} textarea").first


# -- without a browser ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_the_command_line_is_the_run(name: str) -> None:
    run = load_run(name, None, ["rollout.temperature=0.7", 'data.path="two words.jsonl"', "seed=3", "optim.weight_decay=0.01"])
    words = shlex.split(drafts.command(run, name, ITEMS).replace("\\\n", " "))
    assert words[:4] == ["localrl", "train", "--preset", name]
    assert load_run(name, None, words[4:]) == run
    import tomllib

    assert build(tomllib.loads(drafts.toml_of(run))) == run


def test_what_a_command_line_cannot_say_is_said() -> None:
    run = load_run("demo").model_copy(update={"memory": load_run("demo").memory.model_copy(update={"card": None})})
    base = next(name for name in presets() if load_run(name).memory.card)
    told = drafts.command(load_run(base).model_copy(update={"memory": run.memory}), base, ITEMS)
    assert told.startswith("# a command line cannot unset")


def test_the_bars_are_the_plan() -> None:
    plan = as_dict(plan_for_card(load_run("qwen3-8b-16gb"), "16GiB", lambda text: None))
    for phase, total in plan["phases"].items():
        assert sum(planned.parts(plan, phase).values()) == total
    said = planned.shown(plan)
    assert "It fits" in said and all(gib(total) in said for total in plan["phases"].values())
    assert all(knob["reason"].split("<")[0][:20] in said or form.UNSET for knob in plan["knobs"].values())
    small = as_dict(plan_for_card(load_run("qwen3-8b-16gb"), "4GiB", lambda text: None))
    assert "does not fit" in planned.shown(small) and "Try: " in planned.shown(small)


def test_a_draft_begun_twice_is_one_run(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    run = load_run("demo", None, ["data.path=missing.jsonl"])       # refused when it begins: nothing trains here
    first, second = drafts.begin(place, run), drafts.begin(place, run)
    assert first == second == "runs/demo-001"
    other = drafts.begin(place, run.model_copy(update={"seed": 1}))
    assert other == "runs/demo-002"
    end = time.monotonic() + 60
    while drafts.started(place, first)[0] == "starting" and time.monotonic() < end:
        time.sleep(0.2)


def test_reward_sets_come_along(tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards/mine.py").write_text("def short(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    (tmp_path / "rewards/kind.toml").write_text('[rewards]\nfunctions = [{ function = "mine.py:short", weight = 2.0 }, "numeric_answer"]\n')
    run = drafts.beginning(place, rewards="kind")
    assert [(f.function, f.weight) for f in run.rewards.functions] == [("rewards/mine.py:short", 2.0), ("numeric_answer", 1.0)]
    with pytest.raises(UserError, match="no reward set"):
        drafts.beginning(place, rewards="none")


def test_data_of_every_kind_is_previewed_from_its_head(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    place, row = Place.at(tmp_path), {"prompt": "x" * 50_000, "answer": "7"}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 10)
    (tmp_path / "a.csv").write_text("prompt,answer\n" + "what is it,7\n" * 10)
    (tmp_path / "a.json").write_text(json.dumps([row]))
    pq.write_table(pa.table({"prompt": ["p"] * 100, "answer": ["7"] * 100}), tmp_path / "a.parquet")
    for name in preview.data_files(place):
        said = preview.preview(place, name, "prompt")
        assert "prompt (the prompt)" in said and "answer" in said and len(said) < 10_000
    assert "(50,000 characters)" in preview.preview(place, "a.jsonl", "prompt")
    with (tmp_path / "huge.jsonl").open("wb") as file:                                 # 2 GB that take no room on the disk
        file.write((json.dumps({"prompt": "hi"}) + "\n").encode() * 100)
        file.truncate(2 * 2**30)
    begin = time.process_time()
    assert "hi" in preview.preview(place, "huge.jsonl", "prompt")
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(("name", "content", "said"), [
    ("half.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 is no JSON"), ("bin.jsonl", b"\xff\xfe\x00", "not UTF-8"), ("a.txt", b"x", "is no data file"),
    ("none.jsonl", b"", "is empty"), ("list.jsonl", b"[1]\n", "where an object"), ("other.jsonl", b'{"question": "a"}\n', "columns: question"),
    ("fake.parquet", b"PAR1", "cannot be read as Parquet"), ("obj.json", b"{}", "no list of objects"),
])  # fmt: skip
def test_data_that_is_none_gets_a_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        preview.preview(Place.at(tmp_path), name, "prompt")


def test_an_upload_lands_in_the_workspace_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "up.jsonl").write_text("{}")
    place = Place.at(tmp_path)
    assert [preview.take(place, str(tmp_path / "up.jsonl"), "../../up.jsonl") for _ in range(2)] == ["data/up.jsonl", "data/up-2.jsonl"]
    with pytest.raises(UserError, match="must end in"):
        preview.take(place, str(tmp_path / "up.jsonl"), "run.sh")


# -- in a browser ---------------------------------------------------------------------------------------------------------------


def test_from_the_default_to_a_run_that_trains(served: Served, page: Any) -> None:
    page.goto(f"{served.url}/new")
    page.locator("#new-plan", has_text="It fits").wait_for(timeout=3 * PATIENCE)
    before = page.locator("#new-plan").inner_text()
    for key, value in SMALL.items():
        setting(page, key).fill(value)
    page.locator("#new-same").get_by_text("The same as a command line").click()
    page.locator("#new-command", has_text="rollout.num_generations=4").wait_for()
    page.wait_for_function("before => document.querySelector('#new-plan').innerText !== before", arg=before, timeout=3 * PATIENCE)
    page.locator("#new-start").dblclick()
    page.wait_for_url("**/live?run=runs%2Fdemo-001", timeout=4 * PATIENCE)
    end = time.monotonic() + 240
    while look(served.root / "runs/demo-001").stands != "finished" and time.monotonic() < end:
        time.sleep(0.5)
    assert look(served.root / "runs/demo-001").step == 2
    assert [path.name for path in (served.root / "runs").iterdir()] == ["demo-001"]     # a double click is one run


def test_bad_values_and_files_are_said_where_they_are(served: Served, page: Any) -> None:
    (served.root / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    page.goto(f"{served.url}/new")
    page.locator("#new-preview", has_text="The embedded task").wait_for()
    setting(page, "optim-learning_rate").fill("7")
    page.locator("#new-said", has_text="optim.learning_rate").wait_for()
    setting(page, "optim-learning_rate").fill("1e-3")
    page.wait_for_function("() => !document.querySelector('#new-said').innerText.includes('learning_rate')")
    setting(page, "data-path").fill("half.jsonl")
    page.locator("#new-preview", has_text="line 2 is no JSON").wait_for()
    setting(page, "data-path").fill("../../etc/passwd")
    page.locator("#new-preview", has_text="lies outside").wait_for()
    page.locator("#set-run-algorithm-name input").click()
    page.get_by_role("option", name="tbrm", exact=True).click()
    page.get_by_role("button", name="Settings of tbrm").wait_for()
    assert not page.get_by_role("button", name="Settings of gtpo").is_visible()


def test_check_everything_shows_the_prompt_as_the_model_sees_it(served: Served, page: Any) -> None:
    page.goto(f"{served.url}/new")
    page.locator("#new-preview", has_text="The embedded task").wait_for()
    page.locator("#new-check").click()
    page.locator("#new-begun", has_text="Everything checked").wait_for(timeout=4 * PATIENCE)
    assert "the first as the model sees it" in page.locator("#new-begun").inner_text()


def test_a_run_that_cannot_begin_is_said_here(served: Served, page: Any) -> None:
    page.goto(f"{served.url}/new")
    page.locator("#new-preview", has_text="The embedded task").wait_for()
    setting(page, "data-path").fill("missing.jsonl")
    page.locator("#new-preview", has_text="there is no data file").wait_for()
    page.locator("#new-start").click()
    page.locator("#new-begun", has_text="did not start").wait_for(timeout=4 * PATIENCE)
