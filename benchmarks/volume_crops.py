"""Cut NIfTI volumes of one grid into small volumes for a 3-D model: data to measure docs/volumes.md with.

python benchmarks/volume_crops.py FOLDER/mni_icbm152_{t1,gm,wm}_tal_nlin_sym_09a_converted.nii.gz --out mni/data

Each file is a class, named by the part of its name that differs. OUT gets a NIfTI file for each crop and manifest.csv.
Train, val and test crops come from disjoint slabs from back to front, so that no voxel is in two splits; crops overlap
their neighbours, and those of a block of voxels share a `patient`. Crops that are mostly background in the first file
are left out.
"""

import argparse
import csv
import itertools
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np

MARGIN = 4  # voxels at the left and at the bottom
VAL_START = 0.43  # of the axis; the slabs of val and then test are one crop thick
STEPS = {"train": (12, 11, 12), "val": (12, 1, 12), "test": (10, 1, 10)}  # voxels to the right, to the front, up
BACKGROUND = 20  # grey value
MIN_TISSUE, MIN_FOREGROUND = 0.7, 0.1  # of a crop's voxels: brighter than background in the first file, in its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="NIfTI volumes with the same axes and voxels")
    parser.add_argument("--out", type=Path, required=True, help="new folder of the crops")
    parser.add_argument("--side", type=int, default=32, help="voxels of a crop's side")
    arguments = parser.parse_args()
    images = dict(zip(class_names(arguments.files), map(nibabel.load, arguments.files), strict=True))
    first = next(iter(images.values()))
    for path, image in zip(arguments.files, images.values(), strict=True):
        if image.shape != first.shape or not np.allclose(image.affine, first.affine):
            parser.error(f"{path}: its grid differs from that of {arguments.files[0]}; expected volumes of one grid")
    if len(first.shape) != 3 or min(first.shape) < arguments.side or first.shape[1] < 4 * arguments.side:
        parser.error(f"{arguments.files[0]}: {first.shape} voxels are too few for crops of {arguments.side}³")
    arguments.out.mkdir(parents=True)
    volumes = {name: np.asarray(image.dataobj) for name, image in images.items()}
    tissue = next(iter(volumes.values())) > BACKGROUND
    rows = []
    for (name, volume), (split, start) in itertools.product(volumes.items(), starts(first.shape, arguments.side)):
        block = tuple(slice(at, at + arguments.side) for at in start)
        if tissue[block].mean() < MIN_TISSUE or (volume[block] > BACKGROUND).mean() < MIN_FOREGROUND:
            continue
        affine = first.affine.copy()
        affine[:, 3] = first.affine @ [*start, 1]
        file = "_".join([name, *(f"{at:03}" for at in start)]) + ".nii.gz"
        nibabel.save(nibabel.Nifti1Image(volume[block], affine), arguments.out / file)
        rows.append((file, name, "_".join(f"{at // arguments.side}" for at in start), split))
    with (arguments.out / "manifest.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("path", "label", "patient", "split"), *rows])
    for (name, split), count in sorted(Counter((label, split) for _, label, _, split in rows).items()):
        print(f"{name:12} {split:6} {count:5}")


def class_names(files: list[Path]) -> list[str]:
    """The part of each file's name that differs from the other names."""
    names = [path.name.removesuffix(".gz").removesuffix(".nii") for path in files]
    parts = [name.split("_") for name in names]
    shared = set.intersection(*map(set, parts))
    own = ["_".join(part for part in each if part not in shared) for each in parts]
    return own if len(set(own) - {""}) == len(files) else names


def starts(shape: tuple[int, ...], side: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Split and first voxel of each crop of a volume."""
    val = round(VAL_START * shape[1])
    slabs = {
        "train": [(0, val), (val + 2 * side, shape[1])],
        "val": [(val, val + side)],
        "test": [(val + side, val + 2 * side)],
    }
    found = []
    for split, (right, front, up) in STEPS.items():
        for low, high in slabs[split]:
            axes = (
                range(MARGIN, shape[0] - side, right),
                range(low, high - side + 1, front),
                range(MARGIN, shape[2] - side, up),
            )
            found += [(split, start) for start in itertools.product(*axes)]
    return found


if __name__ == "__main__":
    main()
