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
    alone = "1" in (os.environ.get("OMP_NUM_THREADS"), str(os.cpu_count()))  # one thread waits for nobody
    chosen = any(name in os.environ for name in SETTINGS)
    if alone or chosen or "torch" in sys.modules or not STAT.exists():
        return None
    busy = busy_cores(SAMPLE_SECONDS)
    if busy < BUSY_SHARE:
        return None
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return (
        f"other programs keep {busy:.1f} of {os.cpu_count()} cores busy, so this will be slower; threads sleep while they wait "
        "(OMP_WAIT_POLICY=passive)"
    )


def busy_cores(seconds: float) -> float:
    """The number of cores that programs of normal priority use now; this one waits meanwhile."""
    before = _seconds_used()
    begin = time.monotonic()
    time.sleep(seconds)
    return (_seconds_used() - before) / (time.monotonic() - begin)


def _seconds_used() -> float:
    """Seconds of all cores that programs of normal priority and the system have used since the start of the machine."""
    fields = STAT.read_text(encoding="ascii").splitlines()[0].split()  # cpu user nice system idle ...
    return (int(fields[1]) + int(fields[3])) / os.sysconf("SC_CLK_TCK")
