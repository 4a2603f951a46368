"""Dataset checks: each planted problem is found in its own list, and nothing else is found."""

import hashlib
import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from medgen.ingest.dataset_checks import CheckResults, ImageIndex, check_dataset, escaped, summary_lines
from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.near_duplicates import thumbnail
from medgen.ingest.reading import ReadResult


def make_image(seed: int) -> NDArray[np.uint8]:
    """Variations of one image."""
    generator = np.random.default_rng(seed)
    shared, own = (cv2.GaussianBlur(np.random.default_rng(s).normal(0, 1, (96, 96)), (0, 0), 6) for s in (999, seed))
    mixed = shared / shared.std() + 0.7 * own / own.std()
    return np.asarray((mixed * 30 + 120 + generator.normal(0, 2, mixed.shape)).clip(0, 255), np.uint8)


def colour_image() -> NDArray[np.uint8]:
    image = np.repeat(make_image(50)[..., None], 3, axis=2)
    image[..., 2] = 0
    return image


def check(scratch: Path, images: Sequence[tuple[ImageRecord, NDArray[np.uint8]]]) -> CheckResults:
    with ImageIndex(scratch) as index:
        for record, pixels in images:
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            size = (pixels.shape[1], pixels.shape[0])
            index.add(ReadResult(record, digest, digest, size, "L", None), thumbnail(pixels))
        return check_dataset(index, [record.split for record, _ in images])


def clean(number: int = 40) -> list[tuple[ImageRecord, NDArray[np.uint8]]]:
    """Images of as many patients with two labels, a quarter of them in test, without problems."""
    return [
        (ImageRecord(f"{i:03}.png", "AB"[i % 2], f"patient{i}", "test" if i % 4 == 0 else "train", None), make_image(i))
        for i in range(number)
    ]


def jpeg(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_GRAYSCALE), np.uint8)


def new(**changed: str) -> ImageRecord:
    return replace(ImageRecord("x.png", "A", "another", "train", None), **changed)


# Image added to the clean ones (004.png is A in test, 005.png B in train), and the results that are not empty.
PLANTED = {
    "a copy in the same split": ((new(label="B"), make_image(5)), {"exact": [["005.png", "x.png"]]}),
    "a copy in another split": ((new(), make_image(4)), {"exact": [["004.png", "x.png"]], "leaks": 1}),
    "a copy with another label": (
        (new(), make_image(5)),
        {"exact": [["005.png", "x.png"]], "conflicts": [["005.png", "x.png"]]},
    ),
    "re-encoded": ((new(label="B"), jpeg(make_image(5))), {"near": [["005.png", "x.png"]]}),
    "resized, in another split": (
        (new(), cv2.resize(make_image(4), (70, 80), interpolation=cv2.INTER_AREA)),
        {"near": [["004.png", "x.png"]], "leaks": 1},
    ),
    "brighter, with another label": (
        (new(), (make_image(5) * 1.05).clip(0, 255).astype(np.uint8)),
        {"near": [["005.png", "x.png"]], "conflicts": [["005.png", "x.png"]]},
    ),
    "similar images of one patient": ((new(patient="patient5"), jpeg(make_image(5))), {}),
    "a patient in two splits": ((new(patient="patient4"), make_image(60)), {"patient_leaks": ["patient4"], "leaks": 1}),
    "a blank image": ((new(), np.full((96, 96), 118, np.uint8)), {"blank": ["x.png"]}),
    "a colour photograph": ((new(), colour_image()), {"outliers": ["x.png"]}),
    "another image": ((new(), make_image(60)), {}),
}


