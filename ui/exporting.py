"""Exports of a run: what a file will weigh, the command that makes it, and what its self-check found."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from localrl.config import Run
from localrl.export import DType, Merge, What, check_exportable
from localrl.exports import find
from localrl.folder import checkpoints, read_run
from localrl.settings import UserError

from .html import Markup, complaint, notice, table, text
from .jobs import Job, jobs, start
from .place import Place

KIND = "export"
TYPES, MERGES, WHATS = get_args(DType), get_args(Merge), get_args(What)
SERVED = (".gguf", ".md", ".json", "Modelfile")
"""What can be downloaded out of an `export/` folder, by the end of its name."""
_SECRET = secrets.token_bytes(32)


# -- before ---------------------------------------------------------------------------------------------------------------------


def bits(dtype: str) -> float:
    """Bits of a weight: of the type that most tensors get. The output layer and some others get a larger one.

    >>> bits("q8_0"), bits("f16")
    (8.5, 16.0)
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = dtype.upper().removesuffix("_M").removesuffix("_S")
    if name == "IQ4":
        name = "IQ4_XS"
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return 8 * size / numbers


@lru_cache(maxsize=32)
def _parameters(path: str, revision: str | None, r: int, targets: str | tuple[str, ...], stamp: float) -> tuple[int, int]:
    """(of the model, of the adapter). Reads the model's config; UserError if there is none to be had."""
    from localrl.config import build
    from localrl.memory.shape import ModelShape
    from localrl.planning import model_config

    model = {"path": path, **({"revision": revision} if revision else {})}
    shape = ModelShape.read(model_config(_any_run(build, model)).to_dict())
    return shape.parameters, sum(shape.adapter_parts(r, targets))


def _any_run(build: Any, model: dict[str, Any]) -> Run:
    """A run of that model; nothing else of it is asked about."""
    from localrl.config import load_run

    values = load_run("demo").model_dump(mode="json", exclude_none=True) | {"model": model}
    run = build(values)
    assert isinstance(run, Run)
    return run


def estimates(folder: Path, what: str) -> str:
    """A table: every type with its size and its speed beside F16, both as bytes say it."""
    run = read_run(folder)
    model, adapter = _parameters(run.model.path, run.model.revision, run.adapter.lora_r, run.adapter.lora_target_modules, 0.0)
    count = adapter if what == "adapter" else model
    rows = [(name, size(count * bits(name) / 8), f"{16 / bits(name):.1f}x") for name in TYPES]
    told = ("An adapter is small in any type; its base comes with it, once." if what == "adapter"
            else "Writing reads every weight once a token, so half the bytes is up to twice the speed.")
    heads = ("type", "about", "tokens/s beside f16, at most")
    return table(heads, rows, numbers=(1, 2)) + f'<p class="quiet">Estimates, from {count:,} weights. {text(told)}</p>'


def size(count: float) -> str:
    """Bytes for people.

    >>> size(5_200_000), size(7.4e9)
    ('5.0 MiB', '6.9 GiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def objection(folder: Path) -> str:
    """Why this run cannot be exported, before anybody waits for it; empty: it can."""
    from localrl.planning import model_config

    try:
        run = read_run(folder)
        if not checkpoints(folder):
            return f"{folder.name} has no checkpoint yet: there is nothing to export"
        check_exportable(model_config(run), {"target_modules": run.adapter.lora_target_modules},
                         converter=Path(run.export.converter) if run.export.converter else None)
    except UserError as error:
        return str(error)
    return ""


# -- the command ----------------------------------------------------------------------------------------------------------------


def arguments(source: Path, what: str, types: Sequence[str], merge: str) -> list[str]:
    """What follows `localrl`."""
    return ["export", str(source), "--what", what, "--type", ",".join(types), *(["--merge", merge] if what == "merged" else [])]


def command(source: str, what: str, types: Sequence[str], merge: str) -> str:
    """To copy."""
    return shlex.join(["localrl", *arguments(Path(source), what, types, merge)]) if types else ""


def begin(place: Place, name: str, checkpoint: str, what: str, types: Sequence[str], merge: str) -> Job:
    """Start it. UserError for what cannot be, and while another export of this run is under way."""
    folder = place.inside(name)
    if not types:
        raise UserError("no type is chosen: q8_0 is small and nearly exact")
    for given, known in ((what, WHATS), (merge, MERGES), *((t, TYPES) for t in types)):
        if given not in known:
            raise UserError(f"'{given}' is not offered: one of {', '.join(known)}")
    if said := objection(folder):
        raise UserError(said)
    if any(job.state == "running" for job in jobs(place, KIND, name)):
        raise UserError("an export of this run is under way: wait for it, or cancel it")
    source = place.inside(Path(name) / checkpoint) if checkpoint else folder
    if not source.is_dir():
        raise UserError(f"{name} has no {checkpoint}: it was removed since; choose another")
    return start(place, KIND, arguments(source, what, types, merge), name)


def progress(job: Job | None) -> str:
    """What the command is at, or how it ended."""
    if job is None:
        return ""
    lines = [line.strip() for line in job.output().splitlines() if line.strip()]
    if job.state == "running":
        return notice(f"under way: {lines[-1] if lines else 'starting'}")
    if job.state == "failed":
        return notice("cancelled: nothing was left half-written") if job.code in (130, -2) else complaint(job.complaint())
    return notice("done, and proven: see below")


# -- after ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A file of `export/`, passed or put aside."""

    path: Path
    report: dict[str, Any]
    """What `localrl.export.report.CheckReport` says as JSON; empty: there is none."""

    @property
    def failed(self) -> bool:
        """Put aside by its self-check."""
        return self.path.suffix == ".failed"


