"""Prompts from files and from `datasets`: what comes out, and one sentence for whatever is wrong with them."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from localrl.data import EVAL_ID, DataSettings, PromptData, load_prompts
from localrl.settings import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' and no_system %}{{ raise_exception('no system messages here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE, wrap: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Bytes, with special tokens around a text as real tokenizers have them: `<s> $A`, or `<s> $A </s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    special = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=wrap, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template)


TOKENIZER = make_tokenizer()


def lines(folder: Path, rows: list[Any], name: str = "prompts.jsonl") -> str:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return name


def load(folder: Path, rows: list[Any] | str, tokenizer: Any = TOKENIZER, seed: int = 0, needed: int = 1, **settings: Any) -> PromptData:
    path = rows if isinstance(rows, str) else lines(folder, rows)
    given = {"path": path, "holdout": 0, "shuffle": False, **settings}
    return load_prompts(DataSettings.model_validate(given), tokenizer, seed, folder, needed)


def texts(data: PromptData, tokenizer: Any = TOKENIZER) -> list[str]:
    return [tokenizer.decode(prompt.tokens) for prompt in data.train]


CHAT = [{"role": "user", "content": "hi"}]


def test_text_and_chats(tmp_path: Path) -> None:
    data = load(tmp_path, [{"prompt": "plain", "answer": 1}, {"prompt": CHAT, "answer": 2}])
    assert texts(data) == ["<s>plain", "<s>[user]hi[assistant]"], "one BOS each: the tokenizer's for text, the template's for a chat"
    assert [p.id for p in data.train] == [0, 1]
    assert [p.content for p in data.train] == ["plain", CHAT]
    assert [p.columns for p in data.train] == [{"answer": 1}, {"answer": 2}]
    assert data.columns == ("answer",)
    assert len(data.notes) == 1
    assert "plain text and do not go through the model's chat template" in data.notes[0]


def test_system_prompt_makes_a_chat(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, *CHAT]
    data = load(tmp_path, [{"prompt": "plain"}, {"prompt": CHAT}, {"prompt": own}], system_prompt="Be brief.")
    assert texts(data) == ["<s>[system]Be brief.[user]plain[assistant]", "<s>[system]Be brief.[user]hi[assistant]",
                           "<s>[system]own[user]hi[assistant]"]
    assert data.train[0].content == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "plain"}]
    assert data.notes == []


def test_a_chat_that_ends_with_the_assistant_is_continued(tmp_path: Path) -> None:
    data = load(tmp_path, [{"prompt": [*CHAT, {"role": "assistant", "content": "Well,"}]}])
    assert texts(data) == ["<s>[user]hi[assistant]Well,"]


def test_template_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts.jsonl, line 1: the model's chat template refuses the messages: no system messages here"):
        load(tmp_path, [{"prompt": "x"}], system_prompt="s", chat_template_kwargs={"no_system": True})


def test_template_arguments_that_are_not_for_setting() -> None:
    with pytest.raises(ValidationError, match="'tokenize' follows from the messages and cannot be set"):
        DataSettings(path="x", chat_template_kwargs={"tokenize": True})


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tmp_path: Path) -> None:
    ends = make_tokenizer(wrap="<s> $A </s>")
    assert ends("x")["input_ids"][-1] == ends.eos_token_id
    assert texts(load(tmp_path, [{"prompt": "x"}, {"prompt": CHAT}], ends), ends) == ["<s>x", "<s>[user]hi[assistant]"]


def test_a_chat_without_template(tmp_path: Path) -> None:
    bare = make_tokenizer(template=None)
    assert load(tmp_path, [{"prompt": "x"}], bare).notes == []
    with pytest.raises(UserError, match=r"prompts.jsonl, line 2: the prompt is a chat, but the model's tokenizer has no chat template"):
        load(tmp_path, [{"prompt": "x"}, {"prompt": CHAT}], bare)


def test_every_file_format_gives_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b", "answer": "1"}, {"prompt": 'line\n"two"', "answer": "ü"}]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8-sig")
    (tmp_path / "p.csv").write_text('prompt,answer\r\n"a, b",1\r\n"line\n""two""",ü\r\n', encoding="utf-8-sig", newline="")
    (tmp_path / "p.tsv").write_text('prompt\tanswer\na, b\t1\n"line\n""two"""\tü\n', encoding="utf-8")
    names = ["p.json", "p.jsonl", "p.csv", "p.tsv"]
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in [*names, "p.parquet", str(tmp_path / "p.csv")]:
        data = load(tmp_path, name)
        assert [(p.id, {"prompt": p.content, **p.columns}) for p in data.train] == list(enumerate(rows))


