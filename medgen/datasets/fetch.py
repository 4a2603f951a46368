"""Download a dataset of the catalog and import it as the project's data.

medgen data fetch pneumoniamnist       (then: dvc repro)

Downloads are cached in ~/.cache/medgen/datasets/NAME, or in $MEDGEN_DATASETS/NAME:

NAME/download/   files as published; a file that the user puts there counts as downloaded
NAME/ready/      unpacked and reorganized; it exists only when it is complete
NAME/kagglehub/  cache of kagglehub, unless $KAGGLEHUB_CACHE names another folder

Where the publisher gives no checksum, the first download's SHA-256 is recorded in the project's downloads.json, and
later downloads must match it.
"""

import os
import shutil
import time
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter

from medgen import config
from medgen.config import Project
from medgen.console import note
from medgen.datasets import archives, download, import_data
from medgen.datasets.catalog import Dataset, Kaggle, Manual, Web, WebFile, find
from medgen.datasets.reorganize import reorganize
from medgen.errors import UserError
from medgen.io import hash_file, swap, to_json, write_atomic

CHECKSUMS = "downloads.json"  # in the project: SHA-256 of the files whose publisher gives no checksum
SPARE = 256 << 20  # bytes to leave free on the disk
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


def fetch(
    project: Project, data: config.Data, preprocess: config.Preprocess, name: str, file: Path | None = None
) -> int:
    """Make a dataset of the catalog the project's data, and return its number of images.

    Its name in the catalog goes into the params file `file` (data.name).

    Raises:
        UserError: unknown name; data/ holds files that DVC does not track; disk full; download unreachable, refused or
            damaged; or a dataset that the user has to download: the message lists the steps.
    """
    dataset = find(name)
    import_data.require_replaceable(project, data)
    folder = download.cache_folder("datasets") / name
    note(f"{dataset.title}\n  licence: {dataset.license}\n  cite:    {dataset.citation}")
    try:
        source = _get(project, name, dataset, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; expected to store the download of {name!r} there. "
            "Free disk space, grant write permission, or set MEDGEN_DATASETS to another folder"
        ) from None
    return import_data.import_folder(project, data, preprocess, source, name=name, file=file)


def _get(project: Project, name: str, dataset: Dataset, folder: Path) -> Path:
    """The cached folder of images; downloads, unpacks and reorganizes it if that is not done yet."""
    source, ready = dataset.source, folder / "ready"
    if not ready.is_dir():
        (folder / "download").mkdir(parents=True, exist_ok=True)
        has_files = bool(_complete_files(folder / "download"))
        if isinstance(source, Manual) and not has_files:
            raise UserError(
                f"{source.page}: {name!r} has to be downloaded by hand. {source.steps}. {_manual_steps(name, folder)}"
            )
        _require_space(project, name, dataset, folder)
        if isinstance(source, Kaggle) and not has_files:
            return _images_folder(_download_from_kaggle(name, source, folder), source)
        recorded = _recorded_checksums(project)
        new: dict[str, str] = {}
        if isinstance(source, Web):
            for file in source.files:
                checksum = recorded.get(file.url) if file.md5 is None else f"md5:{file.md5}"
                path = _download(file, folder / "download", checksum, dataset.size)
                if checksum is None:
                    new[file.url] = hash_file(path)
        _make_ready(name, folder)
        _record_checksums(project, recorded, new)
    return _images_folder(ready, source)


def _images_folder(folder: Path, source: Kaggle | Manual | Web) -> Path:
    inside = source.folder if isinstance(source, Kaggle) else ""
    if not (folder / inside).is_dir():
        raise UserError(
            f"{folder}: expected a folder {inside}/ in the download. Import the folder of images with "
            "`medgen data import PATH`"
        )
    return folder / inside


def _complete_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix != ".part" and path.name[0] != "."
    )


def _require_space(project: Project, name: str, dataset: Dataset, folder: Path) -> None:
    """Check the disks before the download: the cache holds archive and images, the project data/ and DVC's cache."""
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = Counter({folder.stat().st_dev: max(0, 2 * dataset.size - present)})  # bytes by device
    needed[project.root.stat().st_dev] += 2 * dataset.size
    for place in (folder, project.root):
        free, expected = shutil.disk_usage(place).free, needed[place.stat().st_dev] + SPARE
        if free < expected:
            raise UserError(
                f"{place}: {free / 1e9:.1f} GB free; expected {expected / 1e9:.1f} GB for {name!r} on that disk "
                "(download, images, copies in data/ and in DVC's cache). Free disk space, or set MEDGEN_DATASETS to a "
                "folder on another disk"
            )


