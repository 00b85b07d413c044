"""Models that were split for download, as the gguf package splits them, read as one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from orthrus_converters.cli import main as convert
from stock import Stock

from orthrus_gguf.cli.inspect import main as inspect
from orthrus_gguf.cli.run import main as run
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.model.file import ModelFile

DemoFile = Callable[..., Path]
PER_PART = 25


def split(source: Path, target: Path, per_part: int = PER_PART) -> list[Path]:
    """The same model in parts, by the gguf package. Returns their paths in order."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch, split_max_tensors=per_part)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(target.parent.glob(f"{target.stem}-*-of-*.gguf"))
    assert len(paths) == -(-len(reader.tensors) // per_part)
    return paths


@pytest.fixture
def parts(demo_file: DemoFile, tmp_path: Path) -> list[Path]:
    return split(demo_file("f16"), tmp_path / "model.gguf")


def contents(file: GGUFFile) -> dict[str, Any]:
    return {name: (info.shape, info.type, file.data(name).tobytes()) for name, info in
            file.tensors.items()}  # fmt: skip


@pytest.mark.parametrize("named", [0, 1, -1])
def test_any_part_opens_all(demo_file: DemoFile, parts: list[Path], named: int) -> None:
    with GGUFFile.open(demo_file("f16")) as whole, open_gguf(parts[named]) as file:
        assert contents(file) == contents(whole)
        assert list(file.tensors) == list(whole.tensors)
        assert list(file.metadata) == list(whole.metadata)
        assert file.types == whole.types
        assert file.paths == tuple(parts)
        assert file.path == parts[0]
        assert file.path_of(list(file.tensors)[PER_PART]) == parts[1]
        assert file.n_bytes == sum(path.stat().st_size for path in parts)
        file.prefetch(file.tensors)
        file.release(next(iter(file.tensors)))
        with pytest.raises(KeyError):
            file.path_of("nothing")


def test_models_and_heads_in_parts(demo_file: DemoFile, tmp_path: Path) -> None:
    base = demo_file("f32", split=True)
    heads = base.with_name(f"{base.stem}-heads.gguf")
    bases = split(base, tmp_path / "base.gguf")
    in_parts = split(heads, tmp_path / "heads.gguf", 5)
    with ModelFile.open(base, heads) as one, ModelFile.open(bases[0], in_parts[-1]) as other:
        assert one.config == other.config
        assert other.paths == (*bases, *in_parts)
        assert set(one.tensors) == set(other.tensors)
        for name in one.tensors:
            np.testing.assert_array_equal(one.data(name), other.data(name))


def test_commands_take_parts(
    demo_file: DemoFile, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = demo_file("f16")
    flags = ("-p", "def f", "-n", "8", "--temp", "0", "-t", "1", "--no-perf", "--strategy", "ar")
    texts = []
    for path in (whole, parts[0]):
        assert run([str(path), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert inspect(["--diff", str(whole), str(parts[1])]) == 0
    capsys.readouterr()
    assert inspect(["--verify", str(parts[0])]) == 0
    verified = capsys.readouterr().out
    assert inspect(["--verify", str(whole)]) == 0
    assert capsys.readouterr().out == verified
    assert inspect([str(parts[0])]) == 0
    assert f"{parts[0].name} and {len(parts) - 1} more files: " in capsys.readouterr().out
    merged = tmp_path / "merged.gguf"
    assert convert([str(parts[0]), str(merged)]) == 0
    assert merged.read_bytes() == whole.read_bytes()
    capsys.readouterr()
    assert convert([str(parts[0]), str(parts[1]), "--overwrite"]) == 1
    assert "is an input of this conversion" in capsys.readouterr().err


def test_stock_llama_cpp_reads_them_alike(demo_file: DemoFile, tmp_path: Path) -> None:
    """That these are such files as it takes."""
    base = demo_file("f16", split=True)
    found = [
        [entry["id"] for entry in Stock(path, "f32", 64).greedy([5, 6, 7], 8, 1)]
        for path in (base, split(base, tmp_path / "base.gguf")[0])
    ]
    assert found[0] == found[1]


def refusal(path: Path) -> str:
    with pytest.raises(OrthrusError) as caught:
        open_gguf(path)
    return str(caught.value)


def test_what_is_wrong_with_parts(parts: list[Path], tmp_path: Path) -> None:
    count = f"{len(parts):05d}"
    kept = parts[1].read_bytes()
    parts[1].unlink()
    missing = refusal(parts[2])
    assert missing.startswith(f"{parts[1]}: this part of a model split into {len(parts)} files is")
    parts[1].write_bytes(parts[2].read_bytes())
    assert f"says that it is part 3 of {len(parts)}; its name is wrong" in refusal(parts[0])
    assert f"is not called NAME-00003-of-{count}.gguf" in refusal(parts[1])
    other = tmp_path / "lonely.gguf"
    other.write_bytes(kept)
    assert f"part 2 of a model split into {len(parts)} files, but is not called" in refusal(other)
    parts[1].write_bytes(kept[: len(kept) // 2])
    assert str(parts[1]) in refusal(parts[0])


def test_a_part_alone_can_be_looked_at(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts[2].rename(tmp_path / "elsewhere")
    assert inspect([str(parts[0])]) == 0
    assert f"{parts[2]}: this part of a model split" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(parts[2])
    parts[2].write_bytes(parts[1].read_bytes())
    assert inspect([str(parts[1])]) == 0
    assert "is one of 3 parts, which do not belong together" in capsys.readouterr().out


def test_parts_of_two_models(parts: list[Path], demo_file: DemoFile, tmp_path: Path) -> None:
    """As many, with other tensors in them."""
    with open_gguf(parts[0]) as file:
        n_tensors = len(file.tensors)
    sizes = [size for size in range(1, 40) if -(-n_tensors // size) == len(parts)]
    size = next(size for size in sizes if size != PER_PART)
    (tmp_path / "b").mkdir()
    others = split(demo_file("f16"), tmp_path / "b" / "model.gguf", size)
    parts[1].write_bytes(others[1].read_bytes())
    assert "the parts are not of one model: download them again" in refusal(parts[0])
