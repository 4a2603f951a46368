"""Known datasets come from servers on loopback that misbehave, and are whole in the project or not there."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from medgen import config
from medgen.config import Preprocess, Project
from medgen.datasets import catalog
from medgen.datasets import fetch as fetching
from medgen.datasets.catalog import KNOWN, Kaggle, Torchvision, Web
from medgen.errors import UserError
from medgen.ingest.transforms import mask_to_square

DATA, PREPROCESS = config.Data(), config.Preprocess()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An empty project; no cache, no credentials, no waiting, and disk enough."""
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
    return fetching.fetch(project, DATA, PREPROCESS, name)


def know(monkeypatch: pytest.MonkeyPatch, name: str, source: Any) -> None:
    """Lets a known dataset come from elsewhere."""
    monkeypatch.setitem(catalog.KNOWN, name, replace(KNOWN[name], source=source, size=1000))


def files(folder: Path) -> list[str]:
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
    """A MedMNIST file of 6 pictures of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    arrays = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        arrays |= {f"{split}_images": noise[:count], f"{split}_labels": np.arange(count)[:, None] % 2}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def serve_npz(server: Any, monkeypatch: pytest.MonkeyPatch, checksum: str | None = "right") -> bytes:
    content = npz()
    server.files["pneumoniamnist.npz"] = content
    checksum = f"md5:{md5(content)}" if checksum == "right" else checksum
    source = Web(
        "https://example.org", ((f"{server.address}/records/1/files/pneumoniamnist.npz?download=1", checksum),)
    )
    know(monkeypatch, "pneumoniamnist", source)
    return content


@pytest.mark.parametrize("trouble", ["none", "drop", "429", "503", "drop twice"])
def test_a_file_from_the_web_becomes_the_projects_data(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = serve_npz(server, monkeypatch)
    for _ in range({"drop": 1, "drop twice": 2}.get(trouble, 0)):
        server.drop_after(len(content) // 2)
    if trouble.isdigit():
        server.refuse(int(trouble), retry_after="1")
    assert fetch(project, "pneumoniamnist") == 6
    assert (project.root / "data" / "pneumoniamnist.npz").read_bytes() == content
    said = capsys.readouterr().err
    assert "CC BY 4.0" in said and "Yang et al." in said and "6 images" in said
    num_requests = len(server.ranges)
    assert fetch(Project(project.root.parent), "pneumoniamnist") == 6  # a second project: from the cache
    assert len(server.ranges) == num_requests


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("404", "not there (any more)"),
        ("403", "refused"),
        ("wrong", "MD5 is"),
        ("never", "goes on where this one stopped"),
    ],
)
def test_a_broken_download_never_looks_complete(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, trouble: str, words: str
) -> None:
    content = serve_npz(server, monkeypatch, "md5:" + "0" * 32 if trouble == "wrong" else "right")
    if trouble.isdigit():
        server.refuse(int(trouble))
    for _ in range(4 if trouble == "never" else 0):
        server.drop_after(100)
    with pytest.raises(UserError) as error:
        fetch(project, "pneumoniamnist")
    assert words in str(error.value)
    assert files(project.root) == []
    place = fetching.datasets_folder() / "pneumoniamnist"
    assert not (place / "ready").exists()
    assert not (place / "download" / "pneumoniamnist.npz").exists()
    if trouble == "never":  # the same command goes on
        assert fetch(project, "pneumoniamnist") == 6
        assert server.ranges[-1] == "bytes=100-"
        assert (project.root / "data" / "pneumoniamnist.npz").read_bytes() == content


def test_a_file_put_there_by_hand_is_taken_for_downloaded(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = serve_npz(server, monkeypatch)
    place = fetching.datasets_folder() / "pneumoniamnist" / "download"
    place.mkdir(parents=True)
    (place / "pneumoniamnist.npz").write_bytes(content)
    assert fetch(project, "pneumoniamnist") == 6
    assert server.ranges == []


def test_a_page_in_place_of_an_archive_is_refused(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["master.zip"] = b"<html>log in to the hospital's network</html>"
    know(monkeypatch, "openist", Web("https://example.org", ((f"{server.address}/master.zip", None),)))
    with pytest.raises(UserError, match=r"master\.zip: a damaged or cut off archive.*Remove it"):
        fetch(project, "openist")
    assert "gives no checksum" in capsys.readouterr().err
    assert files(project.root) == []


def test_data_that_dvc_does_not_keep_is_noticed_before_the_download(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_npz(server, monkeypatch)
    (project.root / "data").mkdir()
    (project.root / "data" / "mine.png").write_bytes(png())
    with pytest.raises(UserError, match="DVC does not keep"):
        fetch(project, "pneumoniamnist")
    assert server.ranges == []


def test_a_disk_too_small_is_noticed_before_the_download(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_npz(server, monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB free; expected 0\.3 GB.*MEDGEN_DATASETS"):
        fetch(project, "pneumoniamnist")
    assert server.ranges == []


def test_a_cache_that_cannot_be_written_says_which(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve_npz(server, monkeypatch)
    (tmp_path / "datasets").write_bytes(b"a file in its place")
    with pytest.raises(UserError, match=r"datasets.*MEDGEN_DATASETS"):
        fetch(project, "pneumoniamnist")


@pytest.mark.parametrize(
    "name", [name for name, dataset in KNOWN.items() if isinstance(dataset.source, catalog.ByHand)]
)
def test_what_is_given_by_hand_says_where_and_what_next(project: Project, name: str) -> None:
    with pytest.raises(UserError) as error:
        fetch(project, name)
    place = fetching.datasets_folder() / name / "download"
    for word in ("sites.wustl.edu/oasisbrains", str(place), f"medgen data fetch {name}", "medgen data import"):
        assert word in str(error.value)
    assert error.value.exit_code == 2
    assert place.is_dir()  # the user can put the files there


def put(name: str, **archives: bytes) -> None:
    place = fetching.datasets_folder() / name / "download"
    place.mkdir(parents=True)
    for file, content in archives.items():
        (place / file).write_bytes(content)


def test_oasis_slices_put_there_by_hand(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "keras_png_slices_data/keras_png_slices"
    members = {}
    for split, case in (("train", 1), ("validate", 2), ("test", 3)):
        members[f"{root}_{split}/case_00{case}_slice_0.nii.png"] = png(100 + case)
        members[f"{root}_seg_{split}/seg_00{case}_slice_0.nii.png"] = png(85)
    put("oasis-slices", **{"slices.zip": zip_of(**members)})
    assert fetch(project, "oasis-slices") == 3
    assert not (fetching.datasets_folder() / "oasis-slices" / "download").exists()  # not kept twice


def test_oasis_volumes_are_one_for_each_session(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    session = "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88"
    other = session.replace("0001", "0042").replace("disc1", "disc2")
    discs = {
        f"oasis_cross-sectional_disc{number}.tar.gz": tgz_of(
            **{f"{path}{end}": b"x" for end in ("_masked_gfc.hdr", "_masked_gfc.img", "_gfc.img", "_masked_gfc.gif")}
        )
        for number, path in ((1, session), (2, other))
    }
    put("oasis1-volumes", **discs)
    monkeypatch.setattr(fetching.import_data, "import_folder", lambda *words: len(files(words[-1])))
    assert fetch(project, "oasis1-volumes") == 4
    ready = fetching.datasets_folder() / "oasis1-volumes" / "ready"
    stems = [f"OAS1_{number}_MR1_mpr_n4_anon_111_t88_masked_gfc" for number in ("0001", "0042")]
    assert files(ready) == [f"{stem}{end}" for stem in stems for end in (".hdr", ".img")]


def test_montgomery_gets_its_labels_and_whole_masks(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    left[:, 2:8], right[:, 12:18] = 255, 255
    members = {"__MACOSX/MontgomerySet/CXR_png/._MCUCXR_0001_0.png": b"x", "MontgomerySet/NLM.txt": b"x"}
    for film in ("MCUCXR_0001_0.png", "MCUCXR_0104_1.png"):
        members[f"MontgomerySet/CXR_png/{film}"] = png()
        for side, mask in (("left", left), ("right", right)):
            members[f"MontgomerySet/ManualMask/{side}Mask/{film}"] = bytes(cv2.imencode(".png", mask)[1])
    server.files["NLM-MontgomeryCXRSet.zip"] = zip_of(**members)
    source = Web("https://example.org", ((f"{server.address}/NLM-MontgomeryCXRSet.zip", None),))
    know(monkeypatch, "montgomery", source)
    assert fetch(project, "montgomery") == 2
    data = project.root / "data"
    assert (data / "manifest.csv").read_text().splitlines()[1:] == [
        "images/MCUCXR_0001_0.png,normal,MCUCXR_0001,",
        "images/MCUCXR_0104_1.png,tuberculosis,MCUCXR_0104,",
    ]
    mask = cv2.imread(str(data / "masks" / "MCUCXR_0104_1.png"), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(mask, left | right)


def test_openist_is_its_films_without_the_tools(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "OpenIST-master/Datasets/Chest_x-ray"
    members = {f"{root}/1-2-500.png": png(), f"{root}/1-2-500@.png": png(255), "OpenIST-master/docs/logo.png": png()}
    server.files["master.zip"] = zip_of(**members)
    know(monkeypatch, "openist", Web("https://example.org", ((f"{server.address}/master.zip", None),)))
    assert fetch(project, "openist") == 1
    assert files(project.root / "data") == ["1-2-500.png", "1-2-500@.png"]


def test_mnist_comes_from_torchvisions_mirrors(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    for prefix, count in (("train", 3), ("t10k", 2)):
        pictures = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + bytes(range(256)) * 12
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count))
        server.files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(pictures[: 16 + count * 784])
        server.files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    monkeypatch.setattr(MNIST, "mirrors", [f"{server.address}/gone-", f"{server.address}/"])
    monkeypatch.setattr(MNIST, "resources", [(name, md5(content)) for name, content in server.files.items()])
    assert fetch(project, "mnist") == 5
    assert files(project.root / "data") == sorted(server.files)


def test_cifar10_is_unpacked_and_its_pickles_are_not_loaded(
    server: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    content = tgz_of(**{"cifar-10-batches-py/data_batch_1": b"cos\nsystem\n(S'touch /tmp/run'\ntR."})
    server.files["cifar-10-python.tar.gz"] = content
    monkeypatch.setattr(CIFAR10, "url", f"{server.address}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(content))
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr(fetching.import_data, "import_folder", lambda *words: len(files(words[-1])))
    assert fetch(project, "cifar10") == 1


def test_pets_get_breed_split_and_outline(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import OxfordIIITPet

    trimap = np.full((20, 20), 2, np.uint8)
    trimap[5:15, 5:15], trimap[7:13, 7:13] = 3, 1
    mask = bytes(cv2.imencode(".png", trimap)[1])
    stems = ("Maine_Coon_1", "pug_2", "pug_3")
    jpeg = bytes(cv2.imencode(".jpg", np.full((20, 20, 3), 90, np.uint8))[1])
    server.files["images.tar.gz"] = tgz_of(
        **{f"images/{stem}.jpg": jpeg for stem in stems}, **{"images/stray_1.jpg": jpeg, "images/a.mat": b"x"}
    )
    server.files["annotations.tar.gz"] = tgz_of(
        **{f"annotations/trimaps/{stem}.png": mask for stem in stems},
        **{"annotations/trimaps/._pug_2.png": b"x", "annotations/test.txt": b"pug_3 2 2 1\n"},
        **{"annotations/trainval.txt": b"pug_2 2 2 1\nMaine_Coon_1 1 1 1\n"},
    )
    resources = [(f"{server.address}/{name}", md5(content)) for name, content in server.files.items()]
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", resources)
    assert fetch(project, "oxford-pet") == 3
    data = project.root / "data"
    assert (data / "manifest.csv").read_text().splitlines()[1:] == [
        "images/Maine_Coon_1.jpg,Maine_Coon,,train",
        "images/pug_2.jpg,pug,,train",
        "images/pug_3.jpg,pug,,test",
    ]
    outline = cv2.imread(str(data / "masks" / "pug_2.png"), cv2.IMREAD_GRAYSCALE)
    assert [np.count_nonzero(outline == grey) for grey in (0, 127, 255)] == [300, 64, 36]
    on_or_off = mask_to_square(outline, Preprocess(image_size=20))
    three = mask_to_square(outline, Preprocess(image_size=20, mask_values=(0, 127, 255)))
    assert np.bincount(on_or_off.ravel()).tolist() == [364, 36]
    assert np.bincount(three.ravel()).tolist() == [300, 64, 36]


def test_torchvision_still_says_where_its_datasets_are() -> None:
    for dataset in KNOWN.values():
        if isinstance(dataset.source, Torchvision):
            for urls, name, checksum in fetching._mirrors(dataset.source):
                assert all(url.startswith("http") and url.endswith(name) for url in urls)
                assert checksum is not None and len(checksum) == 36


@pytest.fixture
def kaggle(server: Any, project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Kaggle's interface on loopback; each call fetches the Kermany films, of which its zip has two copies."""
    from kagglesdk import kaggle_env

    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, server.address)
    monkeypatch.setitem(catalog.KNOWN, "chest-xray-pneumonia", replace(KNOWN["chest-xray-pneumonia"], size=1000))
    films = ("train/NORMAL/IM-0115-0001.png", "test/PNEUMONIA/person1_virus_6.png")
    members = {
        f"{top}/{film}": png(n) for n, film in enumerate(films) for top in ("chest_xray", "chest_xray/chest_xray")
    }
    server.files["DownloadDataset"] = zip_of(**members, **{"chest_xray/chest_xray/.DS_Store": bytes(3_000_000)})
    return lambda: fetch(project, "chest-xray-pneumonia")


