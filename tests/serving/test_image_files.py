"""`--format` of generate and reconstruct: units in are units out, as read by nibabel, pydicom and Pillow."""

import dataclasses
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.pixels import apply_rescale

from medgen.config import IntensityWindow, Model, Preprocess, Prior, Project, Volume
from medgen.errors import UserError
from medgen.ingest.images import read_image
from medgen.ingest.transforms import preprocess_image
from medgen.models import build_model, bundle
from medgen.models.bundle import BundleInfo
from medgen.priors import ANALYTIC, save_prior
from medgen.priors.refiner import save_disabled
from medgen.serving import generate
from medgen.serving.generate import load_image
from medgen.serving.image_files import SUFFIXES, writer

LOW, HIGH, SIDE = -1000.0, 400.0, 32
WINDOW = IntensityWindow(low=LOW, high=HIGH, unit="HU")
CT = Preprocess(image_size=SIDE, bits=16, window=WINDOW, clahe_clip=0.0, volume=Volume(min_foreground=0.0))
MODEL = Model(base_channels=8, max_channels=16, latent_channels=4, latent_size=4, attention_resolutions=())
INFO = BundleInfo(MODEL, CT, (1, SIDE, SIDE), (), "d" * 12, "r" * 12, torch.__version__)
UNITS = np.random.default_rng(0).integers(-1200, 600, (SIDE, SIDE)).astype(np.float32)


def read_units(path: Path, axis: str = "axial") -> np.ndarray:
    """Intensities (H, W) of a file by a library that medgen does not write it with, or that checks what it reads."""
    if path.name.endswith(".nii.gz"):
        volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()  # X to the right, Y to the front, Z up
        return np.asarray(np.squeeze(volume, {"sagittal": 0, "coronal": 1, "axial": 2}[axis])[::-1, ::-1].T)
    if path.suffix == ".dcm":
        dataset = pydicom.dcmread(path)
        return np.asarray(apply_rescale(dataset.pixel_array, dataset), np.float64)
    with Image.open(path) as image:
        values = np.asarray(image).astype(np.float64)
    return LOW + values / 65535 * (HIGH - LOW) if path.suffix == ".png" else values


