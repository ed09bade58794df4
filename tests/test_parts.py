"""Tables in parts: readers see one table, a part is complete or absent, and every executor writes the same bytes."""

import fcntl
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import durable, schema
from lib.artifacts import Stage
from lib.config import ROOT, load_config
from lib.errors import BadConfig, BadData, Busy, MissingInput, ProcessLost
from lib.executors import Work, open_executor, ray_actors, worker_processes
from lib.executors.ray_actors import RayExecutor
from lib.executors.worker_processes import ProcessExecutor
from lib.runs import RunArgs, load_manifest, versions
from lib.stage.parts import Parts
from tests.conftest import manifest_of
from tests.killed import AlwaysKilled, KilledWork, NumbersWork, numbers

CONFIG = load_config(quick_test=True)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; requirements-cluster.txt has it"
)
EXECUTORS = ["local", "processes", pytest.param("ray", marks=needs_ray)]


@pytest.fixture
def running(executor, request) -> str:
    """The name of an executor. Ray runs already; `test_every_executor_makes_all_parts` lets the executor start it."""
    if executor == "ray":
        request.getfixturevalue("ray_here")
    return executor


def config_of(executor: str, workers: int = 2):
    return load_config(
        quick_test=True, overrides=[f"executor.type={executor}", f"executor.workers={workers}"]
    )


def stage(tmp_path, name="00_check_data", config=CONFIG, reads=(), **flags) -> Stage:
    return Stage(
        f"{name}.py", config, RunArgs(run_dir=tmp_path / "run", **flags), uses=("seed",), reads=reads
    )


def make(s: Stage, count: int, work: Callable[[Parts], Work] = NumbersWork) -> bool:
    """Make a table of `count` parts. False if other commands make the rest."""
    parts = s.parts({"rewards": schema.REWARDS}, {"made_by": "a test"})
    made = s.make_parts(parts, work(parts), count, "numbers")
    if made is not None:
        s.add_parts(made)
    return made is not None


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.name: durable.sha256_file(p)
        for p in sorted(folder.rglob("part_*"))
        if p.is_file() and p.suffix != ".tmp"
    }


@pytest.fixture
def parts(tmp_path) -> Parts:
    (tmp_path / "table").mkdir()
    return Parts(tmp_path / "table", "key", {"rewards": schema.REWARDS})


# ------------------------------------------------------------------------------------------- one table


def test_readers_see_one_table(tmp_path):
    with stage(tmp_path) as s:
        assert make(s, 7)
    record = manifest_of(s.folder)["outputs"]["rewards"]
    assert record["rows"] == 70 and [part["rows"] for part in record["parts"]] == [10] * 7
    assert record["sha256"] == durable.sha256_folder(s.folder / "rewards")
    assert record["bytes"] == durable.folder_bytes(s.folder / "rewards")
    assert pq.read_table(s.folder / "rewards").num_rows == 70  # also without this project
    with stage(tmp_path, "01_prepare_dataset", reads=("00_check_data",)) as reader:
        table = reader.read("00_check_data", "rewards", schema.REWARDS)
        assert table.equals(schema.conform(numbers(0, 70), schema.REWARDS))
        assert reader.table_metadata("00_check_data", "rewards") == {"made_by": "a test"}
        assert reader.rows("00_check_data", "rewards") == 70
        sizes = [b.num_rows for b in reader.batches("00_check_data", "rewards", schema.REWARDS, rows=32)]
        assert sizes == [32, 32, 6]  # batches cross the borders of parts
        files = reader.table("00_check_data", "rewards")
        for start, stop in ((0, 3), (8, 33), (25, 70), (69, 90), (70, 80)):
            found = pa.Table.from_batches(
                files.batches(schema.REWARDS, ["example_id"], 4, start, stop),
                pa.schema([schema.REWARDS.arrow.field("example_id")]),
            )
            assert found["example_id"].to_pylist() == [f"e{i}" for i in range(start, min(stop, 70))]


