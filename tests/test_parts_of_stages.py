"""Stages 01 to 03 give the same bytes under every executor and as shares of a job array, each with workers that are killed."""

import importlib
import importlib.util
import json
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest

from lib import durable
from lib.config import Config, load_config
from lib.runs import RunArgs, load_manifest
from tests.conftest import manifest_of, run_stages
from tests.killed import run_killed

pytestmark = pytest.mark.slow
STAGES = ("01_prepare_dataset", "02_generate_candidates", "03_build_rewards")
SETTINGS = [
    "candidates.source=random_tokens",
    "tokenizer.examples_per_part=250",
    "candidates.rows_per_group=1024",
]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; requirements-cluster.txt has it"
)


def config_of(*overrides: str) -> Config:
    return load_config(quick_test=True, overrides=[*SETTINGS, *overrides])


def contents(run: Path) -> dict[str, str]:
    """The hashes of all outputs, and the figures of the stages."""
    found = {}
    for name in STAGES:
        manifest = manifest_of(run / name)
        found[f"{name} stats"] = json.dumps(manifest["stats"], sort_keys=True)
        for output, record in manifest["outputs"].items():
            assert durable.sha256(run / name / record["path"]) == record["sha256"]
            found[f"{name}/{output}"] = record["sha256"]
        found[f"{name} parts"] = durable.sha256_folder(run / name / "parts")
        assert not list((run / name).rglob("*.tmp")) and not (run / name / "cut").exists()
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run of stages 00 to 03, in this process, without a kill."""
    run = tmp_path_factory.mktemp("reference") / "run_001"
    run_stages(run, config_of(), ("00_check_data", *STAGES))
    return run


@pytest.fixture
def run(reference, tmp_path) -> Path:
    """A run with stage 00."""
    folder = tmp_path / "run_001"
    run_stages(folder, config_of(), ["00_check_data"])
    return folder


def until_complete(make: Callable[[], None]) -> int:
    """Run something in a process that may be killed, again until it succeeds. Returns the number of kills."""
    for kills in range(100):
        process = get_context("fork").Process(target=make)
        process.start()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -9, "another end than the kill"
    raise AssertionError("no end")


def test_the_reference_has_several_parts(reference):
    for name, table in zip(STAGES, ("examples", "candidates", "rewards"), strict=True):
        assert len(manifest_of(reference / name)["outputs"][table]["parts"]) == 4


def test_a_killed_command_continues_at_the_missing_part(run, reference, tmp_path):
    total = 0
    for name in STAGES:
        (kills := tmp_path / f"kills {name}").mkdir()
        args = RunArgs(run_dir=run, quick_test=True, command=(name,))
        total += until_complete(lambda n=name, a=args, k=kills: run_killed(n, config_of(), a, k))
        assert total >= len(list(kills.iterdir())) > 2
    assert total >= 12
    assert contents(run) == contents(reference)


@pytest.mark.parametrize("executor", ["processes", pytest.param("ray", marks=needs_ray)])
def test_workers_that_are_killed(run, reference, tmp_path, executor, request):
    if executor == "ray":
        request.getfixturevalue("ray_here")
    # A worker of Ray takes seconds to start, so one is killed, in one stage; `benchmarks.kills` kills many in each
    workers, every = (1, 4) if executor == "ray" else (3, 2)
    config = config_of(f"executor.type={executor}", f"executor.workers={workers}")
    for name in STAGES:
        if executor == "ray" and name != STAGES[-1]:
            run_stages(run, config_of(), [name])
            continue
        (kills := tmp_path / f"kills {name}").mkdir()
        args = RunArgs(run_dir=run, quick_test=True, command=(name,))
        run_killed(name, config, args, kills, times=1, every=every)
        assert len(list(kills.iterdir())) >= 4 // every
    assert contents(run) == contents(reference)


def test_shares_of_a_job_array_that_are_killed(run, reference, tmp_path):
    for name in STAGES:
        (kills := tmp_path / f"kills {name}").mkdir()
        for share in (3, 1, 0, 2):
            assert load_manifest(run / name) is None
            args = RunArgs(run_dir=run, quick_test=True, command=(name,), part=(share, 4))
            until_complete(lambda n=name, a=args, k=kills: run_killed(n, config_of(), a, k, times=1))
        assert len(list(kills.iterdir())) > 1
    assert contents(run) == contents(reference)


def test_shares_that_run_at_the_same_time_complete_the_stage_once(run, reference):
    for name in STAGES:
        shares = [
            get_context("fork").Process(
                target=importlib.import_module(name).main,
                args=(config_of(), RunArgs(run_dir=run, quick_test=True, command=(name,), part=(share, 3))),
            )
            for share in range(3)
        ]
        for process in shares:
            process.start()
        for process in shares:
            process.join()
        assert [process.exitcode for process in shares] == [0, 0, 0]
    assert contents(run) == contents(reference)
