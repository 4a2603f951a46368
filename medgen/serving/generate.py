"""Uses of a trained model: new images, and images through the model and back.

medgen generate --n 25 --label NORMAL --out outputs/new
medgen generate --interpolate chest.png other.png --out outputs/path
medgen generate --traverse --out outputs/axes
medgen reconstruct chest.png --out outputs/through
"""

import csv
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from medgen.config import Preprocess, Project
from medgen.errors import UserError
from medgen.ingest.formats.raw import UnreadableImage
from medgen.ingest.images import read_image
from medgen.ingest.transforms import to_square
from medgen.io import write_atomic
from medgen.metrics.reconstruction import psnr, ssim
from medgen.models import GenerativeModel, bundle
from medgen.models.bundle import BundleInfo, label_to_encode
from medgen.priors import Prior, find_label, iterate_samples, load_prior, tells_classes_apart
from medgen.priors.axes import PrincipalAxes
from medgen.priors.generator import load_generator
from medgen.reports.figures import write_gif, write_grid, write_image
from medgen.training.distributed import pick_device

BATCH_SIZE = 64
NUM_IMAGES = 25
MAX_GRID_IMAGES = 100
NUM_AXES = 8
AXIS_STEPS = 9
MAX_STEPS = 200  # of a way or along an axis: all of them are held at once, and stand in one grid
MAX_DEVIATIONS = 3.0  # of an axis, either way
SECONDS_PER_FRAME = 0.15
PAIR_SIDE = 192  # pixels at least of each picture of a pair, so that its caption has room


def run(
    project: Project,
    *,
    n: int = NUM_IMAGES,
    label: str | None,
    seed: int,
    model: Path | None,
    out: Path,
    refine: bool = True,
) -> list[Path]:
    """Writes `n` new images as PNG files and the first hundred as grid.png; returns the images' paths.

    Args:
        project: where artifacts/ is.
        n: how many.
        label: class by name or index; None draws classes as often as the train split has them.
        seed: the same seed gives the same images.
        model: folder with model/, prior/ and refiner/; None is artifacts/.
        out: folder for the pictures; made where it is absent.
        refine: whether the refiner, where the model has one, adds the detail that the decoder leaves out.

    Raises:
        UserError: model, prior or refiner is missing, they do not fit each other, or the label is unknown.
    """
    folder = model or project.model.parent
    loaded = load_generator(folder / "model", folder / "prior", folder / "refiner", pick_device("auto"))
    network, info, prior = loaded.model, loaded.info, loaded.prior
    labels = None if label is None else torch.full((n,), find_label(label, info.classes, prior, network))
    batches = iterate_samples(prior, network, n, labels, seed, BATCH_SIZE, loaded.refiner if refine else None)
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


