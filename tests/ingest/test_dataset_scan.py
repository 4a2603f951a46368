"""Dataset scan: the metadata of each image by folders, names, files and manifest, and the reason for other files."""

import gc
import os
import pathlib
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen.config import Data, Preprocess
from medgen.errors import UserError
from medgen.ingest import dataset_scan, images
from medgen.ingest.dataset_scan import ImageRecord, ScanResult
from medgen.ingest.formats.raw import Contents, UnreadableImage


def make(folder: Path, *names: str, manifest: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    if manifest is not None:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.csv").write_text(manifest)
    return folder


def scan_folder(folder: Path, **data: Any) -> ScanResult:
    return dataset_scan.scan(folder, Data(**{"keep_patient_ids": True, **data}), Preprocess())


def records_of(folder: Path, **data: Any) -> list[ImageRecord]:
    return scan_folder(folder, **data).records


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, Contents | str]:
    """Results of `images.inspect` by file name; a string is the reason why the file cannot be read."""
    found: dict[str, Contents | str] = {}

    def inspect(path: Path, preprocess: Preprocess) -> Contents:
        result = found[path.name]
        if isinstance(result, str):
            raise UnreadableImage(result)
        return result

    monkeypatch.setattr(images, "inspect", inspect)
    return found


LAYOUTS: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "class folders": {"A/1.png": ("A", None), "B/2.png": ("B", None)},
    "split and class": {"train/A/1.png": ("A", "train"), "test/B/2.png": ("B", "test"), "val/A/3.png": ("A", "val")},
    "other names, any case": {
        "Training/A/1.png": ("A", "train"),
        "TESTING/B/2.JPG": ("B", "test"),
        "Validation/A/3.Tif": ("A", "val"),
        "valid/A/4.bmp": ("A", "val"),
    },
    "wrapper above splits": {
        "chest_xray/train/NORMAL/1.jpeg": ("NORMAL", "train"),
        "chest_xray/test/PNEUMONIA/2.jpeg": ("PNEUMONIA", "test"),
    },
    "wrappers above classes": {"Data/images/A/1.png": ("A", None), "Data/images/B/2.png": ("B", None)},
    "flat": {"1.png": (None, None), "2.png": (None, None)},
    "flat below splits": {"train/1.png": (None, "train"), "test/2.png": (None, "test")},
    "class above split": {"A/train/1.png": ("A", "train"), "B/train/2.png": ("B", "train")},
    "deeper folders": {"train/A/x/1.png": ("A", "train"), "train/B/y/2.png": ("B", "train")},
    "images below class": {"A/images/1.png": ("A", None), "B/images/2.png": ("B", None)},
    "split in the folder's name": {
        "slices_train/1.png": (None, "train"),
        "slices_validate/2.png": (None, "val"),
        "slices_test/3.png": (None, "test"),
    },
    "split in the name above classes": {"x/train_set/A/1.png": ("A", "train"), "x/test_set/B/2.png": ("B", "test")},
    "a name like a split, alone": {"stress_test/1.png": ("stress_test", None), "rest/2.png": ("rest", None)},
    "Kaggle's nested copy": {
        "chest_xray/train/NORMAL/1.jpeg": ("NORMAL", "train"),
        "chest_xray/test/PNEUMONIA/2.jpeg": ("PNEUMONIA", "test"),
        "chest_xray/chest_xray/train/NORMAL/1.jpeg": ("NORMAL", "train"),
        "chest_xray/chest_xray/test/PNEUMONIA/2.jpeg": ("PNEUMONIA", "test"),
    },
    "chest-xray-covid19-pneumonia": {
        "Data/train/COVID19/COVID-00003b.jpg": ("COVID19", "train"),
        "Data/test/NORMAL/NORMAL(0).jpg": ("NORMAL", "test"),
    },
    "Montgomery and Shenzhen": {
        "data/Lung Segmentation/CXR_png/MCUCXR_0001_0.png": ("normal", None),
        "data/Lung Segmentation/CXR_png/CHNCXR_0327_1.png": ("tuberculosis", None),
        "data/Lung Segmentation/test/CHNCXR_0025_0.png": ("normal", "test"),
    },
    "Montgomery and Shenzhen in two folders": {
        "MontgomerySet/CXR_png/MCUCXR_0104_1.png": ("tuberculosis", None),
        "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png": ("normal", None),
    },
    "their file names in other class folders": {"Normal/CHNCXR_0001_0.png": ("Normal", None), "TB/x.png": ("TB", None)},
    "TBX11K": {"imgs/tb/tb0005.png": ("tb", None), "imgs/health/h0001.png": ("health", None)},
    "patients' folders are no classes": {
        "OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.png": (None, None),
        "OAS1_0002_MR1/PROCESSED/a.png": (None, None),
        "sub-01/anat/sub-01_T1w.png": (None, None),
    },
    "patients' folders in classes": {"A/patient1/1.png": ("A", None), "B/patient2/2.png": ("B", None)},
    "names with quotes, dots and new lines": {"A/a..\nb.png": ("A", None), 'B/Ünï "b",.png': ("B", None)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_label_and_split_come_from_the_folders(tmp_path: Path, name: str) -> None:
    expected = LAYOUTS[name]
    records = records_of(make(tmp_path, *expected))
    assert {record.path: (record.label, record.split) for record in records} == expected
    assert [record.path for record in records] == sorted(expected)


MASKS = {
    "masks next to images": ("images/a.jpg", "masks/a.png"),
    "with a suffix": ("images/a.jpg", "masks/a_mask.png"),
    "with @": ("images/a-1.jpg", "masks/a-1@.png"),
    "with classes": ("images/A/a.png", "masks/A/a.png"),
    "below classes": ("A/images/a.png", "A/masks/a.png"),
    "below splits": ("train/images/a.png", "train/masks/a.png"),
    "other names": ("Imgs/a.png", "Lung Masks/a.png"),
    "in one folder": ("A/a.png", "A/a_mask.png"),
    "in one folder with @": ("A/a.png", "A/a@.png"),
    "numbered": ("A/a (1).png", "A/a (1)_mask_1.png"),
    "OASIS slices": ("slices_train/case_1_slice_0.nii.png", "slices_seg_train/seg_1_slice_0.nii.png"),
    "a folder named after the images'": ("train/a.png", "train_masks/a_mask.png"),
    "Montgomery": ("x/CXR_png/MCUCXR_0001_0.png", "x/masks/MCUCXR_0001_0.png"),
    "Shenzhen": ("x/CXR_png/CHNCXR_0001_0.png", "x/masks/CHNCXR_0001_0_mask.png"),
    "Oxford pets": ("images/Abyssinian_1.jpg", "annotations/trimaps/Abyssinian_1.png"),
    "volumes": ("images/a.nii.gz", "masks/a.nii"),
    "volumes in one folder": ("A/a.nii.gz", "A/a_seg.nii.gz"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_paired_with_their_image(tmp_path: Path, contents: dict[str, Contents | str], name: str) -> None:
    image, mask = MASKS[name]
    contents.update({Path(path).name: Contents((0,)) for path in (image, mask)})
    scanned = scan_folder(make(tmp_path, image, mask, f"{image.rpartition('/')[0]}/lone.png"))
    assert {record.path: record.mask for record in scanned.records} == {
        image: mask, f"{image.rpartition('/')[0]}/lone.png": None,
    }  # fmt: skip
    assert scanned.other_files == []


def test_a_mask_in_another_folder_belongs_to_the_only_image_of_its_name(tmp_path: Path) -> None:
    names = ("s1/T88/a.png", "s1/FSL_SEG/a_fseg.png", "s2/T88/a.png", "s2/T88/b.png", "s3/b/b.png", "masks/b.png")
    scanned = scan_folder(make(tmp_path, *names))
    assert {r.path: r.mask for r in scanned.records if r.mask} == {"s1/T88/a.png": "s1/FSL_SEG/a_fseg.png"}
    assert scanned.other_files == [("masks/b.png", "a mask without its image")]


def test_a_mask_is_not_paired_across_splits(tmp_path: Path) -> None:
    scanned = scan_folder(make(tmp_path, "train/images/a.png", "train/images/b.png", "test/masks/a.png"))
    assert not any(record.mask for record in scanned.records)
    assert scanned.other_files == [("test/masks/a.png", "a mask without its image")]


def test_masks_without_an_image_are_listed(tmp_path: Path) -> None:
    names = ("A/b_mask.png", "masks/c.png", "A/a_mask.png", "A/a_mask_1.png", "x/ManualMask/leftMask/a.png")
    scanned = scan_folder(make(tmp_path, "A/a.png", "A/with_mask_on.png", "A/d@.png", *names))
    assert [record.path for record in scanned.records] == ["A/a.png", "A/d@.png", "A/with_mask_on.png"]
    assert scanned.other_files == [
        ("A/a_mask_1.png", "a second mask of the image that has A/a_mask.png"),
        ("A/b_mask.png", "a mask without its image"),
        ("masks/c.png", "a mask without its image"),
        ("x/ManualMask/leftMask/a.png", "a mask of one lung: join leftMask and rightMask in a folder masks"),
    ]


def test_class_folders_may_contain_the_word_mask(tmp_path: Path) -> None:
    records = records_of(make(tmp_path, "with_mask/1.png", "without_mask/2.png"))
    assert [record.label for record in records] == ["with_mask", "without_mask"]


def test_the_pet_dataset_has_its_classes_in_the_file_names(tmp_path: Path) -> None:
    names = ("annotations/list.txt", "annotations/xmls/Abyssinian_1.xml")
    paths = ("images/Abyssinian_1.jpg", "images/great_dane_2.jpg", "annotations/trimaps/Abyssinian_1.png")
    scanned = scan_folder(make(tmp_path, *paths, *names))
    assert [record.label for record in scanned.records] == ["Abyssinian", "great_dane"]
    assert [path for path, _ in scanned.other_files] == list(names)


PATIENTS = {
    "A/person12_bacteria_46.jpeg": "person12",
    "A/IM-0001-0001.jpeg": "IM-0001",
    "A/IM-0608-0001-0001.jpeg": "IM-0608",
    "A/NORMAL2-IM-0530-0001.jpeg": "NORMAL2-IM-0530",
    "A/case_001_slice_3.nii.png": "case_001",
    "A/00001280_004.png": "00001280",
    "A/COVID-00015a.png": "COVID-00015",
    "A/COVID-00015.jpg": "COVID-00015",
    "A/OAS1_0001_MR1.png": "OAS1_0001",
    "A/sub-01_T1w.png": "sub-01",
    "A/patient12_3.png": "patient12",
    "A/MCUCXR_0001_0.png": "MCUCXR_0001_0",
    "A/CHNCXR_0327_1.png": "CHNCXR_0327_1",
    "A/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.png": "OAS1_0001",
    "A/holiday.png": "A/holiday.png",
    "A/personal_1.png": "A/personal_1.png",
    "A/sub-07/ses-1/scan.png": "sub-07",
    "OAS2_0003_MR1/RAW/mpr-1.png": "OAS2_0003",
}


def test_patients_are_found_in_file_and_folder_names(tmp_path: Path) -> None:
    records = records_of(make(tmp_path, *PATIENTS))
    assert {record.path: record.patient for record in records} == PATIENTS


def test_the_users_pattern_takes_precedence(tmp_path: Path, contents: dict[str, Contents | str]) -> None:
    contents.update({"x8.dcm": Contents((0,), patient="ANONYMOUS"), "y.dcm": Contents((0,), patient="P1")})
    folder = make(tmp_path, "x7-person1_2.png", "other.png", "x8.dcm", "y.dcm")
    assert [record.patient for record in records_of(folder, patient_pattern=r"^x(\d+)")] == [
        "other.png",
        "7",
        "8",
        "P1",
    ]


@pytest.mark.parametrize("pattern", ["(", "no group"])
def test_a_wrong_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.patient_pattern"):
        records_of(make(tmp_path, "a.png"), patient_pattern=pattern)


def test_patients_are_pseudonyms_by_default(tmp_path: Path) -> None:
    text = "path,patient\nperson7_1.png,\nperson7_2.png,Doe^Jane\nperson7_3.png,\n"
    folder = make(tmp_path, "person7_1.png", "person7_2.png", "person7_3.png", manifest=text)
    hidden = [record.patient for record in records_of(folder, keep_patient_ids=False)]
    assert [record.patient for record in records_of(folder)] == ["person7", "Doe^Jane", "person7"]
    assert hidden[0] == hidden[2] != hidden[1]
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in hidden)


# files of many images, and companion files


def test_each_image_of_a_file_is_a_record(tmp_path: Path, contents: dict[str, Contents | str]) -> None:
    contents["a.npz"] = Contents((0, 1), labels=("0", None), splits=("train", "test"), independent=True)
    contents["scan.nii.gz"] = Contents(range(4, 8, 2), patient="P1")
    contents["sub-3_T1w.nii"] = Contents((0,))
    records = records_of(make(tmp_path, "A/a.npz", "B/scan.nii.gz", "B/sub-3_T1w.nii"))
    assert records == [
        ImageRecord("A/a.npz", "0", "A/a.npz#0", "train", None, 0),
        ImageRecord("A/a.npz", "A", "A/a.npz#1", "test", None, 1),
        ImageRecord("B/scan.nii.gz", "B", "P1", None, None, 4),
        ImageRecord("B/scan.nii.gz", "B", "P1", None, None, 6),
        ImageRecord("B/sub-3_T1w.nii", "B", "sub-3", None, None, 0),
    ]
    assert [record.name for record in records[:2]] == ["A/a.npz", "A/a.npz#1"]


def test_a_manifest_row_applies_to_all_images_of_a_file(tmp_path: Path, contents: dict[str, Contents | str]) -> None:
    contents["a.npz"] = Contents((0, 1), labels=("0", "1"), splits=("train", "test"), independent=True)
    records = records_of(make(tmp_path, "a.npz", manifest="path,label,patient,split\na.npz,X,p,val\n"))
    assert [(record.label, record.patient, record.split, record.index) for record in records] == [
        ("X", "p", "val", 0), ("X", "p", "val", 1),
    ]  # fmt: skip


def test_an_unreadable_file_is_one_record(tmp_path: Path, contents: dict[str, Contents | str]) -> None:
    contents["cut.dcm"] = "damaged"
    assert records_of(make(tmp_path, "cut.dcm")) == [ImageRecord("cut.dcm", None, "cut.dcm", None, None)]


# DICOM series

VOXELS = np.random.default_rng(0).integers(0, 200, (8, 8, 5))
VOLUMES = Preprocess(image_size=(16, 16, 16), clahe_clip=0.0)


def scan_volumes(folder: Path, **data: Any) -> ScanResult:
    return dataset_scan.scan(folder, Data(**{"keep_patient_ids": True, **data}), VOLUMES)


def test_a_series_is_one_record(tmp_path: Path, write_series: Callable[..., list[Path]]) -> None:
    """With the folder's path if it is alone there, else with that of its first file; classes are the folders above."""
    for name, series, patient in (("train/A/ct1", "1.1", "P1"), ("test/B/ct2", "1.2", "P2"), ("test/B", "1.3", "P3")):
        write_series(tmp_path / name, VOXELS, np.eye(4), series=series, patient=patient)
    for number in range(5):
        (tmp_path / "test" / "B" / f"IM{number:04}").rename(tmp_path / "test" / "B" / f"JM{number:04}")
    write_series(tmp_path / "test" / "B", VOXELS, np.eye(4), series="1.4", patient="P4")
    (tmp_path / "train" / "A" / "ct1" / "notes.txt").write_text("text")
    write_series(tmp_path / "val", VOXELS, np.eye(4), series="1.5", patient="P5")
    scanned = scan_volumes(tmp_path)
    assert [(each.path, each.label, each.patient, each.split) for each in scanned.records] == [
        ("test/B/IM0000", "B", "P4", "test"), ("test/B/JM0000", "B", "P3", "test"),
        ("test/B/ct2", "B", "P2", "test"), ("train/A/ct1", "A", "P1", "train"), ("val/IM0000", None, "P5", "val"),
    ]  # fmt: skip
    assert scanned.records[1].files == tuple(f"test/B/JM{number:04}" for number in range(5))
    assert scanned.records[3].slices == tuple(f"train/A/ct1/IM{number:04}" for number in range(5))
    assert scanned.other_files == [("train/A/ct1/notes.txt", "a text file")] and scanned.has_patient_ids
    hidden = scan_volumes(tmp_path, keep_patient_ids=False)
    assert all(len(record.patient) == 16 for record in hidden.records) and "P1" not in repr(hidden)


def test_a_manifest_lists_a_series_by_its_folder_or_one_of_its_files(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    for number, name in enumerate("abcd"):
        write_series(tmp_path / name, VOXELS, np.eye(4), series=f"1.{number}")
    rows = "path,label,split\na,X,train\nb/IM0003,Y,test\nb/IM0004,Z,test\nd/absent,X,train\n"
    (tmp_path / "manifest.csv").write_text(rows)
    scanned = scan_volumes(tmp_path)
    assert [(each.path, each.label, each.split, len(each.files)) for each in scanned.records] == [
        ("a", "X", "train", 5), ("b/IM0003", "Y", "test", 5), ("d/absent", "X", "train", 1),
    ]  # fmt: skip
    assert scanned.other_files == [
        ("b/IM0004", "a slice of b/IM0003, which is one volume"),
        ("c", "not listed in manifest.csv"),
        ("d", "not listed in manifest.csv"),
    ]


def test_a_folder_with_the_name_of_the_patient_is_no_class(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    for number in range(3):
        write_series(tmp_path / f"P{number}" / "study" / "ct", VOXELS, np.eye(4), f"1.{number}", f"P{number}")
    write_series(tmp_path / "B" / "P4" / "ct", VOXELS, np.eye(4), "1.4", "P4")
    assert [(each.path, each.label, each.patient) for each in scan_volumes(tmp_path).records] == [
        ("B/P4/ct", "B", "P4"), *((f"P{number}/study/ct", None, f"P{number}") for number in range(3)),
    ]  # fmt: skip


def test_a_series_has_the_mask_of_its_name(tmp_path: Path, write_series: Callable[..., list[Path]]) -> None:
    uid = "1.2.840.113619.2.5"  # many folders have the name of the series
    for name in ("ct1", "ct2", f"{uid}.1", f"{uid}.2"):
        write_series(tmp_path / "images" / name, VOXELS, np.eye(4), series=f"1.{name[-1]}")
    (tmp_path / "masks").mkdir()
    for name in ("ct2", f"{uid}.2"):
        mask = nibabel.Nifti1Image((VOXELS > 100).astype(np.uint8), np.eye(4))
        nibabel.save(mask, tmp_path / "masks" / f"{name}.nii.gz")
    assert {each.path: each.mask for each in scan_volumes(tmp_path).records} == {
        "images/ct1": None, "images/ct2": "masks/ct2.nii.gz",
        f"images/{uid}.1": None, f"images/{uid}.2": f"masks/{uid}.2.nii.gz",
    }  # fmt: skip
    write_series(tmp_path / "masks" / "ct1", VOXELS > 100, np.eye(4), series="2.1")
    with pytest.raises(UserError, match=r"masks/ct1, the mask of images/ct1, is a DICOM series; .*NIfTI"):
        scan_volumes(tmp_path)


def test_a_damaged_slice_stays_with_its_series(tmp_path: Path, write_series: Callable[..., list[Path]]) -> None:
    """So that the volume is not read without it. A file that names no series is an image of its own."""
    paths = write_series(tmp_path / "ct", VOXELS, np.eye(4))
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    paths[3].with_name("x.dcm").write_bytes(b"not DICOM")
    records = scan_volumes(tmp_path).records
    assert [(each.path, len(each.files), each.patient) for each in records] == [
        ("ct", 5, "QZ-7391155"), ("ct/x.dcm", 1, "ct/x.dcm"),
    ]  # fmt: skip


def test_a_volume_without_selected_slices_is_listed(tmp_path: Path, contents: dict[str, Contents | str]) -> None:
    contents["a.nii"] = Contents(())
    scanned = scan_folder(make(tmp_path, "a.nii", "a_mask.png", "b.png"))
    assert scanned.other_files == [
        ("a.nii", "preprocess.volume selects none of its images"),
        ("a_mask.png", "a mask without its image"),
    ]
    assert [record.path for record in scanned.records] == ["b.png"]


@pytest.mark.parametrize("second", ["a.img", "0.img"])
def test_companions_are_neither_records_nor_other_files(
    tmp_path: Path, contents: dict[str, Contents | str], second: str
) -> None:
    contents["a.hdr"] = Contents((0,), companions=(tmp_path / second, tmp_path / "missing.txt"))
    contents[second] = "only half of a volume"
    scanned = scan_folder(make(tmp_path, "a.hdr", second))
    assert ([record.path for record in scanned.records], scanned.companions) == (["a.hdr"], [second])
    assert scanned.other_files == []


# other files

JUNK = {
    ".DS_Store": "hidden",
    "A/.hidden.png": "hidden",
    ".cache/1.png": "hidden",
    "A/.ipynb_checkpoints/x/1.png": "a notebook's checkpoint copy",
    "__MACOSX/A/1.png": "metadata of macOS",
    "A/__pycache__/1.png": "compiled Python",
}


def test_junk_is_listed_with_the_reason(tmp_path: Path) -> None:
    scanned = scan_folder(make(tmp_path, "A/1.png", ".git/objects/ab/1.png", ".salted", "A/.salt", *JUNK))
    assert [record.path for record in scanned.records] == ["A/1.png"]
    more = {".git/": "files of a tool, skipped", ".salted": "hidden", "A/.salt": "hidden"}
    assert dict(scanned.other_files) == JUNK | more
    assert scanned.other_files == sorted(scanned.other_files)


def test_other_files_are_listed_with_a_description(tmp_path: Path) -> None:
    folder = make(tmp_path, "A/1.png", "A/empty.txt")
    (folder / "notes.txt").write_text("Jane Doe, born 1950")
    (folder / "w.pth").write_bytes(b"\x80\x02\x8a\x0a")
    other_files = dict(scan_folder(folder).other_files)
    assert other_files.keys() == {"A/empty.txt", "notes.txt", "w.pth"}
    assert (other_files["notes.txt"], other_files["A/empty.txt"]) == ("a text file", "empty file")


def test_special_files_are_listed_and_never_opened(tmp_path: Path) -> None:
    folder = make(tmp_path, "A/1.png")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.png")
    (folder / "away.png").symlink_to(folder / "nothing")
    (folder / "ring.png").symlink_to(folder / "ring.png")
    assert scan_folder(folder).other_files == [
        ("away.png", "a link that leads nowhere"),
        ("pipe", "not a regular file"),
        ("pipe.png", "not a regular file"),
        ("ring.png", "a link that leads nowhere"),
    ]


def test_a_name_that_is_not_utf_8_is_escaped(tmp_path: Path) -> None:
    folder = make(tmp_path, "A/1.png")
    (folder / os.fsdecode(b"A/caf\xe9.png")).write_bytes(b"")
    scanned = scan_folder(folder)
    assert scanned.other_files == [("A/caf\\xe9.png", "its name is not UTF-8: rename it")]
    assert len(scanned.records) == 1


# manifest.csv


def test_the_manifest_takes_precedence_over_folders(tmp_path: Path) -> None:
    text = "\ufeffPath,Label,Group,Split,source\ntrain/A/1.png,X,p1,test,s\ntrain/B/person7_1.png,,,,s\n"
    names = ("train/A/1.png", "train/B/person7_1.png", "train/B/unlisted.png")
    records = records_of(make(tmp_path, *names, manifest=text))
    assert records == [
        ImageRecord("train/A/1.png", "X", "p1", "test", None),
        ImageRecord("train/B/person7_1.png", "B", "person7", "train", None),
    ]


def test_a_manifest_of_paths_alone_is_enough(tmp_path: Path) -> None:
    records = records_of(make(tmp_path, "A/1.png", "B/2.png", manifest="path\nA/1.png\nB\\2.png\n"))
    assert [(record.label, record.patient) for record in records] == [("A", "A/1.png"), ("B", "B/2.png")]


def test_images_of_a_manifest_are_paired_with_masks(tmp_path: Path) -> None:
    folder = make(tmp_path, "images/1.png", "masks/1@.png", manifest="path,patient\nimages/1.png,9\n")
    assert records_of(folder) == [ImageRecord("images/1.png", None, "9", None, "masks/1@.png")]


def test_images_missing_in_the_manifest_are_listed_as_other_files(tmp_path: Path) -> None:
    names = ("1.png", "2.png", "1_mask.png", "3_mask.png", "masks/2.png", "notes.txt")
    scanned = scan_folder(make(tmp_path, *names, manifest="path\n1.png\nabsent.png\n"))
    assert scanned.records == [
        ImageRecord("1.png", None, "1.png", None, "1_mask.png"),
        ImageRecord("absent.png", None, "absent.png", None, None),
    ]
    assert dict(scanned.other_files) == {
        **dict.fromkeys(("2.png", "3_mask.png", "masks/2.png"), "not listed in manifest.csv"),
        "notes.txt": "empty file",
    }  # fmt: skip


def test_a_manifest_may_list_hidden_and_unreadable_files(tmp_path: Path) -> None:
    folder = make(tmp_path, ".a/1.png", ".a/2.png", manifest="path\n.a/1.png\npipe\n.\n" + "x" * 999 + "\n")
    os.mkfifo(folder / "pipe")
    scanned = scan_folder(folder)
    assert [record.path for record in scanned.records] == [".", ".a/1.png", "pipe", "x" * 999]
    assert scanned.other_files == [(".a/2.png", "hidden")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\n1.png,A\n", "no column named path among 2; expected a header with path"),
        ("path\n../1.png\n", r"line 2: path '\.\./1\.png'; expected a path inside"),
        ("path\n/etc/passwd\n", "expected a path inside"),
        ("path\nC:\\1.png\n", "expected a path inside"),
        ("path\n\n1.png\n,\n", "expected a path inside"),
        ("path\nlink.png\n", "leads out of"),
        ("path\n1\0.png\n", "expected a path inside"),
        ("path\n1.png\n1.png\n", "line 3: 1.png is listed twice"),
        ("path,split\n1.png,holdout\n", "split 'holdout'; expected train, val, test or"),
        ("path\n", "no images found"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    folder = make(tmp_path / "data", "1.png", manifest=text)
    (tmp_path / "secret.png").write_bytes(b"")
    if "link" in text:
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=reason):
        records_of(folder)


# links and missing files


@pytest.mark.parametrize(
    ("target", "message"), [("secret.png", r"link\.png: leads out of"), ("secrets", "a link to a folder")]
)
def test_links_out_of_the_folder_and_to_folders_are_refused(tmp_path: Path, target: str, message: str) -> None:
    folder = make(tmp_path / "data", "A/1.png")
    make(tmp_path, "secret.png", "secrets/1.png")
    (folder / "A" / "link.png").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=message):
        records_of(folder)


def test_links_into_dvcs_cache_are_allowed_in_a_repository_of_dvc(tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "files" / "md5" / "ab" / ("0" * 30)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    folder = make(tmp_path / "data", "A/1.png")
    (folder / "A" / "2.png").symlink_to(cached)
    with pytest.raises(UserError, match="leads out of"):  # a stranger's folder, whose link names an object of any cache
        records_of(folder)
    (tmp_path / ".dvc").mkdir()
    assert len(records_of(folder)) == 2


def test_a_manifest_that_cannot_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "data", "A/1.png", "manifest.csv")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"manifest\.csv: cannot be read \(Permission denied\); make the file readable"):
        records_of(folder)


def test_the_error_for_a_folder_without_images_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="medgen data import PATH"):
        records_of(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no images found; found 2 x hidden, 1 x empty file; expected PNG.*DICOM"):
        records_of(make(tmp_path, "notes.txt", ".a", ".b"))


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\)"):
        records_of(tmp_path)


def test_the_order_of_the_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, *(f"{label}/{i}.png" for label in "ABC" for i in range(5)))
    expected = records_of(folder)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: Path) -> None:
            self.entries = list(scandir(path))[::-1]

        def __enter__(self) -> "Iterator[os.DirEntry[str]]":
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert records_of(folder) == expected


