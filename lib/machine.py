"""What this machine has: cores, memory, disk, libraries, bf16, a compiler. Read without importing torch."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FLOORS = {
    "torch": (2, 10), "transformers": (5, 5), "pyarrow": (15, 0), "ray": (2, 59),
}  # versions that closed holes through which a file could run code  # fmt: skip
OPTIONAL = ("ray",)
MEMORY_GB, DISK_GB = 2.0, 2.0  # what the default run needs, with room
SLOW_SYNC_SECONDS = 0.5
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "lustre", "glusterfs", "beegfs")


@dataclass(frozen=True)
class Finding:
    """One thing about the machine. `is_fault`: something that Remask needs is missing or too old."""

    name: str
    text: str
    is_fault: bool = False

    def line(self) -> str:
        return f"  {self.name:<14} {self.text}{'   <-- FAULT' if self.is_fault else ''}"


def examine_machine(folder: Path) -> list[Finding]:
    """All findings. `folder`: where runs lie, whose disk is examined."""
    return [_python(), _cores(), _memory(), *_libraries(), _bf16(), _gpu(), _compiler(), *_disk(folder)]


def _python() -> Finding:
    return Finding(
        "python", f"{platform.python_version()} on {platform.platform()}", sys.version_info < (3, 11)
    )


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS")
    threads = f"OMP_NUM_THREADS={limit}" if limit else "as many threads as cores"
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return Finding("cores", f"{cores} may be used, {threads}{busy}")


def _memory() -> Finding:
    facts = {}
    with contextlib.suppress(OSError):
        facts = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii")))
    if "MemTotal" not in facts:
        return Finding("memory", "unknown")
    total, free = (int(facts.get(key, 0)) / 1024**2 for key in ("MemTotal", "MemAvailable"))
    return Finding("memory", f"{total:.1f} GB, {free:.1f} GB are free", free < MEMORY_GB)


def _libraries() -> list[Finding]:
    found = []
    for name, floor in FLOORS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "not installed", name not in OPTIONAL))
            continue
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        needed = ".".join(map(str, floor))
        is_old = numbers < floor
        found.append(Finding(name, f"{version}, at least {needed} is needed" if is_old else version, is_old))
    return found


def _bf16() -> Finding:
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        flags = set((re.search(r"^flags\s*:(.*)$", text, re.MULTILINE) or ["", ""])[1].split())
    kinds = [word for flag, word in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX")) if flag in flags]
    if kinds:
        return Finding("bf16", f"{' and '.join(kinds)}: precision auto is bf16 on the CPU")
    return Finding("bf16", "not on this CPU: precision auto is fp32")


def _gpu() -> Finding:
    cards = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    return Finding("GPU", ", ".join(cards) if cards else "none")


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)
    return Finding("compiler", found or "no C++ compiler: training.compile stays off on the CPU")


def _disk(folder: Path) -> list[Finding]:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    kind = file_system(folder)
    findings = [Finding("disk", f"{free:.1f} GB are free in {folder}", free < DISK_GB)]
    if kind in NETWORK_FILE_SYSTEMS:
        findings.append(Finding(
            "file system", f"{kind}, shared by machines. Locks may not reach other machines: let one machine work on a stage"
        ))  # fmt: skip
    elif kind:
        findings.append(Finding("file system", kind))
    findings.append(_sync(folder))
    return findings


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as ext4 or nfs4; empty if it is unknown."""
    with contextlib.suppress(OSError):
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
        real = os.path.realpath(folder)
        holds = [m for m in mounts if real == m[1] or real.startswith(m[1].rstrip("/") + "/")]
        return max(holds, key=lambda m: len(m[1]))[2] if holds else ""
    return ""


def _sync(folder: Path) -> Finding:
    """Write a small file, sync and remove it."""
    try:
        begin = time.monotonic()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor_", suffix=".tmp") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - begin
    except OSError as error:
        return Finding(
            "writing", f"{folder} cannot be written ({error.strerror}); runs can only be read here"
        )
    slow = "; checkpoints will be slow" if seconds > SLOW_SYNC_SECONDS else ""
    return Finding("writing", f"a file reaches the disk in {1000 * seconds:.0f} ms{slow}")
