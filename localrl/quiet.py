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
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)     # "inputs will be cast to float16", at every call
    warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
