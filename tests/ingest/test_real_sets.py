"""Published sets: what likeness and findings say of them is what sha256sum and eyes say."""

import gzip
import hashlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medgen.config import Data, Preprocess
from medgen.ingest import dataset_scan
from medgen.ingest.dataset_checks import Facts, Findings, find
from medgen.ingest.near_duplicates import near_pairs, perceptual_hash, thumbnail
from medgen.ingest.reading import read_all


def look(scratch: Path, *folders: Path) -> Findings:
    """The findings of real folders, taken as one."""
    preprocess = Preprocess(channels=3)
    with Facts(scratch) as facts:
        for folder in folders:
            records = dataset_scan.scan(folder, Data(), preprocess).records
            for read in read_all(folder, records, preprocess, lambda _record, raw, _mask: thumbnail(raw.pixels)):
                if read.value is not None:
                    facts.add(read, read.value)
        return find(facts, [record.split for record in facts.records])


def identical(folder: Path) -> list[list[str]]:
    """Groups of pictures of identical bytes."""
    groups = defaultdict(list)
    for path in sorted(folder.rglob("*.[jp]*g")) + sorted(folder.rglob("*.JPG")):
        groups[hashlib.sha256(path.read_bytes()).digest()].append(path.relative_to(folder).as_posix())
    return sorted(names for names in groups.values() if len(names) > 1)


# groups of identical files, files in them, groups on two sides; near-duplicate pairs; pictures of another kind
SETS = {
    "quirks": (3, 7, 0, 1, 8),  # one film in two collections; food
    "lungmask": (0, 0, 0, 0, 0),
    "xray": (2, 4, 0, 1, 0),  # COVID-00033 and COVID-00037 are one film
    "mri": (102, 241, 76, 426, 9),  # CT slices and one in a white frame are among the nine
}


@pytest.mark.parametrize(("name", "expected"), SETS.items(), ids=SETS.keys())
def test_copies_and_strangers_of_published_sets(
    tmp_path: Path, shared_data: Callable[[str], Path], name: str, expected: tuple[int, int, int, int, int]
) -> None:
    folder = shared_data(name)
    found = look(tmp_path, folder)
    assert sorted(sorted(group.names) for group in found.exact) == identical(folder)
    assert expected == (
        len(found.exact),
        sum(len(group.names) for group in found.exact),
        sum(group.is_across for group in found.exact),
        len(found.near),
        len(found.outliers),
    )
    assert found.parted == []  # xray was cut by patient; the others name none


def test_a_film_under_two_diagnoses_is_a_conflict(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """844 x 480 pixels as COVID-19 in one collection, 224 x 224 as PNEUMONIA in the other."""
    source = shared_data("quirks") / "cross_dataset_conflict"
    for label, name in (("COVID19", "COVID-00020.jpg"), ("PNEUMONIA", "person1004_virus_1686.jpeg")):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / name).write_bytes((source / name).read_bytes())
    found = look(tmp_path / "scratch", tmp_path / "data")
    assert [group.labels for group in found.conflicts] == [["COVID19", "PNEUMONIA"]]


def test_food_among_brain_slices_is_found(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    food = shared_data("quirks") / "wrong_content_food_labelled_as_mri"
    found = look(tmp_path, shared_data("mri") / "test" / "glioma", food)
    assert sorted(found.outliers) == sorted(path.relative_to(food).as_posix() for path in food.rglob("*.jpg"))


def test_copies_inside_one_file_are_found(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("medmnist")
    with np.load(folder / "pneumoniamnist_balanced.npz") as arrays:
        pictures = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    _, counts = np.unique(pictures.reshape(len(pictures), -1), axis=0, return_counts=True)
    found = look(tmp_path, folder)
    assert sorted(len(group.names) for group in found.exact) == sorted(counts[counts > 1].tolist())
    assert found.num_duplicates == len(pictures) - len(counts)
    assert found.near == []


def test_digits_of_different_hands_are_not_one(shared_data: Callable[[str], Path]) -> None:
    content = gzip.decompress((shared_data("mnist_idx") / "t10k-images-idx3-ubyte.gz").read_bytes())
    thumbs = np.stack([thumbnail(digit) for digit in np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)])
    hashes = np.array([perceptual_hash(thumb) for thumb in thumbs], np.uint64)
    rows = np.arange(len(thumbs))
    assert near_pairs(hashes, thumbs, rows < 0, rows, np.full(len(rows), 28, np.int32)) == []
    assert near_pairs(hashes, thumbs, rows < 0, rows, np.full(len(rows), 64, np.int32)) != []  # why 28 px need more
