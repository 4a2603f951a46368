"""The memory of an evaluation hardly grows with the images of the store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_times_the_images_take_little_more_memory(root: Path, tmp_path: Path) -> None:
    """2,700 more images of 64 px would take 11 MiB as uint8 and 44 MiB as floats."""
    peaks = []
    for count in (900, 3600):
        options = ["--images", str(count), "--generated", "20", "--out", str(tmp_path / str(count))]
        command = [sys.executable, str(root / "benchmarks" / "large_evaluation.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_mib"])
    assert peaks[1] - peaks[0] < 30, peaks
