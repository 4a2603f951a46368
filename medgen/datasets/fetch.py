"""A known dataset, from where it is published to the project's data.

medgen data fetch pneumoniamnist       (then: dvc repro)

Downloads are kept in ~/.cache/medgen/datasets/NAME, or under $MEDGEN_DATASETS:

NAME/download/   the files as they came; one that is put there by hand is taken for downloaded
NAME/ready/      unpacked and arranged; it is there only when all of it is
NAME/kagglehub/  what kagglehub keeps, unless $KAGGLEHUB_CACHE says where

torchvision says where its datasets are and with which MD5; its own transfer starts anew when it breaks off, and its
classes load pickles, so the bytes come through data/download.py.
"""

import os
import shutil
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from medgen import config
from medgen.config import Project
from medgen.datasets import archives, download, import_data
from medgen.datasets.catalog import ByHand, Dataset, Kaggle, Torchvision, Web, find
from medgen.datasets.reorganize import arrange
from medgen.errors import UserError
from medgen.io import swap

SPARE = 256 << 20  # bytes to leave free on the disk
NUM_ATTEMPTS = 4
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_Mirrors = tuple[list[str], str, str | None]  # addresses of one file, its name, its checksum


def fetch(project: Project, data: config.Data, preprocess: config.Preprocess, name: str) -> int:
    """Makes a known dataset the project's data; returns how many images it has.

    Raises:
        UserError: an unknown name; data/ holds what DVC could not bring back; no room on the disk; not reachable,
            refused or damaged; or it is given by hand only: the message then says what to do.
    """
    dataset = find(name)
    import_data.require_replaceable(project, data)
    place = datasets_folder() / name
    _introduce(dataset)
    try:
        source = _get(project, name, dataset, place)
    except OSError as error:
        raise UserError(
            f"{error.filename or place}: {error.strerror or error}; expected to keep the download of {name!r} there. "
            "Make room or give the right to write there, or set MEDGEN_DATASETS to another folder"
        ) from None
    return import_data.import_folder(project, data, preprocess, source)