def test_many_files_need_little_memory_and_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"train/A/person{i // 3:05}_bacteria_{i:06}.png" for i in range(10_000)]
    (tmp_path / "any.png").touch()
    monkeypatch.setattr(dataset_scan, "list_files", lambda folder: iter([(name, None) for name in names]))
    read = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode: read(path, *mode) if path.name == ".salt" else pytest.fail(path)
    )
    scan_folder(tmp_path, keep_patient_ids=False)  # imports modules, which must not count below
    gc.collect()
    tracemalloc.start()
    try:
        scanned = scan_folder(tmp_path, keep_patient_ids=False)
        held, peak = tracemalloc.get_traced_memory()
        interned = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, pathlib.__file__)])
    finally:
        tracemalloc.stop()
    assert len(scanned.records) == len(names)
    # without the interpreter's table of interned strings, which doubles at an arbitrary point
    table = max((trace.size for trace in interned.traces), default=0)
    assert held - table < 400 * len(names)
    assert peak - table < 600 * len(names)


PARTS = (
    "images",
    "masks",
    "train",
    "test",
    "A",
    "sub-01",
    "leftMask",
    "slices_train",
    "slices_seg_train",
    "slices_test",
)
STEMS = ("a", "b", "a_mask", "a_mask_1", "a@", "b_seg", "case_1", "seg_1", "sub-01_T1w", "x_1_y")
NAMES = st.builds(
    lambda parts, stem, suffix: "/".join([*parts, stem + suffix]),
    st.lists(st.sampled_from(PARTS), max_size=3), st.sampled_from(STEMS), st.sampled_from((".png", ".jpg", ".bmp")),
)  # fmt: skip


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(NAMES, min_size=1, max_size=12, unique=True), st.randoms(use_true_random=False))
def test_every_file_name_is_in_one_list(names: list[str], random: Random) -> None:
    def scan_names() -> ScanResult | str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset_scan, "list_files", lambda folder: iter([(name, None) for name in names]))
            try:
                return scan_folder(Path(__file__).parent)
            except UserError as error:
                return str(error)

    scanned = scan_names()
    random.shuffle(names)
    assert scan_names() == scanned
    if isinstance(scanned, ScanResult):
        masks = {record.mask for record in scanned.records if record.mask is not None}
        paths = [*(record.path for record in scanned.records), *masks, *(path for path, _ in scanned.other_files)]
        assert sorted(paths) == sorted(names)
    else:
        assert "no images found" in scanned