@pytest.mark.parametrize("kind", ["png16", "tiff", "nifti", "dicom"])
@pytest.mark.parametrize("bits", [8, 16])
def test_units_in_are_units_out(tmp_path: Path, kind: str, bits: int) -> None:
    Image.fromarray(UNITS).save(tmp_path / "in.tif")
    info = dataclasses.replace(INFO, preprocess=CT.model_copy(update={"bits": bits}))
    image = load_image(tmp_path / "in.tif", info.preprocess)[0]
    path = tmp_path / f"out{SUFFIXES[kind]}"
    writer(kind, info, "a sample")(path, image)
    step = (HIGH - LOW) / (2**bits - 1)
    assert np.abs(read_units(path) - UNITS.clip(LOW, HIGH)).max() <= 0.5 * step + 0.012


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_generated_volume_is_read_as_the_image_it_was_written_from(tmp_path: Path, axis: str) -> None:
    """Its affine gives the directions of the slices that the model was trained on."""
    volume = Volume(axis=axis, min_foreground=0.0)  # type: ignore[arg-type]
    settings = CT.model_copy(update={"volume": volume})
    image = torch.arange(SIDE * SIDE).view(1, SIDE, SIDE) / (SIDE * SIDE - 1)
    writer("nifti", dataclasses.replace(INFO, preprocess=settings), "a sample")(tmp_path / "a.nii.gz", image)
    stored = preprocess_image(read_image(tmp_path / "a.nii.gz", settings).pixels, settings)
    assert np.array_equal(stored, (image.double() * 65535).round().numpy())
    assert np.abs(read_units(tmp_path / "a.nii.gz", axis) - (LOW + image[0].numpy() * (HIGH - LOW))).max() < 0.02
    header: Any = nibabel.load(tmp_path / "a.nii.gz").header
    assert bytes(header["intent_name"]).rstrip(b"\0") == b"HU"
    assert header.get_xyzt_units()[0] == "unknown"  # no voxel size is made up


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_generated_3d_volume_is_read_as_it_was_written(tmp_path: Path, axis: str) -> None:
    volume = Volume(axis=axis)  # type: ignore[arg-type]
    settings = Preprocess(image_size=(16, 20, 24), bits=16, window=WINDOW, clahe_clip=0.0, volume=volume)
    info = dataclasses.replace(INFO, preprocess=settings, image_shape=(1, 16, 20, 24))
    sample = torch.arange(16 * 20 * 24).view(1, 16, 20, 24) / (16 * 20 * 24 - 1)
    writer("nifti", info, "a sample")(tmp_path / "a.nii.gz", sample)
    assert torch.allclose(load_image(tmp_path / "a.nii.gz", settings)[0], sample, atol=1e-5)
    image: Any = nibabel.load(tmp_path / "a.nii.gz")
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "I") and image.header["intent_name"] == b"HU"
    assert image.header.get_zooms() == (1, 1, 1) and image.header.get_xyzt_units()[0] == "unknown"
    sized = dataclasses.replace(info, preprocess=settings.model_copy(update={"voxel_size": (2.0, 3.0, 4.0)}))
    writer("nifti", sized, "a sample")(tmp_path / "b.nii.gz", sample)
    with_size: Any = nibabel.load(tmp_path / "b.nii.gz")
    # slices lie 2 mm apart, rows 3 and columns 4
    assert with_size.header.get_zooms() == {"axial": (4, 3, 2), "coronal": (4, 2, 3), "sagittal": (2, 4, 3)}[axis]
    assert with_size.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(with_size.get_fdata(), image.get_fdata())
    place = np.array([[0, -0.5, 2, 7], [1, 0.2, 0, 8], [0, 0.9, 0.1, 9], [0, 0, 0, 1]])  # of D, H and W
    writer("nifti", sized, "a sample")(tmp_path / "c.nii.gz", sample, place)
    placed: Any = nibabel.load(tmp_path / "c.nii.gz")
    at = np.argwhere(placed.get_fdata() == placed.get_fdata().max())[0]  # the last voxel: 15, 19, 23
    np.testing.assert_allclose(placed.affine @ [*at, 1], place @ [15, 19, 23, 1], atol=1e-5)
    with pytest.raises(UserError, match="--format dicom: this model generates volumes; expected nifti"):
        writer("dicom", info, "a sample")


def build(root: Path, info: BundleInfo = INFO) -> Path:
    """Folder of an untrained model without classes."""
    project = Project(root)
    torch.manual_seed(0)
    bundle.save(project.model, build_model(MODEL, info.image_shape, 0), info)
    latents = torch.randn(64, 4, 4, 4)
    fitted = ANALYTIC["gmm"].fit(latents, torch.full((64,), -1), 0, Prior(components=(1,)))
    save_prior(project.prior, fitted, bundle.digest(project.model))
    save_disabled(project.refiner, bundle.digest(project.model))
    return project.model.parent


def test_all_formats_show_the_same_samples_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    model = build(tmp_path)
    found: dict[str, np.ndarray] = {}
    for kind, suffix in SUFFIXES.items():
        first, again = (generate.run(model, tmp_path / f"{kind}{i}", n=2, file_format=kind) for i in range(2))
        assert [path.name for path in first] == [f"image_0000{i}{suffix}" for i in range(2)]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
        assert (tmp_path / f"{kind}0" / "grid.png").exists()
        if kind != "png":
            found[kind] = np.stack([read_units(path) for path in first])
    step = (HIGH - LOW) / 65535
    for kind, units in found.items():
        assert np.abs(units - found["tiff"]).max() <= 0.5 * step + 1e-3, kind
    assert found["tiff"].std() > step  # the samples are no flat images


