"""The manifest of a stage: its content, and how the code that made a stage differs from the present code."""

import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import code_version
from lib.log import say
from lib.runs import RunArgs, printable, stage_of, validate_manifest, versions


class Clock:
    """When a stage started and how long it has run."""

    def __init__(self) -> None:
        self._started_at, self._start = datetime.now(UTC), time.monotonic()

    def record(self) -> dict[str, Any]:
        return {
            "started_at": self._started_at.isoformat(timespec="seconds"),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._start, 3),
        }


def make_manifest(
    name: str, run_dir: Path, args: RunArgs, clock: Clock, content: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of stage `name` as JSON data, checked against its JSON Schema.

    `content`: config, inputs, outputs, stats, code and environment.
    """
    head = {
        "manifest_version": 1,
        "stage": name,
        "run": printable(os.path.basename(os.path.abspath(run_dir))) or "/",
        "quick_test": args.quick_test,
        "command": [printable(word) for word in args.command],
    }
    manifest = json.loads(json.dumps(head | clock.record() | dict(content), allow_nan=False))
    validate_manifest(manifest)
    return manifest


def code_differences(manifest: Mapping[str, Any], code: Mapping[str, str]) -> dict[str, Any]:
    """How the code that made a stage differs from the present code: {"files": [...], "versions": {...}}, or {}."""
    recorded = manifest.get("code", {})
    files = {*code_version.changed_files(recorded.get("files", {}), code), *recorded.get("mixed", [])}
    before = manifest.get("environment", {})
    libraries = {n: f"{before[n]} -> {v}" for n, v in versions().items() if before.get(n, v) != v}
    return ({"files": sorted(files)} if files else {}) | ({"versions": libraries} if libraries else {})


def describe(differences: Mapping[str, Any]) -> str:
    """`code_differences` in a few words: `lib/a.py, lib/b.py; numpy 1.0 -> 2.0`."""
    parts = [code_version.name_files(differences["files"])] if "files" in differences else []
    return "; ".join(parts + [f"{name} {change}" for name, change in differences.get("versions", {}).items()])


def upstream_differences(upstream: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, dict]:
    """Earlier stages that were made with different code -> the differences. A line for the user names them, too.

    `upstream`: stage -> its manifest.
    """
    found = {
        name: differences
        for name, manifest in upstream.items()
        if (differences := code_differences(manifest, code_version.code_files(stage_of(name), task)))
    }
    if found:
        each = "; ".join(f"{name} ({describe(differences)})" for name, differences in found.items())
        say(f"made with different code, and used as they are: {each}")
    return found
