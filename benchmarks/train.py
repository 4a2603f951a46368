"""Training speed of the spatial VAE by memory format and precision: images per second, and ratios within one run.

python benchmarks/train.py [--rounds 5]
"""

import argparse
import statistics
import time

import torch

from medgen.config import Loss, Model, Phase, Weights
from medgen.models import build_model
from medgen.models.base import ModelOutput
from medgen.training.losses import Objective
from medgen.training.optimizers import build_optimizer, clip_gradients

SHAPE, BATCH, STEPS = (1, 64, 64), 16, 10
WAYS = {  # name: memory format, autocast to bf16
    "contiguous, fp32": (torch.contiguous_format, False),
    "channels_last, fp32": (torch.channels_last, False),
    "channels_last, bf16 autocast": (torch.channels_last, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="each method is timed once per round, in turn")
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: prepare(device, *way) for name, way in WAYS.items()}
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            seconds = time_steps(step, device)
            if round_number:  # round 0 is a warm-up
                rates[name].append(BATCH * STEPS / seconds)
    first = next(iter(WAYS))
    print(f"{device}, {torch.get_num_threads()} threads, {SHAPE[1]} px, batch {BATCH}\n")
    print("| memory format, precision | images/s | ratio |\n|---|---|---|")
    for name in WAYS:
        ratios = [a / b for a, b in zip(rates[name], rates[first], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {spread} |")


def prepare(device: torch.device, memory_format: torch.memory_format, bf16: bool):
    """Return a function that does one training step of a new model."""
    torch.manual_seed(0)
    params = Model(base_channels=16, latent_channels=16, latent_size=8)
    model = build_model(params, SHAPE, 0).to(device)
    model.to(memory_format=memory_format)
    objective = Objective(Loss(), SHAPE)
    optimizer = build_optimizer(Phase(name="a", epochs=1), model.parameters())
    image = torch.rand(BATCH, *SHAPE, device=device).contiguous(memory_format=memory_format)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output: ModelOutput = model(image)
        losses = objective(output, image, Weights(l1=1.0, ssim=0.5), 0.1)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()

    return step


def time_steps(step, device: torch.device) -> float:
    """Seconds of STEPS steps."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
