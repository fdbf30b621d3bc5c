"""The self-check: an exported file is loaded in a child process and has to say what the trained model says.

Every export begins with a file in F32 (F16 where that would be huge), and that one has to be right:

| parent | mean KL, nats: limit | what is right | what goes wrong silently |
|---|---|---|---|
| F32 | 1e-7, and no logit off by more than 1e-4 x max(1, the largest logit) | 1e-11 | a wrong norm epsilon 3e-6 |
| F16 | 1e-4, a warning from 1e-5 | 1e-6 | rope scaling dropped 1e-2, q and k not interleaved 3e-2 |

What is made from it by quantising loses something, on small models more than on large ones. That is no fault but a price: above what is usual
for its type the report warns, above ten times that the file is refused. Whether it was damaged is told by its weights, each within its
type's rounding of the parent's (`tensors.py`).

Where the model's first choice leads by half a nat, the file's must be the same (F32, F16). Greedy text has to agree for those two except where
the model itself was undecided.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from localrl.export.expected import Expected
from localrl.export.reference import GREEDY, Parting
from localrl.export.report import Row
from localrl.export.writer import DType
from localrl.settings import how_it_ended

WORKER = Path(__file__).with_name("check_worker.py")
SECONDS = 3600.0
"""After which the child is given up: a 14B file on two cores takes minutes."""

SMALL = 2**28
"""Bytes of a file up to which one thread is enough."""

MAX_ABS = 1e-4
"""Of an F32 file, times the largest logit if that is above 1."""
USUAL_KL: Mapping[str, float] = {"f32": 1e-7, "f16": 1e-5, "bf16": 1e-4, "q8_0": 1e-3, "q6_k": 5e-3, "q5_k_m": 1e-2, "q4_0": 5e-2, "q3_k_m": 1e-1}
"""Mean KL, nats, of files that are as they should be."""
USUAL_KL_ELSE = 3e-2
REFUSED = 10.0
"""Times what is usual, and the file is refused. An F32 file is refused at once."""
UNDECIDED: Mapping[str, float] = {"f32": 1e-3, "f16": 5e-2, "bf16": 2e-1}
"""Lead in nats under which greedy text may part; other types are not asked."""
COARSE: Mapping[str, float] = {"gemma": 50.0, "gemma2": 50.0, "gemma3": 50.0}
"""Architectures that llama.cpp computes less exactly than fp32 (GELU from a table in F16), and by how much the strict limits are wider for them."""
OWN_ROUNDING = 5e-2
"""Mean KL between the live model's own arithmetic (bf16, int8) and fp32 on the same weights, above which one of them is wrong."""


Agree = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[Parting]]
"""Prompts, and greedy texts to them -> where the model would have gone on differently."""


def run(file: Path, adapter: Path | None, expected: Expected) -> tuple[dict[str, Any] | None, str]:
    """The child's findings, or None and what it said before it died."""
    job = {
        "model": str(file),
        "adapter": str(adapter) if adapter else None,
        "threads": threads_for(file),
        "texts": expected.texts,
        "pieces": expected.pieces,
        "space_in_front": expected.space_in_front,
        "dialogues": expected.dialogues,
        "sequences": [{"tokens": a.tokens, "keep": len(a.logits)} for a in expected.asked],
        "prompts": expected.prompts,
        "count": GREEDY,
    }
    return ask_child(WORKER, job, torch.cat([a.logits for a in expected.asked]).numpy())


