"""llama.cpp as rollout engine, through llama-cpp-python's low-level functions.

The base is a GGUF of the very weights that learn, de-quantised and written once (`base`), the adapter a small file that is written and
swapped after every update (`engine`). One context decodes many sequences (`binding`); where responses end, continue and what is drawn are the
torch engine's own code (`localrl.engines.call`). Its samples are not quite the policy's: the algorithm corrects for that.

    binding.py   the C library: weights, adapters, sequences, logits      check.py     a file is tried in a child process first
    backend.py   prompts read once, one token a row, rows that leave      threads.py   how many threads are quickest here and now
    base.py      the base's file, made once, kept in the cache            engine.py    follow, generate
"""
