"""A folder of images, or an archive of one -> the project's dataset.

medgen data import PATH      (then: dvc repro)

Copied are the pictures, their masks, the files that belong to them and manifest.csv, with their folders; the rest is
left behind and counted. The copy is built beside data/ and then takes its place, and DVC is told, so that the next
`dvc repro` works on it. What was in data/ comes back with `git checkout data.dvc && dvc checkout`; where it would
not, the import is refused.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from medgen import config
from medgen.config import Project
from medgen.datasets import archives, sample
from medgen.errors import UserError
from medgen.ingest import dataset_scan, images, patients
from medgen.ingest.dataset_scan import Listing
from medgen.ingest.manifest import MANIFEST
from medgen.io import swap

NUM_REASONS = 5  # of files left behind, named in the summary


def import_folder(project: Project, data: config.Data, preprocess: config.Preprocess, source: Path) -> int:
    """Makes the images of `source`, a folder or an archive, the project's dataset; returns how many there are.

    Raises:
        UserError: nothing to import, an archive that is not to be trusted, data/ holds what DVC could not bring
            back, no room on the disk, or `dvc add` failed.
    """
    folder = project.root / data.path
    if source.resolve() == folder.resolve():
        raise UserError(f"{source}: this is the project's data already. Run `dvc add {data.path}`, then `dvc repro`")
    require_replaceable(project, data)
    with _as_folder(project, source) as opened:
        listing = dataset_scan.scan(opened, data, preprocess)
        _copy(opened, listing, folder)
    _print_summary(source, listing, folder)
    _tell_dvc(project, data)
    return len(listing.records)


def draw_sample(
    project: Project, data: config.Data, preprocess: config.Preprocess, num_images: int = 480, seed: int = 0
) -> None:
    """Makes the drawn chest films of data/sample.py the project's dataset.

    Raises:
        UserError: data/ holds what DVC could not bring back, or `dvc add` failed.
    """
    folder = project.root / data.path
    require_replaceable(project, data)
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    sample.draw(building, num_images, seed=seed)
    swap(building, folder)
    _print_summary(f"drawn with seed {seed}", dataset_scan.scan(folder, data, preprocess), folder)
    _tell_dvc(project, data)


@contextmanager
def _as_folder(project: Project, source: Path) -> Iterator[Path]:
    """The folder itself; an archive is unpacked to a folder of scratch, which is removed at the end."""
    if not source.is_file():
        yield source
        return
    if not archives.is_archive(source):
        raise UserError(f"{source}: neither a folder nor a zip, tar or tar.gz. Put it into a folder and name that")
    scratch = project.runs / "unpacked"
    try:
        archives.unpack(source, scratch)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy(source: Path, listing: Listing, folder: Path) -> None:
    """Copies, and links nothing: DVC makes what it tracks read-only, which would reach the user's own files."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left by an import that was killed
    names = {name for record in listing.records for name in (record.path, record.mask) if name is not None}
    names |= {*listing.companions, MANIFEST}
    try:
        for name in sorted(names):
            if (source / name).exists():  # a manifest may list more than there is: preprocess reports it
                target = building / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target)
        _salt(source, listing, folder, building)
        swap(building, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename2 or error.filename or building}: {error.strerror}; expected to copy the images there. "
            "Make room or give the right to write there; what was in data/ is as before"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _salt(source: Path, listing: Listing, folder: Path, building: Path) -> None:
    """Keeps the dataset's salt, so that a patient keeps the pseudonym; DICOM files get one of their own."""
    kept = next((place for place in (folder, source) if patients.has_salt(place)), None)
    if kept is not None:
        shutil.copyfile(kept / patients.SALT, building / patients.SALT)
    elif any(images.kind_of(source / path) == "dicom" for path in sorted({record.path for record in listing.records})):
        patients.write_salt(building)


def require_replaceable(project: Project, data: config.Data) -> None:
    """Refuses to remove files that are nowhere else."""
    folder = project.root / data.path
    if not folder.exists() or not any(folder.iterdir()):
        return
    refusal = UserError(
        f"{folder}: holds files that DVC does not keep; expected none, as the import would remove them. "
        f"Run `dvc add {data.path}` to keep them, or move them away"
    )
    if not (project.root / f"{data.path}.dvc").is_file():
        raise refusal
    answer = _dvc(project, "status", "--json", f"{data.path}.dvc")
    if answer.returncode != 0 or json.loads(answer.stdout or "{}"):
        raise refusal


def _tell_dvc(project: Project, data: config.Data) -> None:
    console = Console(stderr=True)
    if not (project.root / ".dvc").is_dir():
        console.print(f"next: dvc init, dvc add {data.path}, then medgen preprocess", highlight=False)
        return
    answer = _dvc(project, "add", "--quiet", data.path)
    if answer.returncode != 0:
        raise UserError(
            f"{data.path}.dvc: `dvc add {data.path}` failed; the images are in place. "
            f"Run it by hand. It said: {answer.stderr.strip()}"
        )
    console.print(f"next: dvc repro    (and to keep it: git add {data.path}.dvc && git commit)", highlight=False)


def _dvc(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)


def _print_summary(source: object, listing: Listing, folder: Path) -> None:
    def count(names: Counter[str]) -> str:
        return ", ".join(f"{name} {number}" for name, number in sorted(names.items()))

    records = listing.records
    labels = Counter(record.label for record in records if record.label is not None)
    given = Counter(record.split for record in records if record.split is not None)
    num_masks = sum(record.mask is not None for record in records)
    lines = [
        f"{source} -> {folder}: {len(records)} images of {len({record.patient for record in records})} patients",
        f"  classes: {count(labels) or 'none (unlabelled)'}",
        f"  splits:  {count(given) or 'none of its own; cut by patient in preprocess'}",
    ]
    if num_masks:
        lines.append(f"  masks:   {num_masks}")
    if listing.foreign:
        reasons = Counter(reason for _, reason in listing.foreign).most_common()
        named = "; ".join(f"{number} × {reason}" for reason, number in reasons[:NUM_REASONS])
        more = sum(number for _, number in reasons[NUM_REASONS:])
        lines.append(f"  left:    {len(listing.foreign)} files: {named}{f'; {more} for other reasons' if more else ''}")
    Console(stderr=True).print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
