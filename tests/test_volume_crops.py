"""benchmarks/volume_crops.py: crops have the voxels of their place, and no voxel is in two splits."""

import csv
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from benchmarks import volume_crops

SHAPE, SIDE = (44, 100, 40), 16
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 0, 1.5, -70], [0, 1.0, 0, -30], [0, 0, 0, 1]])


def save(path: Path, voxels: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), path)
    return path


def cut(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["volume_crops.py", *map(str, words), "--side", str(SIDE)])
    volume_crops.main()


def test_crops_have_the_voxels_of_their_place_and_splits_share_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    volumes = {kind: random.integers(21, 255, SHAPE).astype(np.uint8) for kind in ("t1", "gm")}
    volumes["t1"][:, :, 30:] = 0  # background above the head
    files = [save(tmp_path / f"head_{kind}_sym.nii.gz", voxels) for kind, voxels in volumes.items()]
    cut(monkeypatch, *files, "--out", tmp_path / "crops")
    with (tmp_path / "crops" / "manifest.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert {(row["label"], row["split"]) for row in rows} == {
        (kind, split) for kind in ("t1", "gm") for split in ("train", "val", "test")
    }
    owner = np.full(SHAPE, "", dtype="U5")
    for row in rows:
        crop = nibabel.load(tmp_path / "crops" / row["path"])
        place = np.rint(np.linalg.inv(AFFINE) @ crop.affine[:, 3])[:3].astype(int)
        block = tuple(slice(at, at + SIDE) for at in place)
        assert np.array_equal(np.asarray(crop.dataobj), volumes[row["label"]][block])
        assert (volumes["t1"][block] > 20).mean() >= 0.7
        assert set(owner[block].flat) <= {"", row["split"]}
        owner[block] = row["split"]
    assert sorted(path.name for path in (tmp_path / "crops").glob("*.nii.gz")) == sorted(row["path"] for row in rows)


def test_volumes_of_other_grids_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [save(tmp_path / f"{side}.nii.gz", np.ones((side, 100, 40), np.uint8)) for side in (44, 45)]
    with pytest.raises(SystemExit):
        cut(monkeypatch, *files, "--out", tmp_path / "crops")
    assert "45.nii.gz: its grid differs from that of" in capsys.readouterr().err
