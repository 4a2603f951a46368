"""Tests of `medgen data fetch` with local servers that simulate faults: a project gets a complete dataset or none."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from medgen import config
from medgen.config import Preprocess, Project
from medgen.datasets import catalog
from medgen.datasets import fetch as fetch_module
from medgen.datasets.catalog import Manual, Web, WebFile
from medgen.datasets.download import cache_folder
from medgen.errors import UserError
from medgen.ingest.dataset_scan import scan
from medgen.ingest.transforms import resize_mask

DATA, PREPROCESS = config.Data(), config.Preprocess()
DATASETS = catalog.load()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An empty project, an empty cache, no credentials, no waits and a large disk."""
    monkeypatch.setenv("MEDGEN_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLEHUB_CACHE", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e12))
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project")


def fetch(project: Project, name: str) -> int:
    return fetch_module.fetch(project, DATA, PREPROCESS, name)


def set_files(monkeypatch: pytest.MonkeyPatch, name: str, *files: WebFile) -> None:
    """Replace the source of a dataset by other web files."""
    source = Web(page="https://example.org", files=files)
    monkeypatch.setitem(DATASETS, name, DATASETS[name].model_copy(update={"source": source, "size": 100_000}))


def serve(server: Any, monkeypatch: pytest.MonkeyPatch, name: str, **files: bytes) -> None:
    """Replace the source of a dataset by files on the local server, without checksums."""
    server.files |= files
    set_files(monkeypatch, name, *(WebFile(url=f"{server.address}/{file}") for file in files))


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def png(value: int = 7, shape: tuple[int, ...] = (20, 20)) -> bytes:
    return bytes(cv2.imencode(".png", np.full(shape, value, np.uint8))[1])


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tgz_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def npz() -> bytes:
    """A MedMNIST file of 6 images of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    arrays = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        arrays |= {f"{split}_images": noise[:count], f"{split}_labels": np.arange(count)[:, None] % 2}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def serve_npz(server: Any, monkeypatch: pytest.MonkeyPatch, checksum: str | None = None) -> bytes:
    content = npz()
    server.files["pneumoniamnist.npz"] = content
    url = f"{server.address}/records/1/files/pneumoniamnist.npz?download=1"
    set_files(monkeypatch, "pneumoniamnist", WebFile(url=url, md5=checksum or md5(content)))
    return content


@pytest.mark.parametrize("fault", ["none", "drop", "429", "503", "drop twice"])
def test_web_file_becomes_the_projects_data(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = serve_npz(server, monkeypatch)
    for _ in range({"drop": 1, "drop twice": 2}.get(fault, 0)):
        server.drop_after(len(content) // 2)
    if fault.isdigit():
        server.refuse(int(fault), retry_after="1")
    assert fetch(project, "pneumoniamnist") == 6
    assert (project.root / "data" / "pneumoniamnist.npz").read_bytes() == content
    output = capsys.readouterr().err
    assert "CC BY 4.0" in output and "Yang et al." in output and "6 images" in output
    num_requests = len(server.ranges)
    assert fetch(Project(project.root.parent), "pneumoniamnist") == 6  # the second project uses the cache
    assert len(server.ranges) == num_requests


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("404", "not found"),
        ("403", "refused"),
        ("wrong", "expected MD5"),
        ("never", "to resume the download"),
    ],
)
def test_failed_download_leaves_no_complete_file(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    content = serve_npz(server, monkeypatch, "0" * 32 if fault == "wrong" else None)
    if fault.isdigit():
        server.refuse(int(fault))
    for _ in range(4 if fault == "never" else 0):
        server.drop_after(100)
    with pytest.raises(UserError) as error:
        fetch(project, "pneumoniamnist")
    assert words in str(error.value)
    assert files_in(project.root) == []
    folder = cache_folder("datasets") / "pneumoniamnist"
    assert not (folder / "ready").exists()
    assert not (folder / "download" / "pneumoniamnist.npz").exists()
    if fault == "never":  # the same command resumes
        assert fetch(project, "pneumoniamnist") == 6
        assert server.ranges[-1] == "bytes=100-"
        assert (project.root / "data" / "pneumoniamnist.npz").read_bytes() == content


def test_file_in_the_download_folder_is_used(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    content = serve_npz(server, monkeypatch)
    folder = cache_folder("datasets") / "pneumoniamnist" / "download"
    folder.mkdir(parents=True)
    (folder / "pneumoniamnist.npz").write_bytes(content)
    assert fetch(project, "pneumoniamnist") == 6
    assert server.ranges == []


def test_html_page_instead_of_an_archive_is_refused(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(server, monkeypatch, "openist", **{"master.zip": b"<html>log in to the hospital's network</html>"})
    with pytest.raises(UserError, match=r"master\.zip: damaged or incomplete.*Remove it"):
        fetch(project, "openist")
    assert "gives no checksum" not in capsys.readouterr().err  # this page's is not recorded
    assert files_in(project.root) == []


def test_a_file_without_a_checksum_must_stay_the_first_one(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = zip_of(**{f"Chest_x-ray/1-{number}.{end}": png() for number in range(2) for end in ("jpg", "png")})
    serve(server, monkeypatch, "openist", **{"master.zip": first})
    cache = cache_folder("datasets") / "openist"
    monkeypatch.setattr(fetch_module.import_data, "import_folder", lambda *_, **__: 2)
    monkeypatch.setattr(fetch_module, "reorganize", lambda *_: None)
    fetch(project, "openist")
    digest = hashlib.sha256(first).hexdigest()
    assert digest in capsys.readouterr().err
    assert json.loads((project.root / "downloads.json").read_text()) == {f"{server.address}/master.zip": digest}

    shutil.rmtree(cache)
    fetch(project, "openist")
    assert "gives no checksum" not in capsys.readouterr().err
    shutil.rmtree(cache)
    server.files["master.zip"] = zip_of(other=png())
    with pytest.raises(UserError, match=f"checksum mismatch: expected SHA-256 {digest[:12]}"):
        fetch(project, "openist")
    for content in ("[]", '{"a": 1}', "{", "\0"):
        (project.root / "downloads.json").write_text(content)
        with pytest.raises(UserError, match=r"downloads\.json: cannot be read.*Restore it with git"):
            fetch(project, "openist")


def test_untracked_data_is_found_before_the_download(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_npz(server, monkeypatch)
    (project.root / "data").mkdir()
    (project.root / "data" / "mine.png").write_bytes(png())
    with pytest.raises(UserError, match="DVC does not track"):
        fetch(project, "pneumoniamnist")
    assert server.ranges == []


def test_disk_space_is_checked_before_the_download(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_npz(server, monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB free; expected 0\.3 GB.*MEDGEN_DATASETS"):
        fetch(project, "pneumoniamnist")
    assert server.ranges == []


def test_cache_folder_that_cannot_be_written(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve_npz(server, monkeypatch)
    (tmp_path / "datasets").write_bytes(b"a file, not a folder")
    with pytest.raises(UserError, match=r"datasets.*MEDGEN_DATASETS"):
        fetch(project, "pneumoniamnist")


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if isinstance(entry.source, Manual)])
def test_manual_download_is_explained(project: Project, name: str) -> None:
    with pytest.raises(UserError) as error:
        fetch(project, name)
    folder = cache_folder("datasets") / name / "download"
    for word in ("sites.wustl.edu/oasisbrains", str(folder), f"medgen data fetch {name}", "medgen data import"):
        assert word in str(error.value)
    assert error.value.exit_code == 2
    assert folder.is_dir()  # the user can put the files there


def put(name: str, **archives: bytes) -> None:
    folder = cache_folder("datasets") / name / "download"
    folder.mkdir(parents=True)
    for file, content in archives.items():
        (folder / file).write_bytes(content)


def test_oasis_slices_in_the_download_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "keras_png_slices_data/keras_png_slices"
    members = {}
    for split, case in (("train", 1), ("validate", 2), ("test", 3)):
        members[f"{root}_{split}/case_00{case}_slice_0.nii.png"] = png(100 + case)
        members[f"{root}_seg_{split}/seg_00{case}_slice_0.nii.png"] = png(85)
    put("oasis-slices", **{"slices.zip": zip_of(**members)})
    assert fetch(project, "oasis-slices") == 3
    assert not (cache_folder("datasets") / "oasis-slices" / "download").exists()  # its files are in ready/


def test_oasis_has_one_volume_per_session(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    session = "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88"
    other = session.replace("0001", "0042").replace("disc1", "disc2")
    discs = {
        f"oasis_cross-sectional_disc{number}.tar.gz": tgz_of(
            **{f"{path}{end}": b"x" for end in ("_masked_gfc.hdr", "_masked_gfc.img", "_gfc.img", "_masked_gfc.gif")}
        )
        for number, path in ((1, session), (2, other))
    }
    put("oasis1-volumes", **discs)
    monkeypatch.setattr(fetch_module.import_data, "import_folder", lambda *words, **_: len(files_in(words[-1])))
    assert fetch(project, "oasis1-volumes") == 4
    ready = cache_folder("datasets") / "oasis1-volumes" / "ready"
    stems = [f"OAS1_{number}_MR1_mpr_n4_anon_111_t88_masked_gfc" for number in ("0001", "0042")]
    assert files_in(ready) == [f"{stem}{end}" for stem in stems for end in (".hdr", ".img")]


def test_montgomery_gets_labels_and_joined_masks(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    left[:, 2:8], right[:, 12:18] = 255, 255
    members = {"__MACOSX/MontgomerySet/CXR_png/._MCUCXR_0001_0.png": b"x", "MontgomerySet/NLM.txt": b"x"}
    for image in ("MCUCXR_0001_0.png", "MCUCXR_0104_1.png"):
        members[f"MontgomerySet/CXR_png/{image}"] = png()
        for side, mask in (("left", left), ("right", right)):
            members[f"MontgomerySet/ManualMask/{side}Mask/{image}"] = bytes(cv2.imencode(".png", mask)[1])
    serve(server, monkeypatch, "montgomery", **{"NLM-MontgomeryCXRSet.zip": zip_of(**members)})
    assert fetch(project, "montgomery") == 2
    data = project.root / "data"
    assert (data / "manifest.csv").read_text().splitlines()[1:] == [
        "images/MCUCXR_0001_0.png,normal,,",
        "images/MCUCXR_0104_1.png,tuberculosis,,",
    ]
    mask = cv2.imread(str(data / "masks" / "MCUCXR_0104_1.png"), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(mask, left | right)


def test_openist_keeps_only_images_with_masks(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "OpenIST-master/Datasets/Chest_x-ray"
    members = {f"{root}/1-2-500.png": png(), f"{root}/1-2-500@.png": png(255), "OpenIST-master/docs/logo.png": png()}
    serve(server, monkeypatch, "openist", **{"master.zip": zip_of(**members)})
    assert fetch(project, "openist") == 1
    assert files_in(project.root / "data") == ["1-2-500.png", "1-2-500@.png"]


def test_mnist_comes_from_the_first_mirror_that_has_it(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prefix, count in (("train", 3), ("t10k", 2)):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        server.files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(header + (bytes(range(256)) * 12)[: count * 784])
        server.files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    files = [
        WebFile(url=f"http://127.0.0.1:1/{name}", mirrors=(f"{server.address}/{name}",), md5=md5(content))
        for name, content in server.files.items()
    ]
    set_files(monkeypatch, "mnist", *files)
    assert fetch(project, "mnist") == 5
    assert files_in(project.root / "data") == sorted(server.files)


def test_cifar10_keeps_its_batches_and_class_names(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = np.random.default_rng(0).integers(0, 256, 3072, np.uint8).tobytes()
    members = {
        "data_batch_1.bin": bytes([3]) + row + bytes([0]) + row,
        "test_batch.bin": bytes([9]) + row,
        "batches.meta.txt": "\n".join(DATASETS["cifar10"].classes).encode() + b"\n\n",
    }
    content = tgz_of(
        **{f"cifar-10-batches-bin/{name}": member for name, member in members.items()},
        **{"cifar-10-batches-bin/readme.html": b"<html></html>"},
    )
    serve(server, monkeypatch, "cifar10", **{"cifar-10-binary.tar.gz": content})
    assert fetch(project, "cifar10") == 3
    data = project.root / "data" / "cifar-10-batches-bin"
    assert {path.name: path.read_bytes() for path in data.iterdir()} == members
    records = scan(project.root / "data", DATA, PREPROCESS).records
    assert [(record.label, record.split) for record in records] == [
        ("cat", "train"),
        ("airplane", "train"),
        ("truck", "test"),
    ]


def test_pets_get_breed_split_and_mask(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    trimap = np.full((20, 20), 2, np.uint8)
    trimap[5:15, 5:15], trimap[7:13, 7:13] = 3, 1
    mask = bytes(cv2.imencode(".png", trimap)[1])
    stems = ("Maine_Coon_1", "pug_2", "pug_3")
    jpeg = bytes(cv2.imencode(".jpg", np.full((20, 20, 3), 90, np.uint8))[1])
    images = tgz_of(
        **{f"images/{stem}.jpg": jpeg for stem in stems}, **{"images/stray_1.jpg": jpeg, "images/a.mat": b"x"}
    )
    annotations = tgz_of(
        **{f"annotations/trimaps/{stem}.png": mask for stem in stems},
        **{"annotations/trimaps/._pug_2.png": b"x", "annotations/test.txt": b"pug_3 2 2 1\n"},
        **{"annotations/trainval.txt": b"pug_2 2 2 1\nMaine_Coon_1 1 1 1\n"},
    )
    serve(server, monkeypatch, "oxford-pet", **{"images.tar.gz": images, "annotations.tar.gz": annotations})
    assert fetch(project, "oxford-pet") == 3
    data = project.root / "data"
    assert (data / "manifest.csv").read_text().splitlines()[1:] == [
        "images/Maine_Coon_1.jpg,Maine_Coon,,train",
        "images/pug_2.jpg,pug,,train",
        "images/pug_3.jpg,pug,,test",
    ]
    written = cv2.imread(str(data / "masks" / "pug_2.png"), cv2.IMREAD_GRAYSCALE)
    assert [np.count_nonzero(written == grey) for grey in (0, 127, 255)] == [300, 64, 36]
    two_classes = resize_mask(written, Preprocess(image_size=20))
    three_classes = resize_mask(written, Preprocess(image_size=20, mask_values=(0, 127, 255)))
    assert np.bincount(two_classes.ravel()).tolist() == [364, 36]
    assert np.bincount(three_classes.ravel()).tolist() == [300, 64, 36]


@pytest.fixture
def kaggle(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Fetch a dataset from a local server with Kaggle's interface; its zip holds two copies of each image."""
    from kagglesdk import kaggle_env

    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, server.address)
    entry = DATASETS["chest-xray-pneumonia"].model_copy(update={"size": 100_000})
    monkeypatch.setitem(DATASETS, "chest-xray-pneumonia", entry)
    images = ("train/NORMAL/IM-0115-0001.png", "test/PNEUMONIA/person1_virus_6.png")
    members = {
        f"{top}/{image}": png(n) for n, image in enumerate(images) for top in ("chest_xray", "chest_xray/chest_xray")
    }
    server.files["DownloadDataset"] = zip_of(**members, **{"chest_xray/chest_xray/.DS_Store": bytes(3_000_000)})
    return lambda: fetch(project, "chest-xray-pneumonia")


