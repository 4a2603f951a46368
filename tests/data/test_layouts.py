"""What a folder's names and manifest say of each picture."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from medgen.data.layouts import Record, scan
from medgen.errors import UserError


def make(folder: Path, *names: str, manifest: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    if manifest is not None:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.csv").write_text(manifest)
    return folder


LAYOUTS = {
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
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_label_and_split_come_from_the_folders(tmp_path: Path, name: str) -> None:
    expected = LAYOUTS[name]
    records = scan(make(tmp_path, *expected))
    assert {record.path: (record.label, record.split) for record in records} == expected
    assert [record.path for record in records] == sorted(expected)


MASKS = {
    "masks beside images": ("images/a.jpg", "masks/a.png"),
    "with a mark": ("images/a.jpg", "masks/a_mask.png"),
    "with @": ("images/a-1.jpg", "masks/a-1@.png"),
    "with classes": ("images/A/a.png", "masks/A/a.png"),
    "below classes": ("A/images/a.png", "A/masks/a.png"),
    "below splits": ("train/images/a.png", "train/masks/a.png"),
    "other names": ("Imgs/a.png", "Lung Masks/a.png"),
    "in one folder": ("A/a.png", "A/a_mask.png"),
    "in one folder with @": ("A/a.png", "A/a@.png"),
    "numbered": ("A/a (1).png", "A/a (1)_mask_1.png"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_find_their_picture(tmp_path: Path, name: str) -> None:
    image, mask = MASKS[name]
    records = scan(make(tmp_path, image, mask, image.replace("a", "lone", 1) if "/a" not in image else "other.png"))
    assert {record.path: record.mask for record in records}[image] == mask
    assert len(records) == 2


def test_a_mask_without_its_picture_is_no_picture(tmp_path: Path) -> None:
    assert [record.path for record in scan(make(tmp_path, "A/a.png", "A/b_mask.png", "masks/c.png"))] == ["A/a.png"]


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person12_bacteria_46.jpeg", "person12"),
        ("IM-0001-0001.jpeg", "IM-0001"),
        ("IM-0608-0001-0001.jpeg", "IM-0608"),
        ("NORMAL2-IM-0530-0001.jpeg", "NORMAL2-IM-0530"),
        ("case_001_slice_3.nii.png", "case_001"),
        ("00001280_004.png", "00001280"),
        ("COVID-00015a.png", "COVID-00015"),
        ("COVID-00015.jpg", "COVID-00015"),
        ("OAS1_0001_MR1.png", "OAS1_0001"),
        ("sub-01_T1w.png", "sub-01"),
        ("patient12_3.png", "patient12"),
        ("holiday.png", "A/holiday.png"),
        ("personal_1.png", "A/personal_1.png"),
    ],
)
def test_patients_come_from_known_names(tmp_path: Path, name: str, patient: str) -> None:
    assert scan(make(tmp_path, f"A/{name}"))[0].patient == patient


def test_a_pattern_of_ones_own_comes_first(tmp_path: Path) -> None:
    records = scan(make(tmp_path, "x7-person1_2.png", "other.png"), r"^x(\d+)-")
    assert [record.patient for record in records] == ["other.png", "7"]


@pytest.mark.parametrize("pattern", ["(", "no group"])
def test_a_wrong_pattern_is_named(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.patient_pattern"):
        scan(make(tmp_path, "a.png"), pattern)


def test_junk_is_left_out(tmp_path: Path) -> None:
    junk = (".DS_Store", "A/.hidden.png", "A/.ipynb_checkpoints/1.png", "__MACOSX/A/1.png", "A/notes.txt", "A/w.pth")
    assert [record.path for record in scan(make(tmp_path, "A/1.png", *junk))] == ["A/1.png"]


# manifest.csv


def test_the_manifest_decides_and_folders_fill_in(tmp_path: Path) -> None:
    text = "\ufeffPath,Label,Group,Split,source\ntrain/A/1.png,X,p1,test,s\ntrain/B/person7_1.png,,,,s\n"
    records = scan(make(tmp_path, "train/A/1.png", "train/B/person7_1.png", "train/B/unlisted.png", manifest=text))
    assert records == [
        Record("train/A/1.png", "X", "p1", "test", None),
        Record("train/B/person7_1.png", "B", "person7", "train", None),
    ]


def test_a_manifest_of_paths_alone_is_enough(tmp_path: Path) -> None:
    records = scan(make(tmp_path, "A/1.png", "B/2.png", manifest="path\nA/1.png\nB\\2.png\n"))
    assert [(record.label, record.patient) for record in records] == [("A", "A/1.png"), ("B", "B/2.png")]


def test_a_manifest_names_masks_by_the_folders(tmp_path: Path) -> None:
    folder = make(tmp_path, "images/1.png", "masks/1@.png", manifest="path,patient\nimages/1.png,9\n")
    assert scan(folder) == [Record("images/1.png", None, "9", None, "masks/1@.png")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\n1.png,A\n", "columns are file, label; expected path"),
        ("path\n../1.png\n", r"line 2: path '\.\./1\.png'; expected a path inside"),
        ("path\n/etc/passwd\n", "expected a path inside"),
        ("path\nC:\\1.png\n", "expected a path inside"),
        ("path\n\n1.png\n,\n", "expected a path inside"),
        ("path\nlink.png\n", "leads out of"),
        ("path\n1.png\n1.png\n", "line 3: 1.png is listed twice"),
        ("path,split\n1.png,holdout\n", "split 'holdout'; expected train, val or test"),
        ("path\n", "no pictures found"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, text: str, reason: str) -> None:
    folder = make(tmp_path / "data", "1.png", manifest=text)
    (tmp_path / "secret.png").write_bytes(b"")
    if "link" in text:
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=reason):
        scan(folder)


# links and absence


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "A/1.png")
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "A" / "2.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"2\.png: leads out of"):
        scan(folder)


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "A/1.png")
    (folder / "B").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UserError, match="a link to a folder"):
        scan(folder)


def test_links_into_dvcs_cache_are_fine(tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "files" / "md5" / "ab" / ("0" * 30)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    folder = make(tmp_path / "data", "A/1.png")
    (folder / "A" / "2.png").symlink_to(cached)
    assert len(scan(folder)) == 2


def test_nothing_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="medgen data import PATH"):
        scan(tmp_path / "absent")
    with pytest.raises(UserError, match="no pictures found"):
        scan(make(tmp_path, "notes.txt"))


def test_the_order_of_the_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, *(f"{label}/{i}.png" for label in "ABC" for i in range(5)))
    straight = scan(folder)
    walk = os.walk

    def backwards(top: Path):  # type: ignore[no-untyped-def]
        for place, folders, names in walk(top):
            folders.reverse()
            yield place, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert scan(folder) == straight


# real folders


def test_the_real_chest_xrays(shared_data: Callable[[str], Path]) -> None:
    records = scan(shared_data("xray"))
    assert Counter((record.split, record.label) for record in records) == {
        ("train", "COVID19"): 22, ("train", "NORMAL"): 478, ("train", "PNEUMONIA"): 901,
        ("test", "COVID19"): 8, ("test", "NORMAL"): 120, ("test", "PNEUMONIA"): 214,
    }  # fmt: skip
    of_train, of_test = ({r.patient for r in records if r.split == split} for split in ("train", "test"))
    assert not of_train & of_test


def test_names_alone_give_the_real_patients(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """What the file names say agrees with what the set's own manifest says."""
    listed = scan(shared_data("xray"))
    bare = scan(make(tmp_path, *(record.path for record in listed)))
    named = {record.path: record.patient for record in bare}
    of_name: dict[str, set[str]] = {}
    of_manifest: dict[str, set[str]] = {}
    for record in listed:
        of_name.setdefault(named[record.path], set()).add(record.path)
        of_manifest.setdefault(record.patient, set()).add(record.path)
    assert sorted(map(sorted, of_name.values())) == sorted(map(sorted, of_manifest.values()))


def test_every_real_lung_mask_is_found(shared_data: Callable[[str], Path]) -> None:
    records = scan(shared_data("lungmask"))
    assert len(records) == 219
    assert all(record.mask for record in records)
    assert all(record.mask == record.path.replace("images/", "masks/").replace(".jpg", "@.png") for record in records)


def test_real_junk_is_left_out(shared_data: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="no pictures found"):
        scan(shared_data("quirks") / "junk")
