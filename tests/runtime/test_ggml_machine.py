"""Cores and memory, on machines made of a few small files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orthrus_gguf.runtime.limits import (
    cpu_quota,
    darwin_cores,
    linux_cores,
    memory_bytes,
    thread_count,
    usable_cores,
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def hyperthreaded(root: Path) -> Path:
    """Four cores of two threads: cpu 0 and 4 are one core, 1 and 5 the next."""
    return write(
        root,
        {
            f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list": f"{cpu % 4},{cpu % 4 + 4}"
            for cpu in range(8)
        },
    )


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    assert linux_cores(set(range(8)), hyperthreaded(tmp_path)) == 4


def test_affinity_counts(tmp_path: Path) -> None:
    root = hyperthreaded(tmp_path)
    assert linux_cores({0, 4, 5}, root) == 2
    assert linux_cores({3}, root) == 1


def test_without_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert linux_cores({0, 1, 2}, tmp_path) == 3


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/7",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/docker/7/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/docker/7/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        ({"proc/self/cgroup": "garbage\n\n::\n0::/", "sys/fs/cgroup/cpu.max": "what"}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("250000", 2), ("900000", 4)])
def test_the_quota_caps_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    root = write(
        hyperthreaded(tmp_path),
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"},
    )
    assert linux_cores(set(range(8)), root) == cores


def test_memory_limits(tmp_path: Path) -> None:
    unlimited = memory_bytes(tmp_path / "nothing")
    assert unlimited > 1 << 28
    second = {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": "1048576"}
    assert memory_bytes(write(tmp_path / "v2", second)) == 1 << 20
    first = {
        "proc/self/cgroup": "9:memory:/job",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2097152",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert memory_bytes(write(tmp_path / "v1", first)) == 1 << 21
    maximum = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}
    assert memory_bytes(write(tmp_path / "max", maximum)) == unlimited


def test_this_machine_has_cores() -> None:
    assert 1 <= usable_cores() <= 4096
    assert thread_count(None) == min(usable_cores(), 512)
    assert thread_count(3) == 3


@pytest.mark.skipif(sys.platform != "darwin", reason="asks the macOS kernel")
def test_cores_on_macos() -> None:
    assert darwin_cores() >= 1
