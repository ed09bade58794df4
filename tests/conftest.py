"""One small run of all seven stages serves many tests; and where real data lies, if it does.

A test that uses a fixture of `SLOW_FIXTURES` is marked `slow`, and `make test-fast` leaves it out.

A test that needs real data says which with `@pytest.mark.data("finqa/dev.json")`: `pytest -m data` runs those alone, and
one whose files are not there is skipped.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from lib.config import ROOT, Config, load_config
from lib.runs import STAGES, RunArgs, load_manifest
from lib.sections.base import Section
from lib.sections.data import DataConfig
from lib.sections.finqa import FinqaConfig, RankerConfig

SHARED = Path(os.environ.get("REMASK_DATA", ROOT.parent / "shared" / "data"))


# They run stages, train models, or start processes that load torch
SLOW_FIXTURES = {"quick_run", "ltg_run", "finished", "labelled", "loaded_elsewhere"}


# The longest ones. They begin first, so that no worker has one of them left when the others have finished
LONG_FILES = (
    "test_processes",
    "test_compiling",
    "test_pipeline",
    "test_unkillable",
    "test_process_faults",
    "test_parts_of_stages",
    "test_finqa_pipeline",
    "test_parts",
    "test_hugging_face",
    "test_finqa_pools",
    "test_pretrained",
    "test_pretrained_text",
    "test_pools_task",
    "test_sharding",
    "test_memory",
    "test_families",
    "test_remasking",
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_configure() -> None:
    """Nothing here outlives a loss of power, so files need not reach the disk. That waiting is a sixth of a stage.

    A killed process loses nothing that it wrote. Tests of failing disks put their own function in this place.
    On a busy machine, an example of hypothesis may take long: that is no failure.
    """
    hypothesis.settings.register_profile("remask", deadline=None)
    hypothesis.settings.load_profile("remask")
    os.fsync = os.fstat  # fails, as it does, for what is no open file


def pytest_collection_finish() -> None:
    """All that the modules of the tests import lives to the end: garbage collection need not visit it again and again.

    Stages collect garbage after each model, and torch and transformers have a million objects.
    """
    gc.collect()
    gc.freeze()


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


def table_of(run_dir: Path, name: str) -> Path:
    """The file of a table, or the folder of its parts: `01_prepare_dataset/examples`."""
    folder = run_dir / name
    return folder if folder.is_dir() else folder.with_suffix(".parquet")


def manifest_of(folder: Path) -> dict:
    """The manifest of a complete stage."""
    found = load_manifest(folder)
    assert found is not None, f"{folder} is not complete"
    return found


def run_stages(run_dir: Path, config: Config, names=STAGES, **flags) -> None:
    """The main of each stage in order, in this process."""
    for name in names:
        importlib.import_module(name).main(
            config, RunArgs(run_dir=run_dir, quick_test=True, command=(name,), **flags)
        )


def run_stages_recorded(run_dir: Path, config: Config) -> dict[str, set[str]]:
    """All stages, and the settings that each of them and each training of stage 04 read."""
    found: dict[str, set[str]] = {}
    module = importlib.import_module("04_train")
    train = module.train

    def recorded(unit, *args) -> None:
        with recorded_reads() as found[unit.name]:
            train(unit, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", recorded)
        for name in STAGES:
            with recorded_reads() as found[name]:
                run_stages(run_dir, config, [name])
    return found


NO_RESULT = {"executor"}  # says who makes parts; they are the same under any executor

# Read only to refuse early what a later stage would refuse: these settings change no output
CHECKED_EARLY = {
    "01_prepare_dataset": {"candidates", "generator", "models"},  # texts longer than a model's context
    "02_generate_candidates": {"labels", "models"},
}


def undeclared(reads: dict[str, set[str]], run_dir: Path) -> list[str]:
    """Settings that a stage or a model read although neither its manifest nor that of a stage it reads has them."""
    missing = []
    for name in reads:
        inputs = (load_manifest(run_dir / name) or {})["inputs"].values()
        before = {entry["stage"] for entry in inputs if "stage" in entry}
        declared = set().union(
            *((load_manifest(run_dir / stage) or {})["config"] for stage in before | {name})
        )
        declared |= {key.split(".")[0] for key in declared if key.startswith(("models.", "stream."))}
        missing += [
            f"{name}: {key}"
            for key in sorted(reads[name] - CHECKED_EARLY.get(name, set()) - NO_RESULT)
            if not {key, key.split(".")[0]} & declared
        ]
    return missing


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """Ray, started once for the tests of a module that follow: an executor that finds it running uses it. To start it takes seconds."""
    from lib.executors.ray_actors import _import_ray, _init

    ray = _import_ray()
    _init(ray, 2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def quick_config() -> Config:
    return load_config(quick_test=True)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory, quick_config) -> Path:
    """The run folder of a finished quick run. Tests read it and change nothing.

    It is made once for all processes of the tests, and each has a copy: stages lock the run that they read.
    """
    own = tmp_path_factory.mktemp("outputs")
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared) / "quick_run"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "reads.json").exists():
            reads = run_stages_recorded(folder / "run_001", quick_config)
            (folder / "reads.json").write_text(
                json.dumps({name: sorted(keys) for name, keys in reads.items()})
            )
    shutil.copytree(folder, own, dirs_exist_ok=True)
    return own / "run_001"


@pytest.fixture(scope="session")
def quick_reads(quick_run) -> dict[str, set[str]]:
    """The settings that each stage of `quick_run` read."""
    return {
        name: set(keys) for name, keys in json.loads((quick_run.parent / "reads.json").read_text()).items()
    }


@pytest.fixture(scope="session")
def pretrained_folder(tmp_path_factory) -> Callable[[str], Path]:
    """kind -> the folder of a small pretrained model (tests/pretrained_folders.py), made once."""
    from tests.pretrained_folders import masked_lm_folder

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = masked_lm_folder(kind, tmp_path_factory.mktemp("models") / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def small_text(tmp_path_factory) -> Path:
    """A text of words that the tokenizers of tests/test_foreign.py know."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(1)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "brew",
        "potion",
        "near",
        "old",
        "stone",
    ]
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(120)]
    file.write_text("\n\n".join(lines))
    return file
