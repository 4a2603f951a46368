"""The memory of an evaluation hardly grows with the images of the store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_times_the_images_take_little_more_memory(root: Path, tmp_path: Path) -> None:
    """1,200 more images of 128 px: 35 MiB if pixels and reconstructions were kept. PCA has its own limit."""
    peaks = []
    for count in (400, 1600):
        options = ["--images", str(count), "--size", "128", "--generated", "20", "--out", str(tmp_path / str(count))]
        command = [sys.executable, str(root / "benchmarks" / "large_evaluation.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        memory = json.loads(done.stdout.splitlines()[-1])["mib"]
        peaks.append(max(memory[part] for part in ("evaluate_reconstructions", "describe_sets", "search_train")))
    assert peaks[1] - peaks[0] < 25, peaks
