"""Data and datasets on S3, against a local server: read as local ones are, and errors are one message."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medgen
from medgen.config import Data, Preprocess, Project
from medgen.data import s3
from medgen.data.s3 import S3Folder
from medgen.datasets import import_data
from medgen.errors import UserError
from medgen.ingest import audit, preprocess
from medgen.ingest.patients import pseudonymize

SETTINGS = Preprocess(image_size=16)
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing-key",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server on the loopback interface."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys in the environment, and no configuration of this machine."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MEDGEN_STORES", str(tmp_path / "stores"))
    s3._file_system.cache_clear()
    yield
    s3._file_system.cache_clear()


@pytest.fixture
def bucket(server: str, aws: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty bucket of the test's own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    name = f"bucket-{abs(hash(request.node.name))}"
    s3._file_system().mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Class folders, a mask, a header with its voxels, a labelled IDX file, a hidden file and a text."""
    import nibabel

    folder, generator = tmp_path / "xrays", np.random.default_rng(0)
    for number in range(12):
        path = folder / "AB"[number % 2] / f"person{number}_1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (24, 20), np.uint8)).save(path)
    Image.fromarray(np.eye(24, 20, dtype=np.uint8) * 255).save(folder / "A" / "person0_1_mask.png")
    voxels = generator.integers(1, 255, (16, 16, 3)).astype(np.int16)
    nibabel.save(nibabel.AnalyzeImage(voxels, np.eye(4)), folder / "scan.hdr")
    digits = generator.integers(0, 255, (3, 16, 16), np.uint8)
    header = np.array([0x803, 3, 16, 16], ">u4").tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(header + digits.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(np.array([0x801, 3], ">u4").tobytes() + bytes([1, 0, 1]))
    (folder / ".hidden").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "README").write_text("text")
    return folder


