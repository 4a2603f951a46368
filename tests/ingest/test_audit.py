"""`medgen data audit` finds planted problems, none in a clean dataset, and reveals no patient identifier."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from medgen.config import Data, Preprocess, Project
from medgen.datasets.sample import render
from medgen.errors import UserError
from medgen.ingest.audit import run
from medgen.ingest.audit_page import SEVERITIES
from medgen.ingest.patients import find_salt, pseudonymize

Shared = Callable[[str], Path]


def save(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_image(patient: int, image: int = 0) -> NDArray[np.uint8]:
    return render("NORMAL", 0, 3 * patient, image, 64)[0]


def audit(root: Path, path: Path | None = None, data: Data | None = None) -> dict[str, Any]:
    run(Project(root), data=data or Data(), preprocess=Preprocess(), path=path)
    return json.loads((root / "reports" / "audit.json").read_text())


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A project whose data has one of each problem."""
    data = tmp_path / "data"
    for number in range(12):
        save(data / "train" / "A" / f"person{number}_1.png", make_image(number))
    save(data / "test" / "A" / "person50_1.png", make_image(0))  # exact, across splits
    save(data / "train" / "A" / "person51_1.png", make_image(1))  # exact, within a split
    save(data / "test" / "B" / "person52_1.jpg", make_image(2))  # near, across splits, with another label
    save(data / "test" / "B" / "person3_2.png", make_image(3, image=1))  # another image of a patient in train
    save(data / "train" / "B" / "person53_1.png", np.full((64, 64), 7, np.uint8))
    colour = np.zeros((64, 64, 3), np.uint8)
    colour[..., 0] = make_image(20)
    save(data / "train" / "B" / "person54_1.png", colour)
    (data / "train" / "B" / "person55_1.png").write_bytes(b"")
    (data / "notes.txt").write_text("seen by the second reader")
    return tmp_path


def test_planted_problems_are_found(planted: Path) -> None:
    found = audit(planted)
    assert (found["num_files"], found["num_images"], found["num_patients"]) == (20, 18, 17)
    assert found["kinds"] == {"raster": {"files": 19, "images": 19}}
    assert found["counts"] == {"A": {"test": 1, "train": 13}, "B": {"test": 2, "train": 2}}
    assert found["imbalance"] == 3.5
    assert found["modes"] == {"L": 17, "RGB": 1}
    exact = {tuple(sorted(Path(name).stem for name in group["names"])) for group in found["exact"]}
    assert exact == {("person0_1", "person50_1"), ("person1_1", "person51_1")}
    assert [group["names"] for group in found["near"]] == [["test/B/person52_1.jpg", "train/A/person2_1.png"]]
    assert [group["labels"] for group in found["conflicts"]] == [["A", "B"]]
    assert [leak["patient"] for leak in found["parted"]] == [
        pseudonymize(find_salt(planted / "data", False), "person3")
    ]
    assert found["blank"] == ["train/B/person53_1.png"]
    assert "train/B/person54_1.png" in found["outliers"]
    assert found["unreadable"] == [{"path": "train/B/person55_1.png", "reason": "empty file"}]
    assert found["foreign"] == [{"path": "notes.txt", "reason": "a text file"}]
    assert len(found["leaks"]) == 3


def test_the_page_describes_and_shows_the_problems(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit(planted)
    page = (planted / "reports" / "audit.html").read_text()
    assert "The splits leak: 1 patient and 2 images in several splits." in page
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64)', page)
    # Two images each: exact across, exact within, near across, conflict. One image each: outlier, blank.
    assert page.count("<img") == 2 * 4 + 2
    assert re.search(r"test/B/person52_1.jpg\ntest\nB<.*?train/A/person2_1.png\ntrain\nA\n?<", page, re.DOTALL)
    out, err = capsys.readouterr()
    assert "The splits leak" in out
    assert "audit.html" in err
    assert not (planted / "runs" / "audit").exists()


def test_the_same_data_gives_the_same_bytes(planted: Path) -> None:
    def reports() -> list[bytes]:
        audit(planted)
        return [path.read_bytes() for path in sorted((planted / "reports").iterdir())]

    first = reports()
    assert len(first) == 2
    assert reports() == first


def test_with_own_splits_there_are_no_leaks(planted: Path) -> None:
    found = audit(planted, data=Data(splits="own"))
    assert found["leaks"] == []
    assert found["counts"] == {"A": {"": 14}, "B": {"": 4}}
    assert "defines no splits" in (planted / "reports" / "audit.html").read_text()


