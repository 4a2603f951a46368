"""Import a folder or an archive of images as the project's dataset.

medgen data import PATH --name NAME     (then: dvc repro; PATH may be on S3: s3://bucket/folder)

The import copies images, masks, files that belong to them and manifest.csv, with their folders; it counts the files it
leaves out. It builds the copy in a temporary folder, renames it to data/ and runs `dvc add`, so that the next
`dvc repro` uses it. `git checkout data.dvc && dvc checkout` restores the earlier data; the import refuses to replace
files that DVC does not track. The dataset's name goes into the params file (data.name).
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medgen import config
from medgen.config import Project
from medgen.config.edit import set_value
from medgen.console import note
from medgen.data.s3 import S3Folder, is_s3
from medgen.datasets import archives, sample
from medgen.errors import UserError
from medgen.ingest import dataset_scan, images, patients
from medgen.ingest.dataset_scan import ScanResult
from medgen.ingest.list_files import list_names
from medgen.ingest.manifest import MANIFEST
from medgen.io import replace_folder, write_atomic

SAMPLE = "phantom-chest"  # name of the drawn dataset
NUM_REASONS = 5  # reasons for skipped files that the summary lists


def import_folder(
    project: Project,
    data: config.Data,
    preprocess: config.Preprocess,
    source: Path | str,
    name: str | None = None,
    file: Path | None = None,
) -> int:
    """Make the images of `source`, a folder or an archive, the project's dataset, and return their number.

    Args:
        project, data, preprocess: where the images go, and how they are read.
        source: the folder or archive, or its s3:// address.
        name: the dataset's name; None: the name of `source`.
        file: the params file to write the name into; None: it is not written.

    Raises:
        UserError: no images, an unsafe or damaged archive, a name without letters or digits, files in data/ that DVC
            does not track, a bucket that cannot be read, a full disk, or a failed `dvc add`.
    """
    folder = _target(project, data)
    origin = S3Folder(str(source)) if is_s3(source) else Path(source)
    if isinstance(origin, Path) and origin.resolve() == folder.resolve():
        raise UserError(
            f"{source}: this is already the project's data folder. Run `dvc add {data.path}`, then `dvc repro`; "
            "data.name in params.yaml names it"
        )
    name = _choose_name(origin, name)
    require_replaceable(project, data)
    with _downloaded(project, origin) as local, _as_folder(project, local) as opened:
        listing = dataset_scan.scan(opened, data, preprocess)
        _copy(opened, listing, folder)
    _print_summary(source, listing, folder)
    _write_name(file, data, name)
    _add_to_dvc(project, data)
    return len(listing.records)


def draw_sample(
    project: Project,
    data: config.Data,
    preprocess: config.Preprocess,
    num_images: int = 480,
    seed: int = 0,
    file: Path | None = None,
) -> None:
    """Make drawn chest X-rays (see medgen.datasets.sample) the project's dataset, and write its name as an import does.

    Raises:
        UserError: files in data/ that DVC does not track, or a failed `dvc add`.
    """
    folder = _target(project, data)
    require_replaceable(project, data)
    with replace_folder(folder) as building:
        sample.draw(building, num_images, seed=seed)
    _print_summary(f"drawn with seed {seed}", dataset_scan.scan(folder, data, preprocess), folder)
    _write_name(file, data, SAMPLE)
    _add_to_dvc(project, data)


def _target(project: Project, data: config.Data) -> Path:
    if is_s3(data.path):
        raise UserError(
            f"data.path: {data.path} is read only; expected a folder of the project for a dataset that is created or "
            "imported. Set data.path, such as data.path: data"
        )
    return project.root / data.path


def _choose_name(source: Path | S3Folder, name: str | None) -> str:
    """The name that the user gave, or the source's own with only letters, digits, dots, hyphens and underscores."""
    if name is not None:
        if not name or name != config.to_name(name):
            raise UserError(f"--name {name}: expected ASCII letters, digits, dots, hyphens and underscores")
        return name
    own = source.resolve().name if isinstance(source, Path) else source.name
    if source.is_file():
        own = own.removesuffix(".gz")
        own = own.removesuffix(Path(own).suffix)
    if not (found := config.to_name(own)):
        raise UserError(f"{source}: has no letters or digits to name the dataset after; give a name with --name NAME")
    return found


def _write_name(file: Path | None, data: config.Data, name: str) -> None:
    """Set data.name in the params file and keep its other text; say where models of this dataset are registered.

    Raises:
        UserError: the name cannot be written into the file, which is not changed.
    """
    if file is None:
        return
    if config.load(file).data.path != data.path:
        note(f"name: {name}; give --set data.name={name} with --set data.path={data.path}")
        return
    try:
        text = set_value(file.read_bytes().decode(), "data.name", name)
        is_set = YAML(typ="safe", pure=True).load(text)["data"]["name"] == name
    except (YAMLError, LookupError, TypeError):
        is_set = False
    if not is_set:
        raise UserError(f"{file}: cannot insert data.name, perhaps because of anchors; insert by hand: {name}")
    write_atomic(file, text.encode())
    model = config.load(file).registry.model_name
    note(f"data.name in {file} is now {name}; its models are registered as models:/{model}")
    if model != name:
        note("  (registry.model_name is set; remove it to give each dataset a registered model of its own)")


