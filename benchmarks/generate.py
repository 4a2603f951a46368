"""Sampling speed by prior and refiner: images per second, and ratios within one run.

Weights are random; the speed is that of trained ones.

python benchmarks/generate.py [--rounds 3] [--images 128]
"""

import argparse
import statistics
import time

import torch

from medgen.config import Model, Prior, Refiner
from medgen.models import GenerativeModel, build_model
from medgen.priors import ANALYTIC, NEURAL, iterate_samples
from medgen.priors.refiner import Refiner as ImageRefiner

SHAPE, NUM_LATENTS, BATCH = (1, 64, 64), 512, 64
SPATIAL = Model(name="spatial_vae", base_channels=16, latent_channels=16, latent_size=8)
CODES = Model(name="vqvae", base_channels=16, latent_channels=16, latent_size=16)
WAYS: dict[str, tuple[Model, Prior] | tuple[Model, Prior, Refiner]] = {
    "8×8×16, normal": (SPATIAL, Prior(name="normal")),
    "8×8×16, normal, refined in 4 midpoint steps": (SPATIAL, Prior(name="normal"), Refiner(channels=48)),
    "8×8×16, normal, refined in 4 Euler steps": (SPATIAL, Prior(name="normal"), Refiner(channels=48, solver="euler")),
    "8×8×16, gmm": (SPATIAL, Prior(name="gmm", components=(4,))),
    "8×8×16, flow, 25 midpoint steps": (SPATIAL, Prior(name="flow")),
    "8×8×16, flow, 10 midpoint steps": (SPATIAL, Prior(name="flow", sampling_steps=10)),
    "8×8×16, flow, 10 Euler steps": (SPATIAL, Prior(name="flow", sampling_steps=10, solver="euler")),
    "8×8×16, flow, 10 Euler steps, guidance 2": (
        SPATIAL,
        Prior(name="flow", sampling_steps=10, solver="euler", guidance=2.0),
    ),
    "16×16 codes, gmm": (CODES, Prior(name="gmm", components=(4,))),
    "16×16 codes, tokens, 10 steps": (CODES, Prior(name="tokens")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="each method is timed once per round, in turn")
    parser.add_argument("--images", type=int, default=128, help="number of images per measurement")
    arguments = parser.parse_args()
    draws = {name: prepare(arguments.images, *way) for name, way in WAYS.items()}
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_number in range(arguments.rounds + 1):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw()
            if round_number:  # round 0 is a warm-up
                rates[name].append(arguments.images / (time.perf_counter() - start))
    first = next(iter(WAYS))
    device = "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    print(f"{device}, {SHAPE[1]} px, {arguments.images} images in batches of {BATCH}\n")
    print("| model, prior, refiner | images/s | ratio |\n|---|---|---|")
    for name in WAYS:
        ratios = [a / b for a, b in zip(rates[name], rates[first], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {spread} |")


def prepare(n: int, sizes: Model, params: Prior, refiner_params: Refiner | None = None):
    """Return a function that draws `n` images of a model, a prior and a refiner of two classes."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(sizes, SHAPE, 2).to(device).eval()
    assert isinstance(model, GenerativeModel)
    codes = None if model.codebook is None else model.codebook.cpu()
    latents = torch.randn(NUM_LATENTS, *model.latent_shape)
    if codes is not None:
        places = torch.randint(len(codes), (NUM_LATENTS, *model.latent_shape[1:]))
        latents = codes[places].movedim(-1, 1)
    labels = torch.arange(NUM_LATENTS) % 2
    name = params.name or "gmm"
    if name in ANALYTIC:
        prior = ANALYTIC[name].fit(latents, labels, 2, params)
    else:
        prior = NEURAL[name].create(latents, labels, 2, params, None, codes)
        prior.network.to(device)
    refiner = None
    if refiner_params:
        spectrum = torch.ones(1, SHAPE[1], SHAPE[2] // 2 + 1)
        refiner = ImageRefiner.create(refiner_params, SHAPE, 2, torch.ones(1), spectrum, torch.ones(model.latent_shape))
        refiner.network.to(device)

    def draw() -> None:
        for _ in iterate_samples(prior, model, n, None, seed=0, batch_size=BATCH, refiner=refiner):
            pass

    return draw


if __name__ == "__main__":
    main()