def _make_ready(name: str, folder: Path) -> None:
    """Unpack and reorganize the downloads into a temporary folder, rename it to ready/, and delete the downloads."""
    building = folder / "ready.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        for path in _complete_files(folder / "download"):
            if archives.is_archive(path) or path.name.lower().endswith(_ARCHIVES):
                archives.unpack(path, building / path.name)
            else:
                shutil.copyfile(path, building / path.name)
        reorganize(name, building)
        entries = list(building.iterdir())
        swap(entries[0] if len(entries) == 1 and entries[0].is_dir() else building, folder / "ready")
        shutil.rmtree(folder / "download")
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _download(file: WebFile, folder: Path, checksum: str | None, size: int) -> Path:
    urls = (file.url, *file.mirrors)
    for url in urls[:-1]:
        with suppress(UserError):
            return download.download_file(url, folder / file.name, checksum, size)
    return download.download_file(urls[-1], folder / file.name, checksum, size)


def _record_checksums(project: Project, recorded: dict[str, str], new: dict[str, str]) -> None:
    for url, digest in new.items():
        note(
            f"{url}: the publisher gives no checksum; SHA-256 of the download: {digest}. It is now in {CHECKSUMS}, and "
            "later fetches expect it: compare it with a colleague's, and commit the file"
        )
    if new:
        write_atomic(project.root / CHECKSUMS, to_json(recorded | new))


def _recorded_checksums(project: Project) -> dict[str, str]:
    """SHA-256 by address of the files downloaded before whose publisher gives no checksum."""
    path = project.root / CHECKSUMS
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"{path}: cannot be read; expected a JSON object of addresses and SHA-256. Restore it with git, or remove "
            "it: the next fetch then records the checksums anew"
        ) from None


def _download_from_kaggle(name: str, source: Kaggle, folder: Path) -> Path:
    """The dataset's folder in the cache of kagglehub, which resumes broken downloads."""
    import requests
    from kagglehub.exceptions import DataCorruptionError  # type: ignore[import-untyped]

    for attempt in range(download.NUM_ATTEMPTS):
        try:
            return _call_kagglehub(source, folder)
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            is_final, problem = status not in download.RETRY_STATUSES, _explain_status(status)
        except requests.RequestException as error:
            attempts = f"{type(error).__name__}, {download.NUM_ATTEMPTS} attempts"
            is_final, problem = False, f"not reachable or interrupted ({attempts}). Run the command again to resume"
        except (DataCorruptionError, zipfile.BadZipFile, EOFError, ValueError) as error:
            dataset = source.handle.partition("/versions")[0]
            for partial in _kagglehub_cache(folder).glob(f"datasets/{dataset}/*.archive"):
                partial.unlink()
            is_final = type(error) is ValueError  # it can also mean an invalid kaggle.json
            problem = f"{(str(error).strip() or type(error).__name__).splitlines()[0]}. Run the command again"
        if is_final or attempt == download.NUM_ATTEMPTS - 1:
            break
        time.sleep(2.0**attempt)
    steps = f"Or download the zip there in a browser. {_manual_steps(name, folder)}"
    raise UserError(f"{source.page}: {problem}. {steps}")


def _call_kagglehub(source: Kaggle, folder: Path) -> Path:
    import kagglehub  # type: ignore[import-untyped]

    before = os.environ.get("KAGGLEHUB_CACHE")
    os.environ["KAGGLEHUB_CACHE"] = str(_kagglehub_cache(folder))
    try:
        return Path(kagglehub.dataset_download(source.handle))
    finally:
        if before is None:
            del os.environ["KAGGLEHUB_CACHE"]


def _kagglehub_cache(folder: Path) -> Path:
    return Path(os.environ.get("KAGGLEHUB_CACHE") or folder / "kagglehub")


def _explain_status(status: int) -> str:
    """The problem that an HTTP status of Kaggle means, and what to do."""
    if status in (401, 403):
        problem = (
            "Kaggle needs an account. Sign in there and accept the terms; create a token on "
            "https://www.kaggle.com/settings and save it as ~/.kaggle/access_token or set KAGGLE_API_TOKEN "
            "(an older ~/.kaggle/kaggle.json works too); then run the command again"
        )
    else:
        problem = "not found" if status == 404 else "unexpected answer of Kaggle. Run the command again later"
    return f"HTTP {status}: {problem}"


def _manual_steps(name: str, folder: Path) -> str:
    return (
        f"Put the downloaded files into {folder / 'download'} and run `medgen data fetch {name}` again, or import a "
        "folder or archive with `medgen data import PATH`, such as `medgen data import FILE.zip`"
    )
