"""What a file says of itself: where it comes from, what it was trained for, and how to sample from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf.utility import size_label
from torch import nn

from localrl import __version__
from localrl.export.families import Value
from localrl.export.weights import causal_lm


def general_keys(name: str, config: Any, parameters: int) -> dict[str, Value]:
    """Name, size, and the model that it was made from, as far as its configuration tells."""
    keys: dict[str, Value] = {
        "general.name": name,
        "general.size_label": size_label(parameters, 0, 0, 0),
        "general.quantized_by": "localrl",
    }
    origin = str(getattr(config, "_name_or_path", "") or "")
    return keys | (base_model_keys(origin) if origin else {})


def base_model_keys(origin: str) -> dict[str, Value]:
    """A hub id or a folder as `general.base_model.0.*`; a folder is told by its name alone.

    >>> base_model_keys("Qwen/Qwen3-4B")["general.base_model.0.repo_url"]
    'https://huggingface.co/Qwen/Qwen3-4B'
    """
    keys: dict[str, Value] = {"general.base_model.count": 1, "general.base_model.0.name": Path(origin).name}
    if origin.count("/") == 1 and not Path(origin).exists():  # a hub id, not a folder
        keys["general.base_model.0.organization"] = origin.split("/")[0]
        keys["general.base_model.0.repo_url"] = f"https://huggingface.co/{origin}"
    return keys


def own_keys(metadata: Mapping[str, Value]) -> dict[str, Value]:
    """The caller's facts under `localrl.`, and those about the model under `general.` as they stand; loaders pass over keys they do not know.

    Empty strings and lists cannot be told and are left out.
    """
    named = {key if key.startswith("general.") else f"localrl.{key}": value for key, value in metadata.items() if value not in ("", [])}
    return {"localrl.version": __version__, **named}


def generation_ends(model: nn.Module) -> list[int]:
    """Every end token of the live generation config."""
    ends = getattr(getattr(causal_lm(model), "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [int(i) for i in ends] if isinstance(ends, list) else [int(ends)]
