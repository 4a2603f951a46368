"""preprocess converts a folder to the dataset store, with the same bytes for any number of threads."""

import gzip
import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image

from medgen import config
from medgen.config import Project
from medgen.data import store
from medgen.errors import UserError
from medgen.ingest import audit, reading
from medgen.ingest.patients import find_salt, pseudonymize
from medgen.ingest.preprocess import run
from medgen.io import hash_file

SMALL = config.Preprocess(image_size=16)


def make(folder: Path, num_patients: int = 20) -> Path:
    """Class folders of small images of two classes in several formats, with patients in the file names."""
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


def rejected_files(dataset: store.Store) -> dict[str, str]:
    rows = store.read_csv(dataset.folder / "rejected.csv", store.REJECTED_COLUMNS)
    return {row["path"]: row["reason"] for row in rows}


def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 7):
        monkeypatch.setattr(reading, "num_cores", lambda count=threads: count)
        make(tmp_path / str(threads) / "data")
        (tmp_path / str(threads) / "data" / "A" / "person99_0.png").write_bytes(b"broken")
        run(Project(tmp_path / str(threads)), data=config.Data(), preprocess=SMALL)
    one, many = (content(tmp_path / name / "artifacts") for name in ("1", "7"))
    assert one == many


def test_rows_match_their_files(tmp_path: Path) -> None:
    """Each array row equals the one computed here from the file in the manifest."""
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
            assert row["patient"] == pseudonymize(
                find_salt(tmp_path / "data", False), Path(row["path"]).name.split("_")[0]
            )
            assert row["index"] == "0"
            assert (row["width"], row["height"]) == (str(grey.shape[1]), str(grey.shape[0]))
            assert row["sha256"] == hash_file(tmp_path / "data" / row["path"])


def test_masks_are_aligned_with_their_images(tmp_path: Path) -> None:
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
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=options)
    train = dataset.split("train")
    assert train.masks is not None
    for image, mask, row in zip(train.images, train.masks, train.rows(), strict=True):
        assert (mask == (image > 127 if row["mask"] else 0)).all()
        assert bool(row["mask"]) is (row["path"] != "images/0.png")
    assert rejected_files(dataset) == {"images/tall.png": "mask masks/tall.png is 40 x 20, the image 20 x 40"}


def test_an_unreadable_file_is_listed_and_the_run_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    (tmp_path / "data" / "A" / "lfs.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    assert sum(dataset.counts.values()) == 40
    assert {path: "Git LFS" in reason for path, reason in rejected_files(dataset).items()} == {"A/lfs.png": True}
    output = capsys.readouterr().err
    assert "rejected 1" in output
    assert "rejected.csv" in output
    assert f"train {dataset.counts['train']} (A " in output


def test_a_small_file_of_a_quarter_billion_slices_is_one_reason(tmp_path: Path) -> None:
    make(tmp_path / "data")
    header = bytearray(nibabel.Nifti2Image(np.zeros((1, 1, 1), np.uint8), np.eye(4)).to_bytes()[:544])
    header[16:48] = struct.pack("<4q", 3, 1, 1, 1 << 28)
    bomb = gzip.compress(bytes(header)) + gzip.compress(bytes(1 << 22)) * 64
    (tmp_path / "data" / "A" / "bomb.nii.gz").write_bytes(bomb)
    assert len(bomb) < 300_000
    tracemalloc.start()
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rejected_files(dataset) == {"A/bomb.nii.gz": "axial slices: images of 1 x 1; expected at least 4 x 4"}
    assert sum(dataset.counts.values()) == 40
    assert peak < 64 << 20


def test_too_many_unreadable_files_stop_the_run(tmp_path: Path) -> None:
    make(tmp_path / "data")
    project = Project(tmp_path)
    before = run(project, data=config.Data(), preprocess=SMALL).fingerprint
    for number in range(5):
        (tmp_path / "data" / "A" / f"bad{number}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 of 45 images.*max_rejected = 0\.05.*5 x empty file") as caught:
        run(project, data=config.Data(), preprocess=SMALL)
    assert str(project.runs / "rejected.csv") in str(caught.value)
    assert (project.runs / "rejected.csv").read_text().count("empty file") == 5
    assert store.open_store(project.dataset).fingerprint == before  # the old dataset is unchanged
    run(project, data=config.Data(), preprocess=SMALL.model_copy(update={"max_rejected": 0.2}))


def test_a_listed_file_that_is_missing_is_rejected(tmp_path: Path) -> None:
    make(tmp_path / "data")
    paths = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.*"))
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(["path", *paths, "A/absent.png", "B"]))
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    assert rejected_files(dataset) == {
        "A/absent.png": "No such file or directory",
        "B": "a folder; expected a file, or for volumes a folder of one DICOM series",
    }


