"""preprocess turns any folder into the store: the same bytes for any number of threads, and never in silence."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from medgen import config
from medgen.config import Project
from medgen.data import store
from medgen.errors import UserError
from medgen.preprocess import run

SMALL = config.Preprocess(image_size=16)


def make(folder: Path, num_patients: int = 20) -> Path:
    """Class folders of small pictures of two classes, patients by name, of several kinds."""
    generator = np.random.default_rng(0)
    for number in range(num_patients):
        for image in range(2):
            suffix = ("png", "jpg", "bmp", "tif")[(number + image) % 4]
            path = folder / ("A" if number % 2 else "B") / f"person{number}_{image}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (20 + number, 30)
            Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(path)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_thread_and_many_give_the_same_bytes(tmp_path: Path) -> None:
    for threads in (1, 7):
        make(tmp_path / str(threads) / "data")
        (tmp_path / str(threads) / "data" / "A" / "person99_0.png").write_bytes(b"broken")
        run(Project(tmp_path / str(threads)), data=config.Data(), preprocess=SMALL, num_threads=threads)
    one, many = (content(tmp_path / name / "artifacts") for name in ("1", "7"))
    assert one == many


def test_rows_are_their_files(tmp_path: Path) -> None:
    """Each array row, recomputed by hand from the file that the manifest names."""
    make(tmp_path / "data")
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=config.Preprocess(image_size=16, fit="squash"))
    assert dataset.classes == ("A", "B")
    assert sum(dataset.counts.values()) == 40
    for name in store.SPLITS:
        split = dataset.split(name)
        for image, label, row in zip(split.images, split.labels, split.rows(), strict=True):
            grey = cv2.imread(str(tmp_path / "data" / row["path"]), cv2.IMREAD_GRAYSCALE)
            expected = cv2.resize(cv2.createCLAHE(2.0, (8, 8)).apply(grey), (16, 16), interpolation=cv2.INTER_AREA)
            assert (image[0] == expected).all(), row["path"]
            assert dataset.classes[label] == row["label"] == row["path"][0]
            assert row["patient"] == Path(row["path"]).name.split("_")[0]
            assert (row["width"], row["height"]) == (str(grey.shape[1]), str(grey.shape[0]))
            assert row["sha256"] == store.hash_file(tmp_path / "data" / row["path"])


def test_masks_lie_as_their_images(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    half = np.zeros((20, 40), np.uint8)
    half[:, :20] = 255
    for number in range(5):
        Image.fromarray(half).save(tmp_path / "data" / "images" / f"{number}.png")
        if number:
            Image.fromarray(half).resize((80, 40)).save(tmp_path / "data" / "masks" / f"{number}@.png")
    Image.fromarray(half.T).save(tmp_path / "data" / "images" / "tall.png")
    Image.fromarray(half).save(tmp_path / "data" / "masks" / "tall.png")
    options = config.Preprocess(image_size=16, clahe_clip=0, max_rejected=0.5, val_fraction=0, test_fraction=0)
    train = run(Project(tmp_path), data=config.Data(), preprocess=options).split("train")
    assert train.masks is not None
    for image, mask, row in zip(train.images, train.masks, train.rows(), strict=True):
        assert (mask == (image > 127 if row["mask"] else 0)).all()
        assert bool(row["mask"]) is (row["path"] != "images/0.png")
    rejected = store.read_csv(tmp_path / "artifacts" / "dataset" / "rejected.csv", store.REJECTED_COLUMNS)
    assert [row["path"] for row in rejected] == ["images/tall.png"]
    assert "40 x 20" in rejected[0]["reason"]


def test_a_bad_file_is_listed_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    (tmp_path / "data" / "A" / "lfs.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    assert sum(dataset.counts.values()) == 40
    with (dataset.folder / "rejected.csv").open() as stream:
        assert [(row["path"], "Git LFS" in row["reason"]) for row in csv.DictReader(stream)] == [("A/lfs.png", True)]
    said = capsys.readouterr().err
    assert "rejected 1" in said
    assert "rejected.csv" in said
    assert f"train {dataset.counts['train']} (A " in said


def test_too_many_bad_files_stop_the_run(tmp_path: Path) -> None:
    make(tmp_path / "data")
    project = Project(tmp_path)
    before = run(project, data=config.Data(), preprocess=SMALL).fingerprint
    for number in range(5):
        (tmp_path / "data" / "A" / f"bad{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 of 45 files.*max_rejected = 0\.05.*5 x empty file") as caught:
        run(project, data=config.Data(), preprocess=SMALL)
    assert str(project.runs / "rejected.csv") in str(caught.value)
    assert (project.runs / "rejected.csv").read_text().count("empty file") == 5
    assert store.open_store(project.dataset).fingerprint == before  # the old dataset stands
    run(project, data=config.Data(), preprocess=SMALL.model_copy(update={"max_rejected": 0.2}))


def test_a_listed_file_that_is_missing_is_rejected(tmp_path: Path) -> None:
    make(tmp_path / "data")
    paths = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.*"))
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(["path", *paths, "A/absent.png"]))
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    rejected = store.read_csv(dataset.folder / "rejected.csv", store.REJECTED_COLUMNS)
    assert rejected == [{"path": "A/absent.png", "reason": "No such file or directory"}]


def test_nothing_changed_means_nothing_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "data")
    project = Project(tmp_path)
    first = run(project, data=config.Data(), preprocess=SMALL)
    before = (project.dataset / "dataset.json").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr("medgen.preprocess.decode", lambda *_: pytest.fail("decoded"))
        assert run(project, data=config.Data(), preprocess=SMALL) == first
    assert (project.dataset / "dataset.json").stat().st_ino == before


@pytest.mark.parametrize("change", ["pixels", "label", "patient", "settings", "damage", "new file"])
def test_any_change_makes_it_anew(tmp_path: Path, change: str) -> None:
    project, data, options = Project(tmp_path), config.Data(), SMALL
    folder = make(tmp_path / "data")
    first = run(project, data=data, preprocess=options)
    path = folder / "A" / "person1_0.jpg"
    if change == "pixels":
        stat = path.stat()
        Image.fromarray(np.full((21, 30), 50, np.uint8)).save(path)
        with path.open("ab") as file:  # same size and time: the content alone tells
            file.write(b"\0" * (stat.st_size - path.stat().st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    elif change == "label":
        (folder / "A").rename(folder / "C")
    elif change == "patient":
        data = config.Data(patient_pattern=r"(person)")
        options = options.model_copy(update={"val_fraction": 0.0, "test_fraction": 0.0})
    elif change == "settings":
        options = options.model_copy(update={"fit": "squash"})
    elif change == "damage":
        (project.dataset / "train" / "images.npy").write_bytes(b"")
    else:
        Image.fromarray(np.full((21, 30), 50, np.uint8)).save(folder / "A" / "new.png")
    second = run(project, data=data, preprocess=options)
    assert (second.fingerprint == first.fingerprint) is (change == "damage")
    store.open_store(project.dataset)


def test_no_training_images_is_said(tmp_path: Path) -> None:
    make(tmp_path / "data" / "test")
    with pytest.raises(UserError, match="no training images"):
        run(Project(tmp_path), data=config.Data(), preprocess=SMALL)


def test_a_split_that_parts_a_patient_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data" / "train")
    make(tmp_path / "data" / "test", num_patients=3)
    run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    assert "puts 3 patients into several splits, such as person0" in capsys.readouterr().err


def test_reduced_decode_changes_little(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    smooth = cv2.GaussianBlur(np.random.default_rng(0).normal(128, 600, (1400, 1300)), (0, 0), 20)
    Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(tmp_path / "data" / "large.jpg", quality=90)
    exact, reduced = (
        np.array(run(Project(tmp_path), data=config.Data(), preprocess=options).split("train").images, int)
        for options in (
            config.Preprocess(image_size=32, clahe_clip=0),
            config.Preprocess(image_size=32, clahe_clip=0, reduced_decode=True),
        )
    )
    assert 0 < np.abs(exact - reduced).mean() < 1.0


@pytest.mark.slow
def test_real_chest_xrays(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data = config.Data(path=str(shared_data("xray")))
    dataset = run(Project(tmp_path), data=data, preprocess=config.Preprocess())
    assert dataset.counts["test"] == 342
    assert dataset.counts["train"] + dataset.counts["val"] == 1401
    assert dataset.classes == ("COVID19", "NORMAL", "PNEUMONIA")
    of = {name: {row["patient"] for row in dataset.split(name).rows()} for name in store.SPLITS}
    assert not of["train"] & of["val"]
    assert not (of["train"] | of["val"]) & of["test"]


def test_real_lung_masks(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data = config.Data(path=str(shared_data("lungmask")))
    train = run(Project(tmp_path), data=data, preprocess=config.Preprocess(clahe_clip=0)).split("train")
    assert train.masks is not None
    assert set(np.unique(train.masks)) == {0, 1}
    shares = train.masks.mean(axis=(1, 2, 3))
    assert 0.1 < shares.min() < shares.max() < 0.6
    darker = 0
    for image, mask in zip(train.images[:, 0], train.masks[:, 0], strict=True):
        rim = cv2.dilate(mask, np.ones((9, 9), np.uint8)) - mask
        darker += int(image[mask > 0].mean() < image[rim > 0].mean())
    assert darker > 0.95 * len(train.images)  # lungs are darker than what is round them