def ask_child(worker: Path, job: Mapping[str, Any], array: NDArray[Any]) -> tuple[dict[str, Any] | None, str]:
    """What a worker script makes of a job and an array in a process of its own, or None and what it said before it died."""
    with tempfile.TemporaryDirectory(prefix="localrl-check-") as folder:
        paths = [Path(folder) / name for name in ("job.json", "array.npy", "result.json")]
        paths[0].write_text(json.dumps(job))
        np.save(paths[1], array, allow_pickle=False)
        command = [sys.executable, "-P", str(worker), *map(str, paths)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return None, f"no answer within {SECONDS:.0f} s"
        if child.returncode or not paths[2].exists():
            said = child.stderr.strip().splitlines()[-1:] or ["nothing"]
            return None, f"{how_it_ended(child.returncode)}, last words: {said[0][:300]}"
        return json.loads(paths[2].read_text()), ""


def threads_for(file: Path) -> int:
    """One for a small file, else the cores that nobody is using."""
    return free_cores() if file.stat().st_size > SMALL else 1


def free_cores() -> int:
    """Cores that nobody is using: llama.cpp's threads spin while they wait, and two on one busy core took ten times as long as one."""
    return max(1, (os.cpu_count() or 1) - max(0, round(psutil.getloadavg()[0]) - 1))  # this process has been busy until now


def judge(found: Mapping[str, Any], expected: Expected, agree: Agree, dtype: DType, looseness: float = 1.0) -> tuple[Row, ...]:
    """The child's findings against the limits. `looseness`: how much coarser than others this family's arithmetic is in llama.cpp."""
    rows = [
        Row("loads", True, "llama.cpp loads it", "loads"),
        counted("tokens", found["tokens"], sum(1 + (d is not None) for _, _, d in expected.texts), expected.note),
        counted("text of tokens", found["pieces"], len(expected.pieces)),
        Row("stored template", found["template"] == expected.template, "equal" if found["template"] == expected.template else "differs", "equal",
            parting(expected.template, found["template"])),
        counted("chat template", found["dialogues"], len(expected.dialogues), "" if expected.dialogues else "the tokenizer has none"),
        specials(found["specials"], expected),
        ends(found, expected),
        *distances(found["logits"], dtype, looseness),
    ]  # fmt: skip
    if dtype in UNDECIDED:
        parted = agree(expected.prompts, found["greedy"])
        good = all(p.lead <= UNDECIDED[dtype] * looseness for p in parted)
        equal = f"{len(expected.prompts) - len(parted)} of {len(expected.prompts)} equal"
        rows.append(Row("greedy text", good, equal, "all but near ties", f"first parting: {parted[0]}" if parted else ""))
    own = expected.own_rounding
    if own is not None:
        detail = "of the live model, from its own weights in fp32"
        rows.append(Row("trainer's rounding", own <= OWN_ROUNDING, f"{own:.1e} nats", f"<= {OWN_ROUNDING:.0e}", detail))
    return tuple(rows)


def specials(found: Mapping[str, Any], expected: Expected) -> Row:
    """Special tokens, and what is put around a text, by GGUF key."""
    wrong = {name: found.get(name) for name, value in expected.specials.items() if found.get(name) != value}
    detail = "".join(f"{name}: {value}, wanted {expected.specials[name]} " for name, value in wrong.items()).strip()
    return Row("special tokens", not wrong, f"{len(expected.specials) - len(wrong)} of {len(expected.specials)} equal", "all", detail)


def ends(found: Mapping[str, Any], expected: Expected) -> Row:
    """Where a reply ends: at each of the model's end tokens, and at no other that it would write."""
    stops, known = list(expected.stop_ids), set(found["ends"])
    extra = sorted(known - set(stops))  # llama.cpp knows some end tokens by their text
    stopping = known >= set(stops) and found["eos"] == stops[0] and set(extra) <= expected.harmless_ends
    return Row("end tokens", stopping, f"stops at {sorted(known)}", f"at {stops}", f"by their names also at {extra}" if extra else "")


def distances(logits: Mapping[str, float], dtype: DType, looseness: float) -> list[Row]:
    """The file's logits and distributions against the model's."""
    usual = USUAL_KL.get(dtype, USUAL_KL_ELSE) * (looseness if dtype in UNDECIDED else 1.0)
    kl, refused = logits["kl_mean"], usual * (1.0 if dtype == "f32" else REFUSED)
    scale, same, decided = logits["largest_logit"], logits["decided_top1"], logits["decided"]
    tail, strict = f"99th percentile {logits['kl_p99']:.1e}", MAX_ABS * max(1.0, scale) * looseness
    asked = f"<= {refused:.0e}" if refused == usual else f"<= {refused:.0e}, usual {usual:.0e}"
    rows = [Row("mean KL", kl <= refused, f"{kl:.1e} nats", asked, tail, warns=kl > usual)]
    if dtype == "f32":
        rows.insert(0, Row("logits", logits["max_abs"] <= strict, f"{logits['max_abs']:.1e}", f"<= {strict:.1e}", f"largest logit {scale:.1f}"))
    exact = dtype in UNDECIDED
    good = not decided or same >= 1.0
    found = f"{same if decided else 1:.1%} of {decided:.0f} decided"
    everywhere = f"{logits['top1']:.1%} of all {logits['positions']:.0f}"
    return [*rows, Row("first choice", good or not exact, found, "all" if exact else "not asked", everywhere)]


def looseness(arch: str) -> float:
    """By how much the strict limits are wider for this architecture."""
    return COARSE.get(arch, 1.0)


def parting(wanted: str, got: str) -> str:
    """Where two texts part, in a few characters; empty if they do not.

    >>> parting("abc", "abd"), parting("a", "a")
    ("at 2: 'c' became 'd'", '')
    """
    at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    return "" if wanted == got else f"at {at}: {wanted[at : at + 12]!r} became {got[at : at + 12]!r}"


def counted(name: str, wrong: Sequence[Sequence[Any]], total: int, note: str = "") -> Row:
    """A row for things that must all be equal, with the first that is not."""
    first = "" if not wrong else f"first: {wrong[0][0]!r}: {wrong[0][1]!r} became {wrong[0][2]!r}"
    return Row(name, not wrong, f"{total - len(wrong)} of {total} equal", "all", " ".join(part for part in (note, first[:400]) if part))


def check(
    file: Path, adapter: Path | None, expected: Expected, agree: Agree, dtype: DType, looseness: float = 1.0
) -> tuple[tuple[Row, ...], dict[str, float]]:
    """Load `file` (and `adapter` on it) in a child and compare. `agree`: the model on greedy texts. -> (rows, the logits' distances)."""
    found, words = run(file, adapter, expected)
    if found is None:
        return (Row("loads", False, "llama.cpp cannot load it", "loads", words),), {}
    return judge(found, expected, agree, dtype, looseness), {k: float(v) for k, v in found["logits"].items()}


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
