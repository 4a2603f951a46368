"""Draw docs/images/concepts.png: an image, its latent and its reconstruction; a latent of the prior and its image.

python benchmarks/concepts_figure.py --out FILE [--project FOLDER] [--label NORMAL]

Publish the figure only if the project's data may be published: it shows a test image.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from medgen.config import Project
from medgen.data.store import open_store
from medgen.priors import find_label
from medgen.priors.generator import load_generator

SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path(), help="a folder after `dvc repro`")
    parser.add_argument("--label", default="NORMAL", help="class of both images")
    parser.add_argument("--out", type=Path, required=True, help="image file")
    arguments = parser.parse_args()
    project = Project(arguments.project)
    store = open_store(project.dataset)
    parts = load_generator(project.model, project.prior, project.refiner, torch.device("cpu"))
    model, prior, refiner = parts.model, parts.prior, parts.refiner
    test = store.split("test")
    if refiner is None:
        parser.error("--project: expected a project with a refiner")
    label = torch.tensor([find_label(arguments.label, store.classes, prior, model)])
    row = (torch.from_numpy(test.labels.copy()) == label).nonzero()[0]
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        image = torch.from_numpy(test.images[row.numpy()]).float() / 255.0
        encoded, drawn = model.encode(image, label).mean, prior.sample(1, label, random)
        rows = [("test image", image, encoded), ("", None, drawn)]
        figure, axes = plt.subplots(2, 4, figsize=(9, 4.9), dpi=110)
        for (name, original, latent), cells in zip(rows, axes, strict=True):
            decoded = model.decode(latent, label)
            refined = refiner.sample(model, latent, label, random)
            latent_name = "its latent (encoder)" if original is not None else "a latent drawn from the prior"
            shown = [(name, original), (latent_name, latent[:, :1]), ("decoded", decoded), ("refined", refined)]
            for cell, (title, pixels) in zip(cells, shown, strict=True):
                cell.axis("off")
                if pixels is not None:
                    limits = {} if title == latent_name else {"vmin": 0.0, "vmax": 1.0}
                    cell.imshow(pixels[0, 0], cmap="viridis" if title == latent_name else "gray", **limits)
                    cell.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
