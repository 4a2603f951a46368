"""Evaluate a model of random weights on a store of many images; print the seconds of each part and the memory.

python benchmarks/large_evaluation.py --images 1000000 --out FOLDER
"""

import argparse
import json
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgen.config import Evaluate, Model, Preprocess, Prior, Project, Tracking
from medgen.data.store import StoreWriter, open_store
from medgen.evaluation import evaluate
from medgen.metrics.features import DomainExtractor, ExtractorSizes, save_extractor
from medgen.models import build_model, bundle
from medgen.priors import ANALYTIC, save_prior
from medgen.priors.refiner import save_disabled

NUM_DIFFERENT = 1000  # images, which the store repeats, shifted by another number of pixels each time
SPLITS = ["train"] * 8 + ["val", "test"]
PARTS = (
    "evaluate_reconstructions", "draw_samples", "describe_sets", "search_train", "evaluate_model", "evaluate_pca",
    "evaluate_reference",
)  # fmt: skip


def make_project(project: Project, count: int, size: int) -> None:
    """Write a store, and a model, a prior and an extractor of random weights."""
    shape, generator = (1, size, size), np.random.default_rng(0)
    images = generator.integers(256, size=(min(count, NUM_DIFFERENT), *shape), dtype=np.uint8)
    with StoreWriter(project.dataset, shape, with_masks=False) as writer:
        for number in range(count):
            image = np.roll(images[number % len(images)], divmod(number // len(images), size), axis=(1, 2))
            writer.add(image, None, {"path": f"{number}.png", "patient": str(number)})
        splits = [SPLITS[number % len(SPLITS)] for number in range(count)]
        writer.commit(splits, [], Preprocess().model_dump(mode="json"), "benchmark")
    fingerprint, sizes = open_store(project.dataset).fingerprint, Model(name="vae", base_channels=8, latent_size=16)
    torch.manual_seed(0)
    model = build_model(sizes, shape, 0)
    info = bundle.BundleInfo(sizes, Preprocess(image_size=size), shape, (), fingerprint, "run", torch.__version__)
    bundle.save(project.model, model, info)
    digest = bundle.digest(project.model)
    prior = ANALYTIC["gaussian"].fit(torch.randn(500, *model.latent_shape), None, 0, Prior())
    save_prior(project.prior, prior, digest)
    save_disabled(project.refiner, digest)
    extractor = DomainExtractor(ExtractorSizes(1, size, 16, 4))
    with torch.no_grad():
        batch = [torch.from_numpy(images[:100]) / 255.0]
        extractor.eval().standardise(batch, batch)
    save_extractor(project.features, extractor, {"dataset": fingerprint})


class Meter:
    """Processor time and memory of the parts of an evaluation."""

    def __init__(self) -> None:
        self.seconds = dict[str, float]()
        self.mib = dict[str, int]()  # largest anonymous memory; files mapped into memory do not count
        self.part, self.stop = "start", threading.Event()

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, measured as the part `name`."""

        def call(*arguments: Any) -> Any:
            self.part, start = name, time.process_time()
            try:
                return function(*arguments)
            finally:
                self.part, self.seconds[name] = "other", round(time.process_time() - start, 1)

        return call

    def watch(self) -> None:
        """Read the memory of this process until `stop` is set."""
        while not self.stop.wait(0.002):
            lines = Path("/proc/self/status").read_text().splitlines()
            mib = next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))
            self.mib[self.part] = max(mib, self.mib.get(self.part, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--generated", type=int, default=2000)
    parser.add_argument("--limit-mb", type=int, default=2000, help="limit of private memory (RLIMIT_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the project; an existing store is kept")
    arguments = parser.parse_args()
    project = Project(arguments.out)
    if not (project.features / "extractor.json").exists():
        shutil.rmtree(arguments.out, ignore_errors=True)
        make_project(project, arguments.images, arguments.size)
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_mb << 20, resource.RLIM_INFINITY))
    meter = Meter()
    for name in PARTS:
        setattr(evaluate, name, meter.measured(name, getattr(evaluate, name)))
    watcher = threading.Thread(target=meter.watch)
    watcher.start()
    try:
        settings = Evaluate(num_generated=arguments.generated)
        evaluate.run(project, evaluate=settings, tracking=Tracking(enabled=False))
    finally:
        meter.stop.set()
        watcher.join()
        print(json.dumps({"seconds": meter.seconds, "mib": meter.mib}))


if __name__ == "__main__":
    main()
