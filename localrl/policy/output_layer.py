"""The frozen output layer of a model, and what the model does to its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from localrl.devices import kind_of
from localrl.settings import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What transformers' families do to their logits, by the name of the setting that asks for it.
TIMES = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
OVER = ("logits_scaling",)  # Granite; MiniCPM3 divides the hidden states, which is the same
TIMES_IN_SPITE_OF_ITS_NAME = ("hyperclovax",)  # its logits_scaling multiplies
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2 to 4, nanochat; RecurrentGemma; xLSTM


@dataclass(frozen=True, eq=False)
class Head:
    """Logits are softcap(scale * (h W^T + b)), h being the last hidden state that the decoder returns.

    >>> Head(torch.zeros(5, 3)).logits(torch.ones(2, 3)).shape
    torch.Size([2, 5])
    """

    weight: Tensor
    """(V, H), any float type, without gradient: the live tensor, tied or not, never a copy."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    softcap: float | None = None
    """cap * tanh(logit / cap)."""

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not len(self.weight) or self.weight.dtype not in FLOATS:
            raise ValueError(f"the weight must be a float (V, H), not {tuple(self.weight.shape)} {self.weight.dtype}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"the bias must be ({len(self.weight)},), not {tuple(self.bias.shape)}")
        if not (0 < self.scale < math.inf and (self.softcap is None or 0 < self.softcap < math.inf)):
            raise ValueError(f"scale and softcap must be positive and finite, not {self.scale} and {self.softcap}")
        self.check_frozen()

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a live transformers causal language model, PEFT-wrapped or not. Follow it with `verify` once after loading.

        UserError: there is no plain output layer, or it is quantised, adapted, trained or not in memory.
        """
        bare = bare_model(model)
        layer = bare.get_output_embeddings()
        kind, weight = type(layer).__name__, getattr(layer, "weight", None)
        if layer is None:
            raise UserError(f"{type(bare).__name__} has no output layer: choose a causal language model")
        if type(layer).__module__.startswith("peft."):
            raise UserError(f"the output layer carries an adapter ({kind}): leave lm_head out of the adapter's targets")
        if weight is None or type(weight) not in (Tensor, nn.Parameter, FakeTensor) or weight.dtype not in FLOATS:
            raise UserError(f"the output layer is quantised ({kind}): leave lm_head out of the quantisation")
        if not isinstance(layer, nn.Linear):
            raise UserError(f"the output layer is a {kind} and localrl reads a plain Linear alone: choose another model family")
        if weight.is_meta:
            raise UserError("the output layer is offloaded: load the model with the whole of it on one device")
        scale, softcap = transforms(bare.config)
        return cls(weight, layer.bias, scale, softcap)

    def check_frozen(self) -> None:
        """UserError if the head is being trained: there is no gradient for it here."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            raise UserError("the output layer is being trained, which localrl cannot: freeze lm_head and the embeddings it is tied to")

    def logits(self, hidden: Tensor) -> Tensor:
        """All of them, without temperature or gradient, in fp32: for a handful of rows. (N, H) -> (N, V)."""
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            product = Product(hidden, self.weight)
            return self.bend(product(product.operand(hidden), product.operand(self.weight).T), slice(None))

    def bend(self, z: Tensor, columns: slice, temperature: float = 1.0) -> Tensor:
        """What the model does to h W^T, in place, and the temperature. (n, width), for those columns of the vocabulary -> the same."""
        if self.bias is not None:
            z.add_(self.bias[columns])
        if self.softcap is not None:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        return z if self.scale == temperature else z.mul_(self.scale / temperature)

    def verify(self, model: Any) -> float:
        """Compares the model's own logits of eight tokens with ours, which finds a family that does to them what we do not know.

        Returns the largest difference as a share of the largest logit; UserError if it is beyond the rounding of the model's type.
        Effect: one forward pass, in the model's present mode.
        """
        found, limit = self.trial(model)
        gap = math.inf if found is None else float(found)
        if not gap <= limit:
            raise UserError(
                f"{bare_model(model).config.model_type} does something to its logits that localrl does not know (they differ by {gap:.2g} of the "
                f"largest, {limit:.2g} would be rounding): choose another model family"
            )
        return gap

    def trial(self, model: Any) -> tuple[Tensor | None, float]:
        """(difference, limit) of `verify`: a tensor of one number, None where not even the shapes are the same."""
        bare, seen = bare_model(model), []
        embedding = bare.get_input_embeddings().weight
        tokens = torch.arange(8, device=embedding.device)[None] % len(embedding)
        handle = bare.get_decoder().register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        try:
            with torch.no_grad():
                theirs = bare(input_ids=tokens, use_cache=False).logits[0]
        finally:
            handle.remove()
        ours = self.logits(seen[0][0].to(self.weight.device))
        limit = max(1e-4, 4 * torch.finfo(theirs.dtype).eps)
        if ours.shape != theirs.shape:
            return None, limit
        return (ours - theirs.to(ours)).abs().max() / theirs.abs().max().clamp(min=1e-30), limit


class Product:
    """Matrix products with fp32 results (fp64, where an input is), whatever the inputs' types.

    Half precision goes in as it is where the device has a kernel that multiplies it into fp32 (`mixed`: CUDA); else it is copied to fp32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        types = {hidden.dtype, weight.dtype}
        self.type = torch.float64 if torch.float64 in types else torch.float32
        self.mixed = len(types) == 1 and hidden.dtype.itemsize == 2 and multiplies_into_fp32(hidden.device)

    def operand(self, x: Tensor) -> Tensor:
        return x if self.mixed else x.to(self.type)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=self.type) if self.mixed else torch.mm(a, b)


def multiplies_into_fp32(device: torch.device) -> bool:
    """Whether PyTorch has torch.mm(half, half, out_dtype=float32) for that device (CUDA has, from 2.8 on).

    >>> multiplies_into_fp32(torch.device("cpu"))
    False
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", device.type.upper()) or (kind_of(device) == "cuda" != device.type)


def bare_model(model: Any) -> Any:
    """The transformers model inside PEFT's wrapping, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def transforms(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that a transformers config asks for.

    >>> from transformers import Gemma2Config, GraniteConfig
    >>> transforms(Gemma2Config()), transforms(GraniteConfig(logits_scaling=8.0))
    ((1.0, 30.0), (0.125, None))
    """
    text = config.get_text_config()
    scale = 1.0
    for name in TIMES + OVER:
        value = getattr(text, name, None)
        if value is not None:
            times = name in TIMES or text.model_type.startswith(TIMES_IN_SPITE_OF_ITS_NAME)
            scale = scale * float(value) if times else scale / float(value)
    caps = [float(value) for name in CAPS if (value := getattr(text, name, None)) is not None]
    return scale, caps[0] if caps else None
