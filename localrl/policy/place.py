"""Where a model lies, on what it runs and in which type: all that can be told without the libraries that load it."""

from __future__ import annotations

from pathlib import Path

import torch

from localrl.sections import ModelSettings
from localrl.settings import UserError

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"


def model_path(settings: ModelSettings) -> str:
    """A folder if there is one of that name, the embedded model for "demo", else the hub id as it stands."""
    if settings.path == "demo":
        return str(DEMO_MODEL)
    folder = Path(settings.path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_absolute() or settings.path.startswith((".", "~")) or settings.path.count("/") > 1:
        raise UserError(f"model.path = '{settings.path}': no such folder (a hub id looks like 'Qwen/Qwen3-4B')")
    return settings.path


def pick_device(settings: ModelSettings) -> torch.device:
    """The device that "auto" means on this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device = 'cuda' but torch sees no CUDA device; `localrl doctor` tells why, model.device=cpu trains without one")
    return torch.device("cpu" if settings.device == "cpu" or not torch.cuda.is_available() else "cuda")


def pick_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """Of activations: float32 on a CPU, bfloat16 on a GPU that has it, else float16, unless the settings name one."""
    if settings.compute_dtype != "auto":
        dtype = getattr(torch, settings.compute_dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
