"""No patient identifier of the raw files reaches the store, a log, a report or MLflow."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from medgen import config
from medgen.config import Project
from medgen.data import store
from medgen.ingest import patients, preprocess
from medgen.ingest.patients import pseudonymize
from medgen.training import train

PLANTED = {
    "PatientName": "Bartholomew^Quizzical",
    "PatientID": "MRN7734501",
    "PatientBirthDate": "19520229",
    "OtherPatientNames": "Quincy^Zanzibar",
    "PatientAddress": "17 Elderberry Crescent",
    "PatientComments": "afraid of lifts",
    "StudyDescription": "follow-up for Quizzical",
    "ReferringPhysicianName": "Doctor^Featherstonehaugh",
    "InstitutionName": "Saint Swithin",
    "AccessionNumber": "ACC90210",
    "RequestedProcedureDescription": "whole body of evidence",
}


def write_dicom(path: Path, number: int, patient: int) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    for name, value in PLANTED.items():
        setattr(data, name, value)
    data.PatientID = f"{PLANTED['PatientID']}{patient}"
    data.Rows = data.Columns = 40
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = np.random.default_rng(number).integers(0, 4096, (40, 40), np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


@pytest.fixture
def scanned(tmp_path: Path) -> Project:
    """A project with twenty images of ten patients and one unreadable file."""
    for number in range(20):
        write_dicom(tmp_path / "data" / "AB"[number % 2] / f"image{number}.dcm", number, patient=number // 2)
    broken = tmp_path / "data" / "A" / "broken.dcm"
    write_dicom(broken, 20, patient=11)
    broken.write_bytes(broken.read_bytes()[:-900])
    return Project(tmp_path)


def leaked(folder: Path, output: str) -> set[str]:
    """The planted words outside data/: in the bytes or names of files, or in the terminal output."""
    words = {part for value in PLANTED.values() for part in value.replace("^", " ").split(" ") if len(part) > 5}
    found = {word for word in words if word.lower() in output.lower()}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_relative_to(folder / "data"):
            content = path.read_bytes().lower() + str(path).lower().encode()
            forms = ("utf-8", "utf-16-le")
            found |= {word for word in words if any(word.lower().encode(form) in content for form in forms)}
    return found


@pytest.mark.slow
def test_no_identifier_reaches_an_output(scanned: Project, capfd: pytest.CaptureFixture[str]) -> None:
    options = config.Preprocess(image_size=16, clahe_tiles=2, max_rejected=0.1, val_fraction=0.3)
    dataset = preprocess.run(scanned, data=config.Data(leaks="error"), preprocess=options)
    train.run(
        scanned,
        model=config.Model(base_channels=4, latent_size=8, latent_channels=2),
        loss=config.Loss(weights=config.Weights(l1=1.0)),
        train=config.Train(batch_size=4),
        tracking=config.Tracking(system_metrics=False),
    )
    assert (scanned.root / "mlflow.db").stat().st_size > 0
    rejected = list(store.read_csv(dataset.folder / store.REJECTED, store.REJECTED_COLUMNS))
    assert [(row["path"], row["reason"]) for row in rejected] == [
        ("A/broken.dcm", "damaged: the pixel data ends early")
    ]
    output = capfd.readouterr()
    assert leaked(scanned.root, output.out + output.err) == set()


def test_leaked_finds_planted_words(scanned: Project) -> None:
    (scanned.root / "note.bin").write_bytes(b"\0\1" + "afraid of LIFTS, Zanzibar".encode("utf-16-le"))
    assert leaked(scanned.root, "of Saint Swithin") == {"afraid", "Zanzibar", "Swithin"}


@pytest.mark.parametrize("source", ["DICOM", "manifest.csv"])
def test_pseudonyms_need_the_projects_salt(scanned: Project, source: str) -> None:
    """HMAC of each identifier with every constant in medgen's code gives none of the pseudonyms."""
    names = {number: f"MRN7734501{number // 2}" for number in range(20)}
    if source == "manifest.csv":
        shutil.rmtree(scanned.root / "data")
        (scanned.root / "data").mkdir()
        for number in names:
            Image.fromarray(np.full((20, 20), 10 * number, np.uint8)).save(scanned.root / "data" / f"{number}.png")
        lines = [f"{number}.png,{name}" for number, name in names.items()]
        (scanned.root / "data" / "manifest.csv").write_text("\n".join(["path,patient", *lines]))
    options = config.Preprocess(image_size=16, clahe_tiles=2, max_rejected=0.1)
    rows = [
        row
        for name in store.SPLITS
        for row in preprocess.run(scanned, data=config.Data(), preprocess=options).split(name).rows()
    ]
    by_image = {int("".join(filter(str.isdigit, row["path"]))): row["patient"] for row in rows}
    assert all((by_image[a] == by_image[b]) is (a // 2 == b // 2) for a in by_image for b in by_image)
    assert all(len(patient) == 16 and int(patient, 16) >= 0 for patient in by_image.values())
    salt = bytes.fromhex((scanned.root / "data" / ".salt").read_text())
    assert set(by_image.values()) <= {pseudonymize(salt, name) for name in names.values()}
    constants = [value for value in vars(patients).values() if isinstance(value, bytes)] + [b""]
    guessed = {pseudonymize(constant, name) for constant in constants for name in names.values()}
    assert not guessed & set(by_image.values())
    again = preprocess.run(scanned, data=config.Data(), preprocess=options)
    assert {row["patient"] for row in again.split("train").rows()} <= set(by_image.values())


def test_patient_ids_are_kept_only_on_request(scanned: Project) -> None:
    options = config.Preprocess(image_size=16, clahe_tiles=2, max_rejected=0.1)
    dataset = preprocess.run(scanned, data=config.Data(keep_patient_ids=True), preprocess=options)
    patients = {row["patient"] for name in store.SPLITS for row in dataset.split(name).rows()}
    assert patients == {f"MRN7734501{patient}" for patient in range(10)}
