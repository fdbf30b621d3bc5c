"""From an F32 or F16 file to a smaller type, by llama.cpp's own quantiser: the K-quants' recipes, which give some matrices more bits, are its own.

It runs in a child process: a bad file would abort the interpreter, and Ctrl-C ends a child at once, but a call into C only when it is over.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFReader

from localrl.export.check import free_cores
from localrl.export.writer import FILE_TYPES, DType, Progress
from localrl.settings import UserError

CHILD = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


def quantize(source: Path, target: Path, dtype: DType, progress: Progress | None = None) -> Mapping[str, int]:
    """Make `target` of `source`. -> how many tensors of each GGUF type it holds. `progress` hears tensors done, tensors in all and "quantising".

    UserError with llama.cpp's reason if it refuses. Half a file is left behind if this is interrupted: the caller removes it.
    """
    command = [sys.executable, "-P", "-c", CHILD, str(source), str(target), str(FILE_TYPES[dtype]), str(free_cores())]
    last = "nothing"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        try:
            assert child.stderr is not None
            for line in child.stderr:
                last = line.strip() or last
                if progress is not None and (found := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line)):
                    progress(int(found[1]), int(found[2]), "quantising")
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise UserError(f"llama.cpp cannot make {dtype} of {source.name.removesuffix('.tmp')} ({last[:200]}): export f16 instead")
    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(target).tensors))
