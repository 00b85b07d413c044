"""The CUDA runtime: the kernels of `orthrus_kernels` behind the `Model` protocol.

`model.py` is the model. A pass goes from `passes.py` (what runs together) through `arrange.py`
(what stands where), `tables.py` (one upload), `runner.py` (every launch, captured by `graphs.py`)
to `results.py`. Everything also runs on the CPU through the kernels' plain twins, for tests.
Importing this package is free of side effects; its modules import torch.
"""
