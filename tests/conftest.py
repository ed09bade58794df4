"""One small run of all seven stages serves many tests; and where real data lies, if it does.

A test that needs real data says which with `@pytest.mark.data("finqa/dev.json")`: `pytest -m data` runs those alone, and
one whose files are not there is skipped.
"""

import importlib
import os
from pathlib import Path

import pytest

from lib.config import ROOT, Config, load_config
from lib.runs import STAGES, RunArgs

SHARED = Path(os.environ.get("REMASK_DATA", ROOT.parent / "shared" / "data"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("data"):
        missing = [name for name in mark.args if not (SHARED / name).exists()]
        if missing:
            pytest.skip(
                f"{', '.join(missing)} not in {SHARED}; set REMASK_DATA to the folder of the real data"
            )


def run_stages(run_dir: Path, config: Config, names=STAGES, **flags) -> None:
    """The main of each stage in order, in this process."""
    for name in names:
        importlib.import_module(name).main(
            config, RunArgs(run_dir=run_dir, quick_test=True, command=(name,), **flags)
        )


@pytest.fixture(scope="session")
def quick_config() -> Config:
    return load_config(quick_test=True)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory, quick_config) -> Path:
    """The run folder of a finished quick run. Tests read it and change nothing."""
    run_dir = tmp_path_factory.mktemp("outputs") / "run_001"
    run_stages(run_dir, quick_config)
    return run_dir