def datasets_folder() -> Path:
    """Where downloads are kept: $MEDGEN_DATASETS, or ~/.cache/medgen/datasets."""
    chosen = os.environ.get("MEDGEN_DATASETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "medgen" / "datasets"


def _introduce(dataset: Dataset) -> None:
    lines = f"{dataset.title}\n  licence: {dataset.license}\n  cite:    {dataset.citation}"
    Console(stderr=True).print(lines, highlight=False, markup=False, soft_wrap=True)


def _get(project: Project, name: str, dataset: Dataset, place: Path) -> Path:
    """The folder of pictures in the cache; downloaded, unpacked and arranged where that is still to do."""
    inside = dataset.source.inside if isinstance(dataset.source, Kaggle) else ""
    if (place / "ready").is_dir():
        return _inside(place / "ready", inside)
    (place / "download").mkdir(parents=True, exist_ok=True)
    by_hand = _whole_files(place / "download")
    if isinstance(dataset.source, ByHand) and not by_hand:
        page, steps = dataset.source.page, dataset.source.steps
        raise UserError(f"{page}: {name!r} is given by hand only. {steps}. {_then(name, place)}")
    _require_space(project, name, dataset, place)
    match dataset.source:
        case Kaggle() if not by_hand:
            return _inside(_from_kaggle(name, dataset.source, place), inside)
        case Torchvision():
            _from_mirrors(_mirrors(dataset.source), place / "download")
        case Web():
            files = [([url], _file_name(url), checksum) for url, checksum in dataset.source.files]
            _from_mirrors(files, place / "download")
    _make_ready(name, place)
    return _inside(place / "ready", inside)


def _inside(folder: Path, inside: str) -> Path:
    if not (folder / inside).is_dir():
        raise UserError(f"{folder}: {inside}/ is not in the download. Import the right folder by `medgen data import`")
    return folder / inside


def _whole_files(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_file() and path.suffix != ".part" and path.name[0] != ".")


def _require_space(project: Project, name: str, dataset: Dataset, place: Path) -> None:
    """Refuses early: the download and its unpacked pictures in the cache, a copy in data/ and DVC's in the project."""
    here = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    needed: dict[int, int] = {}
    for folder, size in ((place, max(0, 2 * dataset.size - here)), (project.root, 2 * dataset.size)):
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + size
    for folder in (place, project.root):
        free, expected = shutil.disk_usage(folder).free, needed[folder.stat().st_dev] + SPARE
        if free < expected:
            raise UserError(
                f"{folder}: {free / 1e9:.1f} GB free; expected {expected / 1e9:.1f} GB for {name!r} on that disk "
                "(download, pictures, a copy in data/ and DVC's). Make room, or set MEDGEN_DATASETS to another"
            )


def _make_ready(name: str, place: Path) -> None:
    """Unpacks and arranges beside, then moves into place; the downloads are then of no more use."""
    building = place / "ready.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        for path in _whole_files(place / "download"):
            if archives.is_archive(path) or path.name.lower().endswith(_ARCHIVES):
                archives.unpack(path, building / path.name)
            else:
                shutil.copyfile(path, building / path.name)
        arrange(name, building)
        folders = list(building.iterdir())
        swap(folders[0] if len(folders) == 1 and folders[0].is_dir() else building, place / "ready")
        shutil.rmtree(place / "download")
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _file_name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


def _mirrors(source: Torchvision) -> list[_Mirrors]:
    """Addresses, name and MD5 of each file of a torchvision dataset, from its class."""
    from torchvision import datasets

    known: Any = getattr(datasets, source.name)
    if source.name == "MNIST":
        return [([mirror + file for mirror in known.mirrors], file, f"md5:{md5}") for file, md5 in known.resources]
    if source.name == "CIFAR10":
        return [([known.url], known.filename, f"md5:{known.tgz_md5}")]
    return [([url], _file_name(url), f"md5:{md5}") for url, md5 in known._RESOURCES]


def _from_mirrors(files: Iterable[_Mirrors], folder: Path) -> None:
    for urls, name, checksum in files:
        for number, url in enumerate(urls, start=1):
            try:
                download.fetch(url, folder / name, checksum, num_attempts=NUM_ATTEMPTS, sleep=time.sleep)
                break
            except UserError:
                if number == len(urls):
                    raise


def _from_kaggle(name: str, source: Kaggle, place: Path) -> Path:
    """The folder of a Kaggle dataset in kagglehub's cache, which it fills and goes on with where it broke off."""
    import requests
    from kagglehub.exceptions import DataCorruptionError  # type: ignore[import-untyped]

    for attempt in range(NUM_ATTEMPTS):
        last = attempt == NUM_ATTEMPTS - 1
        try:
            return _call_kagglehub(source, place)
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status not in download.AGAIN or last:
                raise _explain_kaggle(name, source, place, status) from None
        except requests.RequestException as error:
            if last:
                problem = f"{source.page}: not reachable or broken off ({type(error).__name__}, {NUM_ATTEMPTS} tries)"
                raise UserError(f"{problem}. Run the command again, it goes on. {_by_hand(name, place)}") from None
        except (DataCorruptionError, zipfile.BadZipFile, EOFError, ValueError) as error:
            for half in _kagglehub_folder(place).glob(f"datasets/{source.handle.partition('/versions')[0]}/*.archive"):
                half.unlink()
            if last or type(error) is ValueError:  # it also says that of a kaggle.json that is no JSON
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(f"{source.page}: {reason}. Run the command again. {_by_hand(name, place)}") from None
        time.sleep(2.0**attempt)
    raise AssertionError("every try returns or raises in the end")


def _call_kagglehub(source: Kaggle, place: Path) -> Path:
    import kagglehub  # type: ignore[import-untyped]

    before = os.environ.get("KAGGLEHUB_CACHE")
    os.environ["KAGGLEHUB_CACHE"] = str(_kagglehub_folder(place))
    try:
        return Path(kagglehub.dataset_download(source.handle))
    finally:
        if before is None:
            del os.environ["KAGGLEHUB_CACHE"]


def _kagglehub_folder(place: Path) -> Path:
    return Path(os.environ.get("KAGGLEHUB_CACHE") or place / "kagglehub")


def _explain_kaggle(name: str, source: Kaggle, place: Path, status: int) -> UserError:
    """What an HTTP status of Kaggle's means for the user."""
    if status in (401, 403):
        what = (
            "Kaggle wants to know who asks. Sign in there and accept what it shows; make a token on "
            "https://www.kaggle.com/settings and put it into ~/.kaggle/access_token or KAGGLE_API_TOKEN "
            "(an older kaggle.json in ~/.kaggle serves too); then run the command again"
        )
    elif status == 404:
        what = "not there (any more)"
    else:
        what = "Kaggle does not answer as it should. Run the command again later"
    return UserError(f"{source.page}: HTTP {status}: {what}. {_by_hand(name, place)}")


def _by_hand(name: str, place: Path) -> str:
    return f"Or download the zip there in a browser. {_then(name, place)}"


def _then(name: str, place: Path) -> str:
    return (
        f"Put the files, as they are, into {place / 'download'} and run `medgen data fetch {name}` again; "
        "or take a folder or archive of your own by `medgen data import PATH`, such as `medgen data import FILE.zip`"
    )