@torch.no_grad()
def interpolate(
    project: Project, *, ends: tuple[Path, Path], n: int = NUM_IMAGES, label: str | None, model: Path | None, out: Path
) -> Tensor:
    """Writes the way from one image file to another through the latents: `n` pictures, interpolation.png and .gif.

    A model that looks at labels is given `label`, or without one each file's own class, which is the name of a folder
    it stands in: the first file's up to the middle of the way, the second's from there. The refiner is not used.

    Args:
        project: where artifacts/ is.
        ends: the two files.
        n: pictures on the way, both ends with them: 2 to 200.
        label: class by name or index, for a model that looks at labels.
        model: folder with model/; None is artifacts/.
        out: folder for the pictures; made where it is absent.

    Returns:
        The pictures (n, C, H, W) in [0, 1].

    Raises:
        UserError: n is out of range, the model is missing, a file is unreadable, or a label is missing, unknown or
            of no use.
    """
    _check_steps(n)
    network, info = bundle.load_generative((model or project.model.parent) / "model", pick_device("auto"))
    device = next(network.parameters()).device
    labels = [_label_for(network, info, label, end) for end in ends]
    originals = torch.cat([_load_end(end, info.preprocess) for end in ends])
    given = None if labels[0] is None else torch.tensor(labels, device=device)
    latent = network.encode(originals.to(device), given)
    # N(0, I) in many dimensions is a shell, which a straight line leaves; a grid's posterior is far narrower than that
    spherical = latent.logvar is not None and latent.mean.dim() == 2
    shares = torch.linspace(0.0, 1.0, n, device=device)
    path = (slerp if spherical else lerp)(latent.mean[0], latent.mean[1], shares)
    along = None if given is None else given[(shares > 0.5).long()]
    images = _decode(network, path, along)
    captions = [f"{share:.2f}" for share in shares.tolist()]
    if along is not None:
        captions = [f"{text} as {info.classes[c]}" for c, text in zip(along.tolist(), captions, strict=True)]
    for number, image in enumerate(images):
        write_image(out / f"path_{number:05d}.png", image)
    shown = torch.cat([originals[:1], images, originals[1:]])
    write_grid(out / "interpolation.png", shown, captions=["first file", *captions, "second file"])
    _write_film(out / "interpolation.gif", [image[None] for image in images], columns=1)
    Console(highlight=False).print(f"{n} images, interpolation.png and .gif in {out}", markup=False)
    return images


@torch.no_grad()
def traverse(project: Project, *, n: int = AXIS_STEPS, label: str | None, model: Path | None, out: Path) -> Tensor:
    """Writes what the latent's main axes do: traversal.png, an axis a row, and traversal.gif, all axes at once.

    From the train split's mean latent each axis is followed from -3 to 3 of its standard deviations; axes are the
    principal ones of the train split's latents, as the prior holds them, most variance first. The refiner is not used.

    Args:
        project: where artifacts/ is.
        n: pictures along each axis, both ends with them: 2 to 200.
        label: class by name or index, for a model that looks at labels.
        model: folder with model/ and prior/; None is artifacts/.
        out: folder for the pictures; made where it is absent.

    Returns:
        The pictures (axes, n, C, H, W) in [0, 1].

    Raises:
        UserError: n is out of range, model or prior is missing, the prior knows no axes, or a label is missing,
            unknown or of no use.
    """
    _check_steps(n)
    folder = model or project.model.parent
    network, info = bundle.load_generative(folder / "model", pick_device("auto"))
    prior = load_prior(folder / "prior", bundle.digest(folder / "model"))
    chosen = _label_for(network, info, label, None)
    axes = _axes(prior)
    num_axes = min(NUM_AXES, len(axes.scales))
    steps = torch.linspace(-MAX_DEVIATIONS, MAX_DEVIATIONS, n)
    white = torch.zeros(num_axes, n, len(axes.scales))
    white[torch.arange(num_axes), :, torch.arange(num_axes)] = steps
    path = axes.colour(white.flatten(0, 1)).view(-1, *network.latent_shape).to(next(network.parameters()).device)
    given = None if chosen is None else torch.full((len(path),), chosen, device=path.device)
    images = _decode(network, path, given)
    captions = [f"axis {axis + 1}: {step:+.2f}" for axis in range(num_axes) for step in steps.tolist()]
    write_grid(out / "traversal.png", images, columns=n, captions=captions)
    images = images.view(num_axes, n, *images.shape[1:])
    _write_film(out / "traversal.gif", [*images.unbind(1), *images.flip(1)[:, 1:].unbind(1)], columns=4)
    Console(highlight=False).print(f"{num_axes} axes: traversal.png and .gif in {out}", markup=False)
    return images


def lerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Latents (n, ...) on the straight line between two (...), at `shares` (n,) of the way."""
    shares = shares.view(-1, *[1] * first.dim())
    return (1.0 - shares) * first + shares * second


def slerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Latents (n, D) on the arc between two (D,), at `shares` (n,) of the way; of nearly one direction: on the line.

    Source: Shoemake: Animating rotation with quaternion curves, 1985; for latents White: Sampling generative networks,
    2016.
    """
    cosine = torch.dot(first, second) / (first.norm() * second.norm()).clamp_min(1e-12)
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    if float(angle.sin()) < 1e-3:
        return lerp(first, second, shares)
    shares = shares[:, None]
    return (((1.0 - shares) * angle).sin() * first + (shares * angle).sin() * second) / angle.sin()


def _check_steps(n: int) -> None:
    if not 2 <= n <= MAX_STEPS:
        raise UserError(f"--n: found {n}, expected 2 to {MAX_STEPS} pictures from one end to the other")


def _load_end(end: Path, preprocess: Preprocess) -> Tensor:
    try:
        return load_image(end, preprocess)
    except UnreadableImage as error:
        raise UserError(f"--interpolate: {end}: not readable as an image: {error}") from None


def _decode(network: GenerativeModel, latents: Tensor, labels: Tensor | None) -> Tensor:
    parts = torch.split(torch.arange(len(latents)), BATCH_SIZE)
    decoded = [network.decode(latents[rows], None if labels is None else labels[rows]) for rows in parts]
    return torch.cat([images.float().cpu() for images in decoded])


def _label_for(network: GenerativeModel, info: BundleInfo, label: str | None, file: Path | None) -> int | None:
    """The label that a model which looks at labels is given; None for other models."""
    if network.conditional and label is None and file is not None:
        label = next((part for part in reversed(file.absolute().parts[:-1]) if part in info.classes), None)
        if label is None:
            raise UserError(
                f"label: {info.model.name} looks at labels and {file} stands in no folder of a class's name; "
                f"give --label. Known: {', '.join(info.classes)}"
            )
    return label_to_encode(network, info, label)


def _axes(prior: Prior) -> PrincipalAxes:
    """The principal axes of the train split's latents."""
    axes = getattr(prior, "axes", None)
    if not isinstance(axes, PrincipalAxes) or len(axes.scales) == 0:
        raise UserError(
            f"--traverse: prior {prior.name!r} knows no axes of the latents; run `medgen prior --set prior.name=gmm`"
        )
    return axes


def _write_film(path: Path, frames: Sequence[Tensor], columns: int) -> None:
    """A GIF whose frames are grids of images (N, C, H, W)."""
    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / f"{number:05d}.png" for number in range(len(frames))]
        for place, frame in zip(places, frames, strict=True):
            write_grid(place, frame, columns)
        write_gif(path, places, SECONDS_PER_FRAME)


def reconstruct(
    project: Project, *, files: Sequence[Path], label: str | None, model: Path | None, out: Path
) -> list[dict[str, str]]:
    """Writes each file's picture beside its reconstruction, and reconstructions.csv; returns its rows.

    The picture goes through the preprocessing the model was trained with; PSNR (dB) and SSIM compare
    what comes out of the model to what went in. A model that looks at labels is given `label`, or without one each
    file's own class, which is the name of a folder it stands in. The refiner is not used: it would draw detail that the
    picture does not have.

    Raises:
        UserError: the model is missing, a label is missing, unknown or of no use, or files are unreadable; the others
            are done all the same.
    """
    network, info = bundle.load_generative((model or project.model.parent) / "model", pick_device("auto"))
    device = next(network.parameters()).device
    labels = [_label_for(network, info, label, file) for file in files]
    console = Console(highlight=False)
    rows: list[dict[str, str]] = []
    unreadable: list[str] = []
    taken = {"reconstructions"}
    for file, number in zip(files, labels, strict=True):
        try:
            original = load_image(file, info.preprocess)
        except UnreadableImage as error:
            unreadable.append(f"{file}: {error}")
            continue
        with torch.no_grad():
            given = None if number is None else torch.tensor([number], device=device)
            result = network.reconstruct(original.to(device), given).float().cpu()
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