def test_a_dicom_file_is_marked_as_synthetic_and_has_no_patient(tmp_path: Path) -> None:
    model = build(tmp_path)
    files = [pydicom.dcmread(path) for path in generate.run(model, tmp_path / "out", n=2, file_format="dicom")]
    file = files[0]
    assert file.SOPClassUID.name == "Secondary Capture Image Storage"
    assert file.file_meta.MediaStorageSOPInstanceUID == file.SOPInstanceUID
    assert list(file.ImageType) == ["DERIVED", "SECONDARY"]
    assert (file.SyntheticData, file.ConversionType, file.ContentQualification) == ("YES", "SYN", "RESEARCH")
    assert file.PatientIdentityRemoved == "YES"
    assert file.DerivationDescription.startswith("Synthetic: a sample of model rrrrrrrrrrrr")
    assert file.RescaleType == "HU"
    assert (float(file.WindowCenter), float(file.WindowWidth)) == (-300.0, 1400.0)
    for name in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber"):
        assert not file.get(name), name
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert len({each[name].value for each in files}) == 2, name
    assert all(uid.is_valid for uid in (file.SOPInstanceUID, file.SeriesInstanceUID, file.StudyInstanceUID))
    # and medgen reads the display that the file asks for
    shown = read_image(tmp_path / "out" / "image_00000.dcm", Preprocess()).pixels
    assert np.abs(shown.astype(float) - file.pixel_array).max() <= 1


def test_a_reconstruction_is_written_beside_its_pair(tmp_path: Path) -> None:
    model = build(tmp_path)
    Image.fromarray(UNITS).save(tmp_path / "in.tif")
    for kind in ("png", "dicom", "png16"):
        generate.reconstruct(model, tmp_path / kind, files=[tmp_path / "in.tif"], file_format=kind)
    written = {
        kind: {path.name for path in (tmp_path / kind).iterdir()} - {".medgen.json"} for kind in ("png", "dicom")
    }
    assert written["png"] == {"in.png", "reconstructions.csv"}
    assert written["dicom"] == {*written["png"], "in_reconstruction.dcm"}
    network, _ = bundle.load_generative(model / "model")
    with torch.no_grad():
        expected = network.reconstruct(load_image(tmp_path / "in.tif", CT), None)[0, 0]
    step = (HIGH - LOW) / 65535
    for path in (tmp_path / "dicom" / "in_reconstruction.dcm", tmp_path / "png16" / "in_reconstruction.png"):
        found = torch.from_numpy(read_units(path))
        assert (found - (LOW + expected.double() * (HIGH - LOW))).abs().max() <= 0.5 * step + 1e-3


@pytest.mark.parametrize("bits", [8, 16])
def test_colours(tmp_path: Path, bits: int) -> None:
    image = torch.rand(3, SIDE, SIDE)
    info = dataclasses.replace(
        INFO, preprocess=Preprocess(image_size=SIDE, channels=3, bits=bits), image_shape=(3, SIDE, SIDE)
    )
    expected = image.permute(1, 2, 0).numpy()
    writer("dicom", info, "a sample")(tmp_path / "a.dcm", image)
    assert np.array_equal(pydicom.dcmread(tmp_path / "a.dcm").pixel_array, np.rint(expected * 255))
    for kind, white in (("png16", 65535), ("tiff", 2**bits - 1)):
        path = tmp_path / f"a{SUFFIXES[kind]}"
        writer(kind, info, "a sample")(path, image)
        found = read_image(path, info.preprocess).pixels
        assert np.array_equal(found, np.rint(expected * white))
    with pytest.raises(UserError, match="--format nifti: this model generates colours"):
        writer("nifti", info, "a sample")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--format.*jpeg.*png16"):
        generate.run(build(tmp_path), tmp_path / "out", file_format="jpeg")
