"""Training speed on a CPU or GPU: medgen's epoch and other loops around the same network, in images per second.

python benchmarks/train.py                     # 480 drawn X-rays
python benchmarks/train.py --images FOLDER     # a folder of images in class folders
python benchmarks/train.py --neighbour         # beside one busy process and alone, by OpenMP setting

Methods are timed in turn, so ratios are more reliable than times. All use the network, batch size and loss weights of
params.yaml, except pythae, whose loss has no SSIM. Lightning, MONAI and pythae are left out where they are not
installed (dependency group `benchmarks`).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from medgen.machine import set_openmp_defaults

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, str]] = {  # of OpenMP; "medgen" also shares cores
    "torch's default": {},
    "medgen": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SETTLE = 3.0  # seconds of training before it is timed, in which medgen notices a change of load

if "--setting" not in sys.argv or "medgen" in sys.argv:
    set_openmp_defaults()  # before torch is imported

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from medgen.config import Params, Project, load
from medgen.data.store import Split, open_store
from medgen.models import GenerativeModel, build_model
from medgen.training import loop
from medgen.training.cores import share_cores
from medgen.training.distributed import join
from medgen.training.losses import Objective
from medgen.training.optimizers import build_optimizer
from medgen.training.progress import Display
from medgen.training.state import TrainState
from medgen.training.train import ModelTask

Epoch = Callable[[], float]  # trains all images once; returns seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with a folder of images for each class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--neighbour", action="store_true", help="compare OpenMP settings beside a busy process")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement beside a busy process")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)  # a child process of --neighbour
    arguments = parser.parse_args()
    if arguments.setting:
        answer_times(arguments.setting)
    elif arguments.neighbour:
        compare_settings(arguments.rounds, arguments.seconds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare_loops(Path(folder), arguments.images, arguments.rounds)


def compare_loops(folder: Path, images: Path | None, rounds: int) -> None:
    from medgen.datasets.sample import draw
    from medgen.ingest import preprocess

    params = load(ROOT / "params.yaml", ())
    if images is None:
        draw(folder / "data", num_images=480)
        images = folder / "data/images"
    data = params.data.model_copy(update={"path": str(images.resolve())})
    project = Project(folder)
    preprocess.run(project, data=data, preprocess=params.preprocess)
    split = open_store(project.dataset).split("train")
    write_images(split, folder / "small")

    with join("auto") as world:
        device, size = world.device, params.preprocess.image_size
        common = (params, split, device)
        epochs: dict[str, Epoch] = {
            "bare loop in memory": bare_loop(*common),
            "medgen": medgen_loop(params, project, world),
            "bare loop, contiguous": bare_loop(*common, memory_format=torch.contiguous_format),
            "bare loop, bf16 autocast": bare_loop(*common, bf16=True),
            "bare loop, pytorch-msssim": bare_loop(*common, loss=notebook_loss),
            f"notebook: ImageFolder of {size} px, DataLoader": notebook_loop(*common, folder / "small"),
            "notebook: ImageFolder of the original files": notebook_loop(*common, images),
        }
        peers = {
            "lightning": lightning_loop,
            "monai": partial(monai_loop, folder / "small"),
            "pythae": partial(pythae_loop, folder),
        }
        for name, build in peers.items():
            if importlib.util.find_spec(name) is None:
                print(f"{name}: not installed, left out (uv sync --group benchmarks)")
            else:
                epochs[name] = build(*common)
        rates: dict[str, list[float]] = {name: [] for name in epochs}
        for round_number in range(rounds + 1):
            for name, epoch in epochs.items():
                rate = num_steps(params, split) * params.train.batch_size / epoch()
                if round_number:  # round 0 is a warm-up
                    rates[name].append(rate)
    title = f"{device}, {torch.get_num_threads()} threads, {size} px, batch {params.train.batch_size}"
    print(f"\n{title}\n\n| method | images/s | medgen / method (min to max) |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(rates["medgen"], values, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(values):.0f} | {spread} |")


def num_steps(params: Params, split: Split) -> int:
    """Steps of a timed epoch: 24 at most, so that large folders take no longer."""
    return min(len(split.images) // params.train.batch_size, 24)


def timed(epoch: Callable[[], None], device: torch.device) -> Epoch:
    def run() -> float:
        start = time.perf_counter()
        epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def new_model(params: Params, split: Split, device: torch.device) -> GenerativeModel:
    torch.manual_seed(0)
    model = build_model(params.model, split.images.shape[1:], 0).to(device).train()
    assert isinstance(model, GenerativeModel)
    return model


def medgen_loop(params: Params, project: Project, world) -> Epoch:
    """`train_epoch`, with clipping, averaged weights and the finite check."""
    task = ModelTask(project, world, params.model, params.loss, params.train)
    task.num_batches = num_steps(params, task.store.split("train"))
    state = TrainState(task, world, project.runs / "speed")
    phase = params.train.phases[1]  # with β > 0

    def epoch() -> None:
        with share_cores(), Display(0, 1, False) as display:
            loop.train_epoch(state, phase, display)
        state.counters.step, state.counters.sums = 0, {}

    return timed(epoch, world.device)


def bare_loop(
    params: Params,
    split: Split,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
    bf16: bool = False,
    loss=None,
) -> Epoch:
    """Forward, loss, backward and a fused AdamW on images in memory: nothing else."""
    model = new_model(params, split, device).to(memory_format=memory_format)
    objective, weights, beta = Objective(params.loss, split.images.shape[1:]), params.loss.weights, 0.3
    optimizer = build_optimizer(params.train.phases[0], model.parameters())
    images, batch = torch.from_numpy(split.images[:].copy()).to(device), params.train.batch_size

    def epoch() -> None:
        order = torch.randperm(len(images), device=device)
        for step in range(num_steps(params, split)):
            image = images[order[step * batch : (step + 1) * batch]].float().div_(255.0)
            image = image.contiguous(memory_format=memory_format)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = model(image)
            total = loss(output, image) if loss else objective(output, image, weights, beta).total
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()

    return timed(epoch, device)


def notebook_loss(output, image: Tensor) -> Tensor:
    """The loss of params.yaml as a notebook writes it: L1, SSIM of pytorch-msssim and KL."""
    from pytorch_msssim import ssim

    mean, logvar = output.latent.mean, output.latent.logvar
    kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).flatten(1).sum(1).mean()
    reconstruction = output.prediction
    image_loss = nn.functional.l1_loss(reconstruction, image) + 0.5 * (1 - ssim(reconstruction, image, data_range=1.0))
    return image_loss + 0.3 * kl / image[0].numel()


def notebook_loop(params: Params, split: Split, device: torch.device, folder: Path) -> Epoch:
    """The usual notebook: every item is decoded anew, Adam, and the loss is read at every step."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    side = params.preprocess.image_size
    steps = [transforms.Grayscale(), transforms.Resize((side, side)), transforms.ToTensor()]
    dataset = ImageFolder(str(folder), transforms.Compose(steps))
    loader = DataLoader(dataset, batch_size=params.train.batch_size, shuffle=True, drop_last=True)
    model = new_model(params, split, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> None:
        total, done = 0.0, 0
        while done < num_steps(params, split):
            for image, _ in loader:
                image = image.to(device)
                loss = notebook_loss(model(image), image)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, done = total + loss.item(), done + 1
                if done == num_steps(params, split):
                    return

    return timed(epoch, device)


def lightning_loop(params: Params, split: Split, device: torch.device) -> Epoch:
    """Lightning's Trainer on tensors in memory."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = new_model(params, split, device)

        def training_step(self, batch, _):
            loss = notebook_loss(self.model(batch[0]), batch[0])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds = time.perf_counter() - self.started

    images = torch.from_numpy(split.images[:].copy()).float() / 255
    loader = DataLoader(TensorDataset(images), batch_size=params.train.batch_size, shuffle=True, drop_last=True)
    module = Module()

    def run() -> float:
        trainer = lightning.Trainer(
            max_epochs=1, limit_train_batches=num_steps(params, split), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        return module.seconds

    return run


def monai_loop(folder: Path, params: Params, split: Split, device: torch.device) -> Epoch:
    """MONAI's CacheDataset and DataLoader: decoded once."""
    from monai.data import CacheDataset
    from monai.data import DataLoader as MonaiLoader
    from monai.transforms import Compose, LoadImage, ScaleIntensityRange

    files = [str(path) for path in sorted(folder.rglob("*.png"))]
    transform = Compose([LoadImage(image_only=True, ensure_channel_first=True), ScaleIntensityRange(0, 255, 0, 1)])
    dataset = CacheDataset(files, transform, progress=False)
    loader = MonaiLoader(dataset, batch_size=params.train.batch_size, shuffle=True, drop_last=True)
    model = new_model(params, split, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def epoch() -> None:
        total = 0.0
        for _, image in zip(range(num_steps(params, split)), loader, strict=False):
            image = image.as_tensor().to(device)
            loss = notebook_loss(model(image), image)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return timed(epoch, device)


def pythae_loop(folder: Path, params: Params, split: Split, device: torch.device) -> Epoch:
    """pythae's VAE and trainer around the same encoder and decoder; MSE instead of L1 and SSIM."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    network = new_model(params, split, device)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network.encoder

        def forward(self, image: Tensor) -> ModelOutput:
            mean, logvar = self.layers(image).chunk(2, dim=1)
            return ModelOutput(embedding=mean.flatten(1), log_covariance=logvar.flatten(1))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network.decoder

        def forward(self, latent: Tensor) -> ModelOutput:
            grid = latent.unflatten(1, network.latent_shape)
            return ModelOutput(reconstruction=torch.sigmoid(self.layers(grid)))

    shape, batch = tuple(split.images.shape[1:]), params.train.batch_size
    images = torch.from_numpy(split.images[: num_steps(params, split) * batch]).float() / 255
    config = VAEConfig(input_dim=shape, latent_dim=torch.Size(network.latent_shape).numel())
    training = BaseTrainerConfig(output_dir=str(folder / "pythae"), per_device_train_batch_size=batch, num_epochs=1)
    model = VAE(config, encoder=Encoder(), decoder=Decoder())
    trainer = BaseTrainer(model, BaseDataset(images, torch.zeros(len(images))), training_config=training)
    trainer.prepare_training()
    return timed(lambda: trainer.train_step(1), device)


def write_images(split: Split, folder: Path) -> None:
    """The preprocessed train images as PNG files, in one class folder."""
    import cv2

    (folder / "all").mkdir(parents=True)
    for number in range(len(split.images)):
        cv2.imwrite(str(folder / "all" / f"{number:06d}.png"), split.images[number].transpose(1, 2, 0))


def compare_settings(rounds: int, seconds: float) -> None:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    children = {}
    for setting, variables in SETTINGS.items():
        command = [sys.executable, __file__, "--setting", setting]
        children[setting] = subprocess.Popen(
            command, env=plain | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    rates: dict[tuple[str, bool], list[float]] = {}
    try:
        for child in children.values():
            next(answers(child))
        for _ in range(rounds):
            for busy in (False, True):
                for setting, child in children.items():
                    rates.setdefault((setting, busy), []).append(measure(child, seconds, busy))
    finally:
        for child in children.values():
            child.kill()
    print("one busy process beside each; ratios to torch's default alone\n")
    print("| OpenMP | alone, images/s | ratio | beside, images/s | ratio |\n|---|---|---|---|---|")
    alone = statistics.median(rates["torch's default", False])
    for setting in SETTINGS:
        medians = [statistics.median(rates[setting, busy]) for busy in (False, True)]
        print(f"| {setting} | " + " | ".join(f"{rate:.0f} | {rate / alone:.2f}" for rate in medians) + " |")


def measure(child: subprocess.Popen, seconds: float, busy: bool) -> float:
    """Images per second of a child process; with `busy`, beside a process that uses all of one core."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        child.stdin.write(f"{seconds}\n")
        child.stdin.flush()
        return next(answers(child))
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def answers(child: subprocess.Popen) -> Iterator[float]:
    for line in iter(child.stdout.readline, ""):
        yield float(json.loads(line))
    raise RuntimeError("a measuring process ended; its error is above")


def answer_times(setting: str) -> None:
    """For each number of seconds on standard input, train that long and print images per second."""
    params = load(ROOT / "params.yaml", ())
    size = params.preprocess.image_size
    torch.manual_seed(0)
    model = build_model(params.model, (1, size, size), 0).to(memory_format=torch.channels_last).train()
    objective, weights = Objective(params.loss, (1, size, size)), params.loss.weights
    optimizer = build_optimizer(params.train.phases[0], model.parameters())
    image = torch.rand(params.train.batch_size, 1, size, size).contiguous(memory_format=torch.channels_last)

    def train(seconds: float) -> float:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            optimizer.zero_grad(set_to_none=True)
            objective(model(image), image, weights, 0.1).total.backward()
            optimizer.step()
            count += len(image)
        return count / (time.perf_counter() - start)

    print(train(0.1), flush=True)
    for line in sys.stdin:
        if setting == "medgen":
            with share_cores():
                train(SETTLE)
                rate = train(float(line))
        else:
            train(SETTLE)
            rate = train(float(line))
        print(rate, flush=True)


if __name__ == "__main__":
    main()
