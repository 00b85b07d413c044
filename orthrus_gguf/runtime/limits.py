"""What this process may use of the machine: physical cores and memory.

`root` stands for the file system's root, so that tests can put a made-up machine there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from orthrus_gguf.errors import OrthrusError

ROOT = Path("/")


def usable_cores() -> int:
    """Physical cores that this process may run on at once, at least 1.

    ggml's threads wait for each other by spinning, so a second thread per core, or more threads
    than the container's CPU quota pays for, makes everything slower.
    """
    if sys.platform == "darwin":
        return darwin_cores()
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return max(1, os.cpu_count() or 1)
    return linux_cores(cpus)


#: More threads are never used (ggml knows no more).
MOST_THREADS = 512

#: Threads that may be asked for on any machine, however small. ggml aborts when the system refuses
#: to start one, and far more threads than processors would only wait for each other anyway.
ALWAYS_ALLOWED = 16


def thread_count(requested: int | None) -> int:
    """The number of threads to use: as requested, else one per usable physical core."""
    most = min(max(os.cpu_count() or 1, ALWAYS_ALLOWED), MOST_THREADS)
    if requested is None:
        return min(usable_cores(), most)
    if not 1 <= requested <= most:
        raise OrthrusError(f"--threads {requested}: must lie in 1..{most} on this machine")
    return requested


def usable_threads(requested: int | None, say: Callable[[str], None]) -> int:
    """The same, but no more than there are cores to run them: `say` hears of it."""
    threads, cores = thread_count(requested), usable_cores()
    if threads > cores:
        say(f"--threads {threads}: more than this process can run at once; it uses {cores}")
    return min(threads, cores)


def thread_counts(most: int) -> tuple[int, ...]:
    """Numbers of threads that are worth timing, from `most` down: memory may be as fast for fewer,
    and not every core may be as fast or as free as the first."""
    return tuple(sorted({most, *(max(1, most * k // 4) for k in (3, 2, 1)), 1}, reverse=True))


def linux_cores(cpus: set[int], root: Path = ROOT) -> int:
    """Distinct physical cores among the allowed logical `cpus`, cut to the cgroup's quota."""
    cores = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    quota = cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def darwin_cores() -> int:
    """Performance cores where there are two kinds (as llama.cpp counts), else all physical ones."""
    import ctypes.util

    library = ctypes.CDLL(ctypes.util.find_library("c"))
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        count, size = ctypes.c_int32(0), ctypes.c_size_t(4)
        found = library.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, 0) == 0
        if found and count.value > 0:
            return count.value
    return max(1, os.cpu_count() or 1)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the control group pays for (quota / period), None without a limit."""

    def version2(folder: Path) -> float | None:
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None

    def version1(folder: Path) -> float | None:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None

    return _tightest(root, "cpu", version2, version1)


def memory_bytes(root: Path = ROOT) -> int:
    """Memory that this process can hope for: the machine's, cut to the control group's limit."""
    total = _physical_bytes()

    def version2(folder: Path) -> float | None:
        text = _read(folder / "memory.max")
        return int(text) if text.isdigit() else None

    def version1(folder: Path) -> float | None:
        text = _read(folder / "memory.limit_in_bytes")
        return int(text) if text.isdigit() else None

    limit = _tightest(root, "memory", version2, version1)
    return total if limit is None else min(total, int(limit))


def _physical_bytes() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    class Status(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "free", "a", "b", "c", "d", "e")),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.CDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.total)


def private_memory(n_bytes: int) -> mmap.mmap:
    """Zeroed memory, which the system commits page by page when it is touched. Private, since that
    is what huge pages are for. Raises OSError."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows knows no other
        return mmap.mmap(-1, n_bytes)
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _tightest(
    root: Path,
    controller: str,
    version2: Callable[[Path], float | None],
    version1: Callable[[Path], float | None],
) -> float | None:
    """The smallest limit on the way from this process's control group up to the root."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            mount, read = root / "sys/fs/cgroup", version2
        elif controller in controllers.split(","):
            mount, read = root / "sys/fs/cgroup" / controllers, version1
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        limits += [read(mount / folder) for folder in (path, *path.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def _read(path: Path) -> str:
    """The text of a small system file, empty where there is none."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
