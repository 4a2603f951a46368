"""Reorganize the published files of some datasets into a layout that `medgen data import` reads.

Each function changes a freshly unpacked folder in place: reorganize("montgomery", folder).
"""

import csv
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from medgen.errors import UserError

_Row = tuple[str, str, str, str]  # path, label, patient, split


def reorganize(name: str, folder: Path) -> None:
    """Reorganize the unpacked download of a dataset; most datasets need no change.

    Raises:
        UserError: the download lacks the expected files.
    """
    if name in _FUNCTIONS:
        _FUNCTIONS[name](folder)


def _reorganize_oasis1(folder: Path) -> None:
    """OASIS-1: keep the skull-stripped volume in atlas space, one of the eleven volumes of a session."""
    name = re.compile(r"OAS1_\d{4}_MR\d_.*_t88_masked_gfc\.(hdr|img)")
    _flatten(folder, [path for path in _files(folder) if name.fullmatch(path.name)], "*_t88_masked_gfc.img")


def _reorganize_openist(folder: Path) -> None:
    """OpenIST: keep the X-rays that have a mask, and their masks; the repository also holds tools."""
    masks = [path for path in _files(folder) if path.stem.endswith("@")]
    stems = {path.stem[:-1] for path in masks}
    _flatten(folder, [*masks, *(path for path in _files(folder) if path.stem in stems)], "masks NAME@.png")


def _reorganize_nlm(folder: Path) -> None:
    """Montgomery and Shenzhen: X-rays to images/; the masks of left and right lung joined into one in masks/."""
    name = re.compile(r"(?:MCU|CHN)CXR_\d{4}_(?P<label>[01])\.png")
    images: dict[str, Path] = {}
    masks: dict[str, list[Path]] = {}
    for path in _files(folder):
        if name.fullmatch(path.name) and path.parent.name == "CXR_png":
            images[path.name] = path
        elif name.fullmatch(path.name) and path.parent.name.lower() in ("leftmask", "rightmask"):
            masks.setdefault(path.name, []).append(path)
    with _rebuild(folder, images, "X-rays MCUCXR_NNNN_N.png or CHNCXR_NNNN_N.png in CXR_png/") as (new, rows):
        for file, path in sorted(images.items()):
            match = name.fullmatch(file)
            assert match is not None
            _move(path, new / "images" / file)
            if file in masks:
                _join_masks(masks[file], new / "masks" / file)
            rows.append(
                (f"images/{file}", ("normal", "tuberculosis")[int(match["label"])], "", "")
            )  # patient: the name


def _reorganize_pets(folder: Path) -> None:
    """Oxford-IIIT Pet: keep the images of trainval.txt and test.txt, with their trimaps as masks."""
    files = {path.name: path for path in _files(folder) if not path.name.startswith(".")}
    with _rebuild(folder, files.keys() & {"trainval.txt"}, "annotations/trainval.txt and test.txt") as (new, rows):
        for split, list_name in (("train", "trainval.txt"), ("test", "test.txt")):
            lines = files[list_name].read_text(encoding="utf-8").splitlines() if list_name in files else []
            for stem in sorted(line.split()[0] for line in lines if line.strip()):
                if f"{stem}.jpg" not in files:
                    continue
                _move(files[f"{stem}.jpg"], new / "images" / f"{stem}.jpg")
                if f"{stem}.png" in files:
                    _write_pet_mask(files[f"{stem}.png"], new / "masks" / f"{stem}.png")
                rows.append((f"images/{stem}.jpg", stem.rpartition("_")[0], "", split))


_FUNCTIONS: dict[str, Callable[[Path], None]] = {
    "oasis1-volumes": _reorganize_oasis1,
    "openist": _reorganize_openist,
    "montgomery": _reorganize_nlm,
    "shenzhen": _reorganize_nlm,
    "oxford-pet": _reorganize_pets,
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__MACOSX" not in path.parts)


def _flatten(folder: Path, files: list[Path], expected: str) -> None:
    """Keep these files only, without their folders: a folder's name would be read as a class."""
    with _rebuild(folder, files, expected) as (new, _):
        for path in files:
            _move(path, new / path.name)


@contextmanager
def _rebuild(folder: Path, found: Collection[object], expected: str) -> Iterator[tuple[Path, list[_Row]]]:
    """Yield a folder for the files to keep and a list for the rows of their manifest.csv; then delete all other files.

    Raises:
        UserError: nothing was found.
    """
    if not found:
        raise UserError(f"{folder}: expected {expected}, found none. The dataset may have changed: report it")
    new, rows = folder / ".reorganized", list[_Row]()
    new.mkdir()
    yield new, rows
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in new.iterdir():
        path.rename(folder / path.name)
    new.rmdir()
    if rows:
        with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "label", "patient", "split"), *rows])


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    path.rename(target)


def _join_masks(parts: list[Path], target: Path) -> None:
    masks = [_read_mask(path) for path in parts]
    if any(mask.shape != masks[0].shape for mask in masks):
        raise UserError(f"{parts[0]}: the masks of left and right lung differ in size. Fetch the dataset again")
    _write_mask((sum(mask > 0 for mask in masks) > 0).astype(np.uint8) * 255, target)


def _write_pet_mask(trimap: Path, target: Path) -> None:
    """Map pet 1 to 255, background 2 to 0 and border 3 to 127: readable as a mask of two classes or, with
    preprocess.mask_values, of three.
    """
    values = np.zeros(256, np.uint8)
    values[1], values[3] = 255, 127
    _write_mask(values[_read_mask(trimap)], target)


def _read_mask(path: Path) -> Any:
    import cv2

    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)  # (H, W)
    if pixels is None:
        raise UserError(f"{path}: the mask cannot be read. Fetch the dataset again")
    return pixels


def _write_mask(pixels: Any, target: Path) -> None:
    import cv2

    target.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(target), pixels)
