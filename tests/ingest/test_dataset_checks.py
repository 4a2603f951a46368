"""Findings: what is planted is found, each in its own list, and nothing else."""

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

from medgen.ingest.dataset_checks import Facts, Findings, find, printable, summary_lines
from medgen.ingest.dataset_scan import Record
from medgen.ingest.near_duplicates import thumbnail
from medgen.ingest.reading import Read


def film(seed: int) -> NDArray[np.uint8]:
    """One body, seen a little differently each time."""
    generator = np.random.default_rng(seed)
    body, own = (cv2.GaussianBlur(np.random.default_rng(s).normal(0, 1, (96, 96)), (0, 0), 6) for s in (999, seed))
    mixed = body / body.std() + 0.7 * own / own.std()
    return np.asarray((mixed * 30 + 120 + generator.normal(0, 2, mixed.shape)).clip(0, 255), np.uint8)


def colourful() -> NDArray[np.uint8]:
    picture = np.repeat(film(50)[..., None], 3, axis=2)
    picture[..., 2] = 0
    return picture


def collect(scratch: Path, pictures: Sequence[tuple[Record, NDArray[np.uint8]]]) -> Findings:
    with Facts(scratch) as facts:
        for record, pixels in pictures:
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            size = (pixels.shape[1], pixels.shape[0])
            facts.add(Read(record, digest, digest, size, "L", None), thumbnail(pixels))
        return find(facts, [record.split for record, _ in pictures])


def clean(number: int = 40) -> list[tuple[Record, NDArray[np.uint8]]]:
    """Films of as many patients under two labels, a quarter of them for the test; nothing is wrong with them."""
    return [
        (Record(f"{i:03}.png", "AB"[i % 2], f"patient{i}", "test" if i % 4 == 0 else "train", None), film(i))
        for i in range(number)
    ]


def jpeg(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_GRAYSCALE), np.uint8)


def new(**changed: str) -> Record:
    return replace(Record("x.png", "A", "another", "train", None), **changed)


# What is planted beside the clean ones (004.png is A in test, 005.png B in train), and what must differ from them.
PLANTED = {
    "a copy in the same split": ((new(label="B"), film(5)), {"exact": [["005.png", "x.png"]]}),
    "a copy in another split": ((new(), film(4)), {"exact": [["004.png", "x.png"]], "leaks": 1}),
    "a copy under another label": (
        (new(), film(5)),
        {"exact": [["005.png", "x.png"]], "conflicts": [["005.png", "x.png"]]},
    ),
    "re-encoded": ((new(label="B"), jpeg(film(5))), {"near": [["005.png", "x.png"]]}),
    "resized, in another split": (
        (new(), cv2.resize(film(4), (70, 80), interpolation=cv2.INTER_AREA)),
        {"near": [["004.png", "x.png"]], "leaks": 1},
    ),
    "brighter, under another label": (
        (new(), (film(5) * 1.05).clip(0, 255).astype(np.uint8)),
        {"near": [["005.png", "x.png"]], "conflicts": [["005.png", "x.png"]]},
    ),
    "one patient's films alike": ((new(patient="patient5"), jpeg(film(5))), {}),
    "a patient in two splits": ((new(patient="patient4"), film(60)), {"parted": ["patient4"], "leaks": 1}),
    "a blank picture": ((new(), np.full((96, 96), 118, np.uint8)), {"blank": ["x.png"]}),
    "a colour photograph": ((new(), colourful()), {"outliers": ["x.png"]}),
    "one more": ((new(), film(60)), {}),
}


