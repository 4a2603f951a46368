"""Anomaly maps, counterfactuals and inpainting of image files with a trained model (docs/uses.md).

medgen anomaly chest.png --out outputs/anomaly
medgen counterfactual COVID19/chest.png --to NORMAL --out outputs/normal
medgen inpaint chest.png --mask hole.png --out outputs/filled
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from medgen.config import Preprocess
from medgen.errors import UserError
from medgen.inference.anomaly import SCORES, find_anomalies
from medgen.inference.counterfactual import change_label, check_counterfactual
from medgen.inference.inpainting import check_inpainting
from medgen.inference.inpainting import inpaint as fill_hole
from medgen.ingest.formats.raw import Affine, UnreadableImage
from medgen.ingest.images import inspect, open_file, read_image
from medgen.ingest.transforms import preprocess_mask
from medgen.models.bundle import class_index
from medgen.priors import find_label
from medgen.priors.generator import Generator, load_generator
from medgen.reports.figures import differences, flatten, heat, to_colours
from medgen.serving import image_files
from medgen.serving.generate import NewPath, Row, folder_label, write_panels, write_results
from medgen.training.distributed import pick_device

MAX_DISSIMILARITY = 1.0  # of 1 - SSIM that the heat map distinguishes
SHOWN_LIKELIHOOD = 0.995  # quantile of an image's likelihood map that is shown in white


def anomaly(model: Path, out: Path, *, files: Sequence[Path], label: str | None = None) -> list[Row]:
    """Write maps of each image's differences from the train images, and anomalies.csv; return its rows.

    NAME.png shows the image, its reconstruction and the maps; NAME_error.tif, NAME_ssim.tif and, if the prior has a
    map, NAME_likelihood.tif have them as float32, in NIfTI (.nii.gz) for volumes. The scores are described in
    `inference.anomaly`.

    Raises:
        UserError: a part of the model is missing, the label is missing or unknown, or neither model nor prior uses
            labels and one is given; see `write_results`.
    """
    loaded = _load(model)
    index = _optional_label(loaded, label)

    def write_file(number: int, image: Tensor, affine: Affine | None, new_path: NewPath) -> Row:
        device = next(loaded.model.parameters()).device
        labels = None if index is None else torch.tensor([index], device=device)
        generator = torch.Generator().manual_seed(0)  # each file has the draws that it would have alone
        found = find_anomalies(loaded.model, loaded.prior, image.to(device), labels, generator)
        row = {name: f"{value:.4f}" for name, value in zip(SCORES, found.scores[0].tolist(), strict=True)}
        shown = {
            "original": to_colours(image),
            "reconstruction": to_colours(found.reconstruction),
            f"error, mean {row['l1']}": differences(image, found.reconstruction),
            f"1 - SSIM, mean {row['ssim']}": heat(found.dissimilarity, MAX_DISSIMILARITY),
        }
        maps = {"error": found.error, "ssim": found.dissimilarity}
        if found.likelihood is not None:
            most = float(flatten(found.likelihood).quantile(SHOWN_LIKELIHOOD))
            shown[f"likelihood, nll {row['nll']}"] = heat(found.likelihood, most)
            maps["likelihood"] = found.likelihood
        write_panels(new_path(".png"), list(shown.values()), list(shown), loaded.info.preprocess.has_volumes)
        for name, values in maps.items():
            path = new_path(f"_{name}{image_files.map_suffix(loaded.info)}")
            image_files.write_map(path, values[0], loaded.info, affine)
        return row

    return write_results(out, files, loaded.info.preprocess, "anomalies", write_file)


def counterfactual(
    model: Path, out: Path, *, files: Sequence[Path], to: str, label: str | None = None, file_format: str | None = None
) -> list[Row]:
    """Write each image as one of class `to`, and counterfactuals.csv; return its rows.

    NAME.png shows the image, its reconstruction, the counterfactual and the difference of the last two;
    NAME_counterfactual has the counterfactual alone. The refiner is not used.

    Args:
        model: folder with model/, prior/ and refiner/.
        out: folder of the files; created if it does not exist.
        files: the images.
        to: class to change to, by name or index.
        label: class of all files, by name or index. None: the name of a folder that contains the file.
        file_format: of NAME_counterfactual, as in `image_files.writer`. None: png, or nifti of volumes.

    Raises:
        UserError: a part of the model is missing, neither model nor prior can change a label, or a label is missing or
            unknown; see `write_results`.
    """
    loaded = _load(model)
    check_counterfactual(loaded.model, loaded.prior)
    target = find_label(to, loaded.info.classes, loaded.prior, loaded.model)
    own = [class_index(label or folder_label(loaded.info, file), loaded.info.classes) for file in files]
    names = loaded.info.classes
    kind = file_format or image_files.default_format(loaded.info)
    write, suffix = image_files.writer(kind, loaded.info, "a counterfactual"), image_files.SUFFIXES[kind]

    def write_file(number: int, image: Tensor, affine: Affine | None, new_path: NewPath) -> Row:
        device = next(loaded.model.parameters()).device
        labels, others = (torch.tensor([index], device=device) for index in (own[number], target))
        with torch.no_grad():
            rebuilt = loaded.model.reconstruct(image.to(device), labels).float().cpu()
        changed = change_label(loaded.model, loaded.prior, image.to(device), labels, others).cpu()
        size = float((changed - rebuilt).abs().mean())
        shown = [*map(to_colours, (image, rebuilt, changed)), differences(rebuilt, changed)]
        captions = [f"original, {names[own[number]]}", "reconstruction", f"as {names[target]}", "difference"]
        write_panels(new_path(".png"), shown, captions, loaded.info.preprocess.has_volumes)
        write(new_path(f"_counterfactual{suffix}"), changed[0], affine)
        return {"label": names[own[number]], "to": names[target], "change": f"{size:.4f}"}

    return write_results(out, files, loaded.info.preprocess, "counterfactuals", write_file)


def inpaint(
    model: Path, out: Path, *, file: Path, mask: Path, label: str | None = None, file_format: str | None = None
) -> list[Row]:
    """Write the image with the part under `mask` filled, and inpainted.csv; return its row.

    NAME.png shows the image, the hole and the result; NAME_inpainted has the result alone, whose other pixels are
    those of the preprocessed image, in `file_format`: by default png, or nifti of a volume.

    Raises:
        UserError: a part of the model is missing, the model has a codebook, the mask is unreadable, of another shape,
            empty or full, or the label is missing or unknown; see `write_results`.
    """
    loaded = _load(model)
    check_inpainting(loaded.model)
    index = _optional_label(loaded, label)
    hole = _load_mask(mask, file, loaded.info.preprocess)
    kind = file_format or image_files.default_format(loaded.info)
    write, suffix = image_files.writer(kind, loaded.info, "an inpainted image"), image_files.SUFFIXES[kind]

    def write_file(number: int, image: Tensor, affine: Affine | None, new_path: NewPath) -> Row:
        device = next(loaded.model.parameters()).device
        labels = None if index is None else torch.tensor([index], device=device)
        filled = fill_hole(loaded.model, loaded.prior, image.to(device), hole.to(device), labels).cpu()
        shown, captions = [image, torch.where(hole, 0.5, image), filled], ["original", "hole", "filled"]
        write_panels(new_path(".png"), shown, captions, loaded.info.preprocess.has_volumes)
        write(new_path(f"_inpainted{suffix}"), filled[0], affine)
        return {"hole": f"{float(hole.float().mean()):.4f}"}

    return write_results(out, [file], loaded.info.preprocess, "inpainted", write_file)


def _load(model: Path) -> Generator:
    """The model with its prior.

    Raises:
        UserError: a part is missing.
    """
    return load_generator(model / "model", model / "prior", model / "refiner", pick_device("auto"))


def _optional_label(loaded: Generator, label: str | None) -> int | None:
    """Index of the class; None without one, which a conditional model refuses.

    Raises:
        UserError: the label is missing or unknown, or neither model nor prior uses labels.
    """
    if label is None and loaded.model.conditional:
        known = ", ".join(loaded.info.classes)
        raise UserError(f"label: missing, but {loaded.info.model.name} needs one; give --label. Known: {known}")
    return None if label is None else find_label(label, loaded.info.classes, loaded.prior, loaded.model)


def _load_mask(mask: Path, file: Path, preprocess: Preprocess) -> Tensor:
    """The hole (1, 1, H, W) or (1, 1, D, H, W), bool, that a mask file of an image file describes."""
    binary = preprocess.model_copy(update={"mask_values": None})
    try:
        image = read_image(file, preprocess)
        with open_file(mask, binary, mask=True) as opened:
            indices = inspect(mask, binary).indices
            pixels = preprocess_mask(opened.read(indices[len(indices) // 2]), image, mask.name, binary)
    except UnreadableImage as error:
        raise UserError(f"--mask {mask}: {error}") from None
    return torch.from_numpy(pixels)[None] > 0
