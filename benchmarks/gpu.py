"""Check and measure what differs on a GPU, within a time limit; write one Markdown table for docs/results.md.

python benchmarks/gpu.py [--minutes 15] [--data FOLDER] [--out FOLDER]     (`make gpu MINUTES=15`)
python benchmarks/gpu.py --device cpu --minutes 3                               (the same on a CPU, in a small form)

In order: the tests of tests/test_gpu.py; the speed of a training step against a bare compiled loop and the speed of a
matrix product; images in the GPU's memory against images that are read for each step; a registered version; the GPU
recipes for the time that is left. What does not fit into the time, or needs a GPU, is listed as left out. The exit code
is 1 if something failed.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from medgen.config import Loss, Model, Phase, Project, Train, Weights
from medgen.data.store import ShardedArray
from medgen.datasets.sample import draw
from medgen.models import build_model
from medgen.models.base import ModelOutput
from medgen.tracking import history
from medgen.training.distributed import World, pick_device, pick_precision
from medgen.training.loader import Loader
from medgen.training.loop import train_epoch
from medgen.training.losses import Objective
from medgen.training.optimizers import build_optimizer, clip_gradients
from medgen.training.progress import Display
from medgen.training.state import TrainState
from medgen.training.train import ModelTask

ROOT = Path(__file__).parent.parent
RECIPES = ("chest-xray-256", "chest-xray-512", "vqvae-oasis-256")
CLEANUP_SECONDS = 20  # kept free at the end, to stop the last training and to write the table


class Left(Exception):
    """A measurement that is left out, and why."""


@dataclass
class Report:
    """Rows of the table, and the time that is left."""

    device: torch.device
    deadline: float
    out: Path
    data: Path | None = None  # images that are trained on
    rows: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def small(self) -> bool:
        """True on a CPU, where sizes are small."""
        return self.device.type == "cpu"

    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, name: str, value: str) -> None:
        """Add a row to the table and print it."""
        self.rows.append((name, value))
        print(f"{name}: {value}", flush=True)

    def run(self, name: str, seconds: float, measure: Callable[["Report"], None]) -> None:
        """Call `measure` if its expected `seconds` are left; record why not, and what failed."""
        try:
            if seconds > self.seconds_left():
                raise Left(f"needs about {seconds:.0f} s, {max(0.0, self.seconds_left()):.0f} s are left")
            measure(self)
        except Left as why:
            self.left_out.append(f"{name}: {why}")
            print(f"left out: {name}: {why}", flush=True)
        except Exception as error:  # one failed measurement does not end the others
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
            self.failed.append(f"{name}: {reason}")
            print(f"failed: {name}: {reason}", flush=True)

    def markdown(self) -> str:
        """The table, and what failed or was left out."""
        lines = ["| on this machine | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.rows)]
        for title, entries in (("Failed", self.failed), ("Left out", self.left_out)):
            lines += ["", f"{title}:", *(f"- {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"


def describe_machine(report: Report) -> None:
    device = platform.processor() or platform.machine()
    if not report.small:
        properties = torch.cuda.get_device_properties(report.device)
        device = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    report.add("device", device)
    report.add("PyTorch, Python", f"{torch.__version__}, {platform.python_version()}")


def run_tests(report: Report) -> None:
    """The tests of tests/test_gpu.py, on the GPU or on the CPU."""
    result = report.out / "tests.xml"
    marker = "not gpu" if report.small else "gpu"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", marker, "-n0", f"--junitxml={result}"]
    limit = max(30.0, 0.5 * report.seconds_left())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise Left(f"the tests did not end within {limit:.0f} s") from None
    if not result.exists():
        raise RuntimeError(done.stdout + done.stderr)
    cases = list(ElementTree.parse(result).getroot().iter("testcase"))
    for case in cases:
        name = case.attrib["name"].removeprefix("test_").replace("_", " ")
        if (skipped := case.find("skipped")) is not None:
            report.left_out.append(f"test: {name}: {skipped.attrib['message']}")
        elif (failure := case.find("failure")) is not None or (failure := case.find("error")) is not None:
            report.failed.append(f"test: {name}: {' '.join(failure.attrib['message'].split())[:300]}")
        else:
            report.add(f"test: {name}", f"passed, {float(case.attrib['time']):.0f} s")


class Trainer:
    """A bare training step: forward, loss, backward, clip, fused step."""

    def __init__(self, report: Report, side: int, compiled: bool, precision: torch.dtype) -> None:
        torch.manual_seed(0)
        params = Model(base_channels=8 if report.small else 32, latent_channels=8, latent_size=8)
        self.device, self.precision = report.device, precision
        self.model = build_model(params, (1, side, side), 0).to(report.device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if compiled else self.model
        self.objective = Objective(Loss(), (1, side, side)).to(report.device)
        self.optimizer = build_optimizer(Phase(name="a", epochs=1), self.model.parameters())

    def step(self, image: torch.Tensor) -> None:
        """Train on a batch (B, 1, side, side)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            output: ModelOutput = self.network(image.contiguous(memory_format=torch.channels_last))
        losses = self.objective(output, image, Weights(l1=1.0, ssim=0.5), 0.1)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def images_per_second(report: Report, step: Callable[[int], None], batch_size: int, seconds: float = 3.0) -> float:
    """Speed after a warm-up, over at least `seconds`."""
    seconds = 0.5 if report.small else seconds
    for number in range(3):
        step(number)
    synchronize(report.device)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            step(number)
            number += 1
        synchronize(report.device)
    return number * batch_size / (time.perf_counter() - start)


