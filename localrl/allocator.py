"""How PyTorch and the C library keep memory that a tensor has given back.

On a GPU the caching allocator's segments grow instead of standing side by side, which halves what rows of many lengths lose to
fragmentation: set once, before torch is imported.

On a CPU glibc is left as it is. Measured on the demo: thresholds that make it give memory back at once (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) lower
the peak by up to 10 % and make a step 5 to 70 % longer; malloc_trim between phases lowers no run's peak, only what smaller phases inherit from
the fullest, for about 3 % of the time.
"""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name of today, and the one before, which torch still reads."""
EXPANDABLE = "expandable_segments:True"


def set_allocator() -> None:
    """Once, before torch is imported. What a person has set stays."""
    if not any(name in os.environ for name in SETTINGS) and can_expand():
        os.environ[_setting()] = EXPANDABLE


def told() -> str | None:
    """What the environment says to PyTorch's allocator."""
    return next((os.environ[name] for name in SETTINGS if name in os.environ), None)


def expands() -> bool:
    """Whether a run here has segments that grow: it is set, or will be by `set_allocator`."""
    setting = told()
    if setting is None:
        return can_expand()
    return re.search(r"expandable_segments\s*:\s*true", setting, re.IGNORECASE) is not None


def can_expand() -> bool:
    """Whether the driver's virtual memory calls are to be relied on: not on Windows (torch ignores the setting), nor under WSL and on
    Tegra boards, where the first allocation may fail with "CUDA driver error"."""
    return platform.system() == "Linux" and not under_wsl() and not Path("/etc/nv_tegra_release").exists()


def under_wsl() -> bool:
    """Linux as a guest of Windows."""
    try:
        return "microsoft" in Path("/proc/version").read_text(errors="replace").lower()
    except OSError:
        return False


def _setting() -> str:
    """torch 2.9 knows the new name but does not heed it on CUDA; before, there was the old one alone."""
    try:
        release = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return SETTINGS[0]
    return SETTINGS[0] if release >= (2, 10) else SETTINGS[1]
