"""Builds the CPU kernels with the package (see `kernels/orthrus_cpu_kernels/build.py`)."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernels(BuildHookInterface):
    """Compiles one object per instruction set; without a C compiler, the wheel has none of them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = Path(self.root) / "kernels" / "orthrus_cpu_kernels"
        spec = importlib.util.spec_from_file_location("build_kernels", kernels / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        objects = module.build(kernels / "objects")
        if not objects:
            self.app.display_warning(
                "no C compiler (cc, gcc or clang) that works: the CPU kernels are left out,"
                " and ggml, which is slower, serves in their place"
            )
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        if version != "editable":
            for path in objects:
                build_data["force_include"][str(path)] = f"orthrus_cpu_kernels/objects/{path.name}"
