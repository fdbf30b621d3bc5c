"""Do the algorithms do what their papers claim, here, on a small model that really learns?

    python -m bench.learning [claim ...] [--seeds 5] [--workers 2] [--work runs/learning]

Every trial is `localrl train` in a process of its own, on one thread, with the embedded quantised model; one that is in the work folder
already is not run again. Each claim is a file of this folder: its trials, what is measured of each, the table and the picture, which go to
`results/`. Clocks are compared only between trials that ran alone, side by side in one call.
"""
