"""The graphics card: what it is, who else holds it, how PyTorch keeps it, and what past runs have taught about it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from localrl import allocator
from localrl.doctor.finding import Finding, first_line
from localrl.memory.cards import CARD_SHARE, CONTEXT, FRAGMENTATION, FRAGMENTATION_OF_FIXED, Card, gib, pinnable, usable_bytes
from localrl.memory.reality import lessons, store

SHOWN_LESSONS = 6
PINNED_TRIAL = 2**28
"""Bytes that are pinned for a moment, to see whether it works."""
TOKEN_OF_8B = 288 * 2**10
"""Bytes of all layers' inputs, half precision."""


def cards() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why = "this build of torch is for CPUs" + ("; a driver is there, so install torch's CUDA build" if shutil.which("nvidia-smi") else "")
        elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            why = "CUDA_VISIBLE_DEVICES hides every GPU: unset it"
        else:
            why = f"torch is built for CUDA {torch.version.cuda} but sees no device: is the driver installed and new enough?"
        return [Finding("GPU", "none", "warn", f"{why}. The demo and small models train on the CPU; a real model wants a card of 8 GiB or more")]
    found = []
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        value = f"{told.name}, {gib(told.total_memory)}, compute capability {told.major}.{told.minor}, CUDA {torch.version.cuda}"
        half = "" if told.major >= 8 else "; no bfloat16 in hardware, float16 is used"
        meaning = f"a plan may use {gib(usable_bytes(told.total_memory))} of it{half}"
        if index:
            meaning = "localrl trains on the first GPU only; CUDA_VISIBLE_DEVICES chooses another"
        found.append(Finding(f"GPU {index}", value, "ok" if told.major >= 7 else "warn", meaning))
    return found


def neighbours() -> list[Finding]:
    """Who else holds memory, which driver, and what a plan is left with."""
    if shutil.which("nvidia-smi") is None:
        return []
    driver = _smi("--query-gpu=driver_version,memory.used,memory.total")
    others = _smi("--query-compute-apps=pid,process_name,used_memory")
    found = [Finding("GPU driver", "; ".join(f"{row[0]} ({row[1]} of {row[2]} in use)" for row in driver if len(row) > 2) or "unknown", "ok", "")]
    others = [row for row in others if row and row[0] != str(os.getpid())]
    if others:
        value = "; ".join(f"{Path(row[1]).name} (pid {row[0]}) {row[2]}" for row in others if len(row) > 2)
        meaning = "what they hold is missing from the plan's card, and may grow: close them, or name a smaller memory.card"
        found.append(Finding("other programs on the GPU", value, "warn", meaning))
    return found + left()


def left() -> list[Finding]:
    """What the desktop and everybody else leave of the first card, and what a plan makes of it."""
    import torch

    if not torch.cuda.is_available():
        return []
    free, total = torch.cuda.mem_get_info()                          # ours is the context alone: nothing of size is on the card yet
    desktop = max(0, total - free - CONTEXT)
    allowed = total - round(CARD_SHARE * total)
    card = Card.of(None, "cuda")
    value = f"{gib(free)} of {gib(total)} free, a plan has {gib(card.usable)}"
    if desktop <= allowed:
        return [Finding("room on the GPU", value, "ok", "")]
    meaning = (
        f"a desktop or other programs hold about {gib(desktop)}, which the plan leaves to them; without them it would have {gib(usable_bytes(total))}: "
        "close them, or let the processor's own graphics drive the screen"
    )
    return [Finding("room on the GPU", value, "warn", meaning)]


def segments() -> list[Finding]:
    """Which share of the card fragmentation is taken to cost, and why."""
    import torch

    if not torch.cuda.is_available():
        return []
    told, good = allocator.told(), allocator.expands()
    value = told or (f"{allocator.EXPANDABLE} (localrl sets it)" if good else "segments of fixed size")
    if good:
        return [Finding("CUDA allocator", value, "ok", f"a plan gives {FRAGMENTATION:.0%} to fragmentation")]
    meaning = f"a plan gives {FRAGMENTATION_OF_FIXED:.0%} of its bytes to fragmentation instead of {FRAGMENTATION:.0%}: "
    if told is not None:
        return [Finding("CUDA allocator", value, "warn", f"{meaning}add {allocator.EXPANDABLE} to PYTORCH_ALLOC_CONF, or unset it")]
    under = "WSL" if allocator.under_wsl() else f"{platform.system()} on this machine"
    own = f"{meaning}under {under} segments that grow are not to be relied on; if `PYTORCH_ALLOC_CONF={allocator.EXPANDABLE}` works for you, set it"
    return [Finding("CUDA allocator", value, "warn", own)]


def pinned() -> list[Finding]:
    """How much host memory may be pinned, which memory.offload wants: CUDA asks the driver for it, `ulimit -l` does not count."""
    import torch

    if not torch.cuda.is_available():
        return []
    room = pinnable()
    try:
        trial = torch.empty(PINNED_TRIAL, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        meaning = f"memory.offload=true will not work here ({first_line(error)}): leave it off, long responses then take smaller passes or more of the card"
        return [Finding("pinned memory", f"{gib(PINNED_TRIAL)} refused", "warn", meaning)]
    del trial
    _empty_pinned()
    guest = "; Windows pins no more than part of what its guest has, and .wslconfig (memory=...) sets that" if allocator.under_wsl() else ""
    meaning = f"memory.offload keeps the layers' inputs there: room for a pass of about {room // TOKEN_OF_8B:,} tokens of an 8B"
    return [Finding("pinned memory", f"works, about {gib(room)} can be pinned", "ok", meaning + guest)]


def _empty_pinned() -> None:
    """torch keeps pinned memory for the next time, too."""
    import torch

    if (empty := getattr(torch._C, "_host_emptyCache", None)) is not None:
        empty()


def taught() -> list[Finding]:
    """What past runs have taught: how much each phase took of what was planned."""
    troubles: list[str] = []
    known = lessons(troubles.append)
    if troubles:
        return [Finding("lessons on memory", "damaged", "warn", troubles[0])]
    found: list[Finding] = []
    for key, lesson in known.items():
        card, model, *_ = key.split(" | ")
        value = f"{card}, {model.split()[0]}: " + ", ".join(f"{phase} {ratio:.2f}" for phase, ratio in lesson.ratios.items())
        found.append(Finding(f"lesson on memory {len(found) + 1}", f"{value} ({lesson.date})", "ok", "measured over planned: the next plan there counts on it"))
    if len(found) > SHOWN_LESSONS:
        found = [*found[:SHOWN_LESSONS], Finding("more lessons on memory", f"{len(found) - SHOWN_LESSONS} of other cards and models", "ok", f"in {store()}")]
    return found


def _smi(query: str) -> list[list[str]]:
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=5, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