def test_only_the_parts_that_are_read_are_hashed_and_a_damaged_one_is_named(tmp_path):
    with stage(tmp_path) as s:
        make(s, 4)
    damaged = s.folder / "rewards" / "part_00002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")  # of the same size
    with stage(tmp_path, "01_prepare_dataset", reads=("00_check_data",)) as reader:
        files = reader.table("00_check_data", "rewards")
        assert sum(b.num_rows for b in files.batches(schema.REWARDS, stop=20)) == 20
        with pytest.raises(BadData, match=r"part_00002\.parquet is damaged.*00_check_data\.py --overwrite"):
            list(files.batches(schema.REWARDS))
        damaged.unlink()
        with pytest.raises(MissingInput, match=r"part_00002\.parquet is missing"):
            list(files.batches(schema.REWARDS))


def test_keys_are_unique_over_all_parts(tmp_path):
    class Twice(NumbersWork):
        def _make(self, number: int) -> None:
            with self.parts.writing(number) as part:
                part.write("rewards", numbers(10 * (number % 3), 10))

    with pytest.raises(BadData, match="two rows have the same"), stage(tmp_path) as s:
        make(s, 4, Twice)


def test_files_of_a_longer_table_are_removed(tmp_path):
    with pytest.raises(RuntimeError), stage(tmp_path) as s:
        make(s, 5)
        raise RuntimeError
    with stage(tmp_path) as s:
        (s.folder / "rewards" / "part_00001.parquet.7.tmp").touch()  # a killed worker left it
        (s.folder / "parts" / "part_00001.json.7.tmp").touch()
        assert make(s, 3)
    assert sorted(p.name for p in (s.folder / "parts").iterdir()) == [f"part_0000{n}.json" for n in range(3)]
    assert sorted(p.name for p in (s.folder / "rewards").iterdir()) == [
        f"part_0000{n}.parquet" for n in range(3)
    ]


# ------------------------------------------------------------------------------------------- complete or absent


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_write_leaves_the_part_absent_and_others_as_they_were(parts, monkeypatch, call):
    work = NumbersWork(parts)
    work.open(None)(0)
    first, real, finished = hashes(parts.folder), getattr(os, call), False
    for number in range(1, 20):
        countdown = iter(range(number, 0, -1))

        def failing(*arguments, countdown=countdown):
            if next(countdown, None) == 1:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                work.open(None)(1)
                finished = True
            except OSError:  # absent, or whole, if only the last fsync of the folder failed
                found = parts.manifest(1)
                file = parts.path("rewards", 1)
                assert found is None or found["tables"]["rewards"]["sha256"] == durable.sha256_file(file)
        assert parts.manifest(0) is not None and first.items() <= hashes(parts.folder).items()
        if finished:
            break
        assert not list(parts.folder.rglob("*.tmp"))
        (parts.folder / "parts" / "part_00001.json").unlink(missing_ok=True)
    assert finished and number > 2


def test_a_part_with_another_key_counts_as_absent(parts):
    other = Parts(parts.folder, "other", parts.schemas)
    NumbersWork(parts).open(None)(0)
    assert parts.missing([0, 1]) == [1] and other.missing([0, 1]) == [0, 1]
    with pytest.raises(RuntimeError), other.writing(0) as part:
        part.write("rewards", numbers(5, 2))
        raise RuntimeError
    assert parts.missing([0]) == [0]  # its file may have been replaced: nobody takes it for complete
    NumbersWork(parts).open(None)(0)
    os.truncate(parts.path("rewards", 0), 10)
    assert parts.missing([0]) == [0]


def test_a_stage_continues_with_the_missing_parts(tmp_path, capsys):
    with pytest.raises(ValueError, match="part 4 is wrong"), stage(tmp_path) as s:
        make(s, 6, lambda parts: NumbersWork(parts, fails=4))
    before = hashes(s.folder)
    times = {p: p.stat().st_mtime_ns for p in s.folder.rglob("part_*.parquet")}
    with stage(tmp_path) as s:
        assert make(s, 6)
    assert "4 of 6 parts are complete already" in capsys.readouterr().err
    assert before.items() <= hashes(s.folder).items()
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())  # they were not made again


