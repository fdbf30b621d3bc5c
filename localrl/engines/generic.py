"""Any causal language model, by its own forward pass and with the cache that it makes itself: slower, and right for every architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from localrl.engines.weights import compute_device
from localrl.settings import UserError


class ModelCache:
    """The model's own cache and what goes with it: (n, columns) int64 attention mask, (n,) positions."""

    def __init__(self, kept: Any, mask: Tensor) -> None:
        self.kept, self.mask = kept, mask
        self.foldable = can_select(kept)
        """Rows can leave it."""
        self.moves = True

    def grow(self) -> None:
        """It grows by itself."""

    def fill(self, columns: int) -> None:
        """As after `columns` steps in which every key and value was 0, without the steps. UserError for a cache of unknown kind."""
        layers = getattr(self.kept, "layers", None)
        if layers is None:
            raise UserError(f"{type(self.kept).__name__} cannot be filled for a rehearsal: memory.probe=false does without one")
        for layer in layers:
            if isinstance(layer, DynamicLayer) and layer.is_initialized:             # other kinds keep a state of fixed size
                _lengthen(layer, columns)
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), columns)), 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows (k,) from now on. May name a row several times."""
        places = torch.tensor(rows, device=self.mask.device)
        self.kept.batch_select_indices(places)
        self.mask = self.mask[places]


class OwnForward:
    """A model read by its own forward pass. Rows are left-padded: the last column is every row's newest token."""

    apart = False

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = compute_device(inner)
        known = inspect.signature(inner.forward).parameters
        self.positioned, self.trimmed = "position_ids" in known, "logits_to_keep" in known
        self.cache_name = "cache" if "cache" in known else "past_key_values"           # transformers 5.24 renamed it

    def prefill(self, contexts: Sequence[Sequence[int]], owner: Sequence[int], room: int) -> tuple[Tensor, ModelCache]:
        """As `Decoder.prefill`. A cache whose rows cannot be copied is filled row by row instead of once a group."""
        logits, cache = self._read(contexts)
        if len(owner) == len(contexts):
            return logits, cache
        if cache.foldable:
            cache.keep(owner)
            return logits[torch.tensor(owner, device=self.device)], cache
        return self._read([contexts[i] for i in owner])

    def _read(self, contexts: Sequence[Sequence[int]]) -> tuple[Tensor, ModelCache]:
        width = max(len(c) for c in contexts)
        tokens = torch.tensor([[*[0] * (width - len(c)), *c] for c in contexts], device=self.device)
        mask = torch.arange(width, device=self.device) >= width - torch.tensor([[len(c)] for c in contexts], device=self.device)
        out = self._call(tokens, mask.long(), None)
        return out.logits[:, -1].float(), ModelCache(getattr(out, self.cache_name), mask.long())

    def step(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """One token more for every row. (n,) int64 -> logits of the next (n, V) float32."""
        cache.mask = torch.cat((cache.mask, cache.mask.new_ones(len(tokens), 1)), 1)
        out = self._call(tokens[:, None], cache.mask, cache.kept)
        cache.kept = getattr(out, self.cache_name)
        return out.logits[:, -1].float()

    def _call(self, tokens: Tensor, mask: Tensor, kept: Any) -> Any:
        more: dict[str, Any] = {self.cache_name: kept}
        if self.positioned:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        if self.trimmed:
            more["logits_to_keep"] = 1
        return self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **more)


def _lengthen(layer: Any, columns: int) -> None:
    """Zeros behind what a layer of transformers' own cache holds, as its own code would put them there one by one: what slides forgets, and
    what it keeps lies in a tensor of the window's size in the end."""
    step = columns - 1 if not layer.is_sliding else min(columns - 1, layer.sliding_window)
    done = 0
    while done < columns:
        count = max(1, min(step, columns - 1 - done))                # the last one alone
        keys, values = (kept.new_zeros(1).expand(*kept.shape[:2], count, kept.shape[3]) for kept in (layer.keys, layer.values))
        layer.update(keys, values)
        done += count


def can_select(cache: Any) -> bool:
    """Whether rows of this cache can be copied and dropped."""
    layers = getattr(cache, "layers", None)
    return hasattr(cache, "batch_select_indices") and layers is not None and all(hasattr(layer, "batch_select_indices") for layer in layers)


def _in_one_piece(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy: torch counts the strides of dimensions of size 1 too, which `contiguous` leaves as they are."""
    return inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:]


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """For as long as the model's own forward pass decodes: activation checkpointing off, which in training mode would drop the cache, MLPs in
    one tile, so that what a wave needs does not depend on how training is done, and last states in one piece for the output layer: of a slice through
    several rows torch makes one product a row, for which oneDNN copies the layer's weight as often.

    Everything is put back at the end, also the tables that some rotary embeddings recompute for long sequences.
    """
    tiled: list[tuple[Any, int]] = [(m, tile) for m in model.modules() if isinstance(tile := getattr(m, "tile", None), int)]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    tables = [(m, dict(vars(m)), [(n, b, b.clone()) for n, b in m._buffers.items() if b is not None]) for m in model.modules() if m._buffers]
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layer = inner.get_output_embeddings()
    whole = None if layer is None else layer.register_forward_pre_hook(_in_one_piece)
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        for module, _ in tiled:
            module.tile = 0
        yield
    finally:
        if whole is not None:
            whole.remove()
        for module, tile in tiled:
            module.tile = tile
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, attributes, buffers in tables:
            vars(module).update(attributes)
            for name, buffer, content in buffers:
                module._buffers[name] = buffer.copy_(content)