def test_parquet_with_chats_and_odd_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi", "name": None}]
    rows = [{"prompt": chat, "day": datetime.date(2020, 1, 2), "image": b"x", "deep": {"a": [1]}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    data = load(tmp_path, "p.parquet")
    assert data.train[0].content == CHAT
    assert data.train[0].columns == {"day": "2020-01-02", "deep": {"a": [1]}}
    assert data.columns == ("day", "deep")
    assert data.notes == ["column 'image' of p.parquet is left out: values of type bytes cannot be given to rewards"]


def test_columns_that_differ_between_rows(tmp_path: Path) -> None:
    data = load(tmp_path, [{"prompt": CHAT, "a": 1}, {"prompt": CHAT, "b": 2}, {"prompt": CHAT, "a": None, "b": 3}])
    assert [p.columns for p in data.train] == [{"a": 1, "b": None}, {"a": None, "b": 2}, {"a": None, "b": 3}]
    assert data.notes == ["column 'a' is missing in 1 of 3 rows of prompts.jsonl: rewards see None there",
                          "column 'b' is missing in 1 of 3 rows of prompts.jsonl: rewards see None there"]


def test_rename(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": 1, "prompt": "old"}]
    data = load(tmp_path, rows, rename={"question": "prompt", "prompt": "was", "answer": "gold"})
    assert data.train[0].content == "q"
    assert data.train[0].columns == {"gold": 1, "was": "old"}
    with pytest.raises(UserError, match=r"data.rename: prompts.jsonl has no column 'qestion': did you mean 'question'\?"):
        load(tmp_path, rows, rename={"qestion": "prompt"})
    with pytest.raises(UserError, match=r"data.rename: prompts.jsonl already has a column 'prompt'"):
        load(tmp_path, rows, rename={"question": "prompt"})


NUMBERED = [{"prompt": f"{n:03}"} for n in range(100)]


def test_holdout_and_order_are_the_seeds(tmp_path: Path) -> None:
    data = load(tmp_path, NUMBERED, holdout=20, shuffle=True)
    again = load(tmp_path, NUMBERED, holdout=20, shuffle=True)
    other = load(tmp_path, NUMBERED, holdout=20, shuffle=True, seed=1)
    plain = load(tmp_path, NUMBERED, holdout=20)
    ids = [[p.id for p in part] for part in (data.train, data.eval)]
    assert ids == [[p.id for p in part] for part in (again.train, again.eval)]
    assert [p.id for p in other.eval] != ids[1]
    assert sorted(ids[0] + ids[1]) == list(range(100))
    assert len(ids[1]) == 20
    assert ids[0] != sorted(ids[0])
    assert [p.id for p in plain.eval] == ids[1], "the order of training does not move the held-out prompts"
    assert [p.id for p in plain.train] == sorted(ids[0])
    assert all(p.content == f"{p.id:03}" for p in data.train + data.eval), "an id is the row's number in the file"


def test_holdout_is_at_most_a_quarter(tmp_path: Path) -> None:
    data = load(tmp_path, [{"prompt": CHAT, "n": n} for n in range(10)], holdout=64)
    assert (len(data.train), len(data.eval)) == (8, 2)
    assert data.notes[0] == "2 of 10 prompts are held out for evaluation, not data.holdout = 64: at most a quarter of the data"
    assert data.notes[1] == "2 of 2 evaluation prompts are among the training prompts too: their rewards flatter"


def test_evaluation_from_its_own_file(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"prompt": "x", "level": 3}, {"prompt": "000"}], "eval.jsonl")
    data = load(tmp_path, NUMBERED, eval_path=path, holdout=20, limit=5)
    assert [p.id for p in data.train] == [0, 1, 2, 3, 4], "limit takes the file's first rows"
    assert [p.id for p in data.eval] == [EVAL_ID, EVAL_ID + 1]
    assert data.columns == ("level",)
    assert "1 of 2 evaluation prompts are among the training prompts too: their rewards flatter" in data.notes


def test_too_long(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * n} for n in (3, 9, 4, 12)]
    assert len(load(tmp_path, rows, max_prompt_length=13).train) == 4, "twelve bytes and a BOS"
    with pytest.raises(UserError, match=r"prompts.jsonl, line 2: the prompt has 10 tokens, the limit is data.max_prompt_length = 9 "
                                        r"\(2 of 4 prompts are longer, the longest has 13\): raise it, or set data.overlong = \"drop\""):
        load(tmp_path, rows, max_prompt_length=9)
    data = load(tmp_path, rows, max_prompt_length=9, overlong="drop")
    assert [p.id for p in data.train] == [0, 2]
    assert "2 of 4 prompts of prompts.jsonl are left out: longer than data.max_prompt_length = 9 tokens" in data.notes
    with pytest.raises(UserError, match=r"every prompt of prompts.jsonl is longer than data.max_prompt_length = 2"):
        load(tmp_path, rows, max_prompt_length=2, overlong="drop")
    path = lines(tmp_path, rows, "eval.jsonl")
    with pytest.raises(UserError, match=r"eval.jsonl, line 4: the prompt has 13 tokens"):
        load(tmp_path, NUMBERED, eval_path=path, max_prompt_length=12)


