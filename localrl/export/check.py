"""The self-check: an exported file is loaded in a child process and has to say what the trained model says.

Limits, and what was measured on CPUs:

| file | mean KL, nats: limit | what is right | what goes wrong silently |
|---|---|---|---|
| F32 | 1e-7, and no logit off by more than 1e-4 x max(1, the largest logit) | 1e-11 | a wrong norm epsilon 3e-6 |
| F16 | 1e-4 | 1e-6 | q and k interleaved where they must not be 8e-3 |
| Q8_0 | 5e-3 | 7e-4 | rope scaling dropped 1e-2, q and k not interleaved 3e-2 |

Where the model's first choice leads by half a nat, the file's must be the same. Greedy text has to agree for F32 and F16 except where the
model itself was undecided; Q8_0 may part anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from localrl.export.expected import Expected
from localrl.export.reference import GREEDY, Parting
from localrl.export.writer import DType

WORKER = Path(__file__).with_name("check_worker.py")
SECONDS = 3600.0
"""After which the child is given up: a 14B file on two cores takes minutes."""

SMALL = 2**28
"""Bytes of a file up to which one thread is enough."""

MAX_ABS: Mapping[DType, float] = {"f32": 1e-4, "f16": np.inf, "q8_0": np.inf}
MEAN_KL: Mapping[DType, float] = {"f32": 1e-7, "f16": 1e-4, "q8_0": 5e-3}
TOP1: Mapping[DType, float] = {"f32": 1.0, "f16": 1.0, "q8_0": 0.97}
"""Share of the decided positions (first choice leads by half a nat) at which the first choice must be the same."""
UNDECIDED: Mapping[DType, float] = {"f32": 1e-3, "f16": 5e-2, "q8_0": np.inf}
"""Lead in nats under which greedy text may part."""
OWN_ROUNDING = 5e-2
"""Mean KL between the live model's own arithmetic (bf16, int8) and fp32 on the same weights, above which one of them is wrong."""


Agree = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[Parting]]
"""Prompts, and greedy texts to them -> where the model would have gone on differently."""


@dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    name: str
    passed: bool
    value: str
    """What was found."""
    limit: str
    """What was asked for."""
    detail: str = ""
    """Where it differs, or what a reader should know."""