def sizes(report: Report) -> tuple[int, int]:
    """Side of an image and batch size."""
    return (32, 8) if report.small else (256, 64)


def measure_step(report: Report) -> None:
    """Images/s by precision and compilation, FLOPs, memory, and the share of a large matrix product's speed."""
    side, batch_size = sizes(report)
    image = torch.rand(batch_size, 1, side, side, device=report.device)
    best, fp32 = pick_precision("auto", report.device), torch.float32
    ways = [("float32", False, fp32)]
    if not report.small:
        ways += [("bf16", False, torch.bfloat16), ("bf16, compiled", True, best)]
    first, speed = 0.0, 0.0
    for name, compiled, precision in ways:
        if not report.small:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(report, side, compiled, precision)
        speed = images_per_second(report, lambda _, trainer=trainer: trainer.step(image), batch_size)
        first = first or speed
        memory = "" if report.small else f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most"
        text = f"{speed:.0f} images/s ({speed / first:.2f} of float32){memory}"
        report.add(f"bare step, {side} px, batch {batch_size}, {name}", text)
    with FlopCounterMode(display=False) as counter:
        Trainer(report, side, False, fp32).step(image)
    flops = counter.get_total_flops() / batch_size
    peak = matmul_flops(report, best)
    report.add("arithmetic of a step", f"{flops / 1e9:.2f} GFLOP per image, {flops * speed / 1e12:.2f} TFLOP/s")
    report.add(
        "share of the speed of a large matrix product", f"{flops * speed / peak:.1%} of {peak / 1e12:.2f} TFLOP/s"
    )


