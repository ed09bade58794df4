"""The provenance of a benchmark's figures: code, date, command, library versions and machine."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import code_version
from lib.config import ROOT
from lib.runs import STAGES, versions


def provenance() -> dict[str, Any]:
    """The provenance of a figure that this process measures now.

    `code` is one hash of the scripts, this benchmark, the modules of this repository that are loaded, and all modules of lib/ that
    they can import, without comments and docstrings. It is the same for equal code, whatever the commit.
    """
    return code_version.commit() | {
        "code": code_version.digest(files()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *_command()],
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(),
    }


def files() -> dict[str, str]:
    """Hashes of the code that this process can run; see lib.code_version."""
    found: dict[str, str] = {}
    script = Path(sys.argv[0]).resolve()
    loaded = [
        Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))
    ]
    within = [path for path in loaded if path.is_relative_to(ROOT)]
    own = sorted(str(path) for path in within if path.relative_to(ROOT).parts[0] not in (".venv", "tests"))
    for entry in (*(f"{name}.py" for name in STAGES), str(script), *own):
        if (ROOT / entry).is_relative_to(ROOT):
            found |= code_version.code_files(entry, "text") | code_version.code_files(entry, "finqa")
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, threads, and the GPU if there is one."""
    import torch

    device = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **device}


def say_provenance() -> None:
    """Print the provenance on one line, above a benchmark's tables."""
    print("provenance: " + json.dumps(provenance()), flush=True)


def _command() -> list[str]:
    script = Path(sys.argv[0])
    if (
        script.resolve().is_relative_to(ROOT) and script.resolve().parent != ROOT
    ):  # run as `python -m benchmarks.x`
        return ["-m", ".".join(script.resolve().relative_to(ROOT).with_suffix("").parts), *sys.argv[1:]]
    return [script.name, *sys.argv[1:]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
