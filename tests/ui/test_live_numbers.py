"""What the live page is made of, without a browser: metric files that grow, charts, troubles, completions."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.base import Picture
from localrl.folder import read_run
from localrl.settings import UserError
from ui import completions, findings, runs, watch
from ui.charts import Drawing, Section, sections
from ui.completions import FOLD, Wanted
from ui.place import Place
from ui.tail import BUCKETS, Curves, Tail


def write(path: Path, rows: list[dict[str, Any]], mode: str = "w") -> None:
    with path.open(mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


# -- metric files ---------------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_lines_are_read_in_two_seconds(tmp_path: Path) -> None:
    names = [f"rewards/name{i}/mean" for i in range(58)]
    lines = [json.dumps({"step": 0, **{name: random.random() for name in names}, "timestamp": 1.0})[10:] for _ in range(500)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for start in range(0, 100_000, 500):
            file.write("".join(f'{{"step": {start + i + 1}{line}\n' for i, line in enumerate(lines)))
    taken = []
    for _ in range(2):
        tail, begun = Tail(tmp_path), time.process_time()
        tail.read()
        taken.append(time.process_time() - begun)
    assert min(taken) < 2.0, taken
    assert tail.curves.count == 100_000 and tail.first["step"] == 1 and tail.recent[-1]["step"] == 100_000
    assert BUCKETS <= len(tail.curves.steps()) <= 2 * BUCKETS + 1 and tail.curves.steps()[-1] == 100_000
    begun = time.process_time()
    assert sections(Drawing(tail.curves)) and time.process_time() - begun < 2.0
    begun = time.process_time()
    version = tail.read()
    assert time.process_time() - begun < 0.05 and tail.read() == version            # nothing new: nothing is read


def test_buckets_are_exact(tmp_path: Path) -> None:
    dice = random.Random(7)
    values = [dice.gauss(0, 1) for _ in range(5000)]
    whole = Curves()
    rows = [{"step": i, "x": None if i % 7 == 0 else value} for i, value in enumerate(values)]
    at = 0
    while at < len(rows):                                            # in pieces of any size, as they come
        size = dice.randint(1, 400)
        whole.add(rows[at : at + size])
        at += size
    assert len(whole.low) < 2 * BUCKETS and whole.width > 1
    known = [value for i, value in enumerate(values) if i % 7]
    low, high = whole.range("x")
    assert (np.nanmin(low), np.nanmax(high)) == (min(known), max(known))
    counts = np.append(whole.known[:, 1], np.isfinite(whole._open[:, 1]).sum()) if len(whole._open) else whole.known[:, 1]
    assert np.nansum(whole.mean("x") * counts) == pytest.approx(sum(known))
    assert (low <= whole.mean("x") + 1e-12).all() and (whole.mean("x") <= high + 1e-12).all()


def test_only_new_lines_are_read_and_half_ones_wait(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(tmp_path)
    assert tail.read() == 0 and not tail.recent                      # not there yet
    write(path, [{"step": 1, "reward": 1.0}])
    first = tail.read()
    with path.open("a") as file:
        file.write('{"step": 2, "rewa')
    assert tail.read() == first and tail.curves.count == 1
    with path.open("a") as file:
        file.write('rd": 2.0}\n')
    assert tail.read() > first and tail.curves.mean("reward").tolist() == [1.0, 2.0] and tail.damaged == 0


def test_a_resumed_run_forgets_its_last_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": i + 1, "reward": 1.0} for i in range(9)])
    tail = Tail(tmp_path)
    tail.read()
    write(tmp_path / "new", [{"step": i + 1, "reward": 2.0} for i in range(9)])                # as long as before, but another file
    (tmp_path / "new").rename(path)
    tail.read()
    assert tail.curves.mean("reward").tolist() == [2.0] * 9
    write(path, [{"step": 1, "reward": 3.0}])                        # the same file, shorter
    tail.read()
    assert tail.curves.mean("reward").tolist() == [3.0] and len(tail.recent) == 1
    path.unlink()
    tail.read()
    assert tail.curves.count == 0


def test_damaged_lines_and_new_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n\x00\x00{"st\n[3]\n{"step": 2, "a": null, "b": "words", "c": 5}\n{"step": 3, "c": 6, "d": [1]}\n')
    tail = Tail(tmp_path)
    tail.read()
    assert tail.damaged == 2 and tail.curves.steps().tolist() == [1, 2, 3]
    assert np.nan_to_num(tail.curves.mean("c"), nan=-1).tolist() == [-1, 5, 6]
    assert np.isnan(tail.curves.mean("b")).all() and np.isnan(tail.curves.mean("nobody")).all() and math.isnan(tail.recent[1]["a"])


# -- charts ---------------------------------------------------------------------------------------------------------------------


def drawn(folder: Path) -> list[Section]:
    tail = Tail(folder)
    tail.read()
    run = read_run(folder)
    return sections(Drawing(tail.curves, tail.evaluations, [spec.label for spec in run.rewards.functions], run.algorithm))


def test_every_metric_of_a_real_run_is_in_a_chart(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(trained_run, folder)
    rows = [json.loads(line) | {"of_tomorrow": 1.0, "sampler/new_one": 2.0} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write(folder / "metrics.jsonl", rows)
    made = drawn(folder)
    for section in made:
        for chart in section.charts:
            go.Figure(chart.figure)                                  # plotly's own check
            assert chart.title and chart.caption and chart.figure["layout"]["uirevision"]
    keys = [chart.key for section in made for chart in section.charts]
    assert len(keys) == len(set(keys)) and {"reward", "rewards", "time", "memory", "memory-ratio", "oom"} <= set(keys)
    by_key = {chart.key: chart for section in made for chart in section.charts}
    assert [t["y"] for t in by_key["reward"].figure["data"] if t.get("name") == "the total"] == [[float(f"{r['reward']:.5g}") for r in rows]]
    assert [len(t["x"]) for t in by_key["reward"].figure["data"] if t.get("error_y")] == [2]               # held out, before and after
    own = [chart for section in made if section.key == "algorithm" for chart in section.charts]
    assert len(own) >= len(read_run(folder).algorithm.pictures) > 0
    count = sum(len([t for t in c.figure["data"] if t.get("showlegend") is not False]) for c in by_key.values())
    assert count > 30
    more = " ".join(chart.caption for section in made if section.key == "more" for chart in section.charts)
    assert "of_tomorrow" in more and "sampler/new_one" in more       # nobody has heard of them, and they are shown


def test_an_algorithm_of_tomorrow_gets_its_pictures() -> None:
    class Tomorrow(ALGORITHMS["grpo"]):  # type: ignore[misc]
        reports = ("tomorrow/warp", "tomorrow/left_over")
        pictures = (Picture("Warp", "How fast.", ("tomorrow/warp",), limits=("epsilon",)), Picture("Pairs", "Degrees.", ("tomorrow/*/angle",), "matrix"))

    curves = Curves()
    curves.add([{"step": 1, "tomorrow/warp": 9.0, "tomorrow/left_over": 1.0, "tomorrow/0-1/angle": 90.0}])
    own = next(section for section in sections(Drawing(curves, rewards=["<b>x</b>", "y"], algorithm=Tomorrow())) if section.key == "algorithm")
    assert [chart.title for chart in own.charts] == ["Warp", "Pairs", "left over"]
    assert own.charts[0].figure["layout"]["shapes"][0]["y0"] == Tomorrow().epsilon
    heat = own.charts[1].figure["data"][0]
    assert heat["z"] == [[0.0, 90.0], [90.0, 0.0]] and heat["x"] == ["&lt;b&gt;x&lt;/b&gt;", "y"]


def test_the_pages_name_no_algorithm() -> None:
    names = re.compile(r"\b(" + "|".join(ALGORITHMS) + r")\b", re.IGNORECASE)
    for path in (Path(__file__).parent.parent.parent / "ui").rglob("*.py"):
        assert not names.findall(re.sub(r'"""[\s\S]*?"""|"[^"\n]*"|#.*', "", path.read_text("utf-8"))), path


# -- why is it not learning -------------------------------------------------------------------------------------------------------


def told(rows: list[dict[str, Any]], tmp_path: Path) -> tuple[str, str]:
    write(tmp_path / "metrics.jsonl", rows)
    tail = Tail(tmp_path)
    tail.read()
    algorithm = ALGORITHMS["grpo"](name="grpo")
    found = findings.find(tail, ["a"], algorithm)
    return findings.panel(found, bool(rows)), findings.details(found, findings.plain_numbers(tail))


def row(step: int, **changes: float | None) -> dict[str, Any]:
    return {"step": step, "entropy": 0.5, "frac_reward_zero_std": 0.1, "grad_norm": 1.0, "rewards/a/mean": 0.4, **changes}


def test_troubles_that_stand_and_those_that_are_over(tmp_path: Path) -> None:
    well, _ = told([row(i) for i in range(30)], tmp_path)
    assert "All well" in well
    flat, numbers = told([row(i, frac_reward_zero_std=float(i > 15)) for i in range(30)], tmp_path)
    assert "got the same reward" in flat and "All well" not in flat and "look here" in numbers and "100%" in numbers
    over, numbers = told([row(i, frac_reward_zero_std=float(5 < i < 15)) for i in range(30)], tmp_path)
    assert "All well" in over and "step 10" in numbers and "got the same reward" in numbers
    gone, numbers = told([row(i, grad_norm=None if i == 29 else 1.0) for i in range(30)], tmp_path)
    assert "not finite" in gone
    failing, _ = told([row(i, **{"rewards/a/timeouts": 2}) for i in range(30)], tmp_path)
    assert "ran out of time 40 times" in failing
    assert "Nothing to judge yet" in told([], tmp_path)[0]


# -- completions ----------------------------------------------------------------------------------------------------------------


def answer(prompt: int, sample: int, text: str, reward: float | None, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt, "sample": sample, "prompt": f"question {prompt}", "completion": text, "tokens": len(text), "done": True,
            "rewards": {"right": reward, "short": 1.0}, "reward": reward, **more}


ROWS = [answer(1, 0, "alpha", 0.5), answer(1, 1, "beta", None), answer(2, 0, "gamma", 2.0), answer(2, 1, "delta", -1.0)]


def order(shown: str) -> list[str]:
    return re.findall(r"alpha|beta|gamma|delta", shown)


def test_answers_are_filtered_sorted_and_grouped() -> None:
    assert order(completions.show(ROWS, Wanted(grouped=False)).html) == ["alpha", "beta", "gamma", "delta"]
    assert order(completions.show(ROWS, Wanted(grouped=False, order="best first")).html) == ["gamma", "alpha", "delta", "beta"]       # None: last
    assert order(completions.show(ROWS, Wanted(grouped=False, order="worst first")).html) == ["delta", "alpha", "gamma", "beta"]
    assert order(completions.show(ROWS, Wanted(order="best first")).html) == ["gamma", "delta", "alpha", "beta"]                       # together with its group
    assert order(completions.show(ROWS, Wanted(least=0.5, most=1.0)).html) == ["alpha"]
    assert order(completions.show(ROWS, Wanted(words="QUESTION 2")).html) == ["gamma", "delta"]
    assert len(order(completions.show(ROWS, Wanted("short", least=1.0)).html)) == 4
    assert "widen the range" in completions.show(ROWS, Wanted(least=9.0)).html and completions.show(ROWS, Wanted(least=9.0)).count == 0
    many = [answer(i, 0, f"alpha {i}", 1.0) for i in range(100)]
    assert completions.show(many, Wanted(page=99)).pages == 9 and "alpha 99" in completions.show(many, Wanted(page=99)).html


def test_what_a_model_wrote_is_text_and_a_long_one_folds() -> None:
    evil = completions.show([answer(1, 0, "<img src=x onerror=alert(1)>", 1.0)], Wanted()).html
    assert "<img" not in evil and "&lt;img" in evil
    long = completions.show([answer(1, 0, "x" * 50_000 + "end", 1.0)], Wanted()).html
    before, _, after = long.partition("<details")
    assert before.count("x") < FOLD + 100 and f"of {50_003:,} characters" in after and "end" in after


def test_tokens_are_tinted_by_their_weight() -> None:
    one = answer(1, 0, "good <b>bad</b>", 1.0, token_ids=[1, 2, 3], token_weights=[2.0, 1.0, 0.0], token_lengths=[4, 1, 10])
    shown = completions.show([one], Wanted()).html
    assert re.search(r'class="more"[^>]*title="weight 2">good</span> <span class="less"[^>]*title="weight 0">&lt;b&gt;bad', shown)
    assert "from 0 to 2" in shown
    old = completions.show([answer(1, 0, "words", 1.0, token_ids=[1], token_weights=[2.0])], Wanted()).html
    assert "earlier version" in old and 'class="more"' not in old and "words" in old


def test_a_real_run_tells_where_its_tokens_end(trained_run: Path) -> None:
    rows = completions.read(trained_run, completions.steps(trained_run)[-1])
    assert rows and all(sum(row["token_lengths"]) == len(row["completion"]) and len(row["token_lengths"]) == len(row["token_weights"]) for row in rows)
    for tint in completions.TINTS:
        assert all("".join(span.part for span in completions.tinted(row, tint) or ()) == row["completion"] for row in rows)
    surprises = [-logp for row in rows for logp in row["token_logps"]]
    assert min(surprises) >= 0 and 0 < np.mean(surprises) < 10


def test_tokens_are_tinted_by_their_surprise() -> None:
    """Asked for, or where there are no weights."""
    one = answer(1, 0, "a <b>", 1.0, token_ids=[1, 2], token_logps=[-0.5, -3.0], token_lengths=[1, 4])
    for shown in (completions.show([one], Wanted()).html, completions.show([one], Wanted(tint=completions.SURPRISE)).html):
        assert re.search(r'title="probability 0.61, surprise 0.50 nats">a</span><span [^>]*title="probability 0.05, surprise 3.00 nats"> &lt;b&gt;<', shown)
        assert "from 0.5 to 3" in shown and "surprising" in shown
    both = answer(1, 0, "a", 1.0, token_weights=[2.0], token_logps=[-0.5], token_lengths=[1])
    assert "weight 2" in completions.show([both], Wanted()).html and "0.50 nats" in completions.show([both], Wanted(tint=completions.SURPRISE)).html
    assert "legend" not in completions.show([answer(1, 0, "words", 1.0)], Wanted()).html


# -- what can be done to a run ----------------------------------------------------------------------------------------------------


def test_only_runs_within_the_workspace_are_deleted(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    place = Place.at(tmp_path / "w")
    shutil.copytree(trained_run, place.root / "runs" / "mine")
    outside = tmp_path / "outside"
    shutil.copytree(trained_run, outside)
    (place.root / "data").mkdir()
    (place.root / "data" / "keep.txt").touch()
    (place.root / "linked").symlink_to(outside)
    (place.root / "inner").symlink_to(place.root / "runs" / "mine")
    refused = {"../outside": "outside", "linked": "outside", "inner": "link", "data": "no run folder", ".": "no run folder", "runs": "no run folder"}
    for name, words in refused.items():
        with pytest.raises(UserError, match=words):
            runs.delete(place, name)
    assert (outside / "run.toml").exists() and (place.root / "data" / "keep.txt").exists()
    half = place.root / "half"
    shutil.copytree(trained_run, half)
    (half / "run.toml").unlink()
    assert "deleted" in runs.delete(place, "half") and not half.exists()
    assert "deleted" in runs.delete(place, "runs/mine") and not (place.root / "runs" / "mine").exists() and (place.root / "runs").exists()


def test_resume_refuses_in_a_sentence(trained_run: Path, tmp_path: Path) -> None:
    place = Place.at(tmp_path)
    shutil.copytree(trained_run, tmp_path / "r")
    for steps, words in ((3, "more than that"), (0, "no number of steps"), (3.5, "no number of steps")):
        with pytest.raises(UserError, match=words):
            runs.resume(place, "r", steps)
    shutil.rmtree(tmp_path / "r" / "checkpoint-2")
    shutil.rmtree(tmp_path / "r" / "checkpoint-3")
    with pytest.raises(UserError, match="no checkpoint"):
        runs.resume(place, "r", 9)
    assert not (tmp_path / ".localrl" / "jobs").exists() or not [*(tmp_path / ".localrl" / "jobs").iterdir()]       # nothing was started
    with pytest.raises(UserError, match="not running"):
        runs.stop(place, "r")
    with pytest.raises(UserError, match="no run nowhere"):
        watch.view(place, "nowhere")
