"""Result files: small JSON files with what was measured and where it comes from. docs/results.md is made from them.

A file in docs/results/ has four keys:

    version      1
    name         of the benchmark or run, and of the file
    provenance   commit, date, command, versions of libraries, machine; see benchmarks/provenance.py
    figures      plain numbers; an estimate is {"value", "low", "high"} with the ends of its 95 % interval

Figures that exist only as text of an earlier document have a provenance with `transcribed_from` in place of a machine.
The page marks them, and the next measurement replaces the file.
"""

import argparse
import itertools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from lib import durable
from lib.config import ROOT
from lib.runs import plain

FOLDER = ROOT / "docs" / "results"
VERSION = 1
MEASURED = {"commit", "dirty", "date", "command", "versions", "machine"}  # keys that a measurement must have
TRANSCRIBED = {
    "transcribed_from",
    "date",
    "command",
}  # and `commit`, or the `published_commit` where that is unknown


@dataclass(frozen=True)
class ResultFile:
    """One file of docs/results/."""

    name: str
    provenance: dict[str, Any]
    figures: dict[str, Any]

    @property
    def transcribed(self) -> bool:
        return "transcribed_from" in self.provenance

    @property
    def note(self) -> str:
        """What a reader must know beside the figures, or nothing."""
        return self.provenance.get("note", "")

    @property
    def command(self) -> str:
        """The command to paste: without `--out FILE`, and all stages in place of the one that was recorded of a run."""
        words = list(self.provenance["command"])
        if words[1:2] == ["04_train.py"]:
            return _pipeline(words[2:])
        if "--out" in words:
            at = words.index("--out")
            del words[at : at + 2]
        return " ".join(words) if self.transcribed else shlex.join(words)

    @property
    def source(self) -> str:
        """Commit and date in words, for a table."""
        source = self.provenance
        day = str(source["date"])[:10]
        if not self.transcribed:
            return (
                f"{str(source['commit'])[:7]}{' with uncommitted changes' if source['dirty'] else ''}, {day}"
            )
        how = "measured at" if "commit" in source else "published in"
        return f"transcribed ({how} {str(source.get('commit') or source['published_commit'])[:7]}, {day})"


def _pipeline(flags: list[str]) -> str:
    """`make pipeline` with the configs and settings of a script's flags."""
    pairs = list(itertools.pairwise(flags))
    configs = [value for flag, value in pairs if flag == "--config"]
    settings = [value for flag, value in pairs if flag == "--set"]
    words = ["make pipeline"]
    if configs:
        words.append(f"CONFIG={shlex.quote(' '.join(configs))}")
    if settings:
        words.append(f"SET={shlex.quote(' '.join(map(shlex.quote, settings)))}")
    return " ".join(words)


def add_out(parser: argparse.ArgumentParser) -> None:
    """The flag `--out FILE` of a benchmark."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="result file; by default in outputs/benchmarks/. The results page is made from those in docs/results/",
    )


def write(
    path: Path | None, name: str, figures: dict[str, Any], source: dict[str, Any] | None = None
) -> None:
    """Write a result file.

    Args:
        path: of the file; None: outputs/benchmarks/<name>.json.
        figures: plain numbers, as the head of this module says.
        source: their provenance; None: that of this process.
    """
    path = path or ROOT / "outputs" / "benchmarks" / f"{name}.json"
    origin: dict[str, Any] = dict(source or provenance())
    origin["command"] = [without_machine(word) for word in origin["command"]]
    content = plain({"version": VERSION, "name": name, "provenance": origin, "figures": figures})
    _check(content, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"result file: {path}")


def read(path: Path) -> ResultFile:
    """Raises ValueError for a file that is not complete."""
    content = json.loads(path.read_text(encoding="utf-8"))
    _check(content, path)
    return ResultFile(content["name"], content["provenance"], content["figures"])


def read_all(folder: Path = FOLDER) -> dict[str, ResultFile]:
    """Name -> result file, of all in a folder."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return {file.name: file for file in found}


def without_machine(word: str) -> str:
    """A word of a command with `/path/to/` in place of the folders of an absolute path."""
    return re.sub(r"(?<![\w./~])/(?:[^/\s\"']+/)+", "/path/to/", word)


def _check(content: dict[str, Any], path: Path) -> None:
    if content.get("version") != VERSION or set(content) != {"version", "name", "provenance", "figures"}:
        raise ValueError(f"{path}: expected version {VERSION} with the keys name, provenance and figures")
    if content["name"] != path.stem and path.parent == FOLDER:
        raise ValueError(f"{path}: its name is {content['name']}; expected that of the file")
    source = content["provenance"]
    needed = TRANSCRIBED if "transcribed_from" in source else MEASURED
    if lacking := sorted(needed - set(source)):
        raise ValueError(f"{path}: the provenance lacks {', '.join(lacking)}")


# ------------------------------------------------------------------------------------------ figures in words


def number(value: float, digits: int = 3, percent: bool = False) -> str:
    """`0.878` or `87.8 %`."""
    rounded = round(100 * value if percent else value, digits) + 0.0  # no "-0.00"
    return f"{rounded:.{digits}f}" + " %" * percent


def interval(estimate: dict[str, Any], digits: int = 3, percent: bool = False) -> str:
    """`0.863 – 0.889`; nothing where the estimate has no interval."""
    if estimate.get("low") is not None and estimate.get("high") is not None:
        low, high = (100 * estimate[k] if percent else estimate[k] for k in ("low", "high"))
        return f"{low:.{digits}f} – {high:.{digits}f}"
    if estimate.get("half_width") is not None:
        half = 100 * estimate["half_width"] if percent else estimate["half_width"]
        return f"± {half:.{digits}f}"
    return ""


def full(estimate: dict[str, Any], digits: int = 3, percent: bool = False) -> str:
    """`0.878 (0.863 – 0.889)` or `1.861 ± 0.012`; the value alone where there is no interval."""
    value, around = number(estimate["value"], digits, percent), interval(estimate, digits, percent)
    if not around:
        return value
    return f"{value} {around}" if around.startswith("±") else f"{value} ({around})"


def percent_cells(estimate: dict[str, Any]) -> list[str]:
    """Two cells of a table: `77.0 %` and `74.2 – 79.8 %`."""
    around = interval(estimate, 1, percent=True)
    return [number(estimate["value"], 1, percent=True), around and f"{around} %"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table. A `|` of a cell does not end it."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])