@contextmanager
def _downloaded(project: Project, source: Path | S3Folder) -> Iterator[Path]:
    """Yield a local path itself, or a temporary copy of a folder or an archive on S3."""
    if isinstance(source, Path):
        yield source
        return
    temporary = project.runs / "downloaded"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        if source.is_file():
            source.download("", temporary / source.name)
            yield temporary / source.name
        else:
            sizes = source.list_files()
            wanted = {path for path, reason in list_names(sizes) if reason is None} | {patients.SALT_FILE}
            source.download_all({path: size for path, size in sizes.items() if path in wanted}, temporary)
            yield temporary
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(source))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _as_folder(project: Project, source: Path) -> Iterator[Path]:
    """Yield the folder itself, or a temporary folder with the contents of an archive."""
    if not source.is_file():
        yield source
        return
    if not archives.is_archive(source):
        raise UserError(
            f"{source}: expected a folder, or a zip, tar or tar.gz. Put the file into a folder and import that"
        )
    temporary = project.runs / "unpacked"
    try:
        archives.unpack(source, temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, listing: ScanResult, folder: Path) -> None:
    """Copy the files: DVC makes the files it tracks read-only, and a hard link would pass that on to the originals."""
    names = {name for record in listing.records for name in (*record.files, record.mask) if name is not None}
    names |= {*listing.companions, MANIFEST}
    try:
        with replace_folder(folder) as building:
            for name in sorted(names):
                if (source / name).exists():  # preprocess reports files that the manifest lists and the folder lacks
                    target = building / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, target)
            _add_salt(source, listing, folder, building)
    except OSError as error:
        raise UserError(
            f"{error.filename2 or error.filename or folder}: {error.strerror}; expected to copy the images there. "
            "Free disk space or grant write permission; data/ is unchanged"
        ) from None


def _add_salt(source: Path, listing: ScanResult, folder: Path, building: Path) -> None:
    """Keep the project's salt, so that patients keep their pseudonyms; create one for patient identifiers.

    A salt in `source` is not used: whoever packed the images knows it.
    """
    if patients.has_salt(source):
        note(f"{source / patients.SALT_FILE}: not imported; to keep its pseudonyms, copy it to {folder} yourself")
    if patients.has_salt(folder):
        shutil.copyfile(folder / patients.SALT_FILE, building / patients.SALT_FILE)
    elif listing.has_patient_ids or any(
        images.file_kind(source / record.files[0]) == "dicom" for record in listing.records
    ):
        patients.write_salt(building)


def require_replaceable(project: Project, data: config.Data) -> None:
    """Check that DVC can restore the files that data/ holds.

    Raises:
        UserError: DVC does not track them or their current state.
    """
    folder = project.root / data.path
    if not folder.exists() or not any(folder.iterdir()):
        return
    refusal = UserError(
        f"{folder}: contains files that DVC does not track, and the import would delete them. "
        f"Run `dvc add {data.path}` to track them, or move them to another folder"
    )
    if not (project.root / f"{data.path}.dvc").is_file():
        raise refusal
    result = _dvc(project, "status", "--json", f"{data.path}.dvc")
    if result.returncode != 0 or json.loads(result.stdout or "{}"):
        raise refusal


def _add_to_dvc(project: Project, data: config.Data) -> None:
    if not (project.root / ".dvc").is_dir():
        note(f"next: dvc init, dvc add {data.path}, then medgen preprocess")
        return
    result = _dvc(project, "add", "--quiet", data.path)
    if result.returncode != 0:
        raise UserError(
            f"{data.path}.dvc: `dvc add {data.path}` failed: {result.stderr.strip()}. The images are in {data.path}/; "
            f"run `dvc add {data.path}` again"
        )
    note(f"next: dvc repro    (and to record the version: git add params.yaml {data.path}.dvc && git commit)")


def _dvc(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)


def _print_summary(source: object, listing: ScanResult, folder: Path) -> None:
    def count(names: Counter[str]) -> str:
        return ", ".join(f"{name} {number}" for name, number in sorted(names.items()))

    records = listing.records
    labels = Counter(record.label for record in records if record.label is not None)
    given = Counter(record.split for record in records if record.split is not None)
    num_masks = sum(record.mask is not None for record in records)
    lines = [
        f"{source} -> {folder}: {len(records)} images of {len({record.patient for record in records})} patients",
        f"  classes: {count(labels) or 'none (unlabelled)'}",
        f"  splits:  {count(given) or 'none; preprocess splits by patient'}",
    ]
    if num_masks:
        lines.append(f"  masks:   {num_masks}")
    if listing.other_files:
        reasons = Counter(reason for _, reason in listing.other_files).most_common()
        named = "; ".join(f"{number} × {reason}" for reason, number in reasons[:NUM_REASONS])
        more = sum(number for _, number in reasons[NUM_REASONS:])
        others = f"; {more} for other reasons" if more else ""
        lines.append(f"  skipped: {len(listing.other_files)} files: {named}{others}")
    note("\n".join(lines))