def test_the_generated_sample_is_clean(tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = audit(tmp_path, path=tiny_store.parent.parent / "data")
    assert (found["num_files"], found["num_images"], found["num_masks"]) == (96, 48, 48)
    for key in ("parted", "exact", "near", "conflicts", "blank", "outliers", "unreadable", "left_out", "foreign"):
        assert found[key] == [], key
    sentences = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert sentences == [
        "- The dataset defines no splits; preprocess keeps patients and duplicates together when it assigns them."
    ]


def test_unknown_patients_are_said_to_be_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, split in enumerate(["train", "train", "test"]):
        save(tmp_path / "data" / split / "A" / f"image{number}.png", make_image(number))
    found = audit(tmp_path)
    assert (found["num_known_patients"], found["num_images_without_patient"]) == (0, 3)
    page = (tmp_path / "reports" / "audit.html").read_text()
    assert re.search(r"<td>patients in several splits</td><td[^>]*>unknown</td>", page)
    assert re.search(r"<td>patients</td><td[^>]*>unknown</td>", page)
    assert "Patients are unknown for 3 of 3 images, so leaks of patients cannot be found there" in page
    assert "No patient and no image" not in page + capsys.readouterr().out

    (tmp_path / "data" / "manifest.csv").write_text(
        "path,patient\ntrain/A/image0.png,P1\ntrain/A/image1.png,\ntest/A/image2.png,P2\n"
    )
    found = audit(tmp_path)
    assert (found["num_known_patients"], found["num_images_without_patient"]) == (2, 1)
    page = (tmp_path / "reports" / "audit.html").read_text()
    assert re.search(r"<td>patients in several splits</td><td[^>]*>unknown</td>", page)
    assert "1 images name no patient; none among the other 2" in page


def test_strict_exits_with_code_2_on_leaks_after_the_page_is_written(planted: Path) -> None:
    with pytest.raises(UserError, match="3 leaks between splits"):
        run(Project(planted), data=Data(), preprocess=Preprocess(), strict=True)
    assert (planted / "reports" / "audit.html").exists()
    run(Project(planted), data=Data(splits="own"), preprocess=Preprocess(), strict=True)


def test_out_is_the_only_folder_that_is_written(planted: Path, tmp_path: Path) -> None:
    before = {path for path in planted.rglob("*") if path.name != ".salt"}
    run(Project(planted), data=Data(), preprocess=Preprocess(), out=tmp_path / "page" / "new")
    written = {path for path in planted.rglob("*") if path.name != ".salt"} - before
    names = ("page", "page/new", "page/new/audit.html", "page/new/audit.json")
    assert written == {tmp_path / name for name in names}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"):
        run(Project(planted), data=Data(), preprocess=Preprocess(), out=tmp_path / "file" / "page")


def test_the_page_has_histograms_and_lists_the_most_severe_problems_first(planted: Path) -> None:
    found = audit(planted)
    assert [sum(each["images"] for each in bins) for bins in found["histograms"].values()] == [18, 18]
    page = (planted / "reports" / "audit.html").read_text()
    assert page.count('class="bars"') == 2
    severities = re.findall(r'data-head="severity">(\w*)<', page)
    assert severities[:3] == ["error"] * 3 and [each for each in severities if each] == sorted(
        filter(None, severities), key=SEVERITIES.index
    )
    titles = ["Patients in several splits", "Exact duplicates across", "One image, several", "Other exact", "Outliers"]
    places = [page.index(f"<h2>{title}") for title in titles]
    assert places == sorted(places)


def test_json_on_standard_output_is_the_file(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Project(planted), data=Data(), preprocess=Preprocess(), as_json=True)
    assert capsys.readouterr().out == (planted / "reports" / "audit.json").read_text()


@pytest.mark.parametrize(
    ("path", "message"),
    [("set.zip", "a file; expected a folder.*import"), ("absent", "no such folder"), ("data", "no images")],
)
def test_a_path_without_a_folder_of_images_is_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK\3\4")
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=message):
        audit(tmp_path, path=tmp_path / path)
    assert not (tmp_path / "reports").exists()


def test_names_are_escaped_on_the_page_and_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = "<b>bold[red]"
    for name in ("<script>alert(1)", "two\nlines", "\x1b[31mred", "[bold]x", "[@]"):
        save(tmp_path / "data" / label / f"{name}.png", make_image(0))
    (tmp_path / "data" / "<img src=x>.txt").write_text("no image")
    found = audit(tmp_path)
    assert len(found["exact"][0]["names"]) == 5
    assert any("\n" in name for name in found["exact"][0]["names"])  # unchanged, for programs
    page = (tmp_path / "reports" / "audit.html").read_text()
    assert not re.search(r"<script|<b>|<img src=x|\x1b|two\nlines", page)
    assert "&lt;b&gt;bold[red]" in page
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "<b>bold[red]" in out


def test_no_output_contains_a_patient_identifier(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planted = {
        "PatientName": "Wolpertinger^Adelgunde",
        "PatientID": "WA-5518203",
        "PatientBirthDate": "19030405",
        "PatientComments": "keeps honeybees in Quagmire Street",
    }
    for number, split in enumerate(("train", "test", "test")):
        data = pydicom.Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{number}"
        for name, value in planted.items():
            setattr(data, name, value)
        data.Rows = data.Columns = 64
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
        data.PixelData = make_image(0).tobytes()[: 4096 if number < 2 else 99]  # the last file is truncated
        path = tmp_path / "data" / split / "A" / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(path, enforce_file_format=True)
    found = audit(tmp_path, data=Data(keep_patient_ids=True))
    assert len(found["parted"]) == len(found["unreadable"]) == 1
    written = [path.read_bytes() for path in (tmp_path / "reports").iterdir()]
    everything = b"".join(written) + "".join(capfd.readouterr()).encode()
    for secret in ("Wolpertinger", "Adelgunde", "5518203", "19030405", "honeybees", "Quagmire"):
        assert secret.encode() not in everything, secret
    assert found["parted"][0]["patient"].encode() in everything


def test_problems_of_real_files_are_found(shared_data: Shared, tmp_path: Path) -> None:
    folder = shared_data("quirks")
    found = audit(tmp_path, path=folder)
    conflict = {"cross_dataset_conflict/COVID-00020.jpg", "cross_dataset_conflict/person1004_virus_1686.jpeg"}
    assert conflict in [set(group["names"]) for group in found["near"]]
    food = {
        path.relative_to(folder).as_posix() for path in (folder / "wrong_content_food_labelled_as_mri").rglob("*.jpg")
    }
    assert food == set(found["outliers"])
    assert ["Git LFS" in one["reason"] for one in found["unreadable"]] == [True]
