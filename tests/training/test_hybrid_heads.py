"""Heads of hybrids in training: their arithmetic is the runtime's, they learn, and what is written
is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_layers import compiled_layers
from hf_hybrid import VOCAB, write_hybrid
from mtp_models import CONFIG, mtp_weights, stock_model
from orthrus_converters.cli import main as converter
from orthrus_converters.safetensors_file import read_header
from orthrus_hybrid import BLOCK, MASK, NumpyHybrid, heads_model

from orthrus_gguf.cli.train import main
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.training.answers import Answer
from orthrus_gguf.training.blocks import Library, draw_anchors, lay, loss_and_hits
from orthrus_gguf.training.delta_net import CHUNK
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.output import write_checkpoint, write_sidecar

ANCHORS = np.array([[0, 1, 2, 70], [3, CHUNK, CHUNK + 1, 89]])


def test_both_views_are_the_runtimes() -> None:
    """Texts of more rows than are solved for at once, and several blocks on each, at every place
    that is special: the numbers of the numpy oracle, and of the reference runtime."""
    texts, oracle = np.random.default_rng(3).integers(0, 256, (2, 90)), NumpyHybrid()
    with ModelFile.open(heads_model()) as file:
        network, model = Network(file), ReferenceModel(file)
    memory, hidden = network.read(torch.from_numpy(texts))
    tokens = torch.full((*ANCHORS.shape, BLOCK), MASK)
    tokens[:, :, 0] = torch.from_numpy(np.take_along_axis(texts, ANCHORS, 1))
    blocks = network.logits(network.draft(tokens, torch.from_numpy(ANCHORS), memory)).detach()
    for i, text in enumerate(texts.tolist()):
        rows, _ = oracle.read(text)
        np.testing.assert_allclose(network.logits(hidden)[i].numpy(), rows, rtol=0, atol=1e-4)
        for j, anchor in enumerate(ANCHORS[i].tolist()):
            _, known = oracle.read(text[:anchor])
            expected = oracle.block(known, anchor, text[anchor])
            np.testing.assert_allclose(blocks[i, j].numpy(), expected, rtol=0, atol=1e-4)
    cache, anchor = model.new_cache(128), int(ANCHORS[1, 2])
    text = texts[1].tolist()
    model.logits([ar_segment(cache, text[:anchor], 0, wanted=range(0))])
    cache.commit(range(anchor))
    (theirs,) = model.logits([diffusion_segment(cache, text[anchor], MASK, BLOCK, anchor)])
    np.testing.assert_allclose(blocks[1, 2].numpy(), theirs, rtol=0, atol=1e-3)


def answers_of(network: Network) -> list[Answer]:
    """Two texts of other lengths, which the base goes on with by itself."""
    rng, found = np.random.default_rng(5), []
    for index, length in enumerate((9, 30)):
        tokens = rng.integers(0, 256, length).tolist()
        for _ in range(16):
            _, hidden = network.read(torch.tensor([tokens]))
            tokens.append(int(network.logits(hidden[0, -1]).argmax()))
        found.append(Answer(index, "text", length, tuple(tokens), held=False))
    return found


def test_every_head_learns() -> None:
    """A few steps on the same blocks of padded texts lower the loss; no head is left out, none of
    the base moves, and decays stay below zero."""
    with ModelFile.open(stock_model()) as file:
        network = Network(file)
    library = Library(network, 1 << 30)
    texts, rng = [library.text(a) for a in answers_of(network)], np.random.default_rng(0)
    batch = lay(texts, [draw_anchors(text.answer, 4, rng) for text in texts], BLOCK, MASK)
    names = [name for name, _ in network.named_heads()]
    assert len(names) == 3 * 9 + 6
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0), []
    for _ in range(5):
        loss, _ = loss_and_hits(network, batch, 0.85)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        for name, head in network.named_heads():
            assert head.grad is not None, name
            assert 0 < head.grad.abs().max() < 1e3, name
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    again = Library(network, 0).text(texts[0].answer)
    torch.testing.assert_close(again.probabilities, texts[0].probabilities, rtol=0, atol=0)
    for name, head in network.named_heads():
        if name.endswith("ssm_a_diff"):
            assert (network.stored(name, head.detach()) < 0).all()


def test_nothing_is_left_on_the_cpu() -> None:
    meta = torch.device("meta")
    with ModelFile.open(stock_model()) as file:
        network = Network(file, torch.bfloat16, meta)
    library = Library(network, 1 << 30)
    answers = [Answer(i, "text", 4, tuple(range(i, i + 20 + i)), held=False) for i in range(2)]
    texts, rng = [library.text(answer) for answer in answers], np.random.default_rng(0)
    batch = lay(texts, [draw_anchors(text.answer, 3, rng) for text in texts], BLOCK, MASK)
    loss, _ = loss_and_hits(network, batch, 0.85)
    grads = torch.autograd.grad(loss, network.parameters())
    assert all(grad.device == meta for grad in grads)


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    """The sidecar, opened like any, and the checkpoint, whose heads stand in Hugging Face's order,
    added to its base by the converter: the same numbers."""
    with ModelFile.open(stock_model()) as file:
        network, rng = Network(file), torch.Generator().manual_seed(0)
        heads = {
            name: network.stored(name, head.detach() + 0.1 * torch.randn(head.shape, generator=rng))
            .bfloat16()
            .float()
            .numpy()
            for name, head in network.named_heads()
        }
        write_sidecar(tmp_path / "heads.gguf", file, heads, BLOCK, MASK)
        (tmp_path / "out").mkdir()
        write_checkpoint(tmp_path / "out", file, heads, BLOCK, MASK)
    names = read_header(tmp_path / "out" / "model.safetensors")
    for part in ("A_log_diff", "dt_bias_diff", "conv1d_diff.weight", "in_proj_qkv_diff.weight"):
        assert f"model.layers.0.linear_attn.{part}" in names
    argv = [str(tmp_path / "out"), str(tmp_path / "whole.gguf"), "--heads-type", "f32"]
    assert converter(argv) == 0
    for files in ((stock_model(), tmp_path / "heads.gguf"), (tmp_path / "whole.gguf",)):
        with ModelFile.open(*files) as model:
            assert (model.config.block_size, model.config.mask_token) == (BLOCK, MASK)
            loaded = Network(model)
            for name, head in loaded.named_heads():
                found = loaded.stored(name, head.detach()).numpy()
                np.testing.assert_allclose(found, heads[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_both_kinds_of_layers_compile_whole() -> None:
    """Twice for DeltaNet, since the first layer's input has no gradient, once for attention."""
    with ModelFile.open(stock_model()) as file:
        assert compiled_layers(file) == 3


@pytest.mark.slow
def test_a_training_ends_with_heads_and_a_report(tmp_path: Path) -> None:
    """The command, on a checkpoint with an MTP block, which stays where it is."""
    base = write_hybrid(tmp_path / "base", CONFIG, mtp_weights(), dtype="F32")
    small = ("--texts", "17", "--answer-tokens", "24", "--prompt-tokens", "8", "--context", "48")
    more = ("--batch", "2", "--blocks", "2", "--block-size", "4", "-t", "1", "--steps", "12")
    folder = tmp_path / "trained"
    argv = [str(base), str(folder), *small, *more, "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--mask-token", str(MASK)]) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["decoded"]["same_text"]
    assert report["decoded"]["tokens_per_cycle"] > 1
    assert len(report["losses"]) == 12
    assert converter([str(folder), str(tmp_path / "whole.gguf")]) == 0
    with ModelFile.open(tmp_path / "whole.gguf") as whole:
        assert whole.config.has_heads
        assert whole.config.hybrid is not None
        assert whole.config.hybrid.mtp
        assert whole.config.n_vocab == VOCAB
