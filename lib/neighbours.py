"""Other programs on the same processor.

OpenMP divides each operation among the cores, and threads that are done wait for the rest. By default they wait in a loop,
since waking up takes time. If another program holds one of the cores, a thread waits there for its turn. All others
burn their time meanwhile. So with one busy core of two, a training step takes three times as long. Threads that sleep
while they wait cost a fifth to a half more on a quiet machine, but with a busy core only a third.

libgomp reads OMP_WAIT_POLICY when torch is imported, so this module must run before. Results are the same either way.
"""

import os
import sys
import time
from pathlib import Path

STAT = Path("/proc/stat")  # Linux only
SAMPLE_SECONDS = 0.2
BUSY_SHARE = 0.6  # of one core, over the sample
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a user's own choice counts


def share_with_neighbours() -> str | None:
    """Let threads sleep while they wait if other programs keep a core busy now. Returns a line for the user if they do.

    Programs of lower priority (nice) do not count, since they leave a core as soon as it is needed.
    """
    if not STAT.exists() or "torch" in sys.modules or any(name in os.environ for name in SETTINGS):
        return None
    cores = os.sched_getaffinity(0)
    if os.environ.get("OMP_NUM_THREADS") == "1" or len(cores) == 1:  # one thread waits for nobody
        return None
    busy = busy_cores(cores, SAMPLE_SECONDS)
    if busy < BUSY_SHARE:
        return None
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return (
        f"other programs keep {busy:.1f} of {len(cores)} cores busy, so this will be slower; threads sleep while they wait "
        "(OMP_WAIT_POLICY=passive)"
    )


def busy_cores(cores: set[int], seconds: float) -> float:
    """How many of these cores programs of normal priority use now. This one waits meanwhile."""
    before, begin = _seconds_used(cores), time.monotonic()
    time.sleep(seconds)
    return (_seconds_used(cores) - before) / (time.monotonic() - begin)


def _seconds_used(cores: set[int]) -> float:
    """Seconds of these cores that programs of normal priority and the system have used since the start of the machine."""
    names, ticks = {f"cpu{core}" for core in cores}, 0
    for line in STAT.read_text(encoding="ascii").splitlines():
        name, *times = line.split()  # user nice system idle ...
        ticks += int(times[0]) + int(times[2]) if name in names else 0
    return ticks / os.sysconf("SC_CLK_TCK")