def test_many_prompts_and_progress(tmp_path: Path) -> None:
    rows = [{"prompt": "x" if n % 3 else CHAT, "n": n} for n in range(1200)]
    seen: list[tuple[int, int]] = []
    settings = DataSettings(path=lines(tmp_path, rows), holdout=0, shuffle=False)
    data = load_prompts(settings, TOKENIZER, 0, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(512, 1200), (1024, 1200), (1200, 1200)]
    assert [p.columns["n"] for p in data.train] == list(range(1200))
    assert texts(data)[:3] == ["<s>[user]hi[assistant]", "<s>x", "<s>x"]


WRONG_FILES = {
    "a.jsonl": ('{"prompt": "x"}\n\n{"prompt": ', r"a.jsonl, line 3 is not valid JSON: Expecting value at column 12$"),
    "b.jsonl": ('{"prompt": "x"}\n[1, 2]', r"b.jsonl, line 2: list \[1, 2\] where an object \{\"prompt\": ...\} is expected"),
    "c.jsonl": ("\n \n", r"c.jsonl is empty: there is no prompt in it"),
    "d.jsonl": ('{"text": "x", "answer": 1}', r"d.jsonl has no column 'prompt' for the prompts \(columns: text, answer\): set"),
    "e.jsonl": ('{"prompt": "x"}\n{"prompt": 42}', r"e.jsonl, line 2: column 'prompt' holds int 42 where text or a list of chat messages"),
    "f.jsonl": ('{"prompt": "x"}\n{"answer": 1}', r"f.jsonl, line 2: column 'prompt' holds NoneType null where text"),
    "g.jsonl": ('{"prompt": []}', r"g.jsonl, line 1: column 'prompt' holds list \[\] where text"),
    "h.jsonl": ('{"prompt": ["hi"]}', r"h.jsonl, line 1: message 1 is str \"hi\" where \{\"role\": text, \"content\": text\} is expected"),
    "i.jsonl": ('{"prompt": [{"role": "user"}]}', r"message 1 is dict \{\"role\": \"user\"\} where"),
    "j.jsonl": ('{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}', r"message 1 is dict .* where"),
    "k.jsonl": ('{"prompt": [{"role": "system", "content": "x"}]}', r"line 1: the last message is of role 'system', it must be"),
    "l.jsonl": ('{"prompt": "x"}\n{"prompt": " "}', r"l.jsonl, line 2: the prompt is empty"),
    "l2.jsonl": (r'{"prompt": "x\ud800"}', r"l2.jsonl, line 1: the prompt is not valid Unicode, character 2 is '.ud800'"),
    "m.json": ('{"prompt": "x"}\n{"prompt": "y"}', r"m.json, line 2 is not valid JSON: Extra data .* call the file .jsonl"),
    "n.json": ('{"prompt": "x"}', r"n.json holds dict .* where a list of objects is expected"),
    "o.json": ("[]", r"o.json is empty"),
    "p.csv": ("prompt,answer\nx,1\ny,2,3\n", r"p.csv, line 3 has 3 cells, the header has 2: quote cells that hold a separator"),
    "q.csv": ("prompt,answer\nx\n", r"q.csv, line 2 has 1 cells, the header has 2"),
    "r.csv": ("prompt,prompt\nx,y\n", r"r.csv has two columns called 'prompt'"),
    "s.csv": ('prompt\n"x\n', r"s.csv, line 1 is not valid CSV: unexpected end of data"),
    "t.csv": ("prompt\n", r"t.csv is empty"),
    "u.csv": ("prompt\n42\n\n", ""),
    "v.parquet": ("no parquet", r"v.parquet cannot be read as Parquet: "),
    "w.txt": ("hello", r"w.txt is not a file that can be read: it must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = WRONG_FILES[name]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    if not sentence:
        assert texts(load(tmp_path, name)) == ["<s>42"], "a number in a CSV file is text, an empty line is none"
        return
    with pytest.raises(UserError, match=sentence) as error:
        load(tmp_path, name)
    assert "\n" not in str(error.value)


def test_missing_files_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("missing.jsonl", "no/such/folder/x.csv", str(tmp_path / "absolute")):
        with pytest.raises(UserError, match=r"there is no data file .*"):
            load(tmp_path, path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder is not a file that can be read"):
        load(tmp_path, "folder")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "ü"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl is not UTF-8 text \(byte 12\): save it as UTF-8"):
        load(tmp_path, "latin.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'there is no file some/prompts, and to read it .* pip install "localrl\[data\]"'):
        load(tmp_path, "some/prompts")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match=r'x.parquet: reading Parquet needs pyarrow: pip install "localrl\[data\]"'):
        load(tmp_path, "x.parquet")


def test_fewer_prompts_than_a_step_needs(tmp_path: Path) -> None:
    assert len(load(tmp_path, NUMBERED[:8], holdout=2, needed=6).train) == 6
    with pytest.raises(UserError, match=r"prompts.jsonl leaves 6 prompts to train on, but a step needs 7: add data, or lower data.holdout"):
        load(tmp_path, NUMBERED[:8], holdout=2, needed=7)


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "some" / "prompts").mkdir(parents=True)
    lines(tmp_path / "some" / "prompts", [{"question": "q", "answer": 1}, {"question": "r", "answer": 2}], "train.jsonl")
    lines(tmp_path / "some" / "prompts", [{"question": "s", "answer": 3}], "test.jsonl")
    monkeypatch.chdir(tmp_path)                               # `datasets` looks there for a folder of that name before it asks the hub
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = load(elsewhere, "some/prompts", eval_path="some/prompts", rename={"question": "prompt"})
    assert [p.content for p in data.train + data.eval] == ["q", "r", "s"]
    assert data.columns == ("answer",)
    with pytest.raises(UserError, match=r"the data set some/prompts \(subset None, split nope\) cannot be read: "):
        load(elsewhere, "some/prompts", split="nope")


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in DataSettings.model_fields.values())