def matmul_flops(report: Report, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large matrices: what the card can reach."""
    side = 512 if report.small else 8192
    a = torch.rand(side, side, device=report.device, dtype=dtype)
    return 2.0 * side**3 * images_per_second(report, lambda _: torch.mm(a, a), 1)


def measure_data(report: Report) -> None:
    """Images in the device's memory against images read for each step, with the same compiled network."""
    side, batch_size = sizes(report)
    num = 64 if report.small else 4096
    images = ShardedArray([np.random.default_rng(0).integers(0, 256, (num, 1, side, side), dtype=np.uint8)])
    split = SimpleNamespace(images=images, labels=np.zeros(num, np.int64), masks=None)  # what the loader reads
    trainer = Trainer(report, side, not report.small, pick_precision("auto", report.device))
    fixed = torch.rand(batch_size, 1, side, side, device=report.device)
    bare = images_per_second(report, lambda _: trainer.step(fixed), batch_size)
    report.add("one batch again and again", f"{bare:.0f} images/s")
    loaders = {"from the device's memory": Loader(split, batch_size, report.device)}
    if not report.small:
        with full_memory():
            loaders["read for each step"] = Loader(split, batch_size, report.device)
    for name, loader in loaders.items():
        speed = images_per_second(report, lambda n, loader=loader: trainer.step(loader.batch(n).image), batch_size)
        report.add(f"batches {name}", f"{speed:.0f} images/s ({speed / bare:.2f} of one batch)")


@contextmanager
def full_memory() -> Iterator[None]:
    """Let the loader find the GPU's memory full."""
    info = torch.cuda.mem_get_info
    torch.cuda.mem_get_info = lambda *_: (0, 0)
    try:
        yield
    finally:
        torch.cuda.mem_get_info = info


def measure_loop(report: Report) -> None:
    """medgen's training loop against the bare step on one batch, with the same compiled network and objective."""
    project = Project(sample_project(report, report.out / "loop"))
    size = 8 if report.small else 32
    params = Train(batch_size=size, device=report.device.type, phases=(Phase(name="a", epochs=100),))
    world = World(0, 1, report.device)
    sections = Model(base_channels=8 if report.small else 16, latent_channels=8, latent_size=8), Loss()
    state = TrainState(ModelTask(project, world, *sections, params), world, project.runs / "loop")
    state.resume()
    phase, task, batch = params.phases[0], state.task, state.task.batch(0)
    task.num_batches = 4 if report.small else 200

    def bare(_: int) -> None:
        losses = task.objective(state.network(batch), batch, phase, 0.0)
        state.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        clip_gradients(state.network.parameters(), params.clip_norm)
        state.optimizer.step()

    def epoch() -> float:
        """Images per second."""
        state.counters.step, start = 0, time.perf_counter()
        with Display(0, 1, False) as display:
            train_epoch(state, phase, display)
        synchronize(report.device)
        return task.num_batches * size / (time.perf_counter() - start)

    epoch()  # a warm-up
    ratios, speeds = [], []
    for _ in range(2 if report.small else 5):
        speeds.append(epoch())
        ratios.append(speeds[-1] / images_per_second(report, bare, size))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    report.add("medgen's loop", f"{statistics.median(speeds):.0f} images/s, {spread} of the bare loop")
    if not report.small:
        report.add("host waits per step", f"{count_waits(epoch) / task.num_batches:.3f}")


def count_waits(function: Callable[[], object]) -> int:
    """Number of times that the host waits for the GPU, of those that PyTorch knows."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len(waits)


def sample_project(report: Report, folder: Path) -> Path:
    """A project folder with a small parameter file and its preprocessed dataset."""
    folder.mkdir(parents=True)
    plain = {
        "data": {"path": str(images_folder(report)), "name": "gpu"},
        "preprocess": {"image_size": 32 if report.small else 128, "clahe_tiles": 2},
        "features": {"width": 8, "epochs": 1},
        "model": {"base_channels": 8, "latent_size": 8, "latent_channels": 4},
        "prior": {"name": "gmm", "components": [1]},
        "train": {"batch_size": 8, "device": report.device.type, "phases": {"one": {"epochs": 2}}},
        "evaluate": {"num_generated": 24, "grid_images": 6},
    }
    (folder / "params.yaml").write_text(json.dumps(plain))
    medgen(folder, "preprocess")
    return folder


def images_folder(report: Report) -> Path:
    """The images that are trained on: those of --data, or procedural ones."""
    if report.data is None:
        report.data = report.out / "images"
        draw(report.data, num_images=48 if report.small else 480, size=64 if report.small else 512, seed=0)
    return report.data.resolve()


def medgen(folder: Path, *arguments: str, seconds: float | None = None) -> None:
    """Run a command of medgen in a project's folder; after `seconds` ask it to save and stop."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "medgen", *arguments]
    with (folder / "log.txt").open("a+") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(CLEANUP_SECONDS / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.seek(0)
        if process.returncode not in (0, 5, -signal.SIGTERM, -signal.SIGKILL):
            raise RuntimeError(f"medgen {' '.join(arguments)}: exit code {process.returncode}: {log.read()}")


def register_version(report: Report) -> None:
    """All stages on a small project; its registered version gets the GPU's name as the tag `gpu`."""
    folder = sample_project(report, report.out / "project")
    for stage in ("features", "train", "prior", "refiner", "evaluate", "register"):
        medgen(folder, stage)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}", f"sqlite:///{folder / 'mlflow.db'}")
    version = client.get_model_version_by_alias("gpu", "candidate")
    name = "none" if report.small else torch.cuda.get_device_name(report.device)
    client.set_model_version_tag("gpu", version.version, "gpu", name)
    tags = client.get_model_version("gpu", version.version).tags
    report.add("registered version", f"models:/gpu, version {version.version}, tag gpu: {tags['gpu']}")


def train_recipes(report: Report) -> None:
    """Train each recipe for an equal share of the time that is left."""
    for number, name in enumerate(RECIPES):
        report.run(f"recipe {name}", 60, partial(train_recipe, name=name, share=1.0 / (len(RECIPES) - number)))


def train_recipe(report: Report, name: str, share: float) -> None:
    if report.small:
        raise Left("made for a GPU")
    folder = report.out / name
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / f"{name}.yaml", folder / "params.yaml")
    stop = time.monotonic() + share * (report.seconds_left() - CLEANUP_SECONDS)
    medgen(folder, "preprocess", "--set", f"data.path={images_folder(report)}")
    medgen(folder, "train", "--set", "tracking.enabled=false", seconds=max(1.0, stop - time.monotonic()))
    (scratch,) = (folder / "runs").glob("*/")
    records = history(scratch)
    if not records:
        raise Left("no epoch ended in its share of the time; see --minutes")
    last = records[-1]
    losses = f"val/loss {records[0]['val/loss']:.4f} to {last['val/loss']:.4f}, val/ssim {last['val/ssim']:.3f}"
    report.add(f"recipe {name}", f"{last['run/images_per_second']:.0f} images/s, {len(records)} epochs, {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit of everything together")
    parser.add_argument("--data", type=Path, help="folder of images to train on; default: procedural ones")
    default = Path("outputs", f"gpu-{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--out", type=Path, default=default, help="new folder for the table and projects")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a small form of everything")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out}: exists; expected a new folder")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False, so everything is left out; --device cpu runs a small form")
        return
    arguments.out.mkdir(parents=True)
    deadline = time.monotonic() + 60 * arguments.minutes - CLEANUP_SECONDS
    report = Report(pick_device(arguments.device), deadline, arguments.out.resolve(), arguments.data)
    for name, seconds, measure in STEPS:
        report.run(name, 0.3 * seconds if report.small else seconds, measure)
    (report.out / "gpu.md").write_text(report.markdown())
    print(f"\n{report.markdown()}\nwritten to {report.out / 'gpu.md'}")
    sys.exit(1 if report.failed else 0)


STEPS: tuple[tuple[str, float, Callable[[Report], None]], ...] = (  # name, expected seconds on a GPU, function
    ("machine", 0, describe_machine),
    ("tests", 60, run_tests),
    ("speed of a step", 90, measure_step),
    ("data", 60, measure_data),
    ("speed of the loop", 90, measure_loop),
    ("registered version", 90, register_version),
    ("recipes", 0, train_recipes),
)


if __name__ == "__main__":
    main()
