"""Reading gives each record its outcome, in order, in bounded memory, and leaves nothing open."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image

from medgen.config import Data, Preprocess
from medgen.ingest import dataset_scan, reading
from medgen.ingest.dataset_scan import Record
from medgen.ingest.formats.raw import RawImage, UnreadableImage
from medgen.ingest.reading import Read, hash_sources, read_all

PREPROCESS = Preprocess(image_size=16)


def write(folder: Path, count: int) -> list[Record]:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number:03}.png")
    return dataset_scan.scan(folder, Data(), PREPROCESS).records


def first_pixel(_record: Record, raw: RawImage, _mask: RawImage | None) -> int:
    return int(raw.pixels.flat[0])


def write_volume(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, np.eye(4)) if path.suffix == ".nii" else nibabel.AnalyzeImage(voxels, np.eye(4))
    nibabel.save(image, path)


def read_folder(folder: Path, preprocess: Preprocess = PREPROCESS) -> dict[str, Read[int]]:
    records = dataset_scan.scan(folder, Data(), preprocess).records
    return {read.record.name: read for read in read_all(folder, records, preprocess, first_pixel)}


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_outcomes_come_in_the_order_of_records(tmp_path: Path, num_threads: int) -> None:
    records = write(tmp_path / "data", 200)
    reads = list(read_all(tmp_path / "data", records, PREPROCESS, first_pixel, num_threads))
    assert [read.record for read in reads] == records
    assert [read.value for read in reads] == list(range(200))


def test_only_so_many_pictures_wait(tmp_path: Path) -> None:
    records, most, running = write(tmp_path / "data", 250), 0, 0
    lock = threading.Lock()

    def use(_record: Record, _raw: RawImage, _mask: RawImage | None) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

    for _ in read_all(tmp_path / "data", records, PREPROCESS, use):
        with lock:
            running -= 1
    assert most <= reading._AHEAD + 1


def test_what_use_raises_surfaces_and_leaves_nothing_running(tmp_path: Path) -> None:
    records = write(tmp_path / "data", 50)
    threads, own = threading.active_count(), cv2.getNumThreads()

    def use(record: Record, _raw: RawImage, _mask: RawImage | None) -> None:
        raise KeyError(record.path)

    with pytest.raises(KeyError, match=r"000\.png"):
        list(read_all(tmp_path / "data", records, PREPROCESS, use))
    assert threading.active_count() == threads
    assert cv2.getNumThreads() == own


def test_a_caller_that_stops_early_leaves_nothing_running(tmp_path: Path) -> None:
    records = write(tmp_path / "data", 50)
    threads = threading.active_count()
    reads = read_all(tmp_path / "data", records, PREPROCESS, first_pixel)
    assert next(reads).value == 0
    assert isinstance(reads, Iterator)
    reads.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_each_file_is_opened_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "set.npz", train_images=np.arange(100 * 64, dtype=np.uint16).reshape(100, 8, 8))
    opened: list[object] = []
    closed: list[object] = []
    real = reading.open_file

    def watched(*arguments: object, **options: object) -> object:
        file = real(*arguments, **options)  # type: ignore[arg-type]
        leave: Callable[..., None] = type(file).__exit__

        class Watched(type(file)):  # type: ignore[misc]
            def __exit__(self, *error: object) -> None:
                closed.append(self)
                leave(self, *error)

        file.__class__ = Watched
        opened.append(file)
        return file

    monkeypatch.setattr(reading, "open_file", watched)
    assert len(read_folder(tmp_path)) == 100
    assert len(opened) == 1
    assert closed == opened


def test_a_file_that_cannot_be_opened_gives_its_reason_for_each_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "set.npz", train_images=np.zeros((70, 8, 8), np.uint8))

    def refuse(*_: object, **__: object) -> None:
        raise UnreadableImage("it is gone")

    monkeypatch.setattr(reading, "open_file", refuse)
    assert {read.reason for read in read_folder(tmp_path).values()} == {"it is gone"}


def test_a_file_beyond_any_size_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = write(tmp_path / "data", 1)
    monkeypatch.setattr(reading, "_MAX_FILE_BYTES", 10)
    (read,) = read_all(tmp_path / "data", records, PREPROCESS, first_pixel)
    assert "more than any image file" in read.reason
    assert read.source == ""


def test_the_voxels_of_a_header_are_part_of_it(tmp_path: Path) -> None:
    """Analyze headers of one study are alike to the byte: what differs is in the .img."""
    generator = np.random.default_rng(0)
    for name in "ab":
        write_volume(tmp_path / f"{name}.hdr", generator.integers(0, 255, (12, 12, 3)).astype(np.int16))
    assert (tmp_path / "a.hdr").read_bytes() == (tmp_path / "b.hdr").read_bytes()
    one_slice = Preprocess(image_size=16, volume={"step": 100, "min_foreground": 0})  # type: ignore[arg-type]
    reads = read_folder(tmp_path, one_slice)
    assert reads["a.hdr"].sha256 != reads["b.hdr"].sha256
    records = [read.record for read in reads.values()]
    before = list(hash_sources(tmp_path, records, one_slice))
    assert before == [read.source for read in reads.values()]
    content = bytearray((tmp_path / "b.img").read_bytes())
    content[5] ^= 1
    (tmp_path / "b.img").write_bytes(content)
    after = list(hash_sources(tmp_path, records, one_slice))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_mask_of_other_slices_is_refused(tmp_path: Path, depth: int) -> None:
    generator = np.random.default_rng(0)
    write_volume(tmp_path / "images" / "v.nii", generator.integers(1, 255, (16, 16, 16)).astype(np.uint8))
    write_volume(tmp_path / "masks" / "v.nii", np.ones((16, 16, depth), np.uint8))
    reads = read_folder(tmp_path)
    assert len(reads) == 16
    reasons = {read.reason for read in reads.values()}
    assert reasons == ({""} if depth == 16 else {"mask masks/v.nii: 8 slices, and the image has 16"})


def test_one_picture_is_no_mask_of_a_volume(tmp_path: Path) -> None:
    write_volume(tmp_path / "scan.nii", np.random.default_rng(0).integers(1, 255, (16, 16, 5)).astype(np.uint8))
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "scan_mask.png")
    reasons = {read.reason for read in read_folder(tmp_path).values()}
    assert reasons == {"mask scan_mask.png: 1 slices, and the image has 5"}
