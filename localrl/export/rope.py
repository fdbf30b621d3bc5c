"""Rotary embeddings: transformers' settings as GGUF keys and tensors.

transformers keeps them in `rope_parameters`, Gemma 3's one mapping for each type of layer. Nothing is guessed: a setting that is missing, or that
llama.cpp's graph of the architecture has no place for, is a UserError. What each graph reads is told by llama.cpp's src/models/<arch>.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localrl.settings import UserError

Scalar = int | float | bool | str
FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as transformers' `layer_types` names them."""
CELLS = 256
"""llama.cpp makes the context of a sequence a multiple of so many tokens."""
YARN: Mapping[str, Any] = {
    "beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True,
}  # fmt: skip
"""yarn's settings as llama.cpp has them fixed."""


def rope_of(config: Any, layers: str = FULL) -> dict[str, Any]:
    """The rotary settings of that type of layer as one mapping with `rope_type` and `rope_theta`, wherever transformers keeps them."""
    rope = settings_of(config)
    if nested(config):
        if layers not in rope:
            raise UserError(f"rope_parameters are given for {', '.join(rope)}, not for '{layers}', without which no GGUF can be written: add them")
        rope = dict(rope[layers])
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None))
    if not rope["rope_theta"]:
        raise UserError("the model's configuration names no rope_theta, without which no GGUF can be written: add it to rope_parameters")
    return rope


def settings_of(config: Any) -> dict[str, Any]:
    """As transformers has them, flat or by type of layer."""
    return dict(getattr(config, "rope_scaling", None) or {}) | dict(getattr(config, "rope_parameters", None) or {})


def nested(config: Any) -> bool:
    """Whether there are settings for each type of layer."""
    return any(isinstance(value, Mapping) for value in settings_of(config).values())


def rope_keys(config: Any, width: int, arch: str, known: Collection[str], *, partial: bool = False, local: bool = False) -> dict[str, Scalar]:
    """GGUF keys (without the architecture's prefix). UserError where llama.cpp's would differ. `width`: dimensions of a head.

    `known`: rope types that the architecture's graph computes. `partial`: it can leave a part of each head as it is. `local`: layers with a
    window are turned by settings of their own, which are never scaled.
    """
    if nested(config) and not local:
        raise UserError(f"rope_parameters for each type of layer are not in llama.cpp's {arch} graph, only one for all: keep the PEFT adapter")
    rope, share = rope_of(config), float(rope_of(config).get("partial_rotary_factor") or 1.0)
    if share != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor = {share} is not in llama.cpp's {arch} graph, only 1: keep the PEFT adapter")
    if rope["rope_type"] not in known:
        raise UserError(f"rope_type = '{rope['rope_type']}' is not in llama.cpp's {arch} graph, only {', '.join(known)}: keep the PEFT adapter")
    keys: dict[str, Scalar] = {"rope.dimension_count": turned(config, width), "rope.freq_base": float(rope["rope_theta"])}
    if local:
        keys["rope.freq_base_swa"] = local_theta(config, arch)
    return keys | scaling_keys(config, rope)


def turned(config: Any, width: int) -> int:
    """Dimensions of a head that rotate."""
    return int(width * float(rope_of(config).get("partial_rotary_factor") or 1.0))


def local_theta(config: Any, arch: str) -> float:
    """rope_theta of the layers with a window."""
    rope = rope_of(config, SLIDING)
    if rope["rope_type"] != "default" or float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"rope_type = '{rope['rope_type']}' in layers with a window is not in llama.cpp's {arch} graph, only default: keep the PEFT adapter")
    return float(rope["rope_theta"])


def scaling_keys(config: Any, rope: Mapping[str, Any]) -> dict[str, Scalar]:
    """GGUF keys of the rotary scaling, if there is one."""
    kind = rope["rope_type"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        odd = {k: rope[k] for k, usual in YARN.items() if rope.get(k) not in (None, usual)}
        if odd:
            raise UserError(f"yarn with {odd} has no counterpart in llama.cpp, only {YARN}: keep the PEFT adapter")
        factor, original = float(rope["factor"]), original_length(config, rope)
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": factor, "rope.scaling.original_context_length": original}
    if kind == "longrope":
        original = original_length(config, rope)
        if original < CELLS:
            raise UserError(f"original_max_position_embeddings = {original} is less than llama.cpp's smallest context of {CELLS}: keep the PEFT adapter")
        return {"rope.scaling.attn_factor": attention_factor(config, rope), "rope.scaling.original_context_length": original}
    return {}  # default; llama3's factors travel as a tensor


def original_length(config: Any, rope: Mapping[str, Any]) -> int:
    """Tokens of the context before it was stretched."""
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def attention_factor(config: Any, rope: Mapping[str, Any]) -> float:
    """What longrope multiplies cosine and sine with (arXiv 2402.13753): sqrt(1 + ln(stretch) / ln(original length)), if it is not given."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = original_length(config, rope)
    stretch = float(rope.get("factor") or config.max_position_embeddings / original)
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def unstretched(config: Any) -> int | None:
    """longrope: up to how many tokens llama.cpp has to be given room for, so that it takes the factors that transformers takes; else None.

    transformers chooses between short and long factors by the tokens it reads, llama.cpp by the tokens it has room for.
    """
    rope = rope_of(config)
    return original_length(config, rope) // CELLS * CELLS if rope["rope_type"] == "longrope" else None


def rope_tensors(config: Any, width: int) -> dict[str, NDArray[np.float32]]:
    """Tensor -> what each rotary frequency is divided by, (dimensions that rotate / 2,), for Llama 3's scaling and longrope.

    >>> from transformers import LlamaConfig
    >>> rope_tensors(LlamaConfig(), 128)
    {}
    """
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, width)}
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{name}.weight": np.asarray(rope[f"{name}_factor"], dtype=np.float32) for name in ("long", "short")}
    return {}


def llama3_factors(rope: Mapping[str, Any], width: int) -> NDArray[np.float32]:
    """Llama 3's scaling: long waves are stretched, short ones kept, (width / 2,)."""
    wave = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float64) / width)
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth = np.clip((original / wave - low) / (high - low), 0.0, 1.0)  # 1: a short wave, kept; 0: a long one, stretched
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
