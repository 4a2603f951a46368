"""Generate images with a trained model, interpolate and traverse its latents, and reconstruct image files.

medgen generate --n 25 --label NORMAL --out outputs/new
medgen generate --set-condition view=AP,sex=F,findings=effusion+atelectasis --out outputs/ap
medgen generate --format nifti --out outputs/ct
medgen generate --interpolate chest.png other.png --out outputs/path
medgen generate --traverse --out outputs/axes
medgen reconstruct chest.png --out outputs/reconstructed
medgen reconstruct chest.png --uncertainty 50 --out outputs/reconstructed
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from medgen.config import Preprocess
from medgen.console import OUT, say
from medgen.data.conditions import ConditionField
from medgen.data.images import to_floats
from medgen.errors import UserError
from medgen.inference.uncertainty import reconstruction_deviation
from medgen.ingest.formats.raw import Affine, UnreadableImage
from medgen.ingest.images import inspect, open_file, read_image
from medgen.ingest.masks import stem
from medgen.ingest.transforms import paired_settings, preprocess_raw, resize_mask, resize_paired, resized_affine
from medgen.metrics.reconstruction import psnr
from medgen.models import GenerativeModel, bundle
from medgen.models.bundle import BundleInfo, label_to_encode
from medgen.nn.ssim import ssim
from medgen.priors import Prior, find_conditions, find_label, is_conditional, iterate_samples, load_prior
from medgen.priors.axes import PrincipalAxes
from medgen.priors.generator import load_generator
from medgen.reports.figures import flatten, heat, to_colours, write_gif, write_grid
from medgen.reports.fonts import class_captions
from medgen.serving import image_files
from medgen.serving.output import new_files
from medgen.training.distributed import pick_device

BATCH_SIZE = 64
NUM_IMAGES = 25
MAX_GRID_IMAGES = 100
NUM_AXES = 8
AXIS_STEPS = 9
MAX_STEPS = 200  # of an interpolation or along an axis: all are held in memory and shown in one grid
MAX_DEVIATIONS = 3.0  # standard deviations in both directions of an axis
SECONDS_PER_FRAME = 0.15
MIN_PAIR_SIDE = 192  # pixels of each image of a pair, so that its caption fits

NewPath = Callable[[str], Path]  # path of a new file from the end of its name, such as _map.tif
Row = dict[str, str]  # values of a file by column
Write = Callable[[int, Tensor, Affine | None, NewPath], Row]  # arguments as in `write_results`


def run(
    model: Path,
    out: Path,
    *,
    n: int = NUM_IMAGES,
    label: str | None = None,
    seed: int = 0,
    refine: bool = True,
    file_format: str = "png",
    condition: str = "",
) -> list[Path]:
    """Write `n` new images as files and the first hundred as grid.png; return the images' paths.

    Args:
        model: folder with model/, prior/ and refiner/.
        out: folder of the files; created if it does not exist. They replace those of an earlier call.
        label: class by name or index; None draws classes with their frequencies in the train split.
        refine: use the refiner, if there is one, to add detail that the decoder omits.
        file_format: of the images, as in `image_files.writer`.
        condition: further conditions of all images, such as view=AP,sex=F; the value of a mask or image is its file.

    Raises:
        UserError: model, prior or refiner is missing, they do not belong together, the label, a condition or the format
            is unknown, a file is unreadable, or `out` contains other files or cannot be written.
    """
    loaded = load_generator(model / "model", model / "prior", model / "refiner", pick_device("auto"))
    network, info, prior = loaded.model, loaded.info, loaded.prior
    write, suffix = image_files.writer(file_format, info, "a sample"), image_files.SUFFIXES[file_format]
    drawn = dict(zip(info.classes, class_captions(info.classes), strict=True))
    labels = None if label is None else torch.full((n,), find_label(label, info.classes, prior, network))
    one = find_conditions(
        condition, info.space, prior, network, lambda field, path: load_map(field, Path(path), info.preprocess)
    )
    refiner, conditions = loaded.refiner if refine else None, None if one is None else one.expand(n)
    batches = iterate_samples(prior, network, n, labels, seed, BATCH_SIZE, refiner, conditions=conditions)
    num_batches = math.ceil(n / BATCH_SIZE)
    paths: list[Path] = []
    shown: list[Tensor] = []
    captions: list[str] = []
    with new_files(out) as folder:
        for images, classes in track(batches, "generating", num_batches, console=OUT, disable=not OUT.is_terminal):
            names = ["image"] * len(images) if classes is None else [info.classes[c] for c in classes.tolist()]
            for image, name in zip(images, names, strict=True):
                paths.append(out / f"{file_name(name)}_{len(paths):05d}{suffix}")
                write(folder / paths[-1].name, image)
            missing = MAX_GRID_IMAGES - len(captions)
            shown.append(images[:missing])
            captions += [drawn.get(name, name) for name in names[:missing]]
        write_grid(folder / "grid.png", torch.cat(shown), captions=captions if is_conditional(prior, network) else None)
    say(f"{n} images and grid.png in {out}")
    return paths


def interpolate(
    model: Path,
    out: Path,
    *,
    ends: tuple[Path, Path],
    n: int = NUM_IMAGES,
    label: str | None = None,
    file_format: str = "png",
) -> Tensor:
    """Interpolate between the latents of two image files; write `n` images, interpolation.png and .gif.

    A conditional model gets `label`. Without one it gets each file's own class, which is the name of a folder that
    contains it: the first file's for the first half, the second file's for the second half. The refiner is not used.

    Args:
        model: folder with model/.
        out: folder of the files; created if it does not exist.
        n: number of images, with both ends: 2 to 200.
        label: class by name or index.
        file_format: of the images, as in `image_files.writer`.

    Returns:
        The images (n, C, H, W) in [0, 1].

    Raises:
        UserError: n is out of range, the model is missing, a file is unreadable, a label is missing or unknown, the
            model is unconditional and a label is given, or the format is unknown.
    """
    _check_steps(n)
    network, info = bundle.load_generative(model / "model", pick_device("auto"))
    write, suffix = image_files.writer(file_format, info, "an interpolation"), image_files.SUFFIXES[file_format]
    labels = [_find_label(network, info, label, end) for end in ends]
    originals = torch.cat([_load_end(end, info.preprocess) for end in ends])  # (2, C, H, W)
    images, path_labels = interpolate_images(network, originals, None if labels[0] is None else torch.tensor(labels), n)
    captions = [f"{weight:.2f}" for weight in torch.linspace(0.0, 1.0, n).tolist()]
    if path_labels is not None:
        captions = [f"{text} as {info.classes[c]}" for c, text in zip(path_labels.tolist(), captions, strict=True)]
    shown = torch.cat([originals[:1], images, originals[1:]])
    with new_files(out) as folder:
        for number, image in enumerate(images):
            write(folder / f"path_{number:05d}{suffix}", image)
        write_grid(folder / "interpolation.png", shown, captions=["first file", *captions, "second file"])
        _write_animation(folder / "interpolation.gif", [image[None] for image in images], columns=1)
    say(f"{n} images, interpolation.png and .gif in {out}")
    return images


@torch.no_grad()
def interpolate_images(
    network: GenerativeModel, ends: Tensor, labels: Tensor | None, n: int
) -> tuple[Tensor, Tensor | None]:
    """Images (n, C, H, W) between the latents of two images (2, C, H, W) in [0, 1], and their labels (n,).

    `labels` (2,) are of the ends: the first half of the images is decoded as the first, the second half as the second.
    """
    device = next(network.parameters()).device
    end_labels = None if labels is None else labels.to(device)
    latent = network.encode(ends.to(device), end_labels)
    # Samples of N(0, I) in many dimensions lie near a sphere, which a straight line leaves. Latent grids are
    # interpolated linearly, because their posterior is far narrower.
    spherical = latent.logvar is not None and latent.mean.dim() == 2
    weights = torch.linspace(0.0, 1.0, n, device=device)
    path = (slerp if spherical else lerp)(latent.mean[0], latent.mean[1], weights)
    path_labels = None if end_labels is None else end_labels[(weights > 0.5).long()]
    return decode_batches(network, path, path_labels), path_labels


@torch.no_grad()
def traverse(model: Path, out: Path, *, n: int = AXIS_STEPS, label: str | None = None) -> Tensor:
    """Traverse the principal axes of the latents; write traversal.png, one axis a row, and traversal.gif.

    Each axis is followed from -3 to 3 standard deviations around the mean latent of the train split. The axes are the
    principal components of the train split's latents, stored in the prior, in order of variance. The refiner is not
    used.

    Args:
        model: folder with model/ and prior/.
        out: folder of the files; created if it does not exist.
        n: number of images along each axis, with both ends: 2 to 200.
        label: class by name or index, for a conditional model.

    Returns:
        The images (axes, n, C, H, W) in [0, 1].

    Raises:
        UserError: n is out of range, model or prior is missing, the prior has no axes, a label is missing or unknown,
            or the model is unconditional and a label is given.
    """
    _check_steps(n)
    network, info = bundle.load_generative(model / "model", pick_device("auto"))
    prior = load_prior(model / "prior", bundle.digest(model / "model"))
    label_index = _find_label(network, info, label, None)
    axes = _axes(prior)
    num_axes = min(NUM_AXES, len(axes.scales))
    steps = torch.linspace(-MAX_DEVIATIONS, MAX_DEVIATIONS, n)
    white = torch.zeros(num_axes, n, len(axes.scales))
    white[torch.arange(num_axes), :, torch.arange(num_axes)] = steps
    path = axes.colour(white.flatten(0, 1)).view(-1, *network.latent_shape).to(next(network.parameters()).device)
    labels = None if label_index is None else torch.full((len(path),), label_index, device=path.device)
    images = decode_batches(network, path, labels)
    captions = [f"axis {axis + 1}: {step:+.2f}" for axis in range(num_axes) for step in steps.tolist()]
    with new_files(out) as folder:
        write_grid(folder / "traversal.png", images, columns=n, captions=captions)
        images = images.view(num_axes, n, *images.shape[1:])
        _write_animation(folder / "traversal.gif", [*images.unbind(1), *images.flip(1)[:, 1:].unbind(1)], columns=4)
    say(f"{num_axes} axes: traversal.png and .gif in {out}")
    return images


def lerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Linear interpolation between two latents (...) with weights (n,) of the second; (n, ...)."""
    weights = weights.view(-1, *[1] * first.dim())
    return (1.0 - weights) * first + weights * second


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation between two latents (D,) with weights (n,) of the second; (n, D).

    Latents of nearly the same or opposite direction are interpolated linearly.

    Source: Shoemake: Animating rotation with quaternion curves, 1985; for latents White: Sampling generative networks,
    2016.
    """
    cosine = torch.dot(first, second) / (first.norm() * second.norm()).clamp_min(1e-12)
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    if float(angle.sin()) < 1e-3:
        return lerp(first, second, weights)
    weights = weights[:, None]
    return (((1.0 - weights) * angle).sin() * first + (weights * angle).sin() * second) / angle.sin()


def _check_steps(n: int) -> None:
    if not 2 <= n <= MAX_STEPS:
        raise UserError(f"--n: found {n}, expected 2 to {MAX_STEPS} images")


def _load_end(end: Path, preprocess: Preprocess) -> Tensor:
    try:
        return load_image(end, preprocess)
    except UnreadableImage as error:
        raise UserError(f"--interpolate: {end}: not readable as an image: {error}") from None


def decode_batches(network: GenerativeModel, latents: Tensor, labels: Tensor | None) -> Tensor:
    """Images (N, C, H, W) in [0, 1], on the CPU, of latents (N, ...) and labels (N,) on the model's device."""
    batches = torch.split(torch.arange(len(latents)), BATCH_SIZE)
    decoded = [network.decode(latents[rows], None if labels is None else labels[rows]) for rows in batches]
    return torch.cat([images.float().cpu() for images in decoded])


