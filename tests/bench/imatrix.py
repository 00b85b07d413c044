"""Measure an importance matrix on the reference runtime, as llama-imatrix does on llama.cpp.

    python tests/bench/imatrix.py MODEL.gguf OUT.gguf TEXT_FILE... [--chunks N] [--chunk-size N]

Runs the AR view over the texts and adds up, for every matrix of the layers, the squares of what
each column was multiplied with. Writes the current GGUF format (`<name>.in_sum2` and
`<name>.counts`, in rows), which `orthrus-convert --imatrix` and llama-quantize read. The reference
runtime takes rows one by one: meant for models of the demo model's size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from orthrus_converters.imatrix import read_imatrix
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import View, ar_segment
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.text.tokenizer import load_tokenizer

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_ATTENTION = {f"attn_{name}": name for name in ("q", "k", "v", "output")}


class Recorder(TorchFunctionMode):
    """Adds up the squares of all rows that are multiplied with known matrices, while entered.

    sums: name → [columns], float64. rows: name → number of rows.
    """

    def __init__(self, matrices: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {matrix.data_ptr(): name for name, matrix in matrices.items()}
        self.sums = {name: np.zeros(matrix.shape[1]) for name, matrix in matrices.items()}
        self.rows = dict.fromkeys(matrices, 0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            rows, matrix = args
            name = self._names.get(matrix.data_ptr())
            if name is not None:
                self.sums[name] += rows.double().square().sum(0).numpy()
                self.rows[name] += len(rows)
        return func(*args, **(kwargs or {}))


def matrices(model: ReferenceModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weights [out, in] of every matrix of the AR layers."""
    for index, layer in enumerate(model.layers):
        for part in PARTS:
            owner: Any = layer.attention[View.AR] if part in _ATTENTION else layer
            yield f"blk.{index}.{part}.weight", getattr(owner, _ATTENTION.get(part, part))


def measure(file: ModelFile, chunks: Sequence[Sequence[int]]) -> Recorder:
    """Run every chunk of token ids on an empty cache."""
    model = ReferenceModel(file)
    recorder = Recorder(dict(matrices(model)))
    with recorder:
        for chunk in tqdm(chunks, unit=" chunks", disable=None):
            model.logits([ar_segment(model.new_cache(len(chunk)), chunk, 0)])
    return recorder


def write(path: Path, recorder: Recorder, texts: Sequence[Path], n_chunks: int, size: int) -> None:
    """The keys and tensors that llama-imatrix writes."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text.name for text in texts])
    writer.add_uint32("imatrix.chunk_count", n_chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    for name, sums in recorder.sums.items():
        count: NDArray[np.float32] = np.array([[recorder.rows[name]]], np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("output", type=Path, metavar="OUT.gguf")
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT_FILE")
    parser.add_argument("--chunks", type=int, default=200, help="at most, evenly over the texts")
    parser.add_argument("--chunk-size", type=int, default=256, help="tokens")
    args = parser.parse_args()
    with ModelFile.open(args.model) as file:
        n_vocab = file.config.n_vocab
        tokenizer = load_tokenizer(file.metadata, path=args.model, n_vocab=n_vocab)
        ids = [i for path in args.texts for i in tokenizer.encode(path.read_text("utf-8"))]
        starts = range(0, len(ids) - args.chunk_size + 1, args.chunk_size)
        chosen = [starts[i * len(starts) // args.chunks] for i in range(args.chunks)]
        chunks = [ids[s : s + args.chunk_size] for s in sorted({*chosen})]
        recorder = measure(file, chunks)
    write(args.output, recorder, args.texts, len(chunks), args.chunk_size)
    found = read_imatrix(args.output)
    rows = {*recorder.rows.values()}
    print(f"{len(found.values)} matrices, {rows} rows each, {len(chunks)} chunks", file=sys.stderr)


if __name__ == "__main__":
    main()