def test_parts_of_different_environments_are_said_and_recorded(tmp_path, capsys):
    class OnTwoMachines(NumbersWork):
        def _make(self, number: int) -> None:
            with self.parts.writing(number) as part:
                part.write("rewards", numbers(10 * number, 10))
                part.environment = {"device": "cpu" if number < 2 else "a GPU", "torch": "2.13"}

    with stage(tmp_path) as s:
        make(s, 4, OnTwoMachines)
    assert "made in different environments (device: a GPU, cpu), so" in capsys.readouterr().err
    assert manifest_of(s.folder)["environment"]["different_in_parts"] == {"device": ["a GPU", "cpu"]}
    with stage(tmp_path / "one") as s:
        make(s, 4)
    assert "different_in_parts" not in manifest_of(s.folder)["environment"]


def test_parts_that_models_made_name_their_environment(quick_run):
    names = {"02_generate_candidates", "06_sample"}
    for name in ("01_prepare_dataset", "02_generate_candidates", "03_build_rewards", "06_sample"):
        files = sorted((quick_run / name / "parts").glob("part_*.json"))
        assert files and all(("environment" in durable.read_json(f)) == (name in names) for f in files), name
    made = manifest_of(quick_run / "06_sample")["environment"]
    assert durable.read_json(files[0])["environment"] == {
        k: made[k] for k in (*versions(), "device", "precision")
    }


# ------------------------------------------------------------------------------------------- executors


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_executor_makes_all_parts(executor, parts):
    with open_executor(config_of(executor).executor, NumbersWork(parts)) as opened:
        assert sorted(opened.make([3, 0, 2])) == [0, 2, 3]
        assert parts.missing(range(5)) == [1, 4]
        assert sorted(opened.make([1, 4])) == [1, 4] and not list(opened.make([]))
    assert parts.missing(range(5)) == []


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS[1:])
def test_killed_workers_are_replaced_and_the_bytes_are_the_same(executor, running, parts, tmp_path, capsys):
    """Each of twelve parts is killed twice, at any of its writes. A worker of Ray takes seconds to start: there, every third part once."""
    times, every = (1, 3) if executor == "ray" else (2, 1)
    kills, reference = tmp_path / "kills", Parts(tmp_path / "reference", "key", parts.schemas)
    for folder in (kills, reference.folder):
        folder.mkdir()
    with open_executor(config_of("local").executor, NumbersWork(reference)) as opened:
        list(opened.make(range(12)))
    with open_executor(
        config_of(executor).executor, KilledWork(NumbersWork(parts), kills, times, every)
    ) as opened:
        assert sorted(opened.make(range(12))) == list(range(12))
    assert len(list(kills.iterdir())) >= 10 * times // every
    for number in range(12):
        assert parts.manifest(number) is not None
    assert hashes(parts.folder) == hashes(reference.folder)
    if executor == "processes":
        assert "a worker process was ended from outside; part " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS[1:])
def test_workers_that_are_lost_again_and_again_end_the_work(executor, running, parts):
    with (
        pytest.raises(ProcessLost, match=r"5 times while it made part 1, perhaps because memory ran out"),
        open_executor(config_of(executor).executor, AlwaysKilled(parts)) as opened,
    ):
        list(opened.make(range(3)))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_of_a_part_arrives_as_it_is(executor, running, parts):
    settings = config_of(executor).executor
    with (
        pytest.raises(BadData, match=r"^part 2 is wrong$"),
        open_executor(settings, NumbersWork(parts, 2, BadData)) as opened,
    ):
        list(opened.make(range(3)))
    with (
        pytest.raises((ValueError, RuntimeError), match="part 2 is wrong") as raised,
        open_executor(settings, NumbersWork(parts, 2)) as opened,
    ):
        list(opened.make([2]))
    if executor != "local":  # the traceback of the worker
        assert "tests/killed.py" in str(raised.value) and "ValueError" in str(raised.value)
    with (
        pytest.raises(OSError, match="part 2 is wrong") as raised,
        open_executor(settings, NumbersWork(parts, 2, OSError)) as opened,
    ):
        list(opened.make([2]))
    if executor != "local":
        assert "tests/killed.py" in "".join(raised.value.__notes__)


