"""What kernels allocate and free inside one operator, by device and operator: (arguments, result) -> bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SCRATCH: Mapping[str, Callable[[Any, Any], int]] = {}
