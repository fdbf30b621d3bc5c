"""Blocks, sets in files, own code, and --rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrl.config import load_run
from localrl.lab.blocks import blocks
from localrl.lab.drafts import TEMPLATE, checked, functions_in, own_functions, save_code, save_set
from localrl.rewards.builtin import BUILTINS
from localrl.settings import UserError


def test_every_built_in_is_a_block_with_its_parameters() -> None:
    found = blocks()
    assert found.keys() == BUILTINS.keys()
    assert all(block.summary for block in found.values())
    kinds = {f"{name}.{p.name}": (p.kind, p.default, p.required) for name, block in found.items() for p in block.parameters}
    assert kinds["numeric_answer.tolerance"] == ("number", 1e-6, False)
    assert kinds["tagged_format.tags"] == ("words", ["think", "answer"], False)
    assert kinds["json_schema.schema"] == ("json", None, False)
    assert kinds["length_target.limit"] == ("whole", None, True)
    assert kinds["regex.full"] == ("yes", False, False)
    assert not any(key.endswith((".completions", ".completion_ids", ".columns")) for key in kinds)


def test_what_is_typed_becomes_what_the_function_wants() -> None:
    found = {p.name: p for block in blocks().values() for p in block.parameters}
    assert found["tags"].read("a, b,") == ["a", "b"]
    assert found["schema"].read('{"type": "object"}') == {"type": "object"}
    assert found["target"].read(3.0) == 3
    with pytest.raises(UserError, match=r"target = '3.5': a whole number"):
        found["target"].read("3.5")
    with pytest.raises(UserError, match="JSON"):
        found["schema"].read("{")


def test_a_saved_set_is_used_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = save_code(tmp_path, "mine", TEMPLATE)
    settings = checked([{"function": own, "weight": 0.5}, {"function": "length_target", "args": {"target": 2, "limit": 9}, "given": "mine"}], timeout=3)
    path = save_set(tmp_path, "first", settings)
    assert 'function = "mine.py:mine"' in path.read_text()
    monkeypatch.chdir(tmp_path)
    run = load_run("demo", None, ["rewards.workers=1"], "first")
    assert [spec.label for spec in run.rewards.functions] == ["mine", "length_target"]
    assert (run.rewards.timeout, run.rewards.workers) == (3, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = load_run("demo", None, [], str(path))
    assert again.rewards.functions[0].function == f"{tmp_path / 'rewards' / 'mine.py'}:mine"
    with pytest.raises(UserError, match="no set of rewards 'first'"):
        load_run("demo", None, [], "first")


def test_a_set_that_is_none_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mixed.toml").write_text("[rewards]\nfunctions = ['regex']\n[model]\npath = 'x'\n")
    (tmp_path / "rewards" / "broken.toml").write_text("[rewards\n")
    with pytest.raises(UserError, match="nothing else, it has model"):
        load_run("demo", None, [], "mixed")
    with pytest.raises(UserError, match="no valid TOML"):
        load_run("demo", None, [], "broken")
    with pytest.raises(UserError, match="did you mean 'mixed'"):
        load_run("demo", None, [], "mixd")
    with pytest.raises(UserError, match="no file"):
        load_run("demo", None, [], "nowhere/x.toml")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x.toml", ".x", "1st", "a" * 65, "a b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be a file's name"):
        save_code(tmp_path, name, TEMPLATE)
    with pytest.raises(UserError, match="cannot be a file's name"):
        save_set(tmp_path, name, checked(["exact_answer"]))
    assert not list(tmp_path.rglob("*.*"))


def test_a_link_out_of_the_workspace_is_not_followed(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    base.mkdir()
    other.mkdir()
    (base / "rewards").symlink_to(other)
    with pytest.raises(UserError, match="leads to"):
        save_code(base, "mine", TEMPLATE)
    assert not list(other.iterdir())


def test_code_is_read_and_never_run(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n{TEMPLATE}\ndef _hidden(): pass\nasync def other(completions): return []\n"
    assert [path.rpartition(":")[2] for path in save_code(tmp_path, "mine", code)] == ["mine", "other"]
    assert own_functions(tmp_path).keys() == {"mine.py:mine", "mine.py:other"}
    assert not (tmp_path / "ran").exists()
    for wrong, said in (("def f(:", "no Python: line 1"), ("x = 1", "defines no function"), ("#" * 2**19, "limit")):
        with pytest.raises(UserError, match=said):
            save_code(tmp_path, "mine", wrong)
    assert functions_in(TEMPLATE) == ["mine"]