@pytest.mark.parametrize("fault", ["none", "drop", "429"])
def test_kaggle_dataset_is_resumed_by_kagglehub(
    server: Any, project: Project, kaggle: Callable[[], int], fault: str, tmp_path: Path
) -> None:
    if fault == "drop":
        server.drop_after(2_500_000)
    if fault == "429":
        server.refuse(429)
    assert kaggle() == 2
    assert files_in(project.root / "data") == ["test/PNEUMONIA/person1_virus_6.png", "train/NORMAL/IM-0115-0001.png"]
    assert (cache_folder("datasets") / "chest-xray-pneumonia" / "kagglehub").is_dir()
    if fault == "drop":
        assert server.ranges[-1] == f"bytes={2 << 20}-"  # after the last complete chunk


@pytest.mark.parametrize("status", [401, 403, 404])
def test_kaggle_refusal_is_explained(server: Any, project: Project, kaggle: Callable[[], int], status: int) -> None:
    server.refuse(status)
    with pytest.raises(UserError) as error:
        kaggle()
    words = ["https://www.kaggle.com/datasets/paultimothymooney/chest-xray-pneumonia", f"HTTP {status}", "download"]
    words += ["medgen data fetch chest-xray-pneumonia", "medgen data import FILE.zip"]
    words += ["access_token", "Sign in"] if status in (401, 403) else []
    for word in words:
        assert word in str(error.value)
    assert files_in(project.root) == []


def test_kaggle_offline(kaggle: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"not reachable.*medgen data import FILE\.zip"):
        kaggle()


def test_damaged_kaggle_download_is_replaced(
    server: Any, project: Project, kaggle: Callable[[], int], tmp_path: Path
) -> None:
    complete = server.files["DownloadDataset"]
    server.files["DownloadDataset"] = b"<html>log in</html>"
    with pytest.raises(UserError, match="Run the command again"):
        kaggle()
    assert files_in(project.root) == []
    server.files["DownloadDataset"] = complete
    assert kaggle() == 2


def test_kaggle_zip_from_a_browser_is_used(server: Any, project: Project, kaggle: Callable[[], int]) -> None:
    put("chest-xray-pneumonia", **{"archive.zip": server.files["DownloadDataset"]})
    assert kaggle() == 2
    assert server.ranges == []
