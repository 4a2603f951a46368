"""Write a grid of real test images and generated ones in random order, for a blind test.

python benchmarks/shuffled_grid.py --out FOLDER [--project FOLDER] [--n 24] [--seed 0]

Writes FOLDER/grid.png with numbered images and FOLDER/key.txt with the answer for each number: real or generated.
Generated images come from the project's model, prior and refiner and have the classes of the real ones.
"""

import argparse
from pathlib import Path

import torch

from medgen.config import Project
from medgen.data.store import open_store
from medgen.priors import is_conditional, sample_images
from medgen.priors.generator import load_generator
from medgen.reports.figures import write_grid
from medgen.training.distributed import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path(), help="a folder after `dvc repro`")
    parser.add_argument(
        "--n", type=int, default=24, help="number of real images; the number of generated ones is equal"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images, the samples and the order")
    parser.add_argument("--out", type=Path, required=True, help="folder for grid.png and key.txt")
    arguments = parser.parse_args()
    project = Project(arguments.project)
    random = torch.Generator().manual_seed(arguments.seed)
    test = open_store(project.dataset).split("test")
    parts = load_generator(project.model, project.prior, project.refiner, pick_device("auto"))
    labels = torch.from_numpy(test.labels.copy())
    usable = torch.arange(len(labels))
    if conditional := is_conditional(parts.prior, parts.model):
        known = parts.prior.frequencies > 0
        usable = ((labels >= 0) & known[labels.clamp(min=0)]).nonzero()[:, 0]
    if not 1 <= arguments.n <= len(usable):
        parser.error(f"--n: found {arguments.n}, expected 1 to {len(usable)}, the number of test images")
    rows = usable[torch.randperm(len(usable), generator=random)[: arguments.n]]
    asked = labels[rows] if conditional else None
    drawn = sample_images(parts.prior, parts.model, arguments.n, asked, arguments.seed, refiner=parts.refiner)
    generated = (drawn.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    real = torch.from_numpy(test.images[rows.numpy()])
    order = torch.randperm(2 * arguments.n, generator=random)
    numbers = [str(number) for number in range(1, len(order) + 1)]
    write_grid(arguments.out / "grid.png", torch.cat([real, generated])[order], captions=numbers)
    kinds = ["real" if index < arguments.n else "generated" for index in order.tolist()]
    lines = [f"{number} {kind}\n" for number, kind in zip(numbers, kinds, strict=True)]
    (arguments.out / "key.txt").write_text("".join(lines))
    print(f"{arguments.out / 'grid.png'}: {len(order)} images; the answers are in {arguments.out / 'key.txt'}")


if __name__ == "__main__":
    main()