def test_an_unchanged_dataset_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "data")
    project = Project(tmp_path)
    first = run(project, data=config.Data(), preprocess=SMALL)
    before = (project.dataset / "dataset.json").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr("medgen.ingest.reading.open_file", lambda *_: pytest.fail("a file was read"))
        assert run(project, data=config.Data(), preprocess=SMALL) == first
    assert (project.dataset / "dataset.json").stat().st_ino == before


def test_of_several_at_once_one_makes_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data")
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(run, Project(tmp_path), data=config.Data(), preprocess=SMALL) for _ in range(8)]
        datasets = [each.result() for each in waiting]
    assert len({dataset.fingerprint for dataset in datasets}) == 1
    printed = "".join(capsys.readouterr())
    assert (printed.count("written"), printed.count("unchanged")) == (1, 7)


@pytest.mark.parametrize("change", ["pixels", "label", "patient", "settings", "damage", "new file"])
def test_any_change_rebuilds_the_dataset(tmp_path: Path, change: str) -> None:
    project, data, options = Project(tmp_path), config.Data(), SMALL
    folder = make(tmp_path / "data")
    first = run(project, data=data, preprocess=options)
    path = folder / "A" / "person1_0.jpg"
    if change == "pixels":
        stat = path.stat()
        Image.fromarray(np.full((21, 30), 50, np.uint8)).save(path)
        with path.open("ab") as file:  # same size and time: only the content differs
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
        (project.dataset / "train" / "images-00000.npy").write_bytes(b"")
    else:
        Image.fromarray(np.full((21, 30), 50, np.uint8)).save(folder / "A" / "new.png")
    second = run(project, data=data, preprocess=options)
    assert (second.fingerprint == first.fingerprint) is (change == "damage")
    store.open_store(project.dataset)


def test_a_dataset_without_training_images_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "data" / "test")
    with pytest.raises(UserError, match="no training images"):
        run(Project(tmp_path), data=config.Data(), preprocess=SMALL)


def test_own_splits_replace_given_ones(tmp_path: Path) -> None:
    make(tmp_path / "data" / "test")
    dataset = run(Project(tmp_path), data=config.Data(splits="own"), preprocess=SMALL)
    assert all(dataset.counts[name] > 0 for name in store.SPLITS)
    assert dataset.classes == ("A", "B")


def test_leaks_between_given_splits_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "data" / "train")
    make(tmp_path / "data" / "test", num_patients=3)
    run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    output = capsys.readouterr().err
    assert "patients in several splits: 3, for example test/A/person1_0.jpg's" in output
    assert "exact duplicates across splits: 6" in output