@pytest.mark.parametrize(("planted", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_only_the_planted_problem_is_found(
    tmp_path: Path, planted: tuple[ImageRecord, NDArray[np.uint8]], expected: dict[str, object]
) -> None:
    results = check(tmp_path, [*clean(), planted])
    found = {
        name: getattr(results, name) for name in ("exact", "near", "conflicts", "patient_leaks", "blank", "outliers")
    }
    found |= {name: [group.names for group in found[name]] for name in ("exact", "near", "conflicts")}
    found |= {"patient_leaks": [leak.patient for leak in results.patient_leaks], "leaks": len(results.leaks)}
    assert found == {key: [] for key in found} | {"leaks": 0} | expected
    assert bool(summary_lines(results)) == bool(expected)


def test_the_dataset_is_counted(tmp_path: Path) -> None:
    images = [*clean(8), (new(label=None, split=None), make_image(60)[:48])]
    results = check(tmp_path, images)
    assert results.counts == {"": {"": 1}, "A": {"test": 2, "train": 2}, "B": {"train": 4}}
    assert (results.num_images, results.num_patients, results.num_sizes) == (9, 9, 2)
    assert (results.widths, results.heights) == ((96, 96, 96), (48, 96, 96))
    assert results.modes == {"L": 9}
    assert results.imbalance == 1.0  # the unlabelled image is in no class


def test_copies_are_one_group(tmp_path: Path) -> None:
    images = [*clean(8), *((new(path=f"x{i}.png", patient=f"x{i}"), make_image(4)) for i in range(3))]
    results = check(tmp_path, images)
    assert [group.names for group in results.exact] == [["004.png", "x0.png", "x1.png", "x2.png"]]
    assert (results.exact[0].labels, results.exact[0].splits) == (["A"], ["test", "train"])
    assert results.num_duplicates == 3
    assert results.near == []


def test_a_group_starts_with_one_image_per_split_and_label(tmp_path: Path) -> None:
    copies = [("a", "A", "train"), ("b", "A", "train"), ("c", "B", "train"), ("d", "B", "test")]
    images = [(new(path=path, patient=path, label=label, split=split), make_image(60)) for path, label, split in copies]
    assert [group.names for group in check(tmp_path, images).exact] == [["a", "c", "d", "b"]]


def test_leaks_are_described(tmp_path: Path) -> None:
    planted = [(new(path="x.png"), make_image(4)), (new(path="y.png", patient="patient4"), make_image(60))]
    assert check(tmp_path, [*clean(), *planted]).leaks == [
        "patient patient4, for example 004.png, is in test (1) and train (1)",
        "004.png and x.png are the same image, in test and train",
    ]


def test_results_convert_to_json(tmp_path: Path) -> None:
    for images in ([], [*clean(8), (new(), make_image(4))]):
        results = check(tmp_path, images)
        plain = json.loads(json.dumps(results.to_json()))
        assert plain["num_images"] == len(images)
        assert [group["names"] for group in plain["exact"]] == [group.names for group in results.exact]
        assert plain["leaks"] == results.leaks


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    hostile = "a\nb\x1b[31m\u202e\udcff<b>.png"
    planted = [(new(path=hostile), make_image(4)), (new(path="y", patient="y"), make_image(4))]
    results = check(tmp_path, [*clean(8), *planted])
    for line in (*summary_lines(results), *results.leaks):
        assert line.isprintable()
    assert escaped(hostile) == r"a\nb\x1b[31m\u202e\udcff<b>.png"
    assert results.exact[0].names[1] == hostile  # the original name


def test_the_index_needs_little_memory_and_removes_its_file(tmp_path: Path) -> None:
    thumb = thumbnail(make_image(0))
    records = [ImageRecord("one.npz", "A", "p", None, None, index) for index in range(4000)]
    digest = "0" * 64
    tracemalloc.start()
    with ImageIndex(tmp_path / "scratch") as index:
        for record in records:
            index.add(ReadResult(record, digest, digest, (28, 28), "L", None), thumb)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(index) == len(records)
        assert sum(file.stat().st_size for file in (tmp_path / "scratch").iterdir()) <= len(records) * 64 * 64
    assert used < 200 * len(records)
    assert list((tmp_path / "scratch").iterdir()) == []
