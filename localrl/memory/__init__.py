"""What a run will need, phase by phase, before anything loads: arithmetic on a `config.json`, no allocation, no GPU, no weights.

`shape` reads a model's numbers, `cards` says what there is, `work` holds the nouns, `bill` adds up, with `activations` and `rolling` for
its two hard lines, `plan` chooses the knobs and refuses what does not fit, `show` draws it.

An estimate, and it says so: every plan has a margin among its lines and a list of what it did not count.
"""