def _find_label(network: GenerativeModel, info: BundleInfo, label: str | None, file: Path | None) -> int | None:
    """The index of `label` for a conditional model, by default of the file's folder; None for other models."""
    if network.conditional and label is None and file is not None:
        label = folder_label(info, file)
    return label_to_encode(network, info, label)


def folder_label(info: BundleInfo, file: Path) -> str:
    """The class that a folder of `file` has the name of, the innermost one.

    Raises:
        UserError: there is no such folder.
    """
    label = next((part for part in reversed(file.absolute().parts[:-1]) if part in info.classes), None)
    if label is None:
        raise UserError(
            f"label: missing, and no folder of {file} has the name of a class; give --label. Known: "
            f"{', '.join(info.classes)}"
        )
    return label


def _axes(prior: Prior) -> PrincipalAxes:
    """The principal axes of the train split's latents."""
    axes = getattr(prior, "axes", None)
    if not isinstance(axes, PrincipalAxes) or len(axes.scales) == 0:
        raise UserError(
            f"--traverse: prior {prior.name!r} has no axes of the latents; run `medgen prior --set prior.name=gmm`"
        )
    return axes


def _write_animation(path: Path, frames: Sequence[Tensor], columns: int) -> None:
    """Write a GIF whose frames are grids of images (N, C, H, W)."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{number:05d}.png" for number in range(len(frames))]
        for file, frame in zip(files, frames, strict=True):
            write_grid(file, frame, columns)
        write_gif(path, files, SECONDS_PER_FRAME)


def reconstruct(
    model: Path,
    out: Path,
    *,
    files: Sequence[Path],
    label: str | None = None,
    file_format: str = "png",
    uncertainty: int = 0,
) -> list[Row]:
    """Write each image with its reconstruction to a PNG file, and reconstructions.csv; return its rows.

    A `file_format` other than png adds a file NAME_reconstruction of that format (`image_files.writer`).

    With `uncertainty` N, the PNG file also shows the standard deviation of N draws from the posterior of a variational
    model (`inference.uncertainty`), NAME_uncertainty.tif, or .nii.gz of a volume, has it as float32 in grey values from
    0 to 1, and the column uncertainty its mean.

    The image gets the preprocessing of the training; PSNR (dB) and SSIM compare the reconstruction with the
    preprocessed image. A conditional model gets `label`. Without one it gets each file's own class, which is the name
    of a folder that contains it. The refiner is not used, because it would add detail that the image does not have.

    Raises:
        UserError: the model is missing, a label is missing or unknown, the model is unconditional and a label is given,
            the format is unknown, the model has no posterior to draw from, `out` contains other files or cannot be
            written, or files are unreadable. All readable files are written first.
    """
    network, info = bundle.load_generative(model / "model", pick_device("auto"))
    device = next(network.parameters()).device
    write, suffix = image_files.writer(file_format, info, "a reconstruction"), image_files.SUFFIXES[file_format]
    labels = [_find_label(network, info, label, file) for file in files]

    def write_file(number: int, original: Tensor, affine: Affine | None, new_path: NewPath) -> Row:
        index = labels[number]
        image_label = None if index is None else torch.tensor([index], device=device)
        with torch.no_grad():
            result = network.reconstruct(original.to(device), image_label).float().cpu()
        scores = {"psnr": f"{float(psnr(original, result)):.2f}", "ssim": f"{float(ssim(original, result)):.4f}"}
        shown, captions = [original, result], ["original", f"SSIM {scores['ssim']}, {scores['psnr']} dB"]
        png = new_path(".png")
        if uncertainty:
            generator = torch.Generator().manual_seed(0)  # each file has the draws that it would have alone
            deviation = reconstruction_deviation(network, original.to(device), image_label, uncertainty, generator)
            scores["uncertainty"] = f"{float(deviation.mean()):.4f}"
            shown = [*map(to_colours, shown), heat(deviation.mean(dim=1, keepdim=True))]
            captions.append(f"deviation, mean {scores['uncertainty']}")
            image_files.write_map(new_path(f"_uncertainty{image_files.map_suffix(info)}"), deviation[0], info, affine)
        write_panels(png, shown, captions, info.preprocess.has_volumes)
        if file_format != "png":
            write(new_path(f"_reconstruction{suffix}"), result[0], affine)
        return scores

    return write_results(out, files, info.preprocess, "reconstructions", write_file)


def write_results(out: Path, files: Sequence[Path], preprocess: Preprocess, table: str, write: Write) -> list[Row]:
    """Call `write` for each file; write TABLE.csv and return its rows.

    The arguments of `write` are the file's number, its image (1, C, H, W), the place of a volume, and a function from
    the end of a name to a path. It writes NAME.png, whose path that function gives for ".png", and other files of that
    name, and returns the image's scores by column. The columns file and image are added.

    Raises:
        UserError: `out` contains other files or cannot be written, or files are unreadable. All readable files are
            written first.
    """
    rows: list[Row] = []
    unreadable: list[str] = []
    taken = {table}
    with new_files(out) as folder:
        for number, file in enumerate(files):
            try:
                image, affine = load_placed(file, preprocess)
            except UnreadableImage as error:
                unreadable.append(f"{file}: {error}")
                continue
            paths: dict[str, Path] = {}

            name = file.resolve().name if file.is_dir() else stem(file.name)

            def new_path(end: str, stem: str = file_name(name), paths: dict[str, Path] = paths) -> Path:
                body, dot, suffix = end.partition(".")
                paths[end] = folder / f"{_unused_name(stem + body, taken)}{dot}{suffix}"
                return paths[end]

            scores = write(number, image, affine, new_path)
            name = paths[".png"].name
            values = ", ".join(f"{column} {value}" for column, value in scores.items())
            say(f"{file}: {values} -> {out / name}")
            rows.append({"file": str(file), "image": name, **scores})
        if not rows:
            raise _unreadable_error(unreadable)
        pd.DataFrame(rows).to_csv(folder / f"{table}.csv", index=False, lineterminator="\n")
    if unreadable:
        raise _unreadable_error(unreadable)
    return rows


def write_panels(path: Path, shown: Sequence[Tensor], captions: Sequence[str], volumes: bool) -> None:
    """Write images (1, C, H, W) of one file, with captions; those of `volumes`, three planes wide, below each other."""
    panels = torch.cat([flatten(image) for image in shown])
    num_planes, columns = (3, 1) if volumes else (1, len(panels))
    scale = math.ceil(MIN_PAIR_SIDE * num_planes / panels.shape[-1])
    write_grid(path, panels, columns, captions, scale)


def _unreadable_error(reasons: Sequence[str]) -> UserError:
    return UserError("not readable as images:\n" + "\n".join(reasons))


def load_image(path: Path, preprocess: Preprocess) -> Tensor:
    """The image of a file as input of a model: (1, C, H, W) in [0, 1]; the middle slice of a volume or series.

    For a model of volumes, the volume (1, C, D, H, W).

    Raises:
        UnreadableImage: the file is not a readable image.
    """
    return load_placed(path, preprocess)[0]


def load_placed(path: Path, preprocess: Preprocess) -> tuple[Tensor, Affine | None]:
    """As `load_image`, with the affine of a volume from indices of D, H and W to mm; None if its file has none."""
    raw = read_image(path, preprocess)
    pixels = preprocess_raw(raw, preprocess)
    return to_floats(torch.from_numpy(pixels)[None]), resized_affine(raw, preprocess)


def load_map(field: ConditionField, path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Class numbers of a mask file or grey values of a paired image, (1, H, W), resized as those of the train images.

    Of a volume its middle slice; for a model of volumes (1, D, H, W).

    Raises:
        UserError: the file is not readable as a mask or image.
    """
    try:
        if field.kind == "image":
            return resize_paired(read_image(path, paired_settings(preprocess)), preprocess)
        indices = inspect(path, preprocess).indices
        with open_file(path, preprocess, mask=True) as file:
            raw = file.read(indices[len(indices) // 2])
        return resize_mask(raw.pixels, preprocess, raw.spacing)
    except UnreadableImage as error:
        raise UserError(f"condition: {path}: not readable as {field.describe()}: {error}") from None


def file_name(text: str) -> str:
    """`text` with characters that are unsafe in file names replaced; class names come from users' files."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text).lstrip(".") or "image"


def _unused_name(name: str, taken: set[str]) -> str:
    """`name`, with the first unused number appended if it is taken; adds the result to `taken`."""
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate
