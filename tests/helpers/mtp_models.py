"""A small random hybrid whose MTP block is often right, and what the block computes, in numpy.

Next tokens depend mostly on the last one, and the block sees that one: so an untrained block agrees
with an untrained model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gguf
import numpy as np
from hf_checkpoint import Weights
from hf_hybrid import TEXT, WIDTH, weights, write_hybrid
from make_file import make_file
from numpy.typing import NDArray

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile, open_beside
from orthrus_gguf.model.tensors import MTP_EMBD, MTP_OUTPUT
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.mtp import MtpNetwork

HEADS, KV_HEADS, DIM, ROTARY, LAYERS = 4, 2, 32, 8, 4
CONFIG: dict[str, Any] = {
    **TEXT,
    "layer_types": TEXT["layer_types"][:LAYERS],
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
}

Floats = NDArray[np.float64]

#: What a block may have of its own, by the model's name of it.
OWN = {"token_embd.weight": MTP_EMBD, "output.weight": MTP_OUTPUT}

#: Rows that K-quants take.
WIDE = {"hidden_size": 256, "intermediate_size": 256}


@functools.cache
def mtp_weights(*, wide: bool = False) -> Weights:
    """Those of `hf_hybrid`, fewer layers of them, which add little to the residual stream."""
    dropped = tuple(f"model.layers.{i}." for i in range(LAYERS, 8))
    drawn = weights(WIDE if wide else {}, tied=False)
    found = {k: v for k, v in drawn.items() if not k.startswith(dropped)}
    width = WIDE["hidden_size"] if wide else WIDTH
    rng = np.random.default_rng(5)
    for name in found:
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            found[name] = (0.05 * found[name]).astype(np.float32)
    joined = [np.eye(width), 0.1 * rng.standard_normal((width, width)) / width**0.5]
    found["mtp.fc.weight"] = np.concatenate(joined, axis=1).astype(np.float32)
    found["mtp.norm.weight"] = found["model.norm.weight"]
    found["mtp.pre_fc_norm_embedding.weight"] = 0.2 * found["mtp.pre_fc_norm_embedding.weight"]
    return found


@functools.cache
def mtp_model(type_name: str = "f32", *, wide: bool = False) -> Path:
    """The model with its block; `wide` for rows that K-quants take."""
    config = {**CONFIG, **WIDE} if wide else CONFIG
    folder = write_hybrid(Path(mkdtemp()) / "mtp", config, mtp_weights(wide=wide), dtype="F32")
    path = folder.with_suffix(".gguf")
    make_file(folder, path, "--type", type_name)
    return path


@functools.cache
def stock_model() -> Path:
    """The same model without its block."""
    few = {name: values for name, values in mtp_weights().items() if not name.startswith("mtp.")}
    folder = write_hybrid(Path(mkdtemp()) / "stock", CONFIG, few, dtype="F32")
    path = folder.with_suffix(".gguf")
    make_file(folder, path, "--type", "f32")
    return path


def mtp_block(
    change: Callable[[gguf.ReaderTensor], NDArray[Any] | None] | None = None, *, own: bool = False
) -> Path:
    """The block in a file of its own, as llama.cpp's converter writes it with `--mtp`. change: what
    a tensor becomes, None for what it was. own: with an embedding and an output matrix of its own,
    the model's."""
    reader, path = gguf.GGUFReader(mtp_model()), Path(mkdtemp()) / "mtp-block.gguf"
    writer = gguf.GGUFWriter(path, "qwen35")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if tensor.name.startswith((f"blk.{LAYERS}.", "token_embd", "output")):
            changed = None if change is None else change(tensor)
            writer.add_tensor(tensor.name, tensor.data if changed is None else changed)
        if own and tensor.name in OWN:
            writer.add_tensor(f"blk.{LAYERS}.{OWN[tensor.name]}", tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def opened_mtp(
    target: Path, block: Path | None = None, ids: int | None = None
) -> Iterator[tuple[ModelFile, MtpFile]]:
    """A model's file and its MTP block, from that file unless `block` is named. ids: see
    `MtpFile.cut`."""
    with ModelFile.open(target) as file:
        beside = MtpFile.inside(file) if block is None else open_beside(block, file)
        with closing(beside):
            assert isinstance(beside, MtpFile)
            if ids is not None:
                beside.cut(ids)
            yield file, beside


@contextmanager
def loaded_mtp(
    target: Path,
    runtime: RuntimeName,
    block: Path | None = None,
    ids: int | None = None,
    **settings: Any,
) -> Iterator[ModelWithDrafter]:
    """A model with its MTP block beside it, see `opened_mtp`."""
    asked = RuntimeSettings(runtime, threads=1, **settings)
    with (
        opened_mtp(target, block, ids) as (file, beside),
        closing(load_model(file, asked, drafter=beside)) as model,
    ):
        assert isinstance(model, ModelWithDrafter)
        yield model


@contextmanager
def stand_in_mtp(
    target: Path,
    block: Path | None = None,
    ids: int | None = None,
    *,
    capture: Any = None,
    **settings: Any,
) -> Iterator[ModelWithDrafter]:
    """The same on the CUDA runtime, its kernels replaced by their plain references unless settings
    name others. capture: how passes of either become graphs."""
    from cuda_models import remembered_weights, small_heads

    from orthrus_gguf.runtime.cuda.model import CudaModel
    from orthrus_gguf.runtime.cuda.mtp import CudaBlock

    with (
        remembered_weights(),
        small_heads(),
        opened_mtp(target, block, ids) as (file, beside),
    ):
        options = {"device": "cpu", "capture": capture, **settings}
        model = CudaModel.load(file, drafter=beside, **options)
        network = CudaBlock.load_for(beside, model, capture)
        pair = ModelWithDrafter(model, MtpNetwork(network, beside.beside, beside.taps))
        with closing(pair):
            yield pair


class NumpyBlock:
    """The block in double precision, from the checkpoint's weights, row by row."""

    def __init__(self) -> None:
        self._w = {name: values.astype(np.float64) for name, values in mtp_weights().items()}
        self._keys: list[Floats] = []
        self._values: list[Floats] = []

    def step(self, token: int, hidden: Floats) -> Floats:
        """What the next row gives, [n_embd]."""
        w, layer, position = self._w, "mtp.layers.0", len(self._keys)
        embedded: Floats = w["model.embed_tokens.weight"][token]
        joined = [
            self._norm(embedded, "mtp.pre_fc_norm_embedding"),
            self._norm(hidden, "mtp.pre_fc_norm_hidden"),
        ]
        x = w["mtp.fc.weight"] @ np.concatenate(joined)
        h = self._norm(x, f"{layer}.input_layernorm")
        attn = f"{layer}.self_attn"
        q, gate = np.split((w[f"{attn}.q_proj.weight"] @ h).reshape(HEADS, 2 * DIM), 2, axis=1)
        k, v = ((w[f"{attn}.{n}_proj.weight"] @ h).reshape(KV_HEADS, DIM) for n in "kv")
        self._keys.append(self._rotated(self._norm(k, f"{attn}.k_norm"), position))
        self._values.append(v)
        q = self._rotated(self._norm(q, f"{attn}.q_norm"), position)
        keys, values = (np.repeat(a, 2, axis=1) for a in (self._keys, self._values))
        scores = np.exp(np.einsum("hd,thd->ht", q, keys) / DIM**0.5)
        mixed = np.einsum("ht,thd->hd", scores / scores.sum(1, keepdims=True), values)
        x = x + w[f"{attn}.o_proj.weight"] @ (mixed / (1 + np.exp(-gate))).ravel()
        h = self._norm(x, f"{layer}.post_attention_layernorm")
        up, gate = (w[f"{layer}.mlp.{n}_proj.weight"] @ h for n in ("up", "gate"))
        x = x + w[f"{layer}.mlp.down_proj.weight"] @ (up * gate / (1 + np.exp(-gate)))
        return self._norm(x, "mtp.norm")

    def draft(self, hidden: Floats) -> int:
        """The token that follows such a row."""
        return int((self._w["lm_head.weight"] @ hidden).argmax())

    def keep(self, rows: int) -> None:
        """Drop the rows behind the first ones."""
        del self._keys[rows:], self._values[rows:]

    def _norm(self, x: Floats, name: str) -> Floats:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        normed: Floats = x / scale * (1 + self._w[f"{name}.weight"])
        return normed

    @staticmethod
    def _rotated(x: Floats, position: int) -> Floats:
        half = ROTARY // 2
        angles = position * 1e7 ** (-np.arange(half) / half)
        low, high = x[:, :half].copy(), x[:, half:ROTARY].copy()
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate(
            [low * cos - high * sin, high * cos + low * sin, x[:, ROTARY:]], axis=1
        )


def expected_cycles(
    text: Sequence[int], hidden: Floats, prompt: int, depth: int
) -> list[tuple[int, list[int], int]]:
    """Position of the anchor, drafts and how many are right, cycle by cycle, as long as the text
    tells. hidden: [len(text), n_embd], what the model's last layer gives for its tokens."""
    block, cycles, anchor, entered = NumpyBlock(), [], prompt, 0
    before = np.concatenate([np.zeros((1, WIDTH)), hidden])
    while anchor + depth < len(text):
        block.keep(entered)
        for k in range(entered, anchor + 1):
            given = block.step(text[k], before[k])
        entered, drafts = anchor + 1, [block.draft(given)]
        while len(drafts) < depth:
            given = block.step(drafts[-1], given)
            drafts.append(block.draft(given))
        right = [ours == theirs for ours, theirs in zip(drafts, text[anchor + 1 :], strict=False)]
        accepted = [*right, False].index(False)
        cycles.append((anchor, drafts, accepted))
        anchor += accepted + 1
    return cycles
