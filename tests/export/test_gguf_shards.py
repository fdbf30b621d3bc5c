"""A model in parts says what it says in one file; parts that are damaged, cut short or missing are caught; cancelled, nothing stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from localrl.engines.files import probe
from localrl.export import Export, Sample, export_all
from localrl.export.beside import read_report
from localrl.export.shards import parts_of, size_of
from localrl.exports import exported, find
from localrl.settings import UserError

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]
LIMIT = "150kB"
NAME = "model-merged-f32"


def in_parts(
    live: Live, samples: Samples, folder: Path, dtypes: Any = ("f32",), what: Any = "merged", limit: str = LIMIT, progress: Any = None
) -> list[Export]:
    model, tokenizer = live("llama", "none")
    return export_all(model, tokenizer, folder, what=what, dtypes=dtypes, samples=samples(tokenizer), shard_size=limit, progress=progress)


def test_parts_are_llama_cpps_and_hold_every_byte(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none")
    told = samples(tokenizer)
    whole, done = (
        export_all(model, tokenizer, tmp_path / folder, what="merged", dtypes=["f32"], samples=told, shard_size=size)[0]
        for folder, size in (("whole", "2GiB"), ("run/export", LIMIT))
    )
    parts = parts_of(done.path)
    assert done.path.name == f"{NAME}-00001-of-{len(parts):05d}.gguf" and len(parts) >= 4
    files = {p.name for p in done.path.parent.iterdir()}
    assert files == {*(p.name for p in parts), done.path.name + ".check.json", f"{NAME}.Modelfile", "README.md"}, "nothing else, no folder of parts"
    assert max(p.stat().st_size for p in parts) <= size_of(LIMIT)
    readers = [GGUFReader(p) for p in parts]
    before = GGUFReader(whole.path)
    for number, reader in enumerate(readers):
        told = {key: reader.fields[key].contents() for key in ("split.no", "split.count", "split.tensors.count")}
        assert told == {"split.no": number, "split.count": len(parts), "split.tensors.count": len(before.tensors)}
        assert [reader.fields[key].types[0].name for key in told] == ["UINT16", "UINT16", "INT32"]
        assert reader.tensors and (number == 0 or "tokenizer.ggml.tokens" not in reader.fields)
    held = [tensor for reader in readers for tensor in reader.tensors]
    for tensor, wanted in zip(held, before.tensors, strict=True):
        assert tensor.name == wanted.name and np.array_equal(tensor.data, wanted.data)
    for key, field in before.fields.items():
        if not key.startswith("GGUF.") and key != "localrl.checks":
            assert readers[0].fields[key].contents() == field.contents() and readers[0].fields[key].types == field.types
    rows = {row.name: row for row in done.report.checks}
    assert rows["loads, in parts"].passed and rows["tokens, in parts"].passed and rows["mean KL, in parts"].passed and rows["parts"].passed
    assert dict(done.report.parts) == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in parts}
    assert done.report.bytes == sum(p.stat().st_size for p in parts)
    assert read_report(done.path) == done.report
    assert json.loads(readers[0].fields["localrl.checks"].contents())["checks"]["parts"] == "ok"
    assert probe(done.path) == 512
    killed = tmp_path / "run" / "export" / f"{NAME}.gguf.parts"
    killed.mkdir()
    (killed / done.path.name).write_bytes(b"GGUF, half of one")
    assert [e.path for e in exported(tmp_path / "run")] == [done.path], "and nothing of an export that was killed"
    assert find(tmp_path / "run" / "export" / done.path.name).model == done.path


def test_what_lies_beside_names_the_parts(live: Live, samples: Samples, tmp_path: Path) -> None:
    done = in_parts(live, samples, tmp_path, ["q8_0"], "adapter", "70kB")[0]
    assert done.base is not None
    first = done.base.name
    assert first.startswith("model-base-q8_0-00001-of-0000")
    assert done.path.name == "model-adapter-q8_0.gguf", "adapters are small and stay whole"
    base, adapter = ((tmp_path / f"model-{kind}-q8_0.Modelfile").read_text() for kind in ("base", "adapter"))
    merge = f"llama-gguf-split --merge {first} model-base-q8_0.gguf"
    assert base.startswith("# Ollama reads no model in parts") and merge in base and "FROM ./model-base-q8_0.gguf\n" in base
    assert merge in adapter and "FROM ./model-base-q8_0.gguf\n" in adapter and "ADAPTER ./model-adapter-q8_0.gguf" in adapter
    page = (tmp_path / "README.md").read_text()
    assert f"llama-cli -m {first} --lora model-adapter-q8_0.gguf" in page and f"llama-cli -m {first} -c" in page
    assert merge in page and "ollama create model-base-q8_0 -f model-base-q8_0.Modelfile" in page
    assert f'Llama("{first}"' in page and f"- `{first}` sha256" in page


def cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 4096)


def flip(path: Path) -> None:
    tensor = GGUFReader(path, "r+").tensors[0]
    tensor.data.view(np.uint8).reshape(-1)[5] ^= 1


def missing(path: Path) -> None:
    path.unlink()


def other_number(path: Path) -> None:
    field = GGUFReader(path, "r+").fields["split.no"]
    field.parts[field.data[0]][0] = 7


@pytest.mark.parametrize(("damage", "named"), [(cut, "loads, in parts"), (missing, "loads, in parts"), (other_number, "loads, in parts"), (flip, "parts")])
def test_a_damaged_part_is_caught_and_all_are_put_aside(
    damage: Callable[[Path], None], named: str, live: Live, samples: Samples, tmp_path: Path
) -> None:
    checks: list[str] = []

    def interfere(done: int, total: int, name: str) -> None:
        checks.extend([name] if name == "self-check" else [])
        if name == "self-check" and len(checks) == 2:
            part = sorted((tmp_path / f"{NAME}.gguf.parts").iterdir())[2]
            damage(part)

    with pytest.raises(UserError, match=f"{named}: .*do not use it"):
        in_parts(live, samples, tmp_path, progress=interfere)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left and all(".gguf.failed" in name for name in left)
    assert sum(name.endswith(".gguf.failed.check.json") for name in left) == 1


def test_a_part_that_goes_missing_later_is_told(live: Live, samples: Samples, tmp_path: Path) -> None:
    done = in_parts(live, samples, tmp_path)[0]
    parts_of(done.path)[1].unlink()
    with pytest.raises(UserError, match="cannot load"):
        probe(done.path)


@pytest.mark.parametrize("at", [("splitting", 3), ("self-check", 2)])
def test_cancelled_leaves_nothing(at: tuple[str, int], live: Live, samples: Samples, tmp_path: Path) -> None:
    seen: list[str] = []

    def cancel(done: int, total: int, name: str) -> None:
        seen.append(name)
        if seen.count(at[0]) == at[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parts(live, samples, tmp_path / "new", progress=cancel)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "word"), [("2", "no size"), ("large", "no size"), ("1kB", "at least 64KiB"), ("-1GiB", "no size")])
def test_sizes_that_are_none_are_refused(size: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        size_of(size)
