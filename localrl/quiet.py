"""Silence of libraries: no telemetry, no chatter that says nothing to our users. Cheap to import; call it before they load."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Once, at the start of a process."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("autograd._functions", "backends.cpu.ops"):         # "inputs will be cast to float16" at every call; an optional kernel package
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")         # peft asks transformers so
