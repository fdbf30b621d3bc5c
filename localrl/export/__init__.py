"""GGUF files that are proven equal to the model that was trained.

`export_all` writes one of three: the merged model, the base alone, or an adapter for that base, in one type or several. It only reads the live
model, and returns once llama.cpp, in a child process, has tokenised, rendered, scored and continued real prompts as the trained model does.
`check_exportable` asks before training.

    families.py   which models, under which names;     probes.py      texts and dialogues on which things are known to part
                  rope.py: rotary embeddings
    weights.py    the live model as fp32 rows          reference.py   what the trained model says
    original.py   the same from before quantising      expected.py    everything that a file will be asked, with the answers
    tokenizer.py  the live tokenizer as GGUF keys      check.py       what has to agree, how closely; check_worker.py: llama.cpp's side
                  (sentencepiece.py, added.py, steps.py)   limits.py  texts that llama.cpp tokenises differently
    metadata.py   what a file says of itself           tensors.py     the weights within the file, read back
    writer.py     the file                             heldout.py     the run's own rewards; answer_worker.py: llama.cpp's side
    quantize.py   smaller types made from it           report.py      what was found
    exporter.py   the whole way (parents.py)           settle.py      a file gets its name, or `.failed`; in parts: shards.py
    converter.py  llama.cpp's own, for other models    beside.py      README and Modelfile (ollama.py)
                  (checkpoint.py, converted.py)        made.py        a file between its writing and its name
"""

from localrl.export.exporter import Merge, What, check_exportable, export, export_all, require_llama_cpp
from localrl.export.heldout import HeldOut
from localrl.export.original import Original
from localrl.export.reference import Sample
from localrl.export.report import CheckReport, Interval, RewardChange, Row
from localrl.export.settle import Export
from localrl.export.shards import size_of
from localrl.export.writer import DType

__all__ = [
    "CheckReport", "DType", "Export", "HeldOut", "Interval", "Merge", "Original", "RewardChange", "Row", "Sample", "What", "check_exportable", "export",
    "export_all", "require_llama_cpp", "size_of",
]  # fmt: skip