def test_a_worker_takes_the_gpu_of_the_lost_one_that_it_replaces(parts, monkeypatch):
    class OnGpu(NumbersWork):
        uses_device = True

    def started(work, threads, gpu):
        return SimpleNamespace(gpu=gpu, number=None, send=lambda number: True, end=lambda: None)

    monkeypatch.setattr(worker_processes, "_Worker", started)
    executor = ProcessExecutor(OnGpu(parts), 3)
    executor._assign(deque(range(3)))
    assert [worker.gpu for worker in executor._crew] == [0, 1, 2]
    executor._replace(executor._crew[1], deque())
    executor._assign(deque(range(3)))
    assert [worker.gpu for worker in executor._crew] == [0, 2, 1]


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "on_gpus", "expected"),
    [
        ([(32, 0)] * 3, 10, 9, False, (9, 9, 0.0)),  # three on each machine; the tenth would wait for ever
        ([(8, 0)] * 4, 2, 16, False, (2, 8, 0.0)),  # no machine has 16 cores
        ([(2, 0)], 5, 1, False, (2, 1, 0.0)),
        ([(16, 2)], 3, 5, True, (3, 5, 0.5)),  # two on one GPU; 2/3 of a GPU would place only two
        ([(16, 4)], 2, 8, True, (2, 8, 1.0)),
        ([(16, 1)], 3, 5, True, (3, 5, 0.3333)),
        ([(64, 0), (8, 1), (8, 1)], 4, 20, True, (2, 8, 0.5)),  # none goes to the machine without a GPU
        ([(64, 0), (8, 1), (8, 1)], 4, 20, False, (3, 20, 0.0)),
        ([(0, 0), (8, 0)], 2, 4, True, (2, 4, 0.0)),  # the first machine only leads
    ],
)
def test_ray_can_place_every_worker_that_is_started(nodes, workers, threads, on_gpus, expected):
    assert ray_actors.place(nodes, workers, threads, on_gpus) == expected


def test_a_cluster_without_cores_is_refused():
    with pytest.raises(BadConfig, match="no machine of the Ray cluster has a core"):
        ray_actors.place([(0, 0), (0, 1)], 2, 1, False)


class RayOfThree:
    """A cluster of three machines with 32 cores each, as far as an executor asks for it."""

    def __init__(self):
        self.options: dict[str, Any] = {}
        self.answers: list[list[int]] = []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        lost = {"Alive": False, "Resources": {"CPU": 64.0}}
        return [lost] + [{"Alive": True, "Resources": {"CPU": 32.0, "memory": 1e9}}] * 3

    def remote(self, **options: Any):
        self.options = options
        return lambda actor: SimpleNamespace(remote=lambda work, threads: object())

    def wait(self, futures: list[int], num_returns: int, timeout: float | None):
        return self.answers.pop(0), futures


@pytest.fixture
def on_cluster(parts, monkeypatch) -> RayExecutor:
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    executor = RayExecutor(NumbersWork(parts), 10)
    executor._ray = RayOfThree()
    return executor


def test_actors_are_added_as_parts_need_them_and_machines_have_room(on_cluster, capsys):
    found = []
    for num_parts in (0, 2, 1, 6, 50):
        on_cluster._add_actors(num_parts)
        found.append(len(on_cluster._actors))
    assert found == [0, 2, 2, 6, 9]
    assert on_cluster._ray.options["num_cpus"] == 9 and on_cluster._ray.options["num_gpus"] == 0
    said = capsys.readouterr().err
    assert "executor.workers is 10, but Ray has 96 cores on 3 machines; at most 9 workers of 9 cores" in said
    assert said.count("executor.workers") == 1


def test_a_line_says_that_actors_may_have_no_room(on_cluster, capsys):
    on_cluster._add_actors(1)
    on_cluster._ray.answers = [[], [4], [5]]
    capsys.readouterr()
    assert [on_cluster._first_done([4, 5]), on_cluster._first_done([5])] == [4, 5]
    said = capsys.readouterr().err
    assert said.count("no room for a worker, which needs 9 cores: `ray status`") == 1


