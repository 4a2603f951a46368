"""`preprocess.window` and `preprocess.bits`: intensities in the files' own unit, in every format, and mapped back."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_rescale
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medgen.config import Data, IntensityWindow, Preprocess, Project, Volume
from medgen.data.images import to_floats, to_stored
from medgen.data.store import Store, open_store
from medgen.errors import UserError
from medgen.ingest import preprocess
from medgen.ingest.formats.raw import UnreadableImage
from medgen.ingest.images import read_image
from medgen.ingest.transforms import preprocess_image

LOW, HIGH, SIDE = -1000.0, 400.0, 32
WINDOW = IntensityWindow(low=LOW, high=HIGH, unit="HU")
CT = Preprocess(image_size=SIDE, bits=16, window=WINDOW, clahe_clip=0.0, volume=Volume(min_foreground=0.0))
UNITS = np.linspace(-1500, 900, SIDE * SIDE).reshape(SIDE, SIDE).round().astype(np.int16)  # also outside the window


def write_dicom(path: Path, stored: np.ndarray, **attributes: Any) -> None:
    found = Dataset()
    found.SOPClassUID, found.SOPInstanceUID = CTImageStorage, generate_uid()
    found.Rows, found.Columns = stored.shape
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = 16
    found.HighBit, found.PixelRepresentation = 15, int(stored.dtype.kind == "i")
    found.PixelData = stored.tobytes()
    for name, value in attributes.items():
        setattr(found, name, value)
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.save_as(path, enforce_file_format=True)


def write_nifti(path: Path, units: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> None:
    """A volume whose axial slices show `units` (N, H, W): X points to the left of the image, Y to its top."""
    stored = np.rint((units - inter) / slope).astype(np.int16)
    volume = nibabel.Nifti1Image(stored[:, ::-1, ::-1].transpose(2, 1, 0), np.eye(4))
    volume.header.set_slope_inter(slope, inter)
    nibabel.save(volume, path)


def write(path: Path, kind: str) -> None:
    """UNITS as a file of another library."""
    match kind:
        case "dicom":  # a window of the file, which preprocess.window replaces, and the rescale of most CT
            stored = (UNITS + 1024).clip(0).astype(np.uint16)
            write_dicom(path, stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
        case "dicom, signed":
            write_dicom(path, UNITS)
        case "nifti":
            write_nifti(path, np.stack([UNITS] * 4), 0.5, -100.0)
        case "tiff, int16":
            Image.fromarray(UNITS.astype(np.int32)).save(path)
        case "tiff, float":
            Image.fromarray(UNITS.astype(np.float32)).save(path)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("dicom", "dcm"), ("dicom, signed", "dcm"), ("nifti", "nii"), ("tiff, int16", "tif"), ("tiff, float", "tif")],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_window_maps_the_files_own_unit_to_grey_values(tmp_path: Path, kind: str, suffix: str, bits: int) -> None:
    write(tmp_path / f"image.{suffix}", kind)
    settings = CT.model_copy(update={"bits": bits})
    stored = preprocess_image(read_image(tmp_path / f"image.{suffix}", settings).pixels, settings)
    assert stored.dtype == f"uint{bits}"
    step = (HIGH - LOW) / (2**bits - 1)
    assert settings.scale is not None
    found = LOW + stored[0] * step
    assert np.abs(found - UNITS.clip(LOW, HIGH)).max() <= 0.5 * step + (1e-9 if bits == 16 else 0.01)


def test_unsigned_16_bit_images_keep_their_values_within_a_window(tmp_path: Path) -> None:
    values = np.linspace(0, 4095, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", train_images=values[None])
    window = IntensityWindow(low=1000, high=3000)
    expected = np.rint((values.astype(float) - 1000).clip(0, 2000) / 2000 * 65535)
    for name in ("a.png", "a.npz"):
        assert np.array_equal(read_image(tmp_path / name, CT.model_copy(update={"window": window})).pixels, expected)


@pytest.mark.parametrize("suffix", ["dcm", "nii", "tif"])
def test_percentiles_are_those_of_the_image_or_volume(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"a.{suffix}", {"dcm": "dicom, signed", "nii": "nifti", "tif": "tiff, float"}[suffix])
    settings = Preprocess(window=IntensityWindow(low=10, high=80, unit="percentile"), volume=CT.volume)
    low, high = np.percentile(np.stack([UNITS] * (4 if suffix == "nii" else 1)), [10, 80])
    expected = ((UNITS - low) / (high - low)).clip(0, 1) * 65535
    assert np.abs(read_image(tmp_path / f"a.{suffix}", settings).pixels - expected).max() <= 0.5 + 1e-6
    assert settings.scale is None  # each image has a scale of its own


@pytest.mark.parametrize("name", ["CT_small.dcm", "liver_1frame.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_real_ct_keeps_the_hounsfield_units_that_pydicom_reads(shared_data: Any, name: str) -> None:
    path = shared_data("formats") / "dicom" / "pydicom" / name
    dataset = pydicom.dcmread(path)
    expected = apply_rescale(dataset.pixel_array, dataset).astype(float)
    window = IntensityWindow(low=-1024, high=3071, unit="HU")
    found = -1024 + read_image(path, CT.model_copy(update={"window": window})).pixels * (4095 / 65535)
    assert np.abs(found - expected.clip(-1024, 3071)).max() <= 0.5 * 4095 / 65535 + 1e-6


def test_inverted_files_are_refused_by_a_window_in_their_unit(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", UNITS, PhotometricInterpretation="MONOCHROME1")
    with pytest.raises(UnreadableImage, match="largest values are black"):
        read_image(tmp_path / "a.dcm", CT)
    percentiles = IntensityWindow(low=0, high=100, unit="percentile")
    assert read_image(tmp_path / "a.dcm", CT.model_copy(update={"window": percentiles})).pixels[0, 0] == 65535


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": {"low": 5, "high": 5}}, "low must lie below high"),
        ({"window": {"low": -1, "high": 50, "unit": "percentile"}}, "between 0 and 100"),
        ({"window": {"low": 0, "high": 9, "unit": "HU"}}, "CLAHE changes intensities.*HU.*clahe_clip to 0"),
        ({"bits": 12}, "8 or 16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess.model_validate(values)


def test_clahe_of_16_bits_works_and_leaves_no_scale() -> None:
    settings = Preprocess(
        image_size=SIDE, bits=16, clahe_clip=2.0, clahe_tiles=2, window=IntensityWindow(low=0, high=9)
    )
    image = np.random.default_rng(0).integers(20_000, 30_000, (64, 64)).astype(np.uint16)
    stored = preprocess_image(image, settings)
    assert stored.dtype == np.uint16 and stored.std() > 1.5 * preprocess_image(image, CT).std()
    assert settings.scale is None


def test_8_bit_files_fill_16_bits() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(2, 0).repeat(2, 1)
    stored = preprocess_image(image, Preprocess(image_size=SIDE, bits=16, clahe_clip=0.0))
    assert np.array_equal(stored[0], image * np.uint16(257))


def make_store(root: Path, settings: Preprocess = CT) -> Store:
    """A store of eight DICOM files in HU."""
    (root / "data").mkdir(parents=True)
    for number in range(8):
        write_dicom(
            root / "data" / f"{number}.dcm", np.roll(UNITS, 37 * number, 0), PatientID=f"p{number}", RescaleSlope=1
        )
    return preprocess.run(Project(root), data=Data(), preprocess=settings)


def test_a_store_of_16_bits_has_the_mapping_back_to_units(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    description = json.loads((store.folder / "dataset.json").read_text())
    assert description["intensity"] == [0, 65535]
    scale = description["scale"]
    assert scale["unit"] == "HU"
    split = store.split("train")
    assert split.images.dtype == np.uint16
    units = scale["slope"] * split.images[:].astype(float) + scale["intercept"]
    for image, name in zip(units, split.paths, strict=True):
        original = np.roll(UNITS, 37 * int(Path(name).stem), 0).clip(LOW, HIGH)
        assert np.abs(image[0] - original).max() <= 0.5 * scale["slope"] + 1e-6
    assert store.preprocess == CT  # and so does a model that is trained on it


def test_a_store_of_8_bits_is_described_as_before(tiny_store: Path) -> None:
    """So its bytes, and the fingerprints made from them, do not change."""
    description = json.loads((tiny_store / "dataset.json").read_text())
    assert description["intensity"] == [0, 255]
    assert "scale" not in description
    assert not {"bits", "window"} & description["preprocessing"].keys()


def test_a_store_of_other_bits_is_damaged(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = store.folder / "dataset.json"
    path.write_text(path.read_text().replace('"bits": 16', '"bits": 8'))
    with pytest.raises(UserError, match=r"found uint16 .*; expected uint8"):
        open_store(store.folder)


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_values_and_floats_map_to_each_other(bits: int) -> None:
    import torch

    values = torch.arange(2**bits, dtype=torch.int64).to(torch.uint8 if bits == 8 else torch.uint16)
    floats = to_floats(values)
    assert floats.dtype == torch.float32 and float(floats[0]) == 0.0 and float(floats[-1]) == 1.0
    assert torch.equal(to_stored(floats, bits), values)
    assert to_floats(floats) is floats
