"""Tests of the import: the project gets the complete dataset or keeps the old one, which DVC can restore."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medgen import cli, config
from medgen.config import Project
from medgen.datasets.import_data import import_folder
from medgen.errors import UserError
from medgen.ingest.dataset_scan import ImageRecord, scan
from medgen.ingest.patients import write_salt

DATA, PREPROCESS = config.Data(), config.Preprocess()


def make(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20), number, np.uint8)).save(folder / name)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder: Path) -> list[ImageRecord]:
    return scan(folder, DATA, PREPROCESS).records


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project with git and DVC that tracks its data, and a stage that lists the data."""
    root = tmp_path / "project"
    make(root / "data", "A/old.png")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    dvc(root, "config", "core.analytics", "false")
    dvc(root, "config", "core.check_update", "false")
    dvc(root, "add", "-q", "data")
    (root / "dvc.yaml").write_text(
        "stages:\n  preprocess:\n    cmd: mkdir -p artifacts && ls data > artifacts/list\n"
        "    deps: [data]\n    outs: [artifacts/list]\n"
    )
    return root


def test_only_images_and_masks_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "source", "train/images/A/person1_1.png", "train/images/A/person1_2.png",
                  "test/images/B/2.png", "train/masks/A/person1_1.png")  # fmt: skip
    junk = {".DS_Store": b"x", "notes.txt": b"x"}
    for name, text in junk.items():
        (source / name).write_bytes(text)
    project = Project(tmp_path / "project")
    assert import_folder(project, DATA, PREPROCESS, source) == 3
    assert files(tmp_path / "project" / "data") == {k: v for k, v in files(source).items() if k not in junk}
    assert records(tmp_path / "project" / "data") == records(source)
    summary = capsys.readouterr().err
    for part in ("3 images of 2 patients", "A 2, B 1", "test 1, train 2", "masks:   1", "dvc add data"):
        assert part in summary


