"""Run folders, outputs/run_NNN, and the manifests of their stages: find them, read them, compare them.

`python -m lib.runs [RUN]` prints one line per manifest.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import code_version, durable
from lib.config import ROOT, Config
from lib.errors import BadData, CannotCreate, MissingInput, RemaskError
from lib.log import printable_line

OUTPUTS = ROOT / "outputs"
STAGES = (
    "00_check_data",
    "01_prepare_dataset",
    "02_generate_candidates",
    "03_build_rewards",
    "04_train",
    "05_train_critic",
    "06_sample",
)
SCORE, RANK = (
    "06_score_",
    "06_rank_",
)  # prefixes of the stages that score a user's text, or rank a user's candidates
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "pyarrow", "numpy", "scipy", "scikit-learn")
MANIFEST_SCHEMA = Path(__file__).with_name("manifest.schema.json")


@dataclass(frozen=True)
class RunArgs:
    """The flags of the command line, except --config and --set."""

    run_dir: Path | None = None
    quick_test: bool = False
    overwrite: bool = False
    resume: bool = False
    command: tuple[str, ...] = ()
    only_mode: str | None = None  # 04 only: train the models of this mode and keep the others
    only: tuple[str, ...] = ()  # 04 only: train the models of these names and keep the others
    stream: bool = False  # 02 only: make shards of candidates while stage 04 trains
    part: tuple[int, int] | None = None  # 01 to 03: (i, n), make parts i, i + n, i + 2 n and so on
    score: Path | None = None  # 06 only: score this text instead of sampling
    rank: Path | None = None  # 06 only: rank the candidates of this file instead
    out_dir: Path | None = None  # with score and rank: a folder besides the run for what is made


def run_number(path: Path) -> int | None:
    match = re.fullmatch(r"run_(\d{3,})", path.name)
    return int(match[1]) if match and path.is_dir() else None


def existing_runs(outputs: Path) -> list[Path]:
    """Run folders, oldest first."""
    runs = outputs.glob("run_*") if outputs.is_dir() else ()
    return sorted((p for p in runs if run_number(p) is not None), key=lambda p: run_number(p) or 0)


def find_run(stage_name: str, config: Config, args: RunArgs, outputs: Path) -> Path:
    """The folder of the run: --run_dir if it is given, otherwise the newest run in `outputs`.

    Stage 00 takes the newest run with exactly this config, or starts a new one. The new folder is created here with the
    config in it, so that no two processes start the same run.
    """
    if args.run_dir is not None:
        return args.run_dir
    runs = existing_runs(outputs)
    if stage_name != STAGES[0]:
        if not runs:
            raise MissingInput(f"there is no run in {outputs}; start one with `python 00_check_data.py`")
        return runs[-1]
    for run in reversed(runs):
        if _stored_config(run) == config.model_dump(mode="json"):
            return run
    return _new_run(config, outputs, (run_number(runs[-1]) or 0) + 1 if runs else 1)


def _new_run(config: Config, outputs: Path, number: int) -> Path:
    """Create `run_<number>`, or the next one if another process has created it meanwhile."""
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        while True:
            run = outputs / f"run_{number:03d}"
            with contextlib.suppress(FileExistsError):
                run.mkdir()
                break
            number += 1
        store_config(run, config)
    except OSError as error:
        raise CannotCreate(f"cannot create a run folder in {outputs}: {error.strerror}") from None
    return run


def make_run_dir(run: Path) -> None:
    """Create the folder of a run if it is missing. Raises CannotCreate."""
    try:
        if run.exists() and not run.is_dir():
            raise CannotCreate(f"--run_dir {run} is a file; give a folder")
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreate(f"cannot create the run folder {run}: {error.strerror}") from None


def store_config(run: Path, config: Config) -> None:
    """Write the config into the folder of a run. Stage 00 finds its run by it."""
    durable.remove_temporaries(run, "config.json.*.tmp")
    durable.write_json(run / "config.json", config.model_dump(mode="json"))


def _stored_config(run: Path) -> dict | None:
    try:
        return durable.read_json(run / "config.json")
    except (OSError, ValueError):
        return None


# ----------------------------------------------------------------------------------------- manifests


def load_manifest(folder: Path) -> dict | None:
    """The manifest in the folder of a stage; None if the stage is not complete. Raises BadData if it is damaged."""
    path = folder / "manifest.json"
    try:
        if path.is_symlink():
            raise OSError("it is a link")
        manifest = durable.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read ({error}); run its stage again with --overwrite") from None
    if problem := _problem_of_manifest(manifest):
        raise BadData(
            f"{path} is not a manifest of this project ({problem}); run its stage again with --overwrite"
        )
    for name, output in manifest["outputs"].items():
        if not is_inside(folder / output["path"], folder):
            raise BadData(f"{path}: output '{name}' points outside its folder: {output['path']}")
    return manifest


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies below a folder, after all links were followed. A link to itself does not."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def _problem_of_manifest(manifest: Any) -> str:
    """What a reader of the manifest would stumble over; empty if nothing. Stages check the rest by JSON Schema before writing."""
    sections = ("config", "inputs", "outputs", "stats")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stage"), str):
        return "it has no stage"
    if wrong := [key for key in sections if not isinstance(manifest.get(key), dict)]:
        return f"{wrong[0]} is no map"
    if not all(isinstance(entry, dict) for entry in manifest["inputs"].values()):
        return "an input is no map"
    units = manifest.get("units", {})
    if not isinstance(units, dict) or not all(isinstance(digest, str) for digest in units.values()):
        return "units is no map of hashes"
    for name, record in manifest["outputs"].items():
        parts = record.get("parts", []) if isinstance(record, dict) else None
        records = [record, *parts] if isinstance(parts, list) else [None]
        if not all(_is_record(one) for one in records) or not isinstance(record.get("path"), str):
            return f"the record of output '{name}' is wrong"
        if "\0" in record["path"]:
            return f"the path of output '{name}' has a zero byte"
    return ""


def _is_record(record: Any) -> bool:
    """Whether the record of a file has a hash and sizes."""
    numbers = ("bytes", "rows") if isinstance(record, dict) and "rows" in record else ("bytes",)
    return (
        isinstance(record, dict)
        and isinstance(record.get("sha256"), str)
        and all(isinstance(record.get(key), int) and record[key] >= 0 for key in numbers)
    )


def score_stage(file: Path, prefix: str = SCORE) -> str:
    """The name of the stage that scores or ranks a file or folder: `06_score_<readable>_<hash>`, unique for each path.

    The readable part is the file's name in lower-case Latin letters and digits. The hash is of the absolute path.
    """
    path = os.path.abspath(file)
    stem = os.path.basename(path).split(".gz")[0].rpartition(".")
    letters = unicodedata.normalize("NFKD", stem[0] or stem[2]).encode("ascii", "ignore").decode().lower()
    readable = re.sub(r"[^a-z0-9]+", "_", letters).strip("_")[:40].strip("_") or "text"
    return f"{prefix}{readable}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def stages_of_files(run_dir: Path) -> list[str]:
    """The names of the stages in a run that scored or ranked a file."""
    found = (path for prefix in (SCORE, RANK) for path in run_dir.glob(f"{prefix}*"))
    return sorted(path.name for path in found if path.is_dir() and not path.suffix)


def printable(text: str | Path) -> str:
    """A name that JSON and UTF-8 can hold: bytes that are not UTF-8 become escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def display_path(path: Path) -> str:
    """The path as a user would type it: relative to the current folder if it lies below."""
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def stage_of(name: str) -> str:
    """The stage that a unit belongs to: `04_train` for `04_train/judge`. A stage itself is returned as it is."""
    return name.partition("/")[0]


