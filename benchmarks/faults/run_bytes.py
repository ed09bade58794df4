"""What two runs must have in common: every byte of every output. Times, logs and names of the machine are left out.

A few files tell of time: JSON files and reports. Their other content is compared. The hashes that manifests have of such files
cannot be equal in two runs; they are compared with the files themselves.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lib import durable

LOGS = ("log*.txt", "*.alive", "speed.jsonl")  # what was said, when, and how fast
NO_OUTPUTS = {".locks", "checkpoint"}  # folders; a checkpoint is of the moment of the last interruption
VOLATILE = {
    "command", "run", "started_at", "finished_at", "seconds", "peak_memory_mb", "environment", "code", "overwrite",
    "seconds_waited",
}  # keys of JSON files that tell of the machine, the moment or the command  # fmt: skip
LEFTOVERS = ("*.tmp", "*.new", "*.old", "unfinished.json", "overwrite_*.json")  # of work that is not complete
TOLD_BY_TIME = re.compile(
    r"<title>.*?</title>|<header>.*?</header>|<section[^>]*><h2>[^<]*provenance.*?</section>|<table(?:(?!</table>).)*>seconds[^<]*<.*?</table>",
    re.DOTALL,
)  # parts of a report


def run_bytes(folder: Path) -> dict[str, str]:
    """Relative path -> hash, for each file below `folder`. Raises ValueError if a manifest has a wrong hash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        left_out = NO_OUTPUTS & set(name.parts) or any(path.match(p) for p in LOGS)
        if path.is_file() and not left_out:
            found[name.as_posix()] = hashlib.sha256(_content(path)).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Names below `folder` that only unfinished work has."""
    return sorted(p.relative_to(folder).as_posix() for pattern in LEFTOVERS for p in folder.rglob(pattern))


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """The files that one run has and the other lacks, or that differ."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".html":
        return TOLD_BY_TIME.sub("", data.decode("utf-8")).encode()
    if path.suffix != ".json":
        return data
    content = json.loads(data)
    if path.name == "manifest.json":
        _check_hashes(path, content)
    return json.dumps(_without_volatile(content), sort_keys=True).encode()


def _check_hashes(path: Path, manifest: dict[str, Any]) -> None:
    """Compare the hashes in a manifest with the files, and replace those of files that tell of time."""
    units = manifest.get("units", {})
    for name, sha256 in units.items():
        if durable.sha256_file(path.parent / name / "manifest.json") != sha256:
            raise ValueError(f"{path}: another hash than that of {name}/manifest.json")
        units[name] = "compared"
    for record in manifest.get("outputs", {}).values():
        target = path.parent / record["path"]
        if not units and durable.sha256(target) != record["sha256"]:
            raise ValueError(f"{path}: another hash than that of {record['path']}")
        if target.suffix in (".json", ".html"):
            record.update(sha256="compared", bytes=0)


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in VOLATILE}
    return [_without_volatile(v) for v in value] if isinstance(value, list) else value
