"""One small run of all seven stages serves many tests; and where real data lies, if it does.

A test that needs real data says which with `@pytest.mark.data("finqa/dev.json")`: `pytest -m data` runs those alone, and
one whose files are not there is skipped.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.config import ROOT, Config, load_config
from lib.runs import STAGES, RunArgs, load_manifest
from lib.sections.base import Section
from lib.sections.data import DataConfig
from lib.sections.finqa import FinqaConfig, RankerConfig

SHARED = Path(os.environ.get("REMASK_DATA", ROOT.parent / "shared" / "data"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("data"):
        missing = [name for name in mark.args if not (SHARED / name).exists()]
        if missing:
            pytest.skip(
                f"{', '.join(missing)} not in {SHARED}; set REMASK_DATA to the folder of the real data"
            )


# Sections that some stage uses in part: their keys are recorded one by one
IN_PART = {RankerConfig: "ranker", FinqaConfig: "finqa", DataConfig: "data"}


@contextlib.contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """The settings that are read while the block runs, such as `seed`, `diffusion` or `ranker.prompt`."""
    reads: set[str] = set()
    plain = Section.__getattribute__

    def spy(self, name):
        kind = type(self)
        if kind is Config and name in Config.model_fields and name not in IN_PART.values():
            reads.add(name)
        elif kind in IN_PART and name in kind.model_fields:
            reads.add(f"{IN_PART[kind]}.{name}")
        return plain(self, name)

    patch = pytest.MonkeyPatch()
    patch.setattr(Section, "__getattribute__", spy)
    try:
        yield reads
    finally:
        patch.undo()


def run_stages(run_dir: Path, config: Config, names=STAGES, **flags) -> None:
    """The main of each stage in order, in this process."""
    for name in names:
        importlib.import_module(name).main(
            config, RunArgs(run_dir=run_dir, quick_test=True, command=(name,), **flags)
        )


def run_stages_recorded(run_dir: Path, config: Config) -> dict[str, set[str]]:
    """All stages, and the settings that each of them read."""
    found = {}
    for name in STAGES:
        with recorded_reads() as found[name]:
            run_stages(run_dir, config, [name])
    return found


# Read only to refuse early what a later stage would refuse: these settings change no output
CHECKED_EARLY = {
    "01_prepare_dataset": {"candidates", "generator", "models"},  # texts longer than a model's context
    "02_generate_candidates": {"labels", "models"},
}


def undeclared(reads: dict[str, set[str]], run_dir: Path) -> list[str]:
    """Settings that a stage read although neither its manifest nor that of a stage it reads has them."""
    manifests = {name: load_manifest(run_dir / name) or {} for name in STAGES}
    missing = []
    for name, manifest in manifests.items():
        before = {entry["stage"] for entry in manifest["inputs"].values() if "stage" in entry}
        declared = set().union(*(manifests[stage]["config"] for stage in before | {name}))
        missing += [
            f"{name}: {key}"
            for key in sorted(reads[name] - CHECKED_EARLY.get(name, set()))
            if not {key, key.split(".")[0]} & declared
        ]
    return missing


@pytest.fixture(scope="session")
def quick_config() -> Config:
    return load_config(quick_test=True)


@pytest.fixture(scope="session")
def quick_reads() -> dict[str, set[str]]:
    """The settings that each stage of `quick_run` read."""
    return {}


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory, quick_config, quick_reads) -> Path:
    """The run folder of a finished quick run. Tests read it and change nothing."""
    run_dir = tmp_path_factory.mktemp("outputs") / "run_001"
    quick_reads.update(run_stages_recorded(run_dir, quick_config))
    return run_dir
