"""Published datasets: the duplicates and outliers found match file hashes and visual inspection."""

import gzip
import hashlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medgen.config import Data, Preprocess
from medgen.ingest import dataset_scan
from medgen.ingest.dataset_checks import CheckResults, ImageIndex, check_dataset
from medgen.ingest.near_duplicates import find_near_duplicates, perceptual_hash, thumbnail
from medgen.ingest.reading import read_images


def check(scratch: Path, *folders: Path) -> CheckResults:
    """Check real folders as one dataset."""
    preprocess = Preprocess(channels=3)
    with ImageIndex(scratch) as index:
        for folder in folders:
            records = dataset_scan.scan(folder, Data(), preprocess).records
            for result in read_images(
                folder, records, preprocess, lambda _record, raw, _mask, _paired: thumbnail(raw.pixels)
            ):
                if result.value is not None:
                    index.add(result, result.value)
        return check_dataset(index, [record.split for record in index.records])


def identical_files(folder: Path) -> list[list[str]]:
    """Groups of image files with the same bytes."""
    groups = defaultdict(list)
    for path in sorted(folder.rglob("*.[jp]*g")) + sorted(folder.rglob("*.JPG")):
        groups[hashlib.sha256(path.read_bytes()).digest()].append(path.relative_to(folder).as_posix())
    return sorted(names for names in groups.values() if len(names) > 1)


# groups of identical files, files in them, groups across splits, near-duplicate pairs, outliers
SETS = {
    "quirks": (3, 7, 0, 1, 8),  # one X-ray in two collections; food photographs
    "lungmask": (0, 0, 0, 0, 0),
    "xray": (2, 4, 0, 1, 0),  # COVID-00033 and COVID-00037 are the same image
    "mri": (102, 241, 76, 426, 9),  # the outliers include CT slices and one with a white frame
}


@pytest.mark.parametrize(("name", "expected"), SETS.items(), ids=SETS.keys())
def test_duplicates_and_outliers_of_published_datasets(
    tmp_path: Path, shared_data: Callable[[str], Path], name: str, expected: tuple[int, int, int, int, int]
) -> None:
    folder = shared_data(name)
    results = check(tmp_path, folder)
    assert sorted(sorted(group.names) for group in results.exact) == identical_files(folder)
    assert expected == (
        len(results.exact),
        sum(len(group.names) for group in results.exact),
        sum(group.is_across for group in results.exact),
        len(results.near),
        len(results.outliers),
    )
    assert results.patient_leaks == []  # xray is split by patient; the others have no patient identifiers


def test_an_xray_with_two_diagnoses_is_a_conflict(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """The file is 844 x 480 with label COVID19 in one collection, 224 x 224 with label PNEUMONIA in the other."""
    source = shared_data("quirks") / "cross_dataset_conflict"
    for label, name in (("COVID19", "COVID-00020.jpg"), ("PNEUMONIA", "person1004_virus_1686.jpeg")):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / name).write_bytes((source / name).read_bytes())
    results = check(tmp_path / "scratch", tmp_path / "data")
    assert [group.labels for group in results.conflicts] == [["COVID19", "PNEUMONIA"]]


def test_food_photographs_are_outliers_among_brain_mri(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    food = shared_data("quirks") / "wrong_content_food_labelled_as_mri"
    results = check(tmp_path, shared_data("mri") / "test" / "glioma", food)
    assert sorted(results.outliers) == sorted(path.relative_to(food).as_posix() for path in food.rglob("*.jpg"))


def test_duplicates_inside_one_file_are_found(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("medmnist")
    with np.load(folder / "pneumoniamnist_balanced.npz") as arrays:
        images = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    _, counts = np.unique(images.reshape(len(images), -1), axis=0, return_counts=True)
    results = check(tmp_path, folder)
    assert sorted(len(group.names) for group in results.exact) == sorted(counts[counts > 1].tolist())
    assert results.num_duplicates == len(images) - len(counts)
    assert results.near == []


def test_digits_of_different_writers_are_no_near_duplicates(shared_data: Callable[[str], Path]) -> None:
    content = gzip.decompress((shared_data("mnist_idx") / "t10k-images-idx3-ubyte.gz").read_bytes())
    thumbs = np.stack([thumbnail(digit) for digit in np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)])
    hashes = np.array([perceptual_hash(thumb) for thumb in thumbs], np.uint64)
    rows = np.arange(len(thumbs))
    for side, has_pairs in ((28, False), (64, True)):  # 28 px need the higher correlation
        pairs = find_near_duplicates(hashes, thumbs, rows < 0, rows, np.full(len(rows), side, np.int32))
        assert bool(pairs) is has_pairs