@pytest.mark.parametrize(("planted", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_each_planted_thing_is_found_and_nothing_else(
    tmp_path: Path, planted: tuple[Record, NDArray[np.uint8]], expected: dict[str, object]
) -> None:
    found = collect(tmp_path, [*clean(), planted])
    assert {
        "exact": [group.names for group in found.exact],
        "near": [group.names for group in found.near],
        "conflicts": [group.names for group in found.conflicts],
        "parted": [one.patient for one in found.parted],
        "blank": found.blank,
        "outliers": found.outliers,
        "leaks": len(found.leaks),
    } == {key: [] for key in ("exact", "near", "conflicts", "parted", "blank", "outliers")} | {"leaks": 0} | expected
    assert bool(summary_lines(found)) == bool(expected)


def test_numbers_say_what_is_there(tmp_path: Path) -> None:
    pictures = [*clean(8), (new(label=None, split=None), film(60)[:48])]
    found = collect(tmp_path, pictures)
    assert found.counts == {"": {"": 1}, "A": {"test": 2, "train": 2}, "B": {"train": 4}}
    assert (found.num_images, found.num_patients, found.num_sizes) == (9, 9, 2)
    assert (found.widths, found.heights) == ((96, 96, 96), (48, 96, 96))
    assert found.modes == {"L": 9}
    assert found.imbalance == 1.0  # the unlabelled one is of no class


def test_several_copies_are_one_group(tmp_path: Path) -> None:
    pictures = [*clean(8), *((new(path=f"x{i}.png", patient=f"x{i}"), film(4)) for i in range(3))]
    found = collect(tmp_path, pictures)
    assert [group.names for group in found.exact] == [["004.png", "x0.png", "x1.png", "x2.png"]]
    assert (found.exact[0].labels, found.exact[0].splits) == (["A"], ["test", "train"])
    assert found.num_duplicates == 3
    assert found.near == []


def test_one_of_each_split_and_label_stands_first_in_a_group(tmp_path: Path) -> None:
    copies = [("a", "A", "train"), ("b", "A", "train"), ("c", "B", "train"), ("d", "B", "test")]
    pictures = [(new(path=path, patient=path, label=label, split=split), film(60)) for path, label, split in copies]
    assert [group.names for group in collect(tmp_path, pictures).exact] == [["a", "c", "d", "b"]]


def test_leaks_are_said_in_words(tmp_path: Path) -> None:
    planted = [(new(path="x.png"), film(4)), (new(path="y.png", patient="patient4"), film(60))]
    assert collect(tmp_path, [*clean(), *planted]).leaks == [
        "patient patient4, as 004.png, is in test (1) and train (1)",
        "004.png and x.png are one picture, in test and train",
    ]


def test_findings_are_json_and_no_pictures_are_none(tmp_path: Path) -> None:
    for pictures in ([], [*clean(8), (new(), film(4))]):
        found = collect(tmp_path, pictures)
        plain = json.loads(json.dumps(found.to_json()))
        assert plain["num_images"] == len(pictures)
        assert [group["names"] for group in plain["exact"]] == [group.names for group in found.exact]
        assert plain["leaks"] == found.leaks


def test_names_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    hostile = "a\nb\x1b[31m\u202e\udcff<b>.png"
    found = collect(tmp_path, [*clean(8), (new(path=hostile), film(4)), (new(path="y", patient="y"), film(4))])
    for line in (*summary_lines(found), *found.leaks):
        assert line.isprintable()
    assert printable(hostile) == r"a\nb\x1b[31m\u202e\udcff<b>.png"
    assert found.exact[0].names[1] == hostile  # the list has the name itself


def test_a_picture_costs_few_bytes_of_memory_and_none_of_disk_in_the_end(tmp_path: Path) -> None:
    thumb = thumbnail(film(0))
    records = [Record("one.npz", "A", "p", None, None, index) for index in range(4000)]
    digest = "0" * 64
    tracemalloc.start()
    with Facts(tmp_path / "scratch") as facts:
        for record in records:
            facts.add(Read(record, digest, digest, (28, 28), "L", None), thumb)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(facts) == len(records)
        assert sum(file.stat().st_size for file in (tmp_path / "scratch").iterdir()) <= len(records) * 64 * 64
    assert used < 200 * len(records)
    assert list((tmp_path / "scratch").iterdir()) == []
