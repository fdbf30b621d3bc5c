"""The reward lab: what rewards say of completions, before anything is trained.

    blocks.py   the built-in functions and their parameters, as a form needs them        drafts.py   sets under construction, and own code
    samples.py  completions: sampled, pasted, of a run                                     score.py    rewards on them, in worker processes; probes
    numbers.py  what the scores say: signal, agreement, advantages                         trial.py    all of it as one file
"""
