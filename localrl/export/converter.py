"""llama.cpp's own converter, for models that have no row in `families.py`: found where a person says it is, asked what it can, run in a process of its own.

It comes with llama.cpp's sources (and with the source package of llama-cpp-python, in vendor/llama.cpp), not with any wheel. Nothing is fetched here,
and it is used only if it was named: by `--converter` or `export.converter` for any model, by LLAMA_CPP_DIR for models that cannot be written otherwise.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrl.export.families import FAMILIES, family_of
from localrl.export.writer import DType
from localrl.settings import UserError

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP_DIR"
ASK_SECONDS = 300.0
"""After which a script that only has to tell what it supports is given up."""
GET = f"get llama.cpp's sources ({SCRIPT} is in them, as in vendor/llama.cpp of llama-cpp-python's), and name them with --converter or {VARIABLE}"
WITHOUT_VOCABULARY = """
import runpy, sys
from pathlib import Path
script = Path(sys.argv[1])
sys.argv = sys.argv[1:]
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
try:
    import conversion
except ImportError:
    pass
else:
    known = conversion.get_model_class
    def without_vocabulary(*asked, **more):
        model = known(*asked, **more)
        if hasattr(model, "_set_vocab_none"):
            model.set_vocab = model._set_vocab_none
        return model
    conversion.get_model_class = without_vocabulary
runpy.run_path(str(script), run_name="__main__")
"""
"""The script as it is, but for the vocabulary: it knows tokenizers by a hash of what they make of one text, and refuses what was trained or changed. The
file gets this package's, which the self-check proves. (An older script is one file, and writes the vocabulary too.)"""
KEPT = 40
"""Last lines of what the script says."""


@dataclass(frozen=True)
class Converter:
    """A script that is there, runs, and says that it knows the architecture."""

    script: Path

    @classmethod
    def at(cls, place: Path, architectures: Sequence[str]) -> Converter:
        """From the script's path or that of the folder it lies in. UserError if it is not there, does not run, or does not know the model."""
        script = place / SCRIPT if place.is_dir() else place
        if not script.is_file():
            raise UserError(f"no converter at {script}: {GET}")
        found = cls(script.resolve())
        supported = found.supported()
        if not set(architectures) & set(supported):
            raise UserError(f"{script} does not know {', '.join(architectures) or 'a model without architectures'} (it knows {len(supported)} others): "
                            "take a newer llama.cpp, or keep the PEFT adapter")  # fmt: skip
        return found

    def supported(self) -> list[str]:
        """Names of transformers classes that it can convert."""
        command = [sys.executable, str(self.script), "--print-supported-models"]
        try:
            child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS, check=False, env=surroundings())
        except subprocess.TimeoutExpired:
            raise UserError(f"{self.script} does not answer within {ASK_SECONDS:.0f} s when asked what it supports: take another checkout") from None
        names = re.findall(r"^\s*(?:\S+:\s*)?- (\w+)\s*$", child.stdout + child.stderr, re.MULTILINE)
        if child.returncode or not names:
            why = reason(child.stderr.splitlines())
            raise UserError(f"{self.script} does not run ({why}): take the whole of llama.cpp, the script needs what lies beside it")
        return names

    def convert(self, checkpoint: Path, target: Path, dtype: DType) -> None:
        """Make `target` of a folder with a transformers checkpoint. UserError with the script's own reason if it fails; Ctrl-C ends it at once."""
        command = [sys.executable, "-c", WITHOUT_VOCABULARY, str(self.script), str(checkpoint), "--outfile", str(target), "--outtype", dtype]
        said: list[str] = []
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=surroundings()
        ) as child:
            try:
                assert child.stderr is not None
                for line in child.stderr:
                    said = [*said[1 - KEPT :], line]
            except BaseException:
                child.kill()
                raise
        if child.returncode or not target.is_file():
            raise UserError(f"llama.cpp's converter failed ({reason(said)}): take a newer llama.cpp, or keep the PEFT adapter")


def surroundings() -> dict[str, str]:
    """The child's environment: no network, its own gguf package and no other."""
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {key: value for key, value in os.environ.items() if key not in ("NO_LOCAL_GGUF", "PYTHONPATH")} | ours


def reason(lines: Sequence[str]) -> str:
    """The last line that says something.

    >>> reason(["Traceback ...", "NotImplementedError: BPE pre-tokenizer was not recognized", ""])
    'NotImplementedError: BPE pre-tokenizer was not recognized'
    """
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else "it said nothing"


def converter_for(config: Any, given: Path | None) -> Converter | None:
    """What is to write a model of this configuration: None for this package itself, the converter if it is named. UserError if neither can."""
    architectures = list(getattr(config, "architectures", None) or ())
    if given is not None:
        return Converter.at(given, architectures)
    if str(config.model_type) not in FAMILIES and (place := os.environ.get(VARIABLE)):
        return Converter.at(Path(place), architectures)
    try:
        family_of(config)
    except UserError as error:
        if str(config.model_type) in FAMILIES:
            raise
        raise UserError(f"{error}; or {GET}") from None
    return None
