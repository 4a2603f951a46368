"""Tests of the sample dataset: reproducible, balanced, plausible images and masks."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from medgen.datasets import sample
from medgen.errors import UserError

SIZE = 128
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "data"
    sample.draw(folder, num_images=NUM_IMAGES, size=SIZE, seed=3)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(path: Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    return pixels


def test_every_image_has_a_mask_of_the_same_name(folder: Path) -> None:
    images = {path.relative_to(folder / "images").with_suffix("") for path in (folder / "images").rglob("*.jpg")}
    masks = {path.relative_to(folder / "masks").with_suffix("") for path in (folder / "masks").rglob("*.png")}
    assert len(images) == NUM_IMAGES
    assert images == masks
    assert len(digests(folder)) == 2 * NUM_IMAGES  # no other files


def test_patients_have_one_class_and_one_to_three_images(folder: Path) -> None:
    counts, labels = Counter[str](), defaultdict[str, set[str]](set)
    for path in (folder / "images").rglob("*.jpg"):
        patient, label, _ = path.stem.split("_")
        counts[patient] += 1
        labels[patient].add(path.parent.name)
        assert label.upper() == path.parent.name
    assert set(counts.values()) <= {1, 2, 3}
    assert all(len(names) == 1 for names in labels.values())
    assert {name for names in labels.values() for name in names} == set(sample.CLASSES)


def test_full_dataset_is_balanced() -> None:
    patients = Counter(patient for patient, _ in sample._visits(480, seed=0))
    counts = Counter[str]()
    for patient, num_images in patients.items():
        counts[sample.CLASSES[patient % 3]] += num_images
    assert sum(counts.values()) == 480
    assert min(counts.values()) >= 140
    assert set(patients.values()) == {1, 2, 3}


def test_bytes_depend_on_the_seed_only(folder: Path, tmp_path: Path) -> None:
    sample.draw(tmp_path / "again", num_images=6, size=SIZE, seed=3)
    sample.draw(tmp_path / "other", num_images=6, size=SIZE, seed=4)
    all_images, again, other = digests(folder), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert again.items() <= all_images.items()  # an image does not depend on the number of images
    assert not set(other.values()) & set(all_images.values())


def test_images_and_patients_differ() -> None:
    first, second, other = (sample.render("NORMAL", 0, *key, SIZE)[0] for key in ((5, 0), (5, 1), (6, 0)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    one, two = (sample.Anatomy(sample._generator("anatomy", 0, patient)) for patient in (5, 6))
    assert vars(one) != vars(two)


def test_images_are_grey_with_full_contrast_and_small_files(folder: Path) -> None:
    for path in (folder / "images").rglob("*.jpg"):
        pixels = read(path)
        assert pixels.shape == (SIZE, SIZE)
        assert pixels.dtype == np.uint8
        assert np.percentile(pixels, 99) - np.percentile(pixels, 1) > 120, path
    image, lungs = sample.render("COVID19", 0, 2, 0)  # 480 images fit in 8 MB
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, sample.JPEG_QUALITY])[1]
    png = cv2.imencode(".png", lungs, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]
    assert len(jpeg) + len(png) < 8e6 / 480


def test_masks_show_two_lungs_the_right_one_larger(folder: Path) -> None:
    right_is_larger = []
    for path in (folder / "masks").rglob("*.png"):
        mask = read(path)
        assert set(np.unique(mask)) == {0, 255}
        count, _, stats, centres = cv2.connectedComponentsWithStats(mask, connectivity=8)
        assert count == 3, path  # background and two lungs
        assert not mask[0].any(), path
        assert not mask[-1].any(), path
        assert not mask[:, [0, -1]].any(), path
        left_of_image, right_of_image = sorted((1, 2), key=lambda lung: centres[lung][0])
        assert centres[left_of_image][0] < SIZE / 2 < centres[right_of_image][0]
        assert 0.15 < np.mean(mask > 0) < 0.5
        right_is_larger.append(stats[left_of_image, 4] > stats[right_of_image, 4])
    assert np.mean(right_is_larger) > 0.9


def test_lungs_are_darker_than_the_mediastinum_and_the_abdomen() -> None:
    for patient in range(4):
        image, lungs = sample.render("NORMAL", 1, patient, 0, SIZE)
        middle = image[SIZE // 3 : 2 * SIZE // 3, SIZE // 2 - 4 : SIZE // 2 + 4].mean()
        assert image[lungs > 0].mean() < 0.6 * middle


@pytest.mark.parametrize("patient", range(6))
def test_disease_brightens_the_lung(patient: int) -> None:
    """Compared with NORMAL of the same patient, PNEUMONIA is brighter in one lung, COVID19 laterally in both."""
    renders = {label: sample.render(label, 2, patient, 0, SIZE) for label in sample.CLASSES}
    lungs = renders["NORMAL"][1] > 0
    columns = np.arange(SIZE)[None, :]
    added = {label: renders[label][0].astype(float) - renders["NORMAL"][0] for label in sample.CLASSES}
    sides = [lungs & (columns < SIZE / 2), lungs & (columns >= SIZE / 2)]
    pneumonia = [added["PNEUMONIA"][side].mean() for side in sides]
    covid = [added["COVID19"][side].mean() for side in sides]
    assert max(pneumonia) > 5
    assert abs(min(pneumonia)) < 0.25 * max(pneumonia)
    assert min(covid) > 3
    lateral = np.abs(columns - SIZE / 2) > 0.25 * SIZE
    assert added["COVID19"][lungs & lateral].mean() > added["COVID19"][lungs & ~lateral].mean()
    diseased_side = sample.LOBES[sample.Anatomy(sample._generator("anatomy", 2, patient)).lobe][0]
    assert int(np.argmax(pneumonia)) == (0 if diseased_side < 0 else 1)


def test_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already contains files"):
        sample.draw(tmp_path, num_images=1, size=SIZE)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_interrupted_drawing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            sample.draw(tmp_path / "data", num_images=1, size=SIZE)
    assert not (tmp_path / "data").exists()
    sample.draw(tmp_path / "data", num_images=1, size=SIZE)
    assert len(digests(tmp_path / "data")) == 2