def test_without_ray_one_message_says_what_to_do(parts, monkeypatch):
    def absent(name):
        raise ray_actors.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ray_actors.importlib.metadata, "version", absent)
    with pytest.raises(
        MissingInput, match=r"Ray is not installed; run `pip install -r requirements-cluster.txt`"
    ):
        RayExecutor(NumbersWork(parts), 2).__enter__()
    monkeypatch.setattr(ray_actors.importlib.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(BadConfig, match=r"Ray 2\.1\.0 is installed, but 2\.60\.0 is needed"):
        RayExecutor(NumbersWork(parts), 2).__enter__()


def test_the_version_of_ray_is_the_pinned_one():
    lines = (Path(__file__).parent.parent / "requirements-cluster.txt").read_text().splitlines()
    assert f"ray=={ray_actors.VERSION}" in lines


@needs_ray
@pytest.mark.slow
def test_workers_of_our_own_ray_have_the_priority_of_the_command(ray_here):
    """Ray gives its workers the lowest one but four. On a busy machine, they would take minutes to start."""
    ray = importlib.import_module("ray")  # an optional package: type checkers need not find it

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


RAY_IS_LOST = """
import os, signal, sys, time
from pathlib import Path
from lib.executors.ray_actors import RayExecutor
from lib.stage.parts import Parts
from lib import schema
from tests.killed import NumbersWork
work = NumbersWork(Parts(Path(sys.argv[1]), "key", {"rewards": schema.REWARDS}))
with RayExecutor(work, 1) as executor:
    for number in executor.make(range(1000)):
        if number == 2:
            for kind, process in executor._ray._private.worker._global_node.live_processes():
                if kind == sys.argv[2]:
                    process.send_signal(signal.SIGKILL)
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("server", ["gcs_server", "raylet"])
def test_without_its_server_ray_ends_with_a_message_and_the_code_to_try_again(server, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RAY_IS_LOST, str(tmp_path), server], cwd=ROOT, env=environment, text=True,
        capture_output=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == ProcessLost.exit_code, done.stderr
    assert "the server of Ray was ended from outside" in done.stderr and "Traceback" not in done.stderr
    assert Parts(tmp_path, "key", {"rewards": schema.REWARDS}).missing(range(3)) == []


# ------------------------------------------------------------------------------------------- job arrays


def test_commands_with_a_share_make_the_table_together(tmp_path, capsys):
    for share in (2, 0, 3):
        with stage(tmp_path, part=(share, 4)) as s:
            assert not make(s, 10)
        assert load_manifest(s.folder) is None
    error = capsys.readouterr().err
    assert "8 of 10 parts are missing; --part 0/4, 1/4, 3/4 makes them" in error
    assert "3 of 10 parts are missing; --part 1/4 makes them" in error
    assert "`python 00_check_data.py --run_dir" in error
    with stage(tmp_path, part=(1, 4)) as s:
        assert make(s, 10)  # the last one completes the stage
    assert manifest_of(s.folder)["outputs"]["rewards"]["rows"] == 100
    with stage(tmp_path, part=(1, 4)) as s:
        assert s.finished
    with stage(tmp_path / "plain") as other:
        make(other, 10)
    assert hashes(other.folder) == hashes(s.folder)


def test_a_plain_command_completes_what_shares_began(tmp_path, capsys):
    with stage(tmp_path, part=(1, 2)) as s:
        assert not make(s, 5)
    with stage(tmp_path) as s:
        assert make(s, 5)
    assert "2 of 5 parts are complete already" in capsys.readouterr().err


def test_the_last_command_waits_for_a_doctor_who_tries_its_lock(tmp_path):
    with stage(tmp_path, part=(0, 1)) as s, open(tmp_path / "run" / ".locks" / s.name) as doctor:
        fcntl.flock(doctor, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, lambda: fcntl.flock(doctor, fcntl.LOCK_UN))
        timer.start()
        assert make(s, 2)
        timer.join()
    assert manifest_of(s.folder)["outputs"]["rewards"]["rows"] == 20


def test_shares_run_at_the_same_time_and_exclude_whole_commands(tmp_path, capsys):
    with stage(tmp_path, part=(0, 2)) as one:
        with stage(tmp_path, part=(1, 2)) as other:
            assert not make(other, 4)
            with pytest.raises(Busy), stage(tmp_path):
                pass
            assert not make(one, 4)  # all parts are there, but the other one still works
        assert "another process completes the stage" in capsys.readouterr().err
    with stage(tmp_path, part=(1, 2)) as s:
        assert make(s, 4)
    shutil.rmtree(s.folder / "rewards")
    with pytest.raises(BadData, match="missing or was changed"), stage(tmp_path, part=(0, 2)):
        pass
