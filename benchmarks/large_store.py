"""Train on a dataset larger than a limit of memory: time to open, images per second against the same images in memory.

python benchmarks/large_store.py [--images 1000000] [--limit-mb 2000] [--stages train] [--folder FOLDER]

Makes a project with a dataset of repeated images in FOLDER (kept and used again; by default a temporary folder), then
starts processes whose own memory (RLIMIT_DATA: all but read-only maps of files) is limited.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE, NUM_DISTINCT, SUBSET = 64, 1024, 2048
NAMES = ("RssAnon", "RssFile", "VmData")
PARAMS = """\
model: {name: vae, base_channels: 16, latent_size: 8, latent_channels: 4}
loss: {weights: {l1: 1.0, ssim: 0.5}}
train: {batch_size: 16, subset: %d, phases: {a: {epochs: 1, learning_rate: 1.0e-3}}}
features: {epochs: 1, width: 8}
prior: {}
refiner: {}
evaluate: {num_generated: 64}
tracking: {enabled: false}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--limit-mb", type=int, default=2000)
    parser.add_argument("--stages", nargs="*", default=["train"], help="stages of medgen to run under the limit")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of 10 steps from files and from memory")
    parser.add_argument("--folder", type=Path, help="folder of the project")
    parser.add_argument("--step", choices=["make", "measure"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "make":
        make(arguments.folder, arguments.images)
        return
    if arguments.step == "measure":
        measure(arguments.folder, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for step in ("make", "measure"):
            sizes = ["--images", arguments.images, "--rounds", arguments.rounds]
            own = [sys.executable, Path(__file__).resolve(), "--step", step, "--folder", folder, *sizes]
            run_limited(own, folder, arguments.limit_mb)
        for stage in arguments.stages:
            started = time.perf_counter()
            run_limited([sys.executable, "-m", "medgen", stage], folder, arguments.limit_mb)
            print(f"medgen {stage}: {time.perf_counter() - started:.1f} s under {arguments.limit_mb} MB", flush=True)


def run_limited(command: list[object], folder: Path, limit_mb: int) -> None:
    """Run a command in a folder with a limit on the process's own memory."""
    limit = limit_mb * 10**6
    subprocess.run(
        list(map(str, command)),
        cwd=folder,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )


def make(folder: Path, count: int) -> None:
    """Write params.yaml and a dataset of `count` images, 0.1 % in val and in test, unless it is there."""
    from medgen.config import Preprocess
    from medgen.data.store import StoreWriter

    dataset = folder / "artifacts" / "dataset"
    (folder / "params.yaml").write_text(PARAMS % SUBSET)
    if dataset.exists() and sum(json.loads((dataset / "dataset.json").read_text())["counts"].values()) == count:
        return
    rng, started = np.random.default_rng(0), time.perf_counter()
    coarse = rng.integers(40, 216, (NUM_DISTINCT, 1, 8, 8)).repeat(SIZE // 8, 2).repeat(SIZE // 8, 3)
    images = (coarse + rng.integers(-20, 21, coarse.shape)).astype(np.uint8)
    held_out = max(20, count // 1000)
    with StoreWriter(dataset, (1, SIZE, SIZE), with_masks=False) as writer:
        for number in range(count):
            row = {"path": f"folder/{number // 1000:05}/{number:09}.png", "index": "0", "sha256": f"{number:064x}"}
            row |= {"label": "AB"[number % 2], "patient": f"patient-{number // 4:09}", "mode": "L"}
            writer.add(images[number % NUM_DISTINCT], None, row)
        splits = ["val"] * held_out + ["test"] * held_out + ["train"] * (count - 2 * held_out)
        writer.commit(splits, [], Preprocess(image_size=SIZE).model_dump(mode="json"), "benchmark")
    shards = list(dataset.glob("train/images-*.npy"))
    seconds = time.perf_counter() - started
    print(f"made {count:,} images in {seconds:.0f} s, {len(shards)} files of train images; {memory()}", flush=True)


def measure(folder: Path, rounds: int) -> None:
    """Print the times to open, the ratio of training speeds, and the memory."""
    import torch

    from medgen.config import Loss, Model, Phase, Weights
    from medgen.data.store import open_store
    from medgen.models import build_model
    from medgen.training.loader import Loader
    from medgen.training.losses import Objective
    from medgen.training.optimizers import build_optimizer

    for name in ("first", "second"):
        started = time.perf_counter()
        store = open_store(folder / "artifacts" / "dataset")
        print(f"{name} open: {time.perf_counter() - started:.3f} s", flush=True)
    split, batch, steps, weights = store.split("train"), 16, 10, Weights(l1=1.0, ssim=0.5)
    model = build_model(Model(name="vae", base_channels=16, latent_size=8, latent_channels=4), store.image_shape, 0)
    objective = Objective(Loss(weights=weights), store.image_shape)
    optimizer = build_optimizer(Phase(name="a", epochs=1), model.parameters())
    loader = Loader(split, batch, "cpu")

    def time_steps(read: Callable[[int], Any]) -> float:
        started = time.perf_counter()
        for step in range(steps):
            image = read(step)
            losses = objective(model(image), image, weights, 0.1)
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            optimizer.step()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {"files": [], "memory": []}
    for number in range(rounds + 1):  # round 0 is a warm-up
        numbers = range(number * steps, (number + 1) * steps)
        later = range(numbers.stop + 10**6, numbers.stop + 10**6 + steps)  # other images than the process has just read
        images = torch.cat([(loader.batch(position).image * 255).round().to(torch.uint8) for position in later])
        order = torch.randperm(len(images)).split(batch)
        turns = {
            "files": lambda step, numbers=numbers: loader.batch(numbers[step]).image,
            "memory": lambda step, images=images, order=order: images[order[step]].float().div_(255.0),
        }
        for name in sorted(turns, reverse=bool(number % 2)):
            took = time_steps(turns[name])
            if number:
                seconds[name].append(took)
    ratios = [memory / files for files, memory in zip(seconds["files"], seconds["memory"], strict=True)]
    rates = {name: batch * steps / statistics.median(values) for name, values in seconds.items()}
    print(f"train split {np.prod(split.images.shape) / 1e6:,.0f} MB; images/s: {rates}")
    print(f"speed from files / from memory: {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(memory())


def memory() -> str:
    """Memory of this process: its own, that of mapped files, and what the limit counts."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    found = {name: int(rest.split()[0]) / 1e3 for name, _, rest in lines if name in NAMES}
    return ", ".join(f"{name} {found[name]:.0f} MB" for name in NAMES)


if __name__ == "__main__":
    main()
