"""Compiles `src/` with the system's C compiler, one object per instruction set.

Run by the package's build (`hatch_build.py`), or by hand: `python build.py [NAME ...]`. It imports
nothing but the standard library, so that it runs before anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "src").glob("*.c"))
HEADERS = sorted((HERE / "src").glob("*.h"))

#: All sources as one, since compilers take as long for the headers of intrinsics as for the rest.
TOGETHER = "".join(f'#include "{path.name}"\n' for path in SOURCES)

#: No contraction: products and sums fuse where the source says so, so that every object gives the
#: same bits.
FLAGS = ("-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-Wall")

X86 = {
    "avx512vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512vnni -mfma -mf16c",
    "avx2vnni": "-mavx2 -mavxvnni -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
}
ARM = {
    "neoni8mm": "-march=armv8.2-a+dotprod+i8mm",
    "neon": "-march=armv8.2-a+dotprod",
}


def targets(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """Object → compiler flags, for a kind of processor (default: this one)."""
    machine = (machine or platform.machine()).lower()
    kinds = (
        X86 if machine in ("x86_64", "amd64") else ARM if machine in ("aarch64", "arm64") else {}
    )
    found = {
        name: (f"-DORTHRUS_{name.upper()}", "-O3", *flags.split()) for name, flags in kinds.items()
    }
    # Beyond -O1, loops over sixteen lanes take longer to compile than they save.
    return {**found, "portable": ("-DORTHRUS_PORTABLE", "-O1")}


def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(folder: Path, names: list[str] | None = None) -> list[Path]:
    """Compile into `folder` what is not there yet or older than the sources.

    Returns the objects; none without a compiler. An instruction set that the compiler does not know
    is left out.
    """
    cc = compiler()
    if cc is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: flags for name, flags in targets().items() if not names or name in names}
    newest = max(path.stat().st_mtime for path in (*SOURCES, *HEADERS, Path(__file__)))

    def one(name: str) -> Path | None:
        path = folder / f"{name}.so"
        if path.exists() and path.stat().st_mtime >= newest:
            return path
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        command = [
            cc,
            *FLAGS,
            *wanted[name],
            f"-I{HERE / 'src'}",
            "-x",
            "c",
            "-",
            "-o",
            str(beside),
        ]
        done = subprocess.run(
            [*command, "-lm", "-lpthread"], input=TOGETHER, capture_output=True, text=True
        )
        if done.returncode:
            print(f"{name}: not compiled: {done.stderr.strip()[-400:]}", file=sys.stderr)
            return None
        beside.replace(path)
        return path

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [path for path in pool.map(one, wanted) if path is not None]


if __name__ == "__main__":
    made = build(HERE / "objects", sys.argv[1:])
    print("\n".join(map(str, made)) or "no C compiler: install one (cc, gcc or clang)")
    sys.exit(0 if made else 1)