def upload(source: Path, url: str) -> str:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            s3._file_system().pipe(f"{url}/{path.relative_to(source).as_posix()}", path.read_bytes())
    return url


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_is_preprocessed_from_a_bucket_as_from_a_folder(
    images: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, scratch = upload(images, f"{bucket}/sets/xrays"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    stores = []
    for number, path in enumerate((str(images), url)):
        project = Project(tmp_path / f"project{number}")
        project.root.mkdir()
        stores.append(preprocess.run(project, data=Data(path=path), preprocess=SETTINGS))
        audit.run(project, data=Data(path=path), preprocess=SETTINGS)
    local, remote = (content(store.folder) for store in stores)
    sources = [json.loads(files.pop("dataset.json")) for files in (local, remote)]
    assert [sources[0].pop("source") != sources[1].pop("source")] == [True]  # data.path is part of it
    assert sources[0] == sources[1]
    assert local == remote
    assert stores[1].classes == ("0", "1", "A", "B")
    pages = [content(tmp_path / f"project{number}" / "reports") for number in (0, 1)]
    assert pages[0] == pages[1]
    assert not list(scratch.iterdir())  # nothing of the bucket stays

    def refuse(*_: object) -> None:
        raise AssertionError("the store was made again")

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "_build", refuse)
        preprocess.run(Project(tmp_path / "project1"), data=Data(path=url), preprocess=SETTINGS)
    s3._file_system().pipe(f"{url}/A/person0_1.png", (images / "B" / "person1_1.png").read_bytes())
    changed = preprocess.run(Project(tmp_path / "project1"), data=Data(path=url), preprocess=SETTINGS)
    assert changed.source != stores[1].source


def test_a_dicom_series_in_a_bucket_is_one_volume(
    bucket: str, tmp_path: Path, write_series: Callable[..., object]
) -> None:
    generator = np.random.default_rng(0)
    for number in range(4):
        voxels = generator.integers(0, 200, (16, 16, 6))
        write_series(tmp_path / "scans" / f"ct{number}", voxels, np.eye(4), f"1.{number}", f"P{number}")
    (tmp_path / "scans" / ".salt").write_text("0" * 64 + "\n")
    url = upload(tmp_path / "scans", f"{bucket}/scans")
    settings = Preprocess(image_size=(16, 16, 16), clahe_clip=0.0, test_fraction=0.0, val_fraction=0.0)
    stores = []
    for name, path in (("local", str(tmp_path / "scans")), ("remote", url)):
        project = Project(tmp_path / name)
        project.root.mkdir()
        stores.append(preprocess.run(project, data=Data(path=path), preprocess=settings))
    local, remote = (content(store.folder / "train") for store in stores)
    assert local == remote and stores[0].counts["train"] == 4


def test_patients_of_a_bucket_are_hashed_with_its_salt_or_the_projects(bucket: str, tmp_path: Path) -> None:
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    for number in range(3):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
        data = pydicom.Dataset()
        data.file_meta, data.PatientID = meta, f"MRN{number}"
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Rows = data.Columns = 16
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
        data.PixelData = bytes(range(256))
        (tmp_path / "set").mkdir(exist_ok=True)
        data.save_as(tmp_path / "set" / f"IM{number}", enforce_file_format=True)
    url, project = upload(tmp_path / "set", f"{bucket}/set"), Project(tmp_path)

    def found() -> set[str]:
        store = preprocess.run(project, data=Data(path=url), preprocess=SETTINGS)
        return {row["patient"] for name in ("train", "val", "test") for row in store.split(name).rows()}

    def expected(salt: str) -> set[str]:
        return {pseudonymize(bytes.fromhex(salt), f"MRN{number}") for number in range(3)}

    assert found() == expected((tmp_path / ".salt").read_text())
    s3._file_system().pipe(f"{url}/.salt", b"ab" * 32)
    assert found() == expected("ab" * 32)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_or_an_archive_of_a_bucket_is_imported(
    images: Path, bucket: str, tmp_path: Path, packed: bool
) -> None:
    import shutil

    project = Project(tmp_path / "project")
    if packed:
        archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", images))
        url = f"{bucket}/set.zip"
        s3._file_system().pipe(url, archive.read_bytes())
    else:
        url = upload(images, f"{bucket}/set")
    imported = import_data.import_folder(project, Data(), SETTINGS, url)
    expected = import_data.import_folder(Project(tmp_path / "other"), Data(), SETTINGS, images)
    assert imported == expected == 18
    assert content(project.root / "data") == content(tmp_path / "other" / "data")
    assert not list(project.runs.glob("*"))
    with pytest.raises(UserError, match="is read only; expected a folder of the project"):
        import_data.import_folder(project, Data(path=url), SETTINGS, images)


def test_a_dataset_in_a_bucket_is_downloaded_once_and_checked(
    tiny_store: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, system = upload(tiny_store, f"{bucket}/dataset"), s3._file_system()
    dataset = medgen.open_dataset(url)
    expected = medgen.open_dataset(tiny_store)
    assert dataset.fingerprint == expected.fingerprint
    assert dataset.folder == tmp_path / "stores" / dataset.fingerprint
    assert (dataset.split("train").images[:] == expected.split("train").images[:]).all()
    with monkeypatch.context() as patch:
        patch.setattr(S3Folder, "download_all", lambda *_: pytest.fail("downloaded again"))
        assert medgen.open_dataset(f"{url}/").folder == dataset.folder

    description = json.loads((tiny_store / "dataset.json").read_text())
    name = max(description["files"], key=lambda each: description["files"][each]["bytes"])
    system.pipe(f"{url}/{name}", bytes(description["files"][name]["bytes"]))
    monkeypatch.setenv("MEDGEN_STORES", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="damaged: found SHA-256"):
        medgen.open_dataset(url)
    system.pipe(f"{url}/{name}", bytes(description["files"][name]["bytes"] + 1))
    with pytest.raises(UserError, match="expected at most"):
        medgen.open_dataset(url)
    description["files"]["../../escaped"] = description["files"].pop(name)
    system.pipe(f"{url}/dataset.json", json.dumps(description).encode())
    with pytest.raises(UserError, match="not the description of a preprocessed dataset"):
        medgen.open_dataset(url)
    assert not [path for path in (tmp_path / "empty").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../evil.png", "a/../../evil.png", "/evil.png", "a//b.png", "C:/evil.png"])
def test_a_name_that_leads_out_of_the_folder_is_refused(bucket: str, tmp_path: Path, name: str) -> None:
    s3._file_system().pipe(f"{bucket}/set/a.png", b"x")
    s3._file_system().call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=f"set/{name}", Body=b"x")
    with pytest.raises(UserError, match=r"expected names that a local folder can have"):
        import_data.import_folder(Project(tmp_path / "project"), Data(), SETTINGS, f"{bucket}/set")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_missing_buckets_folders_and_space_are_one_message(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: there is no such bucket"):
        S3Folder("s3://no-such-bucket/x").list_files()
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x/dataset\.json: there is no such bucket"):
        medgen.open_dataset("s3://no-such-bucket/x")
    with pytest.raises(UserError, match=r"/nothing: no files; expected a folder of the bucket"):
        S3Folder(f"{bucket}/nothing").list_files()
    with pytest.raises(UserError, match=r"no dataset\.json; expected a preprocessed dataset"):
        medgen.open_dataset(f"{bucket}/nothing")
    s3._file_system().pipe(f"{bucket}/set/a.png", b"x")
    monkeypatch.setattr(s3, "_SPARE", 1 << 60)
    with pytest.raises(UserError, match="MB free; expected"):
        S3Folder(f"{bucket}/set").download("a.png", tmp_path / "a.png")


def test_an_unreachable_server_and_missing_keys_are_one_message(
    aws: None, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="S3 does not answer") as caught:
        S3Folder("s3://bucket/x").list_files()
    assert "testing-" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name in KEYS:
        monkeypatch.delenv(name)
    s3._file_system.cache_clear()
    with pytest.raises(UserError, match="no credentials for S3; expected AWS_ACCESS_KEY_ID"):
        S3Folder("s3://bucket/x").list_files()


def test_without_s3fs_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for call in (
        lambda: medgen.open_dataset("s3://bucket/dataset"),
        lambda: preprocess.run(Project(tmp_path), data=Data(path="s3://bucket/x"), preprocess=SETTINGS),
        lambda: import_data.import_folder(Project(tmp_path), Data(), SETTINGS, "s3://bucket/x"),
    ):
        with pytest.raises(UserError, match=r"needs s3fs.*uv sync --extra s3.*medgen\[s3\]"):
            call()


@pytest.mark.parametrize("url", ["s3://", "s3:///folder", "s3://key:secret@bucket/folder"])
def test_a_wrong_address_is_refused_and_keys_are_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="expected s3://BUCKET/FOLDER") as caught:
        S3Folder(url)
    assert "secret@" not in str(caught.value)
