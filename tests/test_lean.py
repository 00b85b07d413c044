"""What a command imports before it can answer, and the stand-in for the `gguf` package."""

from __future__ import annotations

import subprocess
import sys

#: Packages that cost a command a tenth of a second, of no use before the first token.
HEAVY = {
    *("yaml", "requests", "tqdm", "sentencepiece", "huggingface_hub", "torch", "matplotlib"),
    *("concurrent.futures", "logging", "hashlib", "secrets", "difflib", "jinja2", "tokenizers"),
    *("gguf.gguf_reader", "gguf.vocab", "gguf.quants"),
}


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_orthrus_run_imports_nothing_that_it_can_do_without() -> None:
    loaded = _python("import sys, orthrus_gguf.cli.run; print(*sys.modules)").split()
    assert "gguf.constants" in loaded
    assert HEAVY.isdisjoint(loaded), HEAVY.intersection(loaded)


def test_every_name_of_the_gguf_package_is_there_as_ever() -> None:
    names = "print(*sorted(name for name in dir(gguf) if not name.startswith('_')))"
    whole = _python(f"import gguf; {names}").split()
    found = _python(
        "import orthrus_gguf, gguf\n"
        f"for name in {whole!r}: print(name, type(getattr(gguf, name)).__name__)"
    )
    plain = _python(
        f"import gguf\nfor name in {whole!r}: print(name, type(getattr(gguf, name)).__name__)"
    )
    assert found == plain


def test_names_come_before_the_package_runs() -> None:
    done = _python(
        "import sys, orthrus_gguf, gguf\n"
        "from gguf import GGMLQuantizationType, quants\n"
        "assert gguf.quants is quants is sys.modules['gguf.quants']\n"
        "assert gguf.GGMLQuantizationType is GGMLQuantizationType\n"
        "print('gguf.gguf_writer' in sys.modules)\n"
        "from gguf import GGUFWriter\n"
        "print(GGUFWriter is sys.modules['gguf.gguf_writer'].GGUFWriter, type(gguf).__name__)\n"
        "try: gguf.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    assert done.splitlines() == [
        "False",
        "True module",
        "module 'gguf' has no attribute 'nothing'",
    ]


def test_a_package_that_is_imported_already_stays_as_it_is() -> None:
    same = "import gguf; before = gguf; import orthrus_gguf, gguf; print(before is gguf)"
    assert _python(same) == "True\n"