def made(folder: Path) -> list[Made]:
    """Every file with its report, newest first; of a file in parts the first."""
    found = []
    for path in (folder / "export").rglob("*"):
        if path.suffix not in (".gguf", ".failed") or ".parts" in path.parent.name or (_part(path.stem) or 1) > 1:
            continue
        found.append(Made(path, _report(path)))
    return sorted(found, key=lambda one: one.path.stat().st_mtime, reverse=True)


def _part(stem: str) -> int | None:
    import re

    number = re.search(r"-(\d{5})-of-\d{5}$", stem)
    return int(number[1]) if number else None


def _report(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.with_name(path.name + ".check.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def listed(place: Place, name: str) -> str:
    """All files of a run with their verdicts and reports, and how to use them."""
    folder = place.inside(name)
    files = made(folder)
    if not files:
        return '<p class="quiet">Nothing has been exported yet.</p>'
    return "".join(_one(place, one) for one in files)


def _one(place: Place, one: Made) -> str:
    report, path = one.report, one.path
    verdict = '<span class="bad">failed its self-check: do not use it</span>' if one.failed else '<span class="good">passed its self-check</span>'
    if not report:
        verdict = '<span class="quiet">no report lies beside it</span>'
    told = " · ".join([size(path.stat().st_size), *([f"{report['what']}, {report['dtype']}"] if {"what", "dtype"} <= report.keys() else [])])
    body = checks(report) + rewards(report) + "".join(notice(note) for note in report.get("notes", ()))
    use = "" if one.failed else usage(place, path, str(report.get("what", "")))
    return (f'<section class="made"><h3>{text(path.name)}</h3><p>{verdict} · {text(told)}</p>{use}'
            f"<details{' open' if one.failed else ''}><summary>What was compared with the trained model</summary>{body}</details></section>")


def checks(report: dict[str, Any]) -> str:
    """The self-check's rows: what was found, what was asked for."""
    rows = []
    for row in report.get("checks", ()):
        passed = bool(row.get("passed"))
        word = Markup('<span class="bad">FAILED</span>') if not passed else Markup("look at it") if row.get("warns") else Markup('<span class="good">ok</span>')
        rows.append((word, row.get("name", ""), row.get("value", ""), row.get("limit", ""), row.get("detail", "")))
    return table(("", "check", "found", "asked for", ""), rows) if rows else ""


def rewards(report: dict[str, Any]) -> str:
    """Held-out rewards of the trained model and of the file, the same prompts and random numbers."""

    def said(interval: dict[str, float]) -> str:
        return f"{interval['mean']:.3f} ± {interval['half']:.3f}"

    rows = [(name, *(said(change[part]) for part in ("before", "after", "change"))) for name, change in report.get("rewards", {}).items()]
    return table(("reward on held-out prompts", "trained model", "this file", "difference"), rows, numbers=(1, 2, 3)) if rows else ""


def usage(place: Place, path: Path, what: str) -> str:
    """Download, and the commands that use it."""
    shown = shlex.quote(place.shown(path))
    lines = [f"localrl chat {shown}", f"localrl serve {shown}", f"llama-cli -m {shown}"]
    if what == "adapter":
        with suppress(UserError):
            lines[-1] = f"llama-cli -m {shlex.quote(place.shown(find(path).model))} --lora {shown}"
    beside = path.parent / "Modelfile"
    extra = [p for p in (beside, path.parent / "README.md") if p.is_file()]
    links = " ".join(f'<a class="do" href="{link(place, p)}" download>{text(p.name)}</a>' for p in (path, *extra))
    modelfile = f"<details><summary>Ollama: Modelfile</summary><pre class=text>{text(beside.read_text('utf-8', 'replace')[:20000])}</pre></details>" \
        if beside.is_file() else ""
    return f'<p>{links}</p><pre class="text">{text(chr(10).join(lines))}</pre>{modelfile}'


# -- downloads ------------------------------------------------------------------------------------------------------------------


def link(place: Place, path: Path) -> str:
    """An address under which this file can be fetched from here, for as long as the UI runs. (A model is not copied for it.)"""
    name = place.shown(path)
    return f"/download/{_token(name)}/{quote(name)}"


def file_of(place: Place, token: str, name: str) -> Path | None:
    """What a link leads to; None for one that was not made here, and for what is no export."""
    if not hmac.compare_digest(token, _token(name)):
        return None
    try:
        path = place.inside(name)
    except UserError:
        return None
    return path if path.is_file() and path.name.endswith(SERVED) and "export" in path.parent.parts else None


def _token(name: str) -> str:
    return hmac.new(_SECRET, name.encode(), hashlib.sha256).hexdigest()[:32]
