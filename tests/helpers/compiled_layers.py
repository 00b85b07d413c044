"""Layers of training, compiled and as they are: the same losses and gradients."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.training.device import as_it_is
from orthrus_gguf.training.network import Network


def compiled_layers(file: ModelFile) -> int:
    """How many functions are compiled for a network's blocks, forward and backward, none of them
    with a break in its graph; their numbers are those of plain code."""
    counter = CompileCounterWithBackend("aot_eager")
    text = torch.from_numpy(np.random.default_rng(0).integers(0, 39, (1, 20)))
    losses = []
    for compiler in (as_it_is, partial(torch.compile, fullgraph=True, backend=counter)):
        network = Network(file, compiler=compiler)
        memory, _ = network.read(text)
        hidden = network.draft(text[:, :8].view(1, 2, 4), torch.tensor([[3, 9]]), memory)
        loss = network.logits(hidden).square().sum()
        grads = torch.autograd.grad(loss, network.parameters())
        losses.append([loss.item(), *(grad.square().sum().item() for grad in grads)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    return counter.frame_count
