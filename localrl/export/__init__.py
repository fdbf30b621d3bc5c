"""GGUF files that are proven equal to the model that was trained.

`export` writes one of three: the merged model, the base alone, or an adapter for that base. It only reads the live model, and returns
once llama.cpp, in a child process, has tokenised, rendered, scored and continued real prompts as the trained model does.
`check_exportable` asks before training.

    families.py   which models, under which names      reference.py      what the trained model says
    weights.py    the live model as fp32 rows          check.py          what has to agree, and how closely
    tokenizer.py  the live tokenizer as GGUF keys      check_worker.py   llama.cpp's side of it, in a process of its own
    writer.py     the file                             exporter.py       the whole way
"""

from localrl.export.check import CheckReport, Row
from localrl.export.exporter import Export, check_exportable, export
from localrl.export.reference import Sample

__all__ = ["CheckReport", "Export", "Row", "Sample", "check_exportable", "export"]
