"""Published folders that no layout fits -> folders that one does.

Each function changes a freshly unpacked folder in place: arrange("montgomery", folder).
"""

import csv
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from medgen.errors import UserError

_Row = tuple[str, str, str, str]  # path, label, patient, split


def arrange(name: str, folder: Path) -> None:
    """Arranges the download of a known dataset, where that is needed.

    Raises:
        UserError: the download does not hold what it is known to hold.
    """
    if name in _ARRANGED:
        _ARRANGED[name](folder)


def _arrange_atlas_volumes(folder: Path) -> None:
    """OASIS-1: of a session's eleven volumes, the skull-stripped one in atlas space."""
    wanted = re.compile(r"OAS1_\d{4}_MR\d_.*_t88_masked_gfc\.(hdr|img)")
    _gather(folder, [path for path in _files(folder) if wanted.fullmatch(path.name)], "*_t88_masked_gfc.img")


def _arrange_openist(folder: Path) -> None:
    """OpenIST: of a repository of tools and data, the films that have a mask."""
    masks = [path for path in _files(folder) if path.stem.endswith("@")]
    films = {path.stem[:-1] for path in masks}
    _gather(folder, [*masks, *(path for path in _files(folder) if path.stem in films)], "masks NAME@.png")


def _arrange_tuberculosis(folder: Path) -> None:
    """Montgomery and Shenzhen: films in images/, the two halves of a lung mask as one in masks/."""
    name = re.compile(r"(?P<patient>(?:MCU|CHN)CXR_\d{4})_(?P<label>[01])\.png")
    films: dict[str, Path] = {}
    halves: dict[str, list[Path]] = {}
    for path in _files(folder):
        if name.fullmatch(path.name) and path.parent.name == "CXR_png":
            films[path.name] = path
        elif name.fullmatch(path.name) and path.parent.name.lower() in ("leftmask", "rightmask"):
            halves.setdefault(path.name, []).append(path)
    new = _begin(folder, films, "films MCUCXR_NNNN_N.png or CHNCXR_NNNN_N.png in CXR_png/")
    rows: list[_Row] = []
    for file, path in sorted(films.items()):
        match = name.fullmatch(file)
        assert match is not None
        _move(path, new / "images" / file)
        if file in halves:
            _join_masks(halves[file], new / "masks" / file)
        rows.append((f"images/{file}", ("normal", "tuberculosis")[int(match["label"])], match["patient"], ""))
    _finish(folder, new, rows)


def _arrange_pets(folder: Path) -> None:
    """Oxford-IIIT Pet: the photographs of its two lists; trimaps as masks: 0 ground, 127 border, 255 pet."""
    files = {path.name: path for path in _files(folder) if not path.name.startswith(".")}
    new = _begin(folder, files.keys() & {"trainval.txt"}, "annotations/trainval.txt and test.txt")
    rows: list[_Row] = []
    for split, list_name in (("train", "trainval.txt"), ("test", "test.txt")):
        lines = files[list_name].read_text(encoding="utf-8").splitlines() if list_name in files else []
        for stem in sorted(line.split()[0] for line in lines if line.strip()):
            if f"{stem}.jpg" not in files:
                continue
            _move(files[f"{stem}.jpg"], new / "images" / f"{stem}.jpg")
            if f"{stem}.png" in files:
                _write_pet_mask(files[f"{stem}.png"], new / "masks" / f"{stem}.png")
            rows.append((f"images/{stem}.jpg", stem.rpartition("_")[0], "", split))
    _finish(folder, new, rows)


_ARRANGED: dict[str, Callable[[Path], None]] = {
    "oasis1-volumes": _arrange_atlas_volumes,
    "openist": _arrange_openist,
    "montgomery": _arrange_tuberculosis,
    "shenzhen": _arrange_tuberculosis,
    "oxford-pet": _arrange_pets,
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__MACOSX" not in path.parts)


def _gather(folder: Path, wanted: Iterable[Path], expected: str) -> None:
    """Leaves these files only, without folders: a disc's or a tool's name is no class."""
    files = list(wanted)
    new = _begin(folder, files, expected)
    for path in files:
        _move(path, new / path.name)
    _finish(folder, new)


def _begin(folder: Path, found: Collection[object], expected: str) -> Path:
    """A new folder inside, to move files to."""
    if not found:
        raise UserError(f"{folder}: none of the {expected} that were expected. The dataset may have changed: report it")
    new = folder / ".arranged"
    new.mkdir()
    return new


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    path.rename(target)


def _finish(folder: Path, new: Path, rows: list[_Row] | None = None) -> None:
    """Leaves only what was moved, and writes manifest.csv where there are rows for it."""
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in new.iterdir():
        path.rename(folder / path.name)
    new.rmdir()
    if rows:
        with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "label", "patient", "split"), *rows])


def _join_masks(halves: list[Path], target: Path) -> None:
    masks = [_read_grey(path) for path in halves]
    if any(mask.shape != masks[0].shape for mask in masks):
        raise UserError(f"{halves[0]}: the halves of a mask differ in size. Fetch the dataset again")
    _write_mask(sum(mask > 0 for mask in masks) > 0, target)


def _write_pet_mask(trimap: Path, target: Path) -> None:
    """1 is the pet, 2 the ground, 3 the border: greys that are on or off too, and three by preprocess.mask_values."""
    greys = np.zeros(256, np.uint8)
    greys[1], greys[3] = 255, 127
    _write_grey(greys[_read_grey(trimap)], target)


def _read_grey(path: Path) -> Any:
    import cv2

    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)  # (H, W)
    if pixels is None:
        raise UserError(f"{path}: a mask that cannot be read. Fetch the dataset again")
    return pixels


def _write_mask(mask: Any, target: Path) -> None:
    _write_grey(mask.astype("uint8") * 255, target)


def _write_grey(pixels: Any, target: Path) -> None:
    import cv2

    target.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(target), pixels)