def command(name: str, *flags: str) -> str:
    """The command that makes a stage or a unit: `python 04_train.py --only judge` for `04_train/judge`."""
    stage, _, unit = name.partition("/")
    return " ".join(["python", f"{stage}.py", *flags, *(["--only", unit] if unit else [])])


def refuse_without_units(run_dir: Path, stage_name: str) -> None:
    """Raises BadData if an earlier version of the project made the stage: without a manifest for each of its units."""
    manifest = load_manifest(run_dir / stage_name)
    if manifest is not None and "units" not in manifest:
        raise BadData(
            f"{stage_name} in {display_path(run_dir)} was made by an earlier version of this project, without a manifest "
            f"for each model; run `{command(stage_name, '--overwrite')}` to make all of them again, or use another "
            "--run_dir"
        )


def check_stage_name(name: str) -> None:
    """Raises ValueError for a stage name that the schema of manifests does not allow."""
    pattern = json.loads(MANIFEST_SCHEMA.read_text(encoding="utf-8"))["properties"]["stage"]["pattern"]
    if not re.search(pattern, name):
        raise ValueError(f"the stage name {name!r} does not match {pattern}")


def validate_manifest(manifest: dict) -> None:
    """Check a manifest against the JSON Schema beside this file. Raises jsonschema.ValidationError."""
    from jsonschema.exceptions import best_match

    if error := best_match(_manifest_validator().iter_errors(manifest)):
        raise error


