"""The weights from before they were quantised, read from the checkpoint on the disk, one at a time: what an adapter can also be merged into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from localrl.export.weights import Reader, Source, causal_lm, lora_of, model_sources, modules_of, scaled, stored
from localrl.settings import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""A checkpoint in one file, or the list of its shards."""


@dataclass(frozen=True)
class Original:
    """A checkpoint's tensors by the names of the live model's modules. A tensor is in memory for as long as its reader."""

    files: Mapping[str, Path]
    """Tensor -> the file that holds it."""

    @classmethod
    def of(cls, folder: Path) -> Original:
        """From the safetensors files that transformers loads of a folder; UserError if there are none, one is missing, or they hold no plain numbers."""
        files: dict[str, Path] = {}
        for file in checkpoint_files(folder):
            if not file.is_file():
                raise UserError(f"{file} is missing, which {INDEX} names: copy it there, or take merge = 'dequantized'")
            with safe_open(file, "pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        if packed := [name for name in files if name.endswith((".absmax", ".SCB", ".qweight", ".weight_scale_inv"))]:
            raise UserError(f"the checkpoint in {folder} is quantised itself ({packed[0]}), it has no original weights: merge = 'dequantized'")
        return cls(files)

    def __call__(self, module: str) -> Reader:
        """Rows of a module's weight in fp32. `module`: its name within the transformers model."""
        wanted = f"{module}.weight"
        found = [wanted] if wanted in self.files else [name for name in self.files if wanted.endswith(f".{name}") or name.endswith(f".{wanted}")]
        if len(found) != 1:
            raise UserError(f"the original checkpoint has no weight '{wanted}' (or several): merge = 'dequantized'")
        with safe_open(self.files[found[0]], "pt") as opened:
            return scaled(opened.get_tensor(found[0]))


def checkpoint_files(folder: Path) -> list[Path]:
    """`model.safetensors`, else what the index of the shards names: whatever else lies in the folder is not the model. UserError if there is neither."""
    if (whole := folder / WHOLE).is_file():
        return [whole]
    if not (index := folder / INDEX).is_file():
        raise UserError(f"{folder} holds no safetensors checkpoint ({WHOLE} or {INDEX}) to read the original weights from: merge = 'dequantized'")
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of a checkpoint's shards ({error!r}): download it again, or take merge = 'dequantized'") from None
    return [folder / name for name in sorted(set(names))]


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer holds codes and no numbers."""
    return not stored(module).weight.is_floating_point()


def any_quantised(model: nn.Module) -> bool:
    """Whether there are two ways to merge at all."""
    return any(is_quantised(module) for _, _, module in modules_of(model))


def merged_sources(model: nn.Module, adapter: str | None, original: Original | None) -> list[Source]:
    """Every tensor of a model file; quantised layers from the original checkpoint, if that is given."""
    sources = model_sources(model, adapter)
    if original is None:
        return sources
    names: dict[int, str] = {id(module): name for name, module in causal_lm(model).named_modules()}
    layers = {f"{name}.weight": module for name, _, module in modules_of(model) if is_quantised(module)}
    return [replace(s, open=partial(onto, original, names[id(layers[s.name])], layers[s.name], adapter)) if s.name in layers else s for s in sources]


def onto(original: Original, name: str, module: Any, adapter: str | None) -> Reader:
    """Rows of W + scaling * B A with the original W."""
    base, lora = original(name), lora_of(module, adapter)

    def read(rows: Tensor) -> Tensor:
        values = base(rows)
        if lora is None:
            return values
        a, b, scaling = lora
        delta = scaling * (b[rows.to(b.device)].float() @ a.float())
        return values.to(delta.device).add_(delta)

    return read

