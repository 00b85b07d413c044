"""CPU kernels in C: products whose cost is flat in rows, and the steps of a pass (`src/`).

Built when the package is (`build.py`), one object per instruction set; `library.py` loads the best
one that the machine can run, and mirrors the C structs.
"""
