"""Triton kernels over GGUF weights, their packed layouts, plain torch references and tuning tables.

Import the modules you need: this file imports nothing, so that `import orthrus_kernels` is free of
side effects on machines without a GPU, without triton or without torch.
"""
