"""A folder of images -> the project's dataset.

medgen data import PATH      (then: dvc repro)

Copied are the pictures, their masks and manifest.csv, with their folders. The copy is built beside data/ and then
takes its place, and DVC is told, so that the next `dvc repro` works on it. What was in data/ comes back with
`git checkout data.dvc && dvc checkout`; where it would not, the import is refused.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from medgen import config
from medgen.config import Project
from medgen.data import layouts, phantom
from medgen.data.layouts import Record
from medgen.errors import UserError
from medgen.files import swap


def import_folder(project: Project, data: config.Data, source: Path) -> int:
    """Makes the images of `source` the project's dataset; returns how many there are.

    Raises:
        UserError: nothing to import, data/ holds what DVC could not bring back, or `dvc add` failed.
    """
    folder = project.root / data.path
    if source.resolve() == folder.resolve():
        raise UserError(f"{source}: this is the project's data already. Run `dvc add {data.path}`, then `dvc repro`")
    records = layouts.scan(source, data.patient_pattern)
    _require_replaceable(project, data)
    _copy(source, records, folder)
    _print_summary(source, records, folder)
    _tell_dvc(project, data)
    return len(records)


def draw_sample(project: Project, data: config.Data, num_images: int = 480, seed: int = 0) -> None:
    """Makes the drawn chest films of data/phantom.py the project's dataset.

    Raises:
        UserError: data/ holds what DVC could not bring back, or `dvc add` failed.
    """
    folder = project.root / data.path
    _require_replaceable(project, data)
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    phantom.draw(building, num_images, seed=seed)
    swap(building, folder)
    _print_summary(f"drawn with seed {seed}", layouts.scan(folder, data.patient_pattern), folder)
    _tell_dvc(project, data)


def _copy(source: Path, records: Sequence[Record], folder: Path) -> None:
    """Copies, and links nothing: DVC makes what it tracks read-only, which would reach the user's own files."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left by an import that was killed
    names = {name for record in records for name in (record.path, record.mask) if name is not None}
    if (source / layouts.MANIFEST).is_file():
        names.add(layouts.MANIFEST)
    try:
        for name in sorted(names):
            target = building / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (source / name).exists():  # a manifest may list more than there is: preprocess reports it
                shutil.copyfile(source / name, target)
        swap(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _require_replaceable(project: Project, data: config.Data) -> None:
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


def _print_summary(source: object, records: Sequence[Record], folder: Path) -> None:
    def count(names: Counter[str]) -> str:
        return ", ".join(f"{name} {number}" for name, number in sorted(names.items()))

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
    Console(stderr=True).print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