PARAMS = """\
# our project
data: {path: data, name: phantom-chest}  # the sample
train:
  batch_size: 8   # fits our GPU
"""


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [("Chest X-rays (Röntgen)", None, "Chest-X-rays-Rontgen"), ("images", "kermany-2018", "kermany-2018")],
)
def test_name_of_the_dataset_is_set_in_the_params_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str | None, expected: str
) -> None:
    """All other text of the file stays, and the dataset gets a registered model of its own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    arguments = ["data", "import", str(make(tmp_path / folder, "A/1.png")), *(["--name", name] if name else [])]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert f"its models are registered as models:/{expected}\n" in result.stderr
    assert path.read_text() == PARAMS.replace("phantom-chest", expected)
    params = config.load(path)
    assert (params.data.name, params.registry.model_name) == (expected, expected)


def test_archive_gives_its_name_without_its_ending(tmp_path: Path) -> None:
    make(tmp_path / "source", "A/1.png")
    archive = shutil.make_archive(str(tmp_path / "xrays.v2"), "gztar", tmp_path / "source")
    path = tmp_path / "params.yaml"
    path.write_text("train: {batch_size: 8}\n")
    import_folder(Project(tmp_path), DATA, PREPROCESS, Path(archive), None, path)
    assert config.load(path).data.name == "xrays.v2"


def test_registered_model_that_is_set_stays_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("data: {}\nregistry: {model_name: ours}\n")
    import_folder(Project(tmp_path), DATA, PREPROCESS, make(tmp_path / "xrays", "A/1.png"), None, path)
    assert config.load(path).registry.model_name == "ours"
    assert "registry.model_name is set; remove it" in capsys.readouterr().err


def test_another_folder_than_that_of_the_params_file_does_not_rename_its_dataset(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    import_folder(Project(tmp_path), config.Data(path="lungs"), PREPROCESS, make(tmp_path / "x", "1.png"), None, path)
    assert path.read_text() == PARAMS


def test_sample_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("data: {name: our-xrays}\n")
    CliRunner().invoke(cli.app, ["data", "sample", "--n", "3"], catch_exceptions=False)
    assert config.load(tmp_path / "params.yaml").data.name == "phantom-chest"


@pytest.mark.parametrize(("folder", "name"), [("x", "a/b"), ("x", ""), ("画像", None)])
def test_name_without_plain_characters_is_refused(tmp_path: Path, folder: str, name: str | None) -> None:
    with pytest.raises(UserError, match="--name"):
        import_folder(Project(tmp_path), DATA, PREPROCESS, make(tmp_path / folder, "A/1.png"), name)
    assert not (tmp_path / "data").exists()


def test_manifest_is_copied(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "1.png", "2.png", "3.png")
    (source / "manifest.csv").write_text("path,label\n1.png,A\n2.png,B\nabsent.png,B\n")
    assert import_folder(Project(tmp_path / "project"), DATA, PREPROCESS, source) == 3
    assert set(files(tmp_path / "project" / "data")) == {"1.png", "2.png", "manifest.csv"}


def test_files_are_copied_not_linked(tmp_path: Path) -> None:
    """DVC makes tracked files read-only, and a hard link would pass that on to the original."""
    source = make(tmp_path / "source", "A/1.png")
    import_folder(Project(tmp_path / "project"), DATA, PREPROCESS, source)
    assert (tmp_path / "project" / "data" / "A" / "1.png").stat().st_ino != (source / "A" / "1.png").stat().st_ino


def test_untracked_files_are_not_deleted(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    before = files(make(project.root / "data", "A/mine.png"))
    with pytest.raises(UserError, match=r"contains files that DVC does not track.*dvc add data"):
        import_folder(project, DATA, PREPROCESS, make(tmp_path / "source", "B/1.png"))
    assert files(project.root / "data") == before


def test_import_of_the_data_folder_itself_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "data", "A/1.png")
    with pytest.raises(UserError, match="already the project's data folder"):
        import_folder(Project(tmp_path), DATA, PREPROCESS, tmp_path / "data")


def test_failed_import_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, project = make(tmp_path / "source", "A/1.png", "A/2.png"), Project(tmp_path / "project")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UserError, match=r"No space left on device.*data/ is unchanged"):
        import_folder(project, DATA, PREPROCESS, source)
    assert files(project.root) == {}


def test_skipped_files_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "source", "A/1.png")
    for name in ("a.txt", "b.txt", "A/.DS_Store"):
        (source / name).write_text("x")
    import_folder(Project(tmp_path / "project"), DATA, PREPROCESS, source)
    assert re.search(r"skipped: +3 files: 2 × .*; 1 × ", capsys.readouterr().err)


def test_companion_files_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "t10k-images-idx3-ubyte").write_bytes(
        b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28)) + bytes(range(196)) * 8
    )
    (source / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x02\x07\x03")
    assert import_folder(Project(tmp_path / "project"), DATA, PREPROCESS, source) == 2
    assert files(tmp_path / "project" / "data") == files(source)
    assert {record.label for record in records(tmp_path / "project" / "data")} == {"3", "7"}


def test_slices_of_a_series_are_copied(tmp_path: Path, write_series: Callable[..., list[Path]]) -> None:
    source = tmp_path / "scans"
    write_series(source / "A" / "ct1", np.zeros((8, 8, 5), np.int16), np.eye(4))
    (source / "A" / "ct1" / "notes.txt").write_text("text")
    preprocess = config.Preprocess(image_size=(16, 16, 16), clahe_clip=0.0)
    assert import_folder(Project(tmp_path / "project"), DATA, preprocess, source) == 1
    copied = files(tmp_path / "project" / "data")
    assert copied.pop(".salt") and sorted(copied) == [f"A/ct1/IM{number:04}" for number in range(5)]
    assert [record.path for record in scan(tmp_path / "project" / "data", DATA, preprocess).records] == ["A/ct1"]


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_archive_is_imported_like_its_folder(tmp_path: Path, kind: str) -> None:
    source = make(tmp_path / "source", "train/A/1.png", "test/B/2.png")
    archive = Path(shutil.make_archive(str(tmp_path / "download"), kind, source))
    project = Project(tmp_path / "project")
    assert import_folder(project, DATA, PREPROCESS, archive) == 2
    assert files(project.root / "data") == files(source)
    assert list(project.runs.iterdir()) == []  # no temporary folder remains
    assert archive.is_file()


def test_unsafe_archive_changes_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("A/1.png", b"x")
        file.writestr("../../escaped.png", b"x")
    with pytest.raises(UserError, match="path outside the folder"):
        import_folder(project, DATA, PREPROCESS, tmp_path / "evil.zip")
    assert list(files(tmp_path)) == ["evil.zip"]


def test_single_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.png: expected a folder, or a zip"):
        import_folder(Project(tmp_path / "project"), DATA, PREPROCESS, tmp_path / "a.png")


def test_dicom_dataset_gets_its_own_salt(tmp_path: Path) -> None:
    """Without a salt, a search over all patient numbers of a hospital would find the pseudonyms."""
    source = make(tmp_path / "source", "A/1.png")
    (source / "A" / "scan.dcm").write_bytes(bytes(128) + b"DICM")  # the import does not read the rest
    salts = set()
    for name in ("one", "other"):
        import_folder(Project(tmp_path / name), DATA, PREPROCESS, source)
        salts.add((tmp_path / name / "data" / ".salt").read_bytes())
    assert len(salts) == 2


def test_existing_salt_is_kept_and_png_files_get_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, project = make(tmp_path / "source", "A/person1_1.png"), Project(tmp_path / "project")
    import_folder(project, DATA, PREPROCESS, source)
    assert not (project.root / "data" / ".salt").exists()
    write_salt(project.root / "data")
    before = records(project.root / "data")
    monkeypatch.setattr(
        "medgen.datasets.import_data.require_replaceable", lambda *_: None
    )  # as if DVC tracked the data
    import_folder(project, DATA, PREPROCESS, source)
    assert records(project.root / "data") == before != records(source)


def test_patients_of_a_manifest_get_a_salt_and_a_strangers_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source", "A/1.png")
    (source / "manifest.csv").write_text("path,patient\nA/1.png,Doe^John 7\n")
    (source / ".salt").write_text("0" * 64)
    shutil.make_archive(str(tmp_path / "packed"), "zip", source)
    salts = {(source / ".salt").read_bytes()}
    for name, given in (("folder", source), ("archive", tmp_path / "packed.zip")):
        import_folder(Project(tmp_path / name), DATA, PREPROCESS, given)
        salts.add((tmp_path / name / "data" / ".salt").read_bytes())
        assert ".salt: not imported" in capsys.readouterr().err
    assert len(salts) == 3


@pytest.mark.slow
def test_import_then_repro(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import and repro, refusal to delete an untracked file, then restore the earlier data."""
    dvc(repository, "repro")
    assert (repository / "artifacts" / "list").read_text() == "A\n"
    old = (repository / "data.dvc").read_text()

    source = make(tmp_path / "source", "B/1.png", "C/2.png")
    assert import_folder(Project(repository), DATA, PREPROCESS, source) == 2
    assert "next: dvc repro" in capsys.readouterr().err
    assert json.loads(dvc(repository, "status", "--json", "data.dvc")) == {}
    dvc(repository, "repro")
    assert (repository / "artifacts" / "list").read_text() == "B\nC\n"

    make(repository / "data", "B/unsaved.png")
    with pytest.raises(UserError, match="DVC does not track"):
        import_folder(Project(repository), DATA, PREPROCESS, source)
    (repository / "data" / "B" / "unsaved.png").unlink()

    (repository / "data.dvc").write_text(old)
    dvc(repository, "checkout", "-q", "--force", "data.dvc")
    assert list(files(repository / "data")) == ["A/old.png"]
    assert (source / "B" / "1.png").stat().st_mode & 0o200  # the original files stay writable


def test_real_images_keep_masks_and_patients(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared_data("lungmask")
    assert import_folder(Project(tmp_path), DATA, PREPROCESS, source) == 219
    imported, original = records(tmp_path / "data"), records(source)  # its manifest.csv names patients: other salts
    assert [replace(record, patient="") for record in imported] == [replace(record, patient="") for record in original]
    assert len({record.patient for record in imported}) == len({record.patient for record in original})
