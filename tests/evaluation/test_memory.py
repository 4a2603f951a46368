"""The memory of an evaluation does not grow with the images of the store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEAK = """
# print the largest anonymous memory of an evaluation, in MiB; files mapped into memory do not count
import sys
import threading
import time
from pathlib import Path
import numpy as np
import torch
from medgen.config import Evaluate, Model, Preprocess, Prior
from medgen.data.store import StoreWriter
from medgen.evaluation import evaluate
from medgen.evaluation.context import EvaluationContext
from medgen.metrics.features import DomainExtractor, ExtractorSizes
from medgen.models import build_model
from medgen.priors import ANALYTIC
from medgen.training.distributed import World

torch.set_num_threads(1)
count, shape = int(sys.argv[1]), (1, 128, 128)
with StoreWriter(Path("dataset"), shape, with_masks=False) as writer:
    for number in range(count):
        image = np.random.default_rng(number).integers(256, size=shape, dtype=np.uint8)
        writer.add(image, None, {"path": f"{number}.png", "patient": str(number)})
    sizes = Preprocess().model_dump(mode="json")
    store = writer.commit(["train", "test"] * (count // 2), [], sizes, "test")
model = build_model(Model(name="autoencoder", base_channels=4, latent_size=8), shape, 0).eval()
prior = ANALYTIC["normal"].fit(torch.randn(50, *model.latent_shape), None, 0, Prior())
context = EvaluationContext(
    store=store, held_out=store.split("test"), model=model, info=None, prior=prior, refiner=None,
    extractor=DomainExtractor(ExtractorSizes(1, 128, 4, 4)).eval(), extractor_sha256="", unrecognised=(),
    inception=None, local=None, world=World(0, 1, torch.device("cpu")),
    params=Evaluate(num_generated=20, batch_size=16),
)
peak, stop = 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon")))

watcher = threading.Thread(target=watch)
watcher.start()
evaluate.evaluate_model(context, evaluate.compute(context))
stop.set()
watcher.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_times_the_images_take_little_more_memory(tmp_path: Path) -> None:
    """900 more images would take 15 MiB as uint8, and 60 MiB as floats."""
    peaks = []
    for count in (300, 1200):
        (tmp_path / str(count)).mkdir()
        command = [sys.executable, "-c", PEAK, str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, cwd=tmp_path / str(count), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 15, peaks
