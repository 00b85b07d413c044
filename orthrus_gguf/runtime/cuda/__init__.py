"""The CUDA runtime: the kernels of `orthrus_kernels` behind the `Model` protocol.

`model.py` is the model, `stepper.py` decodes with one graph launch per cycle. Everything also runs
on the CPU through the kernels' plain torch references, for tests. Importing this package is free
of side effects; its modules import torch.
"""
