"""Threads sleep while they wait, where other programs need the cores."""

import os
import subprocess
import sys
import time

import pytest

from lib import neighbours
from lib.config import ROOT
from lib.neighbours import busy_cores, share_with_neighbours


@pytest.fixture
def busy(monkeypatch, tmp_path):
    """Sets how many cores others use: a /proc/stat that moves with time."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in (*neighbours.SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 4, 6}, raising=False)
    monkeypatch.setattr(neighbours, "SAMPLE_SECONDS", 0.02)

    def set_to(user: float, nice: float = 0.0, system: float = 0.0, core: int = 2) -> None:
        ticks = os.sysconf("SC_CLK_TCK")

        class Stat:
            def exists(self) -> bool:
                return True

            def read_text(self, encoding: str) -> str:
                now = 1000 + time.monotonic() * ticks * 1000
                times = " ".join(str(int(share * now)) for share in (user, nice, system, 1, 0))
                return f"cpu  {times}\ncpu0 5 5 5 5 5\ncpu{core} {times}\nintr 1 2 3"

        monkeypatch.setattr(neighbours, "STAT", Stat())
        monkeypatch.setattr(os, "sysconf", lambda name: ticks * 1000)

    yield set_to
    os.environ.pop("OMP_WAIT_POLICY", None)


@pytest.mark.parametrize(
    ("used", "sleeps"),
    [
        ({"user": 1.0}, True), ({"user": 0.5, "system": 0.5}, True), ({"user": 0.2}, False), ({"user": 0.0, "nice": 4.0}, False),
        ({"user": 1.0, "core": 3}, False),  # a core that this process may not use
    ],
)  # fmt: skip
def test_threads_sleep_if_programs_of_normal_priority_use_a_core(busy, used, sleeps):
    busy(**used)
    line = share_with_neighbours()
    assert (os.environ.get("OMP_WAIT_POLICY") == "passive") is sleeps
    assert (line is not None) is sleeps
    if line is not None:
        assert "1.0 of 4 cores busy" in line


@pytest.mark.parametrize("name", [*neighbours.SETTINGS, "OMP_NUM_THREADS"])
def test_a_choice_of_the_user_and_a_single_thread_are_left_alone(busy, monkeypatch, name):
    busy(user=2.0)
    monkeypatch.setenv(name, "1")
    assert share_with_neighbours() is None
    assert "OMP_WAIT_POLICY" not in os.environ or name == "OMP_WAIT_POLICY"


def test_nothing_is_set_after_torch_was_imported(busy, monkeypatch):
    busy(user=2.0)
    monkeypatch.setitem(sys.modules, "torch", object())
    assert share_with_neighbours() is None


@pytest.mark.skipif(not neighbours.STAT.exists(), reason="needs Linux")
def test_a_busy_program_is_seen():
    code = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    program = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.1)
        assert (
            busy_cores(os.sched_getaffinity(0), 0.3) > 0.3
        )  # the processor may be shared with more programs
    finally:
        program.kill()
        program.wait()


def test_a_script_asks_before_torch_is_imported():
    """A script's imports must leave torch alone until the command line is parsed."""
    code = "import sys, lib.cli, lib.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
