"""The memory of stages 00 and 01 and of training a language model does not grow with the text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.config import ROOT

SMALL, LARGE = 1, 5  # megabytes of text
ALLOWED = 2.0  # bytes of memory per further byte of text; a table of the examples in memory takes more than 8


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux records"
)
def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks = []
    for size in (SMALL, LARGE):
        command = [sys.executable, "-m", "tests.memory_of_stages", str(tmp_path / str(size)), str(size)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    growth = {stage: (peaks[1][stage] - peaks[0][stage]) / (LARGE - SMALL) for stage in peaks[0]}
    assert max(growth.values()) < ALLOWED, (growth, peaks)
