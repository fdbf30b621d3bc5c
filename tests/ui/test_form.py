"""The form and the schema say the same: every setting once, every run the way there and back."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.grpo import GRPO
from localrl.config import Run, build, load_run, presets, settings_table
from localrl.sections import ModelSettings
from localrl.settings import UserError
from ui import form
from ui.form import collect, component, fill, items, toml

ITEMS = items()


def test_every_setting_is_there_once_with_its_help() -> None:
    told = [(key, help_) for key, _, help_ in settings_table() if key != "algorithm.name"]
    found = {item.key: item.help for item in ITEMS}
    assert {key for key, _ in told} <= found.keys()
    assert all(item.help for item in ITEMS)
    own = [(item.algorithm, item.key) for item in ITEMS]
    assert len(own) == len(set(own))
    assert {item.algorithm for item in ITEMS} == {"", *ALGORITHMS}


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: f"{i.algorithm}:{i.key}")
def test_every_setting_has_a_component_that_gives_its_default_back(item: form.Item) -> None:
    made = component(item)
    assert made.label and made.info == item.help
    got = form.entered(item, form.shown(item, item.default))
    wanted = list(item.default) if isinstance(item.default, tuple) else item.default
    assert got == wanted or item.key == "data.path" or (item.default in ({}, ()) and got in ({}, [], ()))    # a run without data is none


@pytest.mark.parametrize("name", presets())
def test_a_preset_goes_through_the_form_unchanged(name: str) -> None:
    run = load_run(name)
    assert build(collect(ITEMS, fill(run, ITEMS))) == run


def test_odd_values_go_through_too() -> None:
    odd = [
        "algorithm.name=gdpo", "algorithm.weighting=directed", "algorithm.weight_bounds=[0.1, 9.5]", "memory.offload=true", "memory.kv_cache=int8",
        'rollout.stop=["</a>", "x y"]', 'data.rename={question="prompt"}', "adapter.lora_target_modules=['q_proj', 'v_proj']",
        "optim.learning_rate=1.5e-05", 'data.system_prompt="say \\"hi\\""',
        'rewards.functions=[{function="regex", args={pattern="a\\\\d+", n=[1, 2]}, weight=-0.5}, "numeric_answer"]',
    ]  # fmt: skip
    run = load_run("demo", None, odd)
    assert build(collect(ITEMS, fill(run, ITEMS))) == run


def test_what_is_no_value_is_said_by_its_key() -> None:
    values = fill(load_run("demo"), ITEMS)
    for key, typed, said in (
        ("memory.head_chunk", "many", "memory.head_chunk = 'many': it wants a whole number"), ("rewards.functions", "{function=", "it wants TOML"),
        ("rollout.concurrent", "0", "rollout.concurrent"), ("optim.learning_rate", "7", "optim.learning_rate"),
    ):
        at = next(i for i, item in enumerate(ITEMS) if item.key == key)
        with pytest.raises(UserError, match=said.replace("(", r"\(")):
            build(collect(ITEMS, [*values[:at], typed, *values[at + 1 :]]))


def test_a_new_setting_and_a_new_algorithm_appear_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(ModelSettings):
        colour: Literal["red", "blue"] = "red"
        """Of the model."""
        ripeness: float = Field(0.5, ge=0, le=1)
        """How ripe."""

    class Newest(GRPO):
        name: Literal["newest"] = "newest"  # type: ignore[assignment]
        """The newest."""
        sharpness: int = Field(3, ge=1)
        """How sharp."""

    class Longer(Run):
        model: More = More()

    monkeypatch.setitem(ALGORITHMS, "newest", Newest)
    monkeypatch.setattr(form, "Run", Longer)
    found: dict[str, Any] = {item.key: item for item in items()}
    assert (found["model.colour"].kind, found["model.colour"].choices) == ("choice", ("red", "blue"))
    assert (found["model.ripeness"].kind, found["model.ripeness"].high) == ("slider", 1.0)
    assert (found["algorithm.sharpness"].algorithm, found["algorithm.sharpness"].help) == ("newest", "How sharp.")
    assert "newest" in found["algorithm.name"].choices


def test_toml_of_whatever() -> None:
    import tomllib

    for value in ({"a b": 'quote " and \\ back', "n": {"x": [1, 2.5, False]}}, ["ü", "\n"], 1e-9, "plain"):
        assert tomllib.loads(f"x = {toml(value)}")["x"] == value
