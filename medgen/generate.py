"""Uses of a trained model: new images, and images through the model and back.

medgen generate --n 25 --label NORMAL --out outputs/new
medgen reconstruct chest.png --out outputs/through
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from medgen import bundle
from medgen.config import Preprocess, Project
from medgen.data.formats.raw import UnreadableImage
from medgen.data.images import read_image
from medgen.data.squares import to_square
from medgen.distributed import pick_device
from medgen.errors import UserError
from medgen.figures import write_grid, write_image
from medgen.files import write_atomic
from medgen.metrics.reconstruction import psnr, ssim
from medgen.priors import find_label, iterate_samples, tells_classes_apart

BATCH_SIZE = 64
MAX_GRID_IMAGES = 100
PAIR_SIDE = 192  # pixels at least of each picture of a pair, so that its caption has room


def run(project: Project, *, n: int, label: str | None, seed: int, model: Path | None, out: Path) -> list[Path]:
    """Writes `n` new images as PNG files and the first hundred as grid.png; returns the images' paths.

    Args:
        project: where artifacts/ is.
        n: how many.
        label: class by name or index; None draws classes as often as the train split has them.
        seed: the same seed gives the same images.
        model: folder with model/ and prior/; None is artifacts/.
        out: folder for the pictures; made where it is absent.

    Raises:
        UserError: model or prior is missing, they do not fit each other, or the label is unknown.
    """
    folder = model or project.model.parent
    network, info, prior = bundle.load_with_prior(folder / "model", folder / "prior", pick_device("auto"))
    labels = None if label is None else torch.full((n,), find_label(label, info.classes, prior, network))
    batches = iterate_samples(prior, network, n, labels, seed, BATCH_SIZE)
    num_batches = math.ceil(n / BATCH_SIZE)
    paths: list[Path] = []
    shown: list[Tensor] = []
    captions: list[str] = []
    console = Console(highlight=False)
    for images, classes in track(batches, "generating", num_batches, console=console, disable=not console.is_terminal):
        names = ["image"] * len(images) if classes is None else [info.classes[c] for c in classes.tolist()]
        for image, name in zip(images, names, strict=True):
            paths.append(out / f"{file_name(name)}_{len(paths):05d}.png")
            write_image(paths[-1], image)
        missing = MAX_GRID_IMAGES - len(captions)
        shown.append(images[:missing])
        captions += names[:missing]
    write_grid(out / "grid.png", torch.cat(shown), captions=captions if tells_classes_apart(prior, network) else None)
    console.print(f"{n} images and grid.png in {out}", markup=False)
    return paths


def reconstruct(project: Project, *, files: Sequence[Path], model: Path | None, out: Path) -> list[dict[str, str]]:
    """Writes each file's picture beside its reconstruction, and reconstructions.csv; returns its rows.

    The picture goes through the preprocessing the model was trained with; PSNR (dB) and SSIM compare
    what comes out of the model to what went in.

    Raises:
        UserError: the model is missing, or files are unreadable; the others are done all the same.
    """
    network, info = bundle.load_generative((model or project.model.parent) / "model", pick_device("auto"))
    device = next(network.parameters()).device
    console = Console(highlight=False)
    rows: list[dict[str, str]] = []
    unreadable: list[str] = []
    taken = {"reconstructions"}
    for file in files:
        try:
            original = load_image(file, info.preprocess)
        except UnreadableImage as error:
            unreadable.append(f"{file}: {error}")
            continue
        with torch.no_grad():
            result = network.reconstruct(original.to(device)).float().cpu()
        scores = {"psnr": f"{float(psnr(original, result)):.2f}", "ssim": f"{float(ssim(original, result)):.4f}"}
        name = _free_name(file_name(file.stem), taken)
        captions = ["original", f"SSIM {scores['ssim']}, {scores['psnr']} dB"]
        scale = math.ceil(PAIR_SIDE / original.shape[-1])
        write_grid(out / f"{name}.png", torch.cat([original, result]), columns=2, captions=captions, scale=scale)
        console.print(f"{file}: PSNR {scores['psnr']} dB, SSIM {scores['ssim']} -> {out / name}.png", markup=False)
        rows.append({"file": str(file), "picture": f"{name}.png", **scores})
    if rows:
        _write_table(out / "reconstructions.csv", rows)
    if unreadable:
        raise UserError("not readable as images:\n" + "\n".join(unreadable))
    return rows


def load_image(path: Path, preprocess: Preprocess) -> Tensor:
    """A file's picture, the middle one of a volume or series, as the model's input (1, C, S, S) in [0, 1].

    Raises:
        UnreadableImage: the file is no image.
    """
    square = to_square(read_image(path, preprocess).pixels, preprocess)
    return torch.from_numpy(square)[None].float() / 255.0


def file_name(text: str) -> str:
    """`text` with what a file name must not hold replaced: class names come from users' folders and tables."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text).lstrip(".") or "image"


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first free number behind it; it is taken from now on."""
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate


def _write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, table.getvalue().encode())
