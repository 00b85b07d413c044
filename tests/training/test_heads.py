"""Heads in training: their arithmetic is the runtime's, and what is written is what was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled_layers import compiled_layers
from hf_bases import write_base
from orthrus_converters.cli import main as converter
from orthrus_converters.safetensors_file import read_header

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import Segment, View
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.training.answers import Answer
from orthrus_gguf.training.base import base_file
from orthrus_gguf.training.blocks import Library, draw_anchors, lay, loss_and_hits
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.output import write_checkpoint, write_sidecar
from tests.tiny_model import BASES, BLOCK_SIZE, MASK, N_VOCAB, SCALINGS, write_heads, write_model


def runtime_block(file: ModelFile, text: Sequence[int], anchor: int) -> Any:
    """Logits of a block on the runtime: the AR view has read what is before the anchor."""
    model = ReferenceModel(file)
    cache = model.new_cache(64)
    before = tuple(text[:anchor])
    model.logits([Segment(cache, View.AR, before, 0, range(0))])
    cache.commit(range(anchor))
    block = (text[anchor], *[MASK] * (BLOCK_SIZE - 1))
    (logits,) = model.logits([Segment(cache, View.DIFFUSION, block, anchor, range(BLOCK_SIZE))])
    return logits


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", BASES)
def test_blocks_are_the_runtimes_diffusion_view(base: str, scaling: str, tmp_path: Path) -> None:
    """Several blocks on padded texts in one batch: each as the runtime sees it."""
    plain = write_model(tmp_path / "base.gguf", base, scaling=scaling, tied=False)
    heads = write_heads(tmp_path / "heads.gguf", base=base, scaling=scaling)
    rng = np.random.default_rng(0)
    texts = rng.integers(0, N_VOCAB - 1, (2, 20))
    anchors = np.array([[1, 7], [4, 19]])
    with ModelFile.open(plain, heads) as file:
        network = Network(file)
        memory, _ = network.read(torch.from_numpy(texts))
        tokens = torch.full((2, 2, BLOCK_SIZE), MASK)
        tokens[:, :, 0] = torch.from_numpy(np.take_along_axis(texts, anchors, 1))
        ours = network.logits(network.draft(tokens, torch.from_numpy(anchors), memory))
        for i, j in np.ndindex(2, 2):
            theirs = runtime_block(file, texts[i].tolist(), int(anchors[i, j]))
            np.testing.assert_allclose(ours[i, j].detach().numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3", "qwen2-untied", "llama3"])
def test_a_checkpoints_weights_are_the_runtimes_too(name: str, tmp_path: Path) -> None:
    """From safetensors: converted, trained heads written, and both views compared."""
    path = base_file(str(write_base(tmp_path, name)), tmp_path)
    with ModelFile.open(path) as file:
        heads = {name: head.detach().numpy() for name, head in Network(file).named_heads()}
        mixed = {name: head[::-1].copy() for name, head in heads.items()}  # unlike the AR view's
        write_sidecar(tmp_path / "heads.gguf", file, mixed, BLOCK_SIZE, MASK)
    check_pair(path, tmp_path / "heads.gguf")


def test_a_quantized_bases_rounding_is_used(demo_file: Callable[..., Path]) -> None:
    path = demo_file("q4_0", split=True)
    check_pair(path, path.with_name(f"{path.stem}-heads.gguf"))


@pytest.mark.slow
def test_a_layer_compiles_whole(demo_file: Callable[..., Path]) -> None:
    """Without a break in its graph, forward and backward, and not anew for every layer: once for
    the first, whose input has no gradient, and once for all others."""
    with ModelFile.open(demo_file("q4_0", split=True)) as file:
        assert file.config.n_layers > 2
        assert compiled_layers(file) == 2


def test_nothing_is_left_on_the_cpu(tmp_path: Path) -> None:
    """On torch's device without memory: a tensor of another device would be refused. No GPU has
    been at hand to train on."""
    meta = torch.device("meta")
    with ModelFile.open(write_model(tmp_path / "base.gguf", "qwen2")) as file:
        network = Network(file, torch.bfloat16, meta)
    answers = [Answer(i, "text", 4, tuple(range(i, i + 20)), held=False) for i in range(2)]
    library = Library(network, 1 << 30)
    texts = [library.text(answer) for answer in answers]
    rng = np.random.default_rng(0)
    batch = lay(texts, [draw_anchors(text.answer, 3, rng) for text in texts], BLOCK_SIZE, MASK)
    loss, hits = loss_and_hits(network, batch, 0.85)
    grads = torch.autograd.grad(loss, network.parameters())
    assert all(grad.device == meta for grad in grads)
    assert hits.shape == (2, 3, BLOCK_SIZE)


def check_pair(path: Path, heads: Path) -> None:
    text = np.random.default_rng(1).integers(0, 30, 12).tolist()
    with ModelFile.open(path, heads) as file:
        network = Network(file)
        memory, _ = network.read(torch.tensor([text]))
        tokens = torch.full((1, 1, BLOCK_SIZE), MASK)
        tokens[0, 0, 0] = text[8]
        ours = network.logits(network.draft(tokens, torch.tensor([[8]]), memory))[0, 0]
        theirs = runtime_block(file, text, 8)
    np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_written_is_what_was_trained(
    base: str, scaling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sidecar, opened like any, and the checkpoint, added to its base by the converter: the
    same numbers. Neither goes with another base."""
    plain = write_model(tmp_path / "base.gguf", base, scaling=scaling)
    with ModelFile.open(plain) as file:
        network = Network(file)
        heads = {
            name: (head.detach() * 1.25).bfloat16().float().numpy()
            for name, head in network.named_heads()
        }
        write_sidecar(tmp_path / "heads.gguf", file, heads, BLOCK_SIZE, MASK)
        (tmp_path / "out").mkdir()
        write_checkpoint(tmp_path / "out", file, heads, BLOCK_SIZE, MASK)
    convert = [str(tmp_path / "out"), str(tmp_path / "whole.gguf"), "--heads-type", "bf16"]
    assert converter(convert) == 0
    for files in ((plain, tmp_path / "heads.gguf"), (tmp_path / "whole.gguf",)):
        with ModelFile.open(*files) as model:
            assert model.config.block_size == BLOCK_SIZE
            assert model.config.mask_token == MASK
            for name, head in Network(model).named_heads():
                np.testing.assert_array_equal(head.detach().numpy(), heads[name])
    names = read_header(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.o_proj_diff.weight" in names
    tensors = {"output_norm.weight": np.ones(32, np.float32)}
    other = write_model(tmp_path / "other.gguf", base, scaling=scaling, tensors=tensors)
    with pytest.raises(OrthrusError, match="trained on another file"):
        ModelFile.open(other, tmp_path / "heads.gguf")
    plain.unlink()
    capsys.readouterr()
    again = ["--base", str(other), "--heads", *convert]
    for argv, message in ((convert, "which is not there"), (again, "trained on another file")):
        assert converter([*argv, "--overwrite"]) == 1
        assert message in capsys.readouterr().err
    assert converter([*convert, "--type", "q8_0"]) == 1
