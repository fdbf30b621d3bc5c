"""What a run will need, phase by phase, before anything loads: no allocation, no GPU, no weights.

`shape` reads a model's numbers, `cards` (with `specs`) says what there is, `work` holds the nouns. `lines` are peaks as simulations found them
(`localrl.simulate`), `fit` says which sizes they are asked for, `bill` tells them apart into what a person can name, `knobs` is the ladder, `plan`
chooses and refuses what does not fit, `speed` expects, `reality` compares with what was measured, `show` draws it.
"""
