"""Reading: one result per record, in order, in bounded memory; all files are closed."""

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
from medgen.ingest.dataset_scan import ImageRecord
from medgen.ingest.formats.raw import RawImage, UnreadableImage
from medgen.ingest.reading import ReadResult, hash_sources, read_images

PREPROCESS = Preprocess(image_size=16)


def write(folder: Path, count: int) -> list[ImageRecord]:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number:03}.png")
    return dataset_scan.scan(folder, Data(), PREPROCESS).records


def first_pixel(_record: ImageRecord, raw: RawImage, _mask: RawImage | None, _paired: object) -> int:
    return int(raw.pixels.flat[0])


def write_volume(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, np.eye(4)) if path.suffix == ".nii" else nibabel.AnalyzeImage(voxels, np.eye(4))
    nibabel.save(image, path)


def read_folder(folder: Path, preprocess: Preprocess = PREPROCESS) -> dict[str, ReadResult[int]]:
    records = dataset_scan.scan(folder, Data(), preprocess).records
    return {result.record.name: result for result in read_images(folder, records, preprocess, first_pixel)}


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_results_are_in_the_order_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(reading, "num_cores", lambda: num_threads)
    records = write(tmp_path / "data", 200)
    results = list(read_images(tmp_path / "data", records, PREPROCESS, first_pixel))
    assert [result.record for result in results] == records
    assert [result.value for result in results] == list(range(200))


def test_the_number_of_pending_images_is_bounded(tmp_path: Path) -> None:
    records, most, running = write(tmp_path / "data", 250), 0, 0
    lock = threading.Lock()

    def transform(_record: ImageRecord, _raw: RawImage, _mask: RawImage | None, _paired: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

    for _ in read_images(tmp_path / "data", records, PREPROCESS, transform):
        with lock:
            running -= 1
    assert most <= reading._MAX_PENDING + 1


def test_an_exception_of_the_transform_is_raised_and_threads_end(tmp_path: Path) -> None:
    records = write(tmp_path / "data", 50)
    threads, own = threading.active_count(), cv2.getNumThreads()

    def transform(record: ImageRecord, _raw: RawImage, _mask: RawImage | None, _paired: object) -> None:
        raise KeyError(record.path)

    with pytest.raises(KeyError, match=r"000\.png"):
        list(read_images(tmp_path / "data", records, PREPROCESS, transform))
    assert threading.active_count() == threads
    assert cv2.getNumThreads() == own


def test_threads_end_if_the_caller_stops_early(tmp_path: Path) -> None:
    records = write(tmp_path / "data", 50)
    threads = threading.active_count()
    results = read_images(tmp_path / "data", records, PREPROCESS, first_pixel)
    assert next(results).value == 0
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_each_file_is_opened_and_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_reason_of_an_unreadable_file_applies_to_all_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "set.npz", train_images=np.zeros((70, 8, 8), np.uint8))

    def refuse(*_: object, **__: object) -> None:
        raise UnreadableImage("it is gone")

    monkeypatch.setattr(reading, "open_file", refuse)
    assert {result.reason for result in read_folder(tmp_path).values()} == {"it is gone"}


def test_a_file_of_impossible_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = write(tmp_path / "data", 1)
    monkeypatch.setattr(reading, "_MAX_FILE_BYTES", 10)
    (result,) = read_images(tmp_path / "data", records, PREPROCESS, first_pixel)
    assert "more than any image file" in result.reason
    assert result.source == ""


def test_the_voxel_file_of_a_header_is_part_of_its_hash(tmp_path: Path) -> None:
    """Analyze headers of one study can have the same bytes; only their .img files differ."""
    generator = np.random.default_rng(0)
    for name in "ab":
        write_volume(tmp_path / f"{name}.hdr", generator.integers(0, 255, (12, 12, 3)).astype(np.int16))
    assert (tmp_path / "a.hdr").read_bytes() == (tmp_path / "b.hdr").read_bytes()
    one_slice = Preprocess(image_size=16, volume={"step": 100, "min_foreground": 0})  # type: ignore[arg-type]
    results = read_folder(tmp_path, one_slice)
    assert results["a.hdr"].sha256 != results["b.hdr"].sha256
    records = [result.record for result in results.values()]
    before = list(hash_sources(tmp_path, records, one_slice))
    assert before == [result.source for result in results.values()]
    content = bytearray((tmp_path / "b.img").read_bytes())
    content[5] ^= 1
    (tmp_path / "b.img").write_bytes(content)
    after = list(hash_sources(tmp_path, records, one_slice))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_mask_with_another_number_of_slices_is_refused(tmp_path: Path, depth: int) -> None:
    generator = np.random.default_rng(0)
    write_volume(tmp_path / "images" / "v.nii", generator.integers(1, 255, (16, 16, 16)).astype(np.uint8))
    write_volume(tmp_path / "masks" / "v.nii", np.ones((16, 16, depth), np.uint8))
    results = read_folder(tmp_path)
    assert len(results) == 16
    reasons = {result.reason for result in results.values()}
    assert reasons == ({""} if depth == 16 else {"mask masks/v.nii: 8 slices, and the image has 16"})


def test_a_single_image_is_no_mask_of_a_volume(tmp_path: Path) -> None:
    write_volume(tmp_path / "scan.nii", np.random.default_rng(0).integers(1, 255, (16, 16, 5)).astype(np.uint8))
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "scan_mask.png")
    reasons = {result.reason for result in read_folder(tmp_path).values()}
    assert reasons == {"mask scan_mask.png: 1 slices, and the image has 5"}
