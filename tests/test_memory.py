"""The memory of stages 00 to 03 and of training a language model does not grow with the text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import ROOT

SMALL, LARGE = 0.5, 2  # megabytes of text
ALLOWED = 1.5  # bytes of memory per further byte of text; a table of the examples in memory takes more than 8
# Freed memory goes back to the system at once. So the peaks are those of memory in use, to 1 MB, and not of the gaps
# between allocations, which differ by 20 MB from run to run.
ALLOCATORS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux records"
)
def test_memory_does_not_grow_with_the_text(tmp_path):
    command = [sys.executable, "-m", "tests.memory_of_stages", str(tmp_path), str(SMALL), str(LARGE)]
    environment = {**os.environ, **ALLOCATORS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    peaks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    growth = {stage: (peaks[1][stage] - peaks[0][stage]) / (LARGE - SMALL) for stage in peaks[0]}
    assert len(peaks) == 2 and max(growth.values()) < ALLOWED, (growth, peaks)
