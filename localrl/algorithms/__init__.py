"""One short file an algorithm. Whatever file of this folder defines an `Algorithm` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from typing import get_args

from localrl.algorithms.base import Algorithm


def discover() -> dict[str, type[Algorithm]]:
    """Every algorithm of this folder, by name, in alphabetical order.

    >>> sorted(discover())[:3]
    ['gdpo', 'group_dpo', 'grpo']
    """
    found: dict[str, type[Algorithm]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        for kind in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(kind, type) and issubclass(kind, Algorithm) and kind.__module__ == f"{__name__}.{module}":
                for name in get_args(kind.model_fields["name"].annotation):
                    found[name] = kind
    return dict(sorted(found.items()))


ALGORITHMS = discover()