def save_image(path: Path, number: int, **options: object) -> Path:
    """Save a smooth random image that depends on the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).normal(128, 900, (96, 96))
    smooth = cv2.GaussianBlur(noise, (0, 0), 8).clip(0, 255).astype(np.uint8)
    Image.fromarray(smooth).save(path, **options)
    return path


@pytest.fixture
def leaky(tmp_path: Path) -> Project:
    """Given splits that share a patient, a copy and a re-encoded copy; and one image with two labels."""
    folder = tmp_path / "data"
    for number in range(12):
        save_image(folder / ("test" if number < 4 else "train") / "AB"[number % 2] / f"person{number}_0.png", number)
    save_image(folder / "train" / "A" / "person0_1.png", 100)  # person0 is in test
    save_image(folder / "train" / "B" / "copy.png", 1)  # of test/B/person1_0.png
    save_image(folder / "train" / "A" / "like.jpg", 2, quality=60)  # of test/A/person2_0.png
    save_image(folder / "train" / "B" / "other.png", 4)  # of train/A/person4_0.png
    return Project(tmp_path)


def splits_by_path(dataset: store.Store) -> dict[str, str]:
    return {row["path"]: name for name in store.SPLITS for row in dataset.split(name).rows()}


NO_VAL = config.Preprocess(image_size=16, val_fraction=0.0)


def test_leaks_are_reported_and_kept(leaky: Project, capsys: pytest.CaptureFixture[str]) -> None:
    found = splits_by_path(run(leaky, data=config.Data(), preprocess=NO_VAL))
    assert all(path.startswith(name) for path, name in found.items())
    output = capsys.readouterr().err
    for line in (
        "patients in several splits: 1",
        "exact duplicates across splits: 1, for example test/B/person1_0.png and train/B/copy.png",
        "exact duplicates within a split: 1",
        "near-duplicates across splits: 1, for example test/A/person2_0.png and train/A/like.jpg",
        "images with several labels: 1, for example train/A/person4_0.png and train/B/other.png (A and B)",
    ):
        assert line in output


def test_leaks_are_moved_to_the_test_split(leaky: Project) -> None:
    found = splits_by_path(run(leaky, data=config.Data(leaks="move"), preprocess=NO_VAL))
    moved = {path for path, name in found.items() if not path.startswith(name)}
    assert moved == {"train/A/person0_1.png", "train/B/copy.png", "train/A/like.jpg"}
    assert {found[path] for path in moved} == {"test"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("leaks", r"data\.leaks is error: patient [0-9a-f]{16}.*found 3 leaks.*data audit"),
        ("duplicates", r"data\.duplicates is error: 2 images.*person1_0.png and train/B/copy.png"),
    ],
)
def test_leaks_and_duplicates_can_stop_the_run(leaky: Project, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(leaky, data=config.Data.model_validate({setting: "error"}), preprocess=NO_VAL)
    assert not leaky.dataset.exists()


def test_duplicates_are_dropped_with_their_reason(leaky: Project) -> None:
    dataset = run(leaky, data=config.Data(duplicates="drop"), preprocess=NO_VAL)
    rejected = rejected_files(dataset)
    assert rejected == {
        "train/B/copy.png": "a duplicate of test/B/person1_0.png",
        "train/A/person4_0.png": "one image under the labels A, B",
        "train/B/other.png": "one image under the labels A, B",
    }
    assert not rejected.keys() & splits_by_path(dataset).keys()
    assert sum(dataset.counts.values()) == 16 - 3


@pytest.mark.parametrize(("leaks", "split"), [("move", "val"), ("warn", "train")])
def test_a_dropped_copy_still_links_other_images(
    tmp_path: Path, leaks: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """near.jpg resembles aaa.png, which is dropped because of its copy in val: near.jpg leaks into val."""
    folder = tmp_path / "data"
    for number in range(4):
        save_image(folder / "train" / "A" / f"other{number}.png", 10 + number)
    save_image(folder / "train" / "A" / "aaa.png", 1)
    save_image(folder / "val" / "A" / "zzz.png", 1)
    save_image(folder / "train" / "A" / "near.jpg", 1, quality=70)
    options = config.Preprocess(image_size=16, test_fraction=0.0)
    found = splits_by_path(run(Project(tmp_path), data=config.Data(duplicates="drop", leaks=leaks), preprocess=options))
    assert "train/A/aaa.png" not in found
    assert found["train/A/near.jpg"] == split
    assert ("near-duplicates across splits: 1" in capsys.readouterr().err) is (leaks == "warn")
    with pytest.raises(UserError, match=r"data\.leaks is error"):
        run(Project(tmp_path), data=config.Data(duplicates="drop", leaks="error"), preprocess=options)


def test_an_unlabelled_copy_is_no_label_conflict(tmp_path: Path) -> None:
    for number in range(4):
        save_image(tmp_path / "data" / "train" / "AB"[number % 2] / f"{number}.png", number)
    save_image(tmp_path / "data" / "train" / "copy.png", 0)
    found = splits_by_path(run(Project(tmp_path), data=config.Data(duplicates="drop"), preprocess=NO_VAL))
    assert "train/copy.png" not in found
    assert "train/A/0.png" in found


def test_the_store_has_no_other_files(tmp_path: Path) -> None:
    make(tmp_path / "data")
    run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    arrays = {f"{split}/{kind}.npy" for split in store.SPLITS for kind in ("images-00000", "labels")}
    assert content(tmp_path / "artifacts").keys() == {
        "dataset.lock",
        *(f"dataset/{name}" for name in arrays | {"manifest.csv", "rejected.csv", "dataset.json"}),
    }
    assert not content(tmp_path / "runs")


def test_unusual_file_names_are_kept(tmp_path: Path) -> None:
    names = {"line\nbreak.png", "carriage\rreturn.png", 'quo"te, comma.png', "Röntgen 胸部.png", "\x1b[31mred.png"}
    for number, name in enumerate(sorted(names)):
        save_image(tmp_path / "data" / name, number)
    (tmp_path / "data" / "bro\rken.png").write_bytes(b"")
    options = config.Preprocess(image_size=16, max_rejected=0.5)
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=options)
    assert set(splits_by_path(dataset)) == names
    assert rejected_files(dataset) == {"bro\rken.png": "empty file"}


def test_an_empty_split_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        save_image(tmp_path / "data" / f"person1_{number}.png", number)
    run(Project(tmp_path), data=config.Data(), preprocess=SMALL)
    assert "no images in val and test: there are too few patients (see data.patient_pattern)" in (
        capsys.readouterr().err
    )


def test_the_error_for_an_empty_dataset_gives_the_reason(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "A" / "1.png", 0)
    save_image(tmp_path / "data" / "B" / "1.png", 0)
    reason = "all 2 images were rejected, 2 of them for this reason: one image under the labels A, B"
    with pytest.raises(UserError, match=reason):
        run(Project(tmp_path), data=config.Data(duplicates="drop"), preprocess=SMALL)


@pytest.mark.parametrize("problem", ["no folder", "full"])
def test_a_full_or_unwritable_disk_is_reported(tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "data")
    if problem == "no folder":
        (tmp_path / "artifacts").write_text("a file")
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"artifacts/dataset: .*Free disk space"):
        run(Project(tmp_path), data=config.Data(), preprocess=SMALL)


def test_near_duplicates_are_in_one_split(tmp_path: Path) -> None:
    for number in range(30):
        save_image(tmp_path / "data" / f"a{number}.png", number)
        save_image(tmp_path / "data" / f"b{number}.jpg", number, quality=70)
    for seed in range(3):
        options = config.Preprocess(image_size=16, val_fraction=0.2, test_fraction=0.3, seed=seed)
        found = splits_by_path(run(Project(tmp_path), data=config.Data(leaks="error"), preprocess=options))
        assert all(found[f"a{number}.png"] == found[f"b{number}.jpg"] for number in range(30))


def test_colour_is_kept_with_three_channels(tmp_path: Path) -> None:
    red = np.zeros((40, 40, 3), np.uint8)
    red[:, 20:] = (200, 30, 30)
    for number in range(6):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(red + number).save(tmp_path / "data" / f"{number}.png")
    options = config.Preprocess(image_size=16, channels=3, clahe_clip=0)
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=options)
    assert dataset.image_shape == (3, 16, 16)
    left, right = dataset.split("train").images[0, :, 8, [2, 13]]
    assert left.max() < 10 and right[0] > 190 and right[1:].max() < 50


def test_images_of_one_file_are_stored_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "num_cores", lambda: 3)
    images = np.random.default_rng(0).integers(0, 256, (80, 16, 16), np.uint8)
    (tmp_path / "data").mkdir()
    arrays = {"train_images": images[:60], "test_images": images[60:]}
    np.savez_compressed(
        tmp_path / "data" / "set.npz",
        **arrays,
        **{f"{name}_labels": np.arange(count)[:, None] % 3 for name, count in (("train", 60), ("test", 20))},
    )
    options = config.Preprocess(image_size=16, clahe_clip=0, val_fraction=0)
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=options)
    assert dataset.classes == ("0", "1", "2")
    assert (dataset.split("train").images[:, 0] == images[:60]).all()
    test = dataset.split("test")
    assert (test.images[:, 0] == images[60:]).all()
    assert [row["index"] for row in test.rows()] == [str(index) for index in range(60, 80)]
    assert [row["label"] for row in test.rows()] == [str(index % 3) for index in range(20)]


def test_dicom_series_and_nifti_of_the_same_voxels_are_equal_volumes(
    tmp_path: Path, write_series: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """From files to the store and the audit; no name, date or identifier of a patient is written."""
    random = np.random.default_rng(0)
    affine = np.diag([-0.8, -0.8, 2.0, 1.0])
    for number in range(6):
        voxels = random.integers(-900, 900, (20, 18, 12))
        voxels[4:14, 4:10, 3 : 5 + number] += 600
        if number < 4:
            write_series(tmp_path / "data" / f"ct{number}", voxels, affine, f"1.{number}", f"QZ-73911{number}")
        if number in (3, 4, 5):
            path = tmp_path / "data" / ("nifti3.nii.gz" if number == 3 else f"other{number}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), affine), path)
    write_series(tmp_path / "data" / "gap", voxels, affine, "1.9", change=lambda at, each: each if at != 5 else None)
    write_series(tmp_path / "data" / "scout", voxels[:, :, :2], affine, "1.8")
    settings = config.Preprocess(image_size=(16, 16, 16), clahe_clip=0.0, bits=16, max_rejected=0.2)
    project = Project(tmp_path)
    dataset = run(project, data=config.Data(), preprocess=settings)
    splits = [dataset.split(name) for name in store.SPLITS]
    volumes = {
        row["path"]: volume for split in splits for row, volume in zip(split.rows(), split.images[:], strict=True)
    }
    assert sorted(volumes) == ["ct0", "ct1", "ct2", "ct3", "nifti3.nii.gz", "other4.nii.gz", "other5.nii.gz"]
    assert np.abs(volumes["ct3"].astype(int) - volumes["nifti3.nii.gz"]).max() <= 1
    rows = {row["path"]: row for split in splits for row in split.rows()}
    assert rows["ct3"]["split"] == rows["nifti3.nii.gz"]["split"]  # one image: near-duplicates stay together
    assert (rows["ct3"]["mode"], rows["ct3"]["width"], rows["ct3"]["height"]) == ("MONOCHROME2;16", "20", "18")
    assert len({rows[f"ct{number}"]["patient"] for number in range(4)}) == 4
    assert rejected_files(dataset) == {
        "gap": rejected_files(dataset)["gap"],
        "scout": "a DICOM series of 2 slices; expected at least 4 in a volume",
    }
    assert rejected_files(dataset)["gap"].startswith("slices are missing: 4 mm between IM00")
    assert dataset.preprocess.voxel_size == (1.5, 1.44, 1.4545)  # 24, 14.4 and 16 mm by 16, 10 and 11 voxels
    before = content(project.dataset)
    run(project, data=config.Data(), preprocess=settings)
    assert content(project.dataset) == before and "unchanged" in capsys.readouterr().err
    audit.run(project, data=config.Data(), preprocess=settings)
    found = json.loads((project.reports / "audit.json").read_text())
    assert found["kinds"] == {"dicom": {"files": 61, "images": 6}, "volume": {"files": 3, "images": 3}}
    assert found["num_files"] == 64 and [entry["path"] for entry in found["left_out"]] == ["scout"]
    folders = [path for path in tmp_path.iterdir() if path.name != "data"]
    text = b"".join(b"".join(content(folder).values()) for folder in folders) + "".join(capsys.readouterr()).encode()
    assert not any(secret in text for secret in (b"Quokka", b"QZ-7391", b"19010203", b"1.2.826"))
    changed = project.root / "data" / "ct0" / "IM0002"
    changed.write_bytes(changed.read_bytes()[:-2] + b"\1\2")
    assert run(project, data=config.Data(), preprocess=settings).source != dataset.source


def test_files_that_are_not_images_are_listed_and_not_counted_as_unreadable(tmp_path: Path) -> None:
    make(tmp_path / "data")
    for name, content in {"notes.txt": b"hello", ".DS_Store": b"\0\0\0\1Bud1", "A/list.csv": b"a,b\n"}.items():
        (tmp_path / "data" / name).write_bytes(content)
    dataset = run(Project(tmp_path), data=config.Data(), preprocess=SMALL.model_copy(update={"max_rejected": 0.0}))
    assert rejected_files(dataset).keys() == {"notes.txt", ".DS_Store", "A/list.csv"}
    assert sum(dataset.counts.values()) == 40


def test_reduced_decode_changes_images_little(tmp_path: Path) -> None:
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
    shares = train.masks[:].mean(axis=(1, 2, 3))
    assert 0.1 < shares.min() < shares.max() < 0.6
    darker = 0
    for image, mask in zip(train.images[:, 0], train.masks[:, 0], strict=True):
        rim = cv2.dilate(mask, np.ones((9, 9), np.uint8)) - mask
        darker += int(image[mask > 0].mean() < image[rim > 0].mean())
    assert darker > 0.95 * len(train.images)  # lungs are darker than their surroundings
