"""From a proven F32 or F16 file to the other types, by llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

from localrl.export.writer import FILE_TYPES, DType, Progress
from localrl.settings import UserError


def quantize(source: Path, target: Path, dtype: DType, progress: Progress | None = None) -> Mapping[str, int]:
    """Make `target` of `source`. UserError if llama.cpp refuses."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[dtype], 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise UserError(f"llama.cpp cannot make {dtype} of {source.name}: export f16 instead")
    return {}