@dataclass(frozen=True)
class CheckReport:
    """What the self-check of one file found."""

    file: str
    what: str
    """merged, adapter or base."""
    dtype: str
    bytes: int
    sha256: str
    types: Mapping[str, int]
    """How many tensors of each GGUF type."""
    seconds: float
    checks: tuple[Row, ...]
    figures: Mapping[str, float]
    """The logits' distances, unrounded."""

    @property
    def passed(self) -> bool:
        """Whether everything was as it must be."""
        return all(row.passed for row in self.checks)

    def failures(self) -> str:
        """What differs, in one line."""
        return "; ".join(f"{row.name}: {row.value}, asked: {row.limit}, {row.detail}".removesuffix(", ") for row in self.checks if not row.passed)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name, found, limit, detail) for a table; what failed says so."""
        return [(row.name if row.passed else f"FAILED {row.name}", row.value, row.limit, row.detail) for row in self.checks]

    def to_json(self) -> str:
        """The report as a JSON document."""
        return json.dumps(asdict(self) | {"passed": self.passed}, indent=1, ensure_ascii=False)


def run(file: Path, adapter: Path | None, expected: Expected) -> tuple[dict[str, Any] | None, str]:
    """The child's findings, or None and what it said before it died."""
    job = {
        "model": str(file),
        "adapter": str(adapter) if adapter else None,
        "threads": free_cores() if file.stat().st_size > SMALL else 1,
        "texts": expected.texts,
        "pieces": expected.pieces,
        "dialogues": expected.dialogues,
        "sequences": [{"tokens": a.tokens, "keep": len(a.logits)} for a in expected.asked],
        "prompts": expected.prompts,
        "count": GREEDY,
    }
    with tempfile.TemporaryDirectory(prefix="localrl-check-") as folder:
        paths = [Path(folder) / name for name in ("job.json", "logits.npy", "result.json")]
        paths[0].write_text(json.dumps(job))
        np.save(paths[1], torch.cat([a.logits for a in expected.asked]).numpy(), allow_pickle=False)
        command = [sys.executable, "-P", str(WORKER), *map(str, paths)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return None, f"no answer within {SECONDS:.0f} s"
        if child.returncode or not paths[2].exists():
            said = child.stderr.strip().splitlines()[-1:] or ["nothing"]
            return None, f"exit code {child.returncode}, last words: {said[0][:300]}"
        return json.loads(paths[2].read_text()), ""


def free_cores() -> int:
    """Cores that nobody is using: llama.cpp's threads spin while they wait, and two on one busy core took ten times as long as one."""
    return max(1, (os.cpu_count() or 1) - max(0, round(psutil.getloadavg()[0]) - 1))  # this process has been busy until now


def judge(found: Mapping[str, Any], expected: Expected, parted: Sequence[Parting], dtype: DType) -> tuple[Row, ...]:
    """The child's findings against the limits."""
    logits = found["logits"]
    scale = logits["largest_logit"]
    limit, kl = MAX_ABS[dtype] * max(1.0, scale), MEAN_KL[dtype]
    stops, ends = list(expected.stop_ids), set(found["ends"])
    extra = sorted(ends - set(stops))  # llama.cpp knows some end tokens by their text
    stopping = ends >= set(stops) and found["eos"] == stops[0] and set(extra) <= expected.harmless_ends
    agreeing = all(p.lead <= UNDECIDED[dtype] for p in parted)
    decided, same = logits["decided"], logits["decided_top1"]
    rows = [
        Row("loads", True, "llama.cpp loads it", "loads"),
        counted("tokens", found["tokens"], sum(1 + (d is not None) for _, _, d in expected.texts), expected.note),
        counted("text of tokens", found["pieces"], len(expected.pieces)),
        counted("chat template", found["dialogues"], len(expected.dialogues), "" if expected.dialogues else "the tokenizer has none"),
        Row("end tokens", stopping, f"stops at {sorted(ends)}", f"at {stops}", f"by their names also at {extra}" if extra else ""),
        Row("logits", logits["max_abs"] <= limit, f"{logits['max_abs']:.1e}", f"<= {limit:.1e}", f"largest logit {scale:.1f}"),
        Row("mean KL", logits["kl_mean"] <= kl, f"{logits['kl_mean']:.1e} nats", f"<= {kl:.1e}", f"99th percentile {logits['kl_p99']:.1e}"),
        Row(
            "first choice", same >= TOP1[dtype] or not decided, f"{same if decided else 1:.1%} of {decided} decided",
            f">= {TOP1[dtype]:.0%}", f"{logits['top1']:.1%} of all {logits['positions']}",
        ),
        Row(
            "greedy text", agreeing, f"{len(expected.prompts) - len(parted)} of {len(expected.prompts)} equal",
            "all but near ties" if dtype != "q8_0" else "not asked", f"first parting: {parted[0]}" if parted else "",
        ),
    ]  # fmt: skip
    own = expected.own_rounding
    if own is not None:
        detail = "of the live model, from its own weights in fp32"
        rows.append(Row("trainer's rounding", own <= OWN_ROUNDING, f"{own:.1e} nats", f"<= {OWN_ROUNDING:.0e}", detail))
    return tuple(rows)


def counted(name: str, wrong: Sequence[Sequence[Any]], total: int, note: str = "") -> Row:
    """A row for things that must all be equal, with the first that is not."""
    first = "" if not wrong else f"first: {wrong[0][0]!r}: {wrong[0][1]!r} became {wrong[0][2]!r}"
    return Row(name, not wrong, f"{total - len(wrong)} of {total} equal", "all", " ".join(part for part in (note, first[:400]) if part))


def check(
    file: Path, adapter: Path | None, expected: Expected, agree: Agree, *, file_name: str, what: str, dtype: DType, types: Mapping[str, int]
) -> CheckReport:
    """Load `file` (and `adapter` on it) in a child and compare. `agree`: the model on greedy texts. `file_name`: what it is to be called."""
    start = time.perf_counter()
    found, words = run(file, adapter, expected)
    if found is None:
        rows: tuple[Row, ...] = (Row("loads", False, "llama.cpp cannot load it", "loads", words),)
    else:
        rows = judge(found, expected, agree(expected.prompts, found["greedy"]), dtype)
    target = adapter or file
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    figures = {} if found is None else {k: float(v) for k, v in found["logits"].items()}
    return CheckReport(file_name, what, dtype, target.stat().st_size, digest, dict(types), time.perf_counter() - start, rows, figures)