@functools.cache
def _manifest_validator() -> Any:
    """Cached: to check the schema itself takes longer than to check a manifest."""
    from jsonschema.validators import validator_for

    schema = json.loads(MANIFEST_SCHEMA.read_text(encoding="utf-8"))
    kind = validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """A line such as `training.steps: 400 -> 500` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            inner = f"{path}.{name}" if path else name
            lines += changes(old.get(name, "(none)"), new.get(name, "(none)"), inner)
        return lines
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:12] + "..." if re.fullmatch(r"[0-9a-f]{64}", text) else text[:80]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy and torch values as Python ones, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def versions() -> dict[str, str]:
    """The versions of the libraries that may change a result."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """Cached: each version is a file to read, and a stage of several models asks for them dozens of times."""
    found = {}
    for package in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment() -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 1024**2
    )
    return {
        "remask": code_version.version(),
        "python": platform.python_version(),
        **versions(),
        "peak_memory_mb": round(peak, 1),
    }


def inspect(run_dir: Path) -> str:
    """One line per stage of a run, also of scored texts: seconds, memory, rows and the stats that are single numbers.

    A line also tells whether the stage is unfinished, or whether --overwrite is making it again.
    """
    lines = []
    of_files = stages_of_files(run_dir)
    width = max(map(len, ("02_generate_candidates", *of_files))) + 2
    for name in (*STAGES, *of_files):
        manifest = load_manifest(run_dir / name)
        if manifest is None:
            lines.append(f"{name:<{width}} {_state(run_dir / name)}")
            continue
        rows = {k: o["rows"] for k, o in manifest["outputs"].items() if "rows" in o}
        facts = [f"{k}={v} rows" for k, v in rows.items()]
        facts += [f"{k}={v:.4g}" for k, v in manifest["stats"].items() if isinstance(v, int | float)]
        facts += [f"of {manifest['stats']['scored']}"] if "scored" in manifest["stats"] else []
        memory = manifest["environment"].get("peak_memory_mb", 0)
        folders = [run_dir / name, *(run_dir / name / unit for unit in manifest.get("units", {}))]
        attempts = [
            new.relative_to(run_dir) for f in folders if (new := durable.beside(f, durable.NEW)).exists()
        ]
        facts += [f"(--overwrite is unfinished: {new})" for new in attempts]
        lines.append(f"{name:<{width}} {manifest['seconds']:8.1f} s {memory:7.0f} MB  {'  '.join(facts)}")
    return "\n".join(lines)


def _state(folder: Path) -> str:
    """The state of a stage without a manifest; of a stage of units also which of them are complete."""
    complete = sorted(p.parent.name for p in folder.glob("*/manifest.json") if not p.parent.suffix)
    begun = complete or any(folder.glob("*/unfinished.json")) or (folder / "unfinished.json").exists()
    return ("unfinished" if begun else "-") + (f" (complete: {', '.join(complete)})" if complete else "")


def main() -> int:
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        print("usage: python -m lib.runs [RUN_DIR]   (default: the newest run in outputs/)")
        return 2
    runs = [Path(sys.argv[1])] if len(sys.argv) == 2 else existing_runs(OUTPUTS)[-1:]
    if not runs or not runs[0].is_dir():
        print("no run to inspect; start one with `python 00_check_data.py`", file=sys.stderr)
        return 66
    print(runs[0])
    try:
        print(printable_line(inspect(runs[0])))
    except RemaskError as error:
        print(printable_line(f"lib.runs: error: {error}"), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