@pytest.mark.parametrize("trouble", ["none", "drop", "429"])
def test_kaggle_comes_through_kagglehub(
    server: Any, project: Project, kaggle: Callable[[], int], trouble: str, tmp_path: Path
) -> None:
    if trouble == "drop":
        server.drop_after(2_500_000)
    if trouble == "429":
        server.refuse(429)
    assert kaggle() == 2
    assert files(project.root / "data") == ["test/PNEUMONIA/person1_virus_6.png", "train/NORMAL/IM-0115-0001.png"]
    assert (fetching.datasets_folder() / "chest-xray-pneumonia" / "kagglehub").is_dir()
    if trouble == "drop":
        assert server.ranges[-1] == f"bytes={2 << 20}-"  # it went on after its last whole chunk


@pytest.mark.parametrize("status", [401, 403, 404])
def test_kaggle_refuses_and_the_user_knows_what_to_do(
    server: Any, project: Project, kaggle: Callable[[], int], status: int
) -> None:
    server.refuse(status)
    with pytest.raises(UserError) as error:
        kaggle()
    words = ["https://www.kaggle.com/datasets/paultimothymooney/chest-xray-pneumonia", f"HTTP {status}", "download"]
    words += ["medgen data fetch chest-xray-pneumonia", "medgen data import FILE.zip"]
    words += ["access_token", "Sign in"] if status in (401, 403) else []
    for word in words:
        assert word in str(error.value)
    assert files(project.root) == []


def test_kaggle_offline_is_one_message(kaggle: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"not reachable.*medgen data import FILE\.zip"):
        kaggle()


def test_damage_on_the_way_from_kaggle_is_not_kept(
    server: Any, project: Project, kaggle: Callable[[], int], tmp_path: Path
) -> None:
    whole = server.files["DownloadDataset"]
    server.files["DownloadDataset"] = b"<html>log in</html>"
    with pytest.raises(UserError, match="Run the command again"):
        kaggle()
    assert files(project.root) == []
    server.files["DownloadDataset"] = whole
    assert kaggle() == 2


def test_a_kaggle_zip_from_a_browser_serves_too(server: Any, project: Project, kaggle: Callable[[], int]) -> None:
    put("chest-xray-pneumonia", **{"archive.zip": server.files["DownloadDataset"]})
    assert kaggle() == 2
    assert server.ranges == []
    assert isinstance(KNOWN["chest-xray-pneumonia"].source, Kaggle)