# real folders


def test_the_real_chest_xrays(shared_data: Callable[[str], Path]) -> None:
    records = records_of(shared_data("xray"))
    assert Counter((record.split, record.label) for record in records) == {
        ("train", "COVID19"): 22, ("train", "NORMAL"): 478, ("train", "PNEUMONIA"): 901,
        ("test", "COVID19"): 8, ("test", "NORMAL"): 120, ("test", "PNEUMONIA"): 214,
    }  # fmt: skip
    of_train, of_test = ({r.patient for r in records if r.split == split} for split in ("train", "test"))
    assert not of_train & of_test


def test_file_names_give_the_patients_of_the_real_manifest(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Patients by file name agree with those of the dataset's own manifest."""
    listed = records_of(shared_data("xray"))
    bare = records_of(make(tmp_path, *(record.path for record in listed)))
    named = {record.path: record.patient for record in bare}
    of_name: dict[str, set[str]] = {}
    of_manifest: dict[str, set[str]] = {}
    for record in listed:
        of_name.setdefault(named[record.path], set()).add(record.path)
        of_manifest.setdefault(record.patient, set()).add(record.path)
    assert sorted(map(sorted, of_name.values())) == sorted(map(sorted, of_manifest.values()))


def test_every_real_lung_mask_is_found(shared_data: Callable[[str], Path]) -> None:
    records = records_of(shared_data("lungmask"))
    assert len(records) == 219
    assert all(record.mask for record in records)
    assert all(record.mask == record.path.replace("images/", "masks/").replace(".jpg", "@.png") for record in records)


@pytest.mark.parametrize("name", ["formats", "quirks", "lungmask", "cifar_format", "medmnist", "mnist_idx"])
def test_every_real_file_is_in_one_list(shared_data: Callable[[str], Path], name: str) -> None:
    folder = shared_data(name)
    scanned = scan_folder(folder)
    lists = [
        {record.path for record in scanned.records},
        {record.mask for record in scanned.records if record.mask is not None},
        set(scanned.companions),
        {path for path, _ in scanned.other_files},
        {"manifest.csv"} if (folder / "manifest.csv").exists() else set(),
    ]
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    assert sorted(path for paths in lists for path in paths) == sorted(files)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mri", {"train": 2700, "test": 900}),
        ("medmnist", {"train": 2428, "val": 270, "test": 468}),
        ("mnist_idx", {"test": 10_000}),
    ],
)
def test_real_images_are_counted(shared_data: Callable[[str], Path], name: str, counts: dict[str, int]) -> None:
    records = records_of(shared_data(name))
    assert Counter(record.split for record in records) == counts
    assert all(record.label is not None for record in records)


def test_label_files_are_companions_or_other_files(shared_data: Callable[[str], Path]) -> None:
    scanned = scan_folder(shared_data("mnist_idx"))
    assert scanned.companions == ["t10k-labels-idx1-ubyte.gz"]
    assert [path for path, _ in scanned.other_files] == ["SOURCE.md", "train-labels-idx1-ubyte.gz"]
    assert dict(scanned.other_files)["train-labels-idx1-ubyte.gz"].startswith("labels without their images")


def test_real_junk_is_not_an_image(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="no images found; found 1 x hidden, 1 x a notebook's checkpoint copy"):
        records_of(shared_data("quirks") / "junk")
