"""The manifest of a stage of units, made from the manifests of the units alone."""

from collections.abc import Mapping
from typing import Any

from lib import code_version
from lib.runs import stage_of

OWN_STATS = ("table", "stream")  # of a unit: joined over all units


def describe_units(stage: str, made: Mapping[str, dict], units: Mapping[str, str]) -> dict[str, Any]:
    """The content of the stage's manifest.

    Settings and inputs are those of all units. Outputs have the name of their unit in front. Times are added, and the
    environment and the code are those of the unit that was completed last.

    Args:
        made: unit -> its manifest, in the order of the config.
        units: unit -> hash of its manifest.
    """
    manifests = list(made.values())
    last = max(manifests, key=lambda m: m["finished_at"])
    memory = max(m["environment"]["peak_memory_mb"] for m in manifests)
    return {
        "quick_test": any(m["quick_test"] for m in manifests),
        "started_at": min(m["started_at"] for m in manifests),
        "finished_at": last["finished_at"],
        "seconds": round(sum(m["seconds"] for m in manifests), 3),
        "config": nested({key: value for m in manifests for key, value in m["config"].items()}),
        "inputs": {
            key: entry
            for m in manifests
            for key, entry in m["inputs"].items()
            if stage_of(entry.get("stage", "")) != stage
        },
        "outputs": {
            f"{unit}/{output}": entry | {"path": f"{unit}/{entry['path']}"}
            for unit, m in made.items()
            for output, entry in m["outputs"].items()
        },
        "units": dict(units),
        "stats": stats_of(made),
        "code": _code(manifests, last),
        "environment": last["environment"] | {"peak_memory_mb": memory},
    }


def stats_of(made: Mapping[str, dict]) -> dict[str, Any]:
    """Unit -> its figures; `table`: the rows of the results table of all; `stream`, if a model learned from shards."""
    stats: dict[str, Any] = {
        unit: {key: value for key, value in m["stats"].items() if key not in OWN_STATS}
        for unit, m in made.items()
    }
    stats["table"] = [row for m in made.values() for row in m["stats"].get("table", [])]
    stream = {label: facts for m in made.values() for label, facts in m["stats"].get("stream", {}).items()}
    return stats | ({"stream": stream} if stream else {})


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys as sections: {"models.judge": x} becomes {"models": {"judge": x}}."""
    found: dict[str, Any] = {}
    for path, value in config.items():
        *sections, key = path.split(".")
        node = found
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return found


def _code(manifests: list[dict], last: dict) -> dict[str, Any]:
    """The code of the last unit; `mixed` names the files in which that of another unit differs."""
    files = last["code"]["files"]
    mixed = {
        path
        for m in manifests
        for path in (*m["code"]["mixed"], *code_version.changed_files(m["code"]["files"], files))
    }
    return {
        "commit": last["code"]["commit"],
        "dirty": True if any(m["code"]["dirty"] for m in manifests) else last["code"]["dirty"],
        "files": files,
        "mixed": sorted(mixed),
        "upstream_differs": {
            name: entry
            for m in manifests
            for name, entry in m["code"]["upstream_differs"].items()
            if stage_of(name) != last["stage"].partition("/")[0]
        },
    }
