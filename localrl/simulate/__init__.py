"""What a run will need, found by doing it with tensors that have no bytes: the real policy and engine under PyTorch's FakeTensorMode.

`fakes` builds a model from its config alone, `counter` watches storages come and go, `phases` does the work of each phase, `fits` turns a
few simulations of a small model into the peaks of the whole one.
"""
