"""GGUF files as sources: converting them, splitting and merging, and files written by others."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from damage import check_refusal
from hf_checkpoint import CONFIG, write_checkpoint
from make_file import make_file
from numpy.typing import NDArray
from orthrus_converters.cli import main

from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.model.file import ModelFile

#: Four layers and rows of 256 and 512, so that every type fits.
WIDE: dict[str, Any] = {
    **CONFIG,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
}
Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


def contents(*paths: Path) -> Contents:
    """Name → type, shape and bytes of all tensors, as the gguf package reads them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            tuple(tensor.shape.tolist()),
            tensor.data.tobytes(),
        )
        for path in paths
        for tensor in gguf.GGUFReader(path).tensors
    }


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {
        key: (field.types, field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(type)`: the wide checkpoint as one GGUF of this type, converted once."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint = write_checkpoint(folder / "m", WIDE)

    def make(type_name: str) -> Path:
        path = folder / f"{type_name}.gguf"
        if not path.exists():
            make_file(checkpoint, path, "--type", type_name)
        return path

    return make


def split_and_merge(source: Path, folder: Path) -> tuple[Path, Path, Path]:
    base, merged = folder / "base.gguf", folder / "merged.gguf"
    assert main([str(source), str(base), "--split"]) == 0
    assert main(["--merge", str(base), str(merged)]) == 0
    return base, folder / "base-heads.gguf", merged


@pytest.mark.parametrize("kind", ["bf16", "q4_k_m", "iq4_xs"])
def test_split_and_merge_are_inverses(kind: str, made: Callable[..., Path], out: Path) -> None:
    source = made(kind)
    base, heads, merged = split_and_merge(source, out)
    assert merged.read_bytes() == source.read_bytes()
    assert contents(base, heads) == contents(source)
    with ModelFile.open(base, heads) as pair, ModelFile.open(source) as single:
        assert pair.config == single.config
    assert gguf.GGUFReader(base).fields["general.architecture"].contents() == "qwen3"
    assert not any("diff" in key or "mask" in key for key in keys_of(base))
    assert not any("orthrus" in key for key in keys_of(base))
    assert keys_of(heads)["adapter.type"][1] == "orthrus_heads"
    assert "tokenizer.ggml.tokens" not in keys_of(heads)


def test_a_split_checkpoint_merges_to_the_single_file(made: Callable[..., Path], out: Path) -> None:
    """Whether the checkpoint or its GGUF was split makes no difference to any tensor."""
    folder = made("q4_k_m").parent / "m"
    base = out / "b.gguf"
    assert main([str(folder), str(base), "--split", "--type", "q4_k_m"]) == 0
    assert main(["--merge", str(base), str(out / "m.gguf")]) == 0
    merged, single = out / "m.gguf", made("q4_k_m")
    assert contents(merged) == contents(single)
    assert list(contents(merged)) == [t.name for t in gguf.GGUFReader(merged).tensors]
    different = {"general.size_label"}  # of the part that was converted
    assert {k: v for k, v in keys_of(merged).items() if k not in different} == {
        k: v for k, v in keys_of(single).items() if k not in different
    }


def test_heads_elsewhere(made: Callable[..., Path], out: Path) -> None:
    _, heads, merged = split_and_merge(made("bf16"), out)
    moved = heads.rename(out / "elsewhere.gguf")
    argv = ["--merge", str(out / "base.gguf"), str(out / "again.gguf")]
    assert main(argv) == 1  # they are not beside the base any more
    assert main([*argv, "--heads", str(moved)]) == 0
    assert (out / "again.gguf").read_bytes() == merged.read_bytes()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("target", ["q8_0", "q4_k_m", "f32"])
def test_float_files_convert_like_the_checkpoint(
    kind: str, target: str, made: Callable[..., Path], convert: Callable[..., Any], out: Path
) -> None:
    """The values are exact in all three types."""
    assert convert(made(kind), "--type", target).code == 0
    assert contents(out / "model.gguf") == contents(made(target))
    assert keys_of(out / "model.gguf") == keys_of(made(target))


def test_quantized_files_are_guarded(
    made: Callable[..., Path], convert: Callable[..., Any], out: Path
) -> None:
    check_refusal(
        convert(made("q8_0"), "--type", "q4_k_m"),
        "tensor token_embd.weight is quantized already (Q8_0)",
        "--allow-requantize",
    )
    check_refusal(convert(made("q8_0"), "--type", "f16"), "is quantized already")
    assert convert(made("q8_0"), "--type", "q4_k_m", "--allow-requantize").code == 0
    rows = gguf.GGUFReader(made("q8_0")).tensors
    for tensor in gguf.GGUFReader(out / "model.gguf").tensors:
        if tensor.tensor_type.name == "Q4_K":
            source = next(t for t in rows if t.name == tensor.name)
            values = gguf.dequantize(source.data, source.tensor_type)
            found = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.mean((found - values) ** 2) < 0.01 * np.mean(values**2)


def test_without_a_type_nothing_changes(
    made: Callable[..., Path], convert: Callable[..., Any], out: Path
) -> None:
    assert convert(made("q4_k_m")).code == 0
    assert (out / "model.gguf").read_bytes() == made("q4_k_m").read_bytes()


def test_heads_alone_change_type(
    made: Callable[..., Path], convert: Callable[..., Any], out: Path
) -> None:
    assert convert(made("bf16"), "--heads-type", "q4_0").code == 0
    before, after = contents(made("bf16")), contents(out / "model.gguf")
    for name, (kind, _, _) in after.items():
        if "_diff" in name and "norm" not in name:
            assert kind == "Q4_0", name
        else:
            assert after[name] == before[name]
    assert convert(made("bf16"), "--heads-type", "q4_0", "--split", "--overwrite").code == 0
    assert keys_of(out / "model.gguf")["general.file_type"][1] == 32
    assert keys_of(out / "model-heads.gguf")["general.file_type"][1] == 2


def test_parts_are_not_models(
    made: Callable[..., Path],
    convert: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, heads, _ = split_and_merge(made("bf16"), tmp_path)
    capsys.readouterr()
    check_refusal(convert(base, "--split"), "holds no diffusion heads", "nothing for --split")
    check_refusal(convert(base, "--heads-type=q8_0"), "nothing for --heads-type", "--base MODEL")
    check_refusal(convert(heads), "holds only diffusion heads", f"--heads {heads}")
    check_refusal(convert(made("bf16"), "--merge"), "not beside it, as bf16-heads.gguf; name them")
    merged_twice = convert(made("bf16"), "--merge", "--heads", str(heads))
    check_refusal(merged_twice, "bf16.gguf: already holds diffusion heads")


@pytest.mark.parametrize("flag", ["--type=q8_0", "--split", "--pure", "--heads-type=q8_0"])
def test_merge_takes_no_other_flags(
    flag: str, made: Callable[..., Path], convert: Callable[..., Any]
) -> None:
    check_refusal(convert(made("bf16"), "--merge", flag), "only --heads goes with it")


def test_no_file_replaces_its_source(made: Callable[..., Path], out: Path) -> None:
    base, heads, _ = split_and_merge(made("q8_0"), out)
    before = {path: path.read_bytes() for path in (base, heads, made("q8_0"))}
    for argv in (
        [str(made("q8_0")), str(made("q8_0"))],
        ["--merge", str(base), str(heads)],
        ["--merge", str(base), str(base)],
        ["--base", str(base), "--heads", str(heads), str(heads)],
        ["--base", str(base), "--heads", str(heads), str(base)],
    ):
        assert main([*argv, "--overwrite"]) == 1
    assert {path: path.read_bytes() for path in before} == before


def foreign(path: Path, source: Path, *, norms: Any = np.float32) -> Path:
    """The same model as others might write it: another order of keys and tensors, wider numbers,
    keys that we do not know, optional ones left out, another alignment."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "orthrus")
    writer.add_custom_alignment(64)
    optional = ("general.type", "general.file_type", "general.size_label", "general.name")
    types = gguf.GGUFValueType
    for key, field in reversed(reader.fields.items()):
        if key.startswith("GGUF.") or key in optional or key == "general.architecture":
            continue
        kind = types.UINT64 if field.types == [types.UINT32] else field.types[0]
        item = field.types[-1] if kind == types.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, item)
    writer.add_string("orthrus.training.note", "ours")
    writer.add_array("other.numbers", [1, 2, 3])
    writer.add_float64("other.float", 0.1)
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        data: NDArray[Any] = tensor.data
        if "norm" in tensor.name:
            writer.add_tensor(tensor.name, data.astype(norms))
        else:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("norms", [np.float32, np.float16])
def test_files_of_others(norms: Any, made: Callable[..., Path], tmp_path: Path, out: Path) -> None:
    source = foreign(tmp_path / "foreign.gguf", made("q4_k_m"), norms=norms)
    base, heads, merged = split_and_merge(source, out)
    assert contents(merged) == contents(base, heads) == contents(source)
    assert keys_of(merged) == keys_of(source)
    assert keys_of(base)["qwen3.training.note"][1] == "ours"
    assert keys_of(base)["general.alignment"][1] == 64
    for path in (base, merged):
        reader = gguf.GGUFReader(path)
        assert reader.alignment == 64
        assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)
    with ModelFile.open(base, heads) as pair, ModelFile.open(source) as single:
        assert pair.config.n_layers == single.config.n_layers == 4


def test_norms_of_others_become_float32(
    made: Callable[..., Path], tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    source = foreign(tmp_path / "foreign.gguf", made("bf16"), norms=np.float16)
    assert convert(source, "--type", "q4_k_m").code == 0
    assert contents(out / "model.gguf") == contents(made("q4_k_m"))
    assert keys_of(out / "model.gguf")["general.file_type"][1] == 15


def test_empty_arrays_are_left_out(
    made: Callable[..., Path], tmp_path: Path, convert: Callable[..., Any], out: Path
) -> None:
    """GGUFWriter cannot write them, so the note says which are gone."""
    data = made("bf16").read_bytes()
    key = b"general.languages"
    entry = len(key).to_bytes(8, "little") + key + struct.pack("<IIQ", 9, 8, 0)
    count = int.from_bytes(data[16:24], "little")
    with GGUFFile.open(made("bf16")) as file:
        start = min(info.offset for info in file.tensors.values())
    header = data[:16] + (count + 1).to_bytes(8, "little") + entry + data[24:start]
    # The header is longer by that entry; its old padding becomes part of the new one.
    unpadded = len(header) - _padding(made("bf16"), start)
    header = header[:unpadded] + bytes(-unpadded % 32)
    (tmp_path / "e.gguf").write_bytes(header + data[start:])
    run = convert(tmp_path / "e.gguf")
    assert run.code == 0, run.stderr
    assert "note: " in run.stderr
    assert "left out empty arrays: general.languages" in run.stderr
    assert (out / "model.gguf").read_bytes() == data


def _padding(path: Path, start: int) -> int:
    """Bytes between the last tensor entry of the header and the data."""
    last = gguf.GGUFReader(path).tensors[-1].field
    end = last.offset + sum(int(part.nbytes) for part in last.parts)
    return start - end
