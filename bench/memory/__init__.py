"""Does the memory plan tell the truth? `python -m bench.memory` runs what is here, `python -m bench.memory truth` one part of it."""
