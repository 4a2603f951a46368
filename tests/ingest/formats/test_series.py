"""DICOM series: the volume equals nibabel's reading of the same voxels as NIfTI, and broken series have one message."""

import copy
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medgen.config import IntensityWindow, Preprocess, Volume
from medgen.ingest.formats import series
from medgen.ingest.formats.nifti import VolumeFile
from medgen.ingest.formats.raw import LeftOutImage, RawImage, UnreadableImage
from medgen.ingest.formats.series import SeriesFile, find_files
from medgen.ingest.images import inspect, read_image

Write = Callable[..., list[Path]]
SECRETS = ("Quokka", "Zebedee", "7391155", "19010203", "1.2.826")
WINDOW = IntensityWindow(low=-1000, high=400, unit="HU")
SLICES: list[bytes] = []  # files of a series
SETTINGS = Preprocess(image_size=(16, 16, 16), clahe_clip=0.0, bits=16, window=WINDOW)
SHAPE = (11, 9, 7)
VOXELS = np.random.default_rng(0).permutation(np.arange(-1100, 1100))[: 11 * 9 * 7].reshape(SHAPE)


def turned(angles: tuple[float, float, float], sizes: tuple[float, float, float], flips: str = "+++") -> Any:
    """Affine of axes that are turned around X, Y and Z by degrees, with these voxel sizes and directions."""
    affine = np.diag([*(size if flip == "+" else -size for size, flip in zip(sizes, flips, strict=True)), 1.0])
    for axis, angle in enumerate(np.radians(angles)):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(4)
        turn[[one, other], [one, other]] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        affine = turn @ affine
    affine[:3, 3] = (-31.5, 17.25, 140.0)
    return affine


AFFINES = {
    "axial": turned((0, 0, 0), (0.7, 0.7, 2.5), "--+"),
    "feet first": turned((0, 0, 0), (0.7, 0.7, 2.5), "+--"),
    "sagittal": turned((90, 0, 90), (0.9, 1.1, 1.3)),
    "coronal": turned((90, 0, 0), (1.2, 1.2, 3.0), "--+"),
    "oblique": turned((20, -15, 30), (0.8, 0.9, 2.0), "--+"),
}


@pytest.fixture(scope="module", autouse=True)
def slices(tmp_path_factory: pytest.TempPathFactory, write_series: Write) -> None:
    SLICES[:] = [path.read_bytes() for path in write_series(tmp_path_factory.mktemp("ct"), VOXELS, AFFINES["axial"])]


def read(path: Path, preprocess: Preprocess = SETTINGS) -> RawImage:
    with SeriesFile(path, preprocess) as file:
        return file.read(0)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("name", AFFINES)
def test_a_series_is_the_volume_that_nibabel_reads_from_nifti(
    tmp_path: Path, write_series: Write, name: str, axis: str
) -> None:
    write_series(tmp_path / "ct", VOXELS, AFFINES[name])
    preprocess = SETTINGS.model_copy(update={"volume": Volume(axis=axis)})  # type: ignore[arg-type]
    found = read(tmp_path / "ct", preprocess)
    image: Any = nibabel.as_closest_canonical(nibabel.Nifti1Image(VOXELS.astype(np.int16), AFFINES[name]))
    across = {"sagittal": 0, "coronal": 1, "axial": 2}[axis]
    expected = np.moveaxis(image.get_fdata()[::-1, ::-1, ::-1], across, 2).T  # slices, rows, columns; all turned round
    expected = np.rint(np.clip((expected + 1000) / 1400, 0, 1) * 65535)
    np.testing.assert_array_equal(found.pixels, expected)
    # the place of the brightest voxel in the patient, and the voxel sizes
    assert found.affine is not None and found.spacing is not None
    index = np.unravel_index(np.argmax(np.where(VOXELS < 400, VOXELS, -2000)), SHAPE)
    at = np.argwhere(found.pixels == np.rint((VOXELS[index] + 1000) / 1400 * 65535))[0]
    np.testing.assert_allclose(found.affine @ [*at, 1], AFFINES[name] @ [*index, 1], atol=1e-3)
    np.testing.assert_allclose(found.spacing, np.linalg.norm(found.affine[:3, :3], axis=0), rtol=1e-5)


@pytest.mark.parametrize("window", [None, IntensityWindow(low=1, high=99, unit="percentile")])
def test_series_and_nifti_have_the_same_contrast(
    tmp_path: Path, write_series: Write, window: IntensityWindow | None
) -> None:
    """The window of a slice's header is not used: it would differ from slice to slice."""
    write_series(tmp_path / "ct", VOXELS, AFFINES["oblique"])
    nibabel.save(nibabel.Nifti1Image(VOXELS.astype(np.int16), AFFINES["oblique"]), tmp_path / "ct.nii")
    preprocess = SETTINGS.model_copy(update={"window": window})
    with VolumeFile(tmp_path / "ct.nii", preprocess) as file:
        expected = file.read(0)
    found = read(tmp_path / "ct", preprocess)
    assert np.abs(found.pixels.astype(int) - expected.pixels).max() <= 1
    assert found.affine is not None and expected.affine is not None
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)


def test_each_slice_has_its_own_rescale_and_padding_is_black(tmp_path: Path, write_series: Write) -> None:
    def change(place: int, dataset: Dataset) -> Dataset:
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 + place, 10 * place
        dataset.PixelPaddingValue = int(VOXELS[0, 0, place] + 1024)
        return dataset

    write_series(tmp_path / "pet", VOXELS, AFFINES["axial"], change=change)
    found = read(tmp_path / "pet")
    places = np.arange(SHAPE[2])
    values = (VOXELS + 1024) * (0.5 + places) + 10 * places
    values[0, 0] = -1000
    expected = np.rint(np.clip((values + 1000) / 1400, 0, 1) * 65535)
    np.testing.assert_array_equal(found.pixels, expected[:, :, ::-1].transpose(2, 1, 0))


def test_slices_without_positions_are_in_order_of_their_numbers(tmp_path: Path, write_series: Write) -> None:
    def change(place: int, dataset: Dataset) -> Dataset:
        del dataset.ImagePositionPatient
        dataset.InstanceNumber = place
        return dataset

    write_series(tmp_path / "ct", VOXELS, AFFINES["axial"], change=change)
    found = read(tmp_path / "ct")
    expected = np.rint(np.clip((VOXELS + 1000) / 1400, 0, 1) * 65535)[:, :, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(found.pixels, expected)
    assert found.spacing == pytest.approx((2.5, 0.7, 0.7))


def test_the_frames_of_one_file_are_a_volume(tmp_path: Path, write_series: Write) -> None:
    """An enhanced object (PS3.3 C.7.6.16): positions in the frames' groups, in any order; the rest is shared."""
    paths = write_series(tmp_path / "single", VOXELS, AFFINES["oblique"])
    slices = [dcmread(path) for path in paths]
    whole = copy.deepcopy(slices[0])
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleIntercept"):
        del whole[keyword]
    shared, frames = Dataset(), []
    for sequence, keywords in (
        ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
        ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness")),
        ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
    ):
        item = Dataset()
        for keyword in keywords:
            setattr(item, keyword, slices[0][keyword].value)
        setattr(shared, sequence, Sequence([item]))
    for each in slices:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = each.ImagePositionPatient
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    whole.NumberOfFrames = len(slices)
    whole.PixelData = b"".join(each.PixelData for each in slices)
    whole.save_as(tmp_path / "whole.dcm", enforce_file_format=True)
    found, expected = read(tmp_path / "whole.dcm"), read(tmp_path / "single")
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.affine is not None and expected.affine is not None
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-9)


def moved(place: int, by: tuple[float, float, float]) -> Callable[[int, Dataset], Dataset]:
    """Move a slice in DICOM's axes."""

    def change(number: int, dataset: Dataset) -> Dataset:
        if number == place:
            dataset.ImagePositionPatient = [
                float(old) + new for old, new in zip(dataset.ImagePositionPatient, by, strict=True)
            ]
        return dataset

    return change


def only(*places: int) -> Callable[[int, Dataset], Dataset | None]:
    return lambda number, dataset: dataset if number in places else None


def setting(place: int, **elements: Any) -> Callable[[int, Dataset], Dataset]:
    """Set or, with None, delete elements of one slice; of all with place -1."""

    def change(number: int, dataset: Dataset) -> Dataset:
        for keyword, value in elements.items() if place in (number, -1) else ():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        return dataset

    return change


def tilted(number: int, dataset: Dataset) -> Dataset:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, float(y) + 0.9 * number, z]
    return dataset


COLOURS = {
    "PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8,
    "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0, "PixelData": bytes(11 * 9 * 3 + 1),
}  # fmt: skip
BROKEN: dict[str, tuple[Any, str]] = {
    "a missing slice": (only(0, 1, 2, 4, 5, 6), r"^slices are missing: 5 mm between IM000\d and IM000\d, 2.5 mm else"),
    "one position twice": (moved(3, (0, 0, 2.5)), r"^1 slices at the position of another one \(IM000\d and IM000\d\)"),
    "one position": (setting(-1, ImagePositionPatient=[0, 0, 0]), r"^6 slices at the position of another one"),
    "uneven distances": (moved(3, (0, 0, 0.5)), r"^uneven distances of slices: 2 to 3 mm; expected one$"),
    "a tilted gantry": (tilted, r"^slices are shifted by 5\.4 mm against each other, as by a .*dcm2niix"),
    "other sizes": (
        setting(2, Rows=8, PixelData=bytes(11 * 8 * 2)),
        r"^slices of different sizes in one series: .*11 x [89] and 11 x [89] \(",
    ),
    "other pixel sizes": (
        setting(2, PixelSpacing=[0.8, 0.7]),
        r"^slices of different pixel sizes in one series: .*0\.7 x 0\.8 mm",
    ),
    "no pixel size": (setting(2, PixelSpacing=None), r"^IM000\d: no PixelSpacing, so the size"),
    "no direction": (setting(2, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), r"^IM000\d: ImageOrientationPatient is"),
    "a lost position": (setting(2, ImagePositionPatient=None), r"^1 of 7 slices have no ImagePositionPatient$"),
    "no order": (
        setting(-1, ImagePositionPatient=None, InstanceNumber=1),
        r"^slices without ImagePositionPatient and without different instance numbers$",
    ),
    "no distance": (
        setting(-1, ImagePositionPatient=None, SliceThickness=None),
        r"^slices without ImagePositionPatient, SpacingBetweenSlices and SliceThickness$",
    ),
    "colours": (setting(-1, **COLOURS), r"^a DICOM series of colour images; expected grey slices$"),
    "low is white": (setting(-1, PhotometricInterpretation="MONOCHROME1"), r"^IM000\d: its largest values are black"),
    "a slice cut short": (setting(4, PixelData=bytes(20)), r"^IM000\d: damaged: the pixel data ends early$"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_series_is_one_message_without_a_patient(tmp_path: Path, write_series: Write, name: str) -> None:
    change, message = BROKEN[name]
    write_series(tmp_path / "ct", VOXELS, AFFINES["axial"], change=change)
    with pytest.raises(UnreadableImage, match=message) as caught:
        read(tmp_path / "ct")
    assert not isinstance(caught.value, LeftOutImage)
    assert not re.search("|".join(SECRETS), str(caught.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only(0, 1, 2), r"^a DICOM series of 3 slices; expected at least 4 in a volume$"),
        (
            setting(2, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], Rows=8, PixelData=bytes(11 * 8 * 2)),
            r"^slices of different orientations in one series, as of a localizer \(IM000\d and IM000\d\)$",
        ),
    ],
)
def test_a_localizer_is_left_out(tmp_path: Path, write_series: Write, change: Any, message: str) -> None:
    write_series(tmp_path / "scout", VOXELS, AFFINES["axial"], change=change)
    with pytest.raises(LeftOutImage, match=message):
        read(tmp_path / "scout")


def test_a_large_series_is_mapped_from_disk(tmp_path: Path, write_series: Write, monkeypatch: Any) -> None:
    write_series(tmp_path / "ct", VOXELS, AFFINES["oblique"])
    expected = read(tmp_path / "ct").pixels
    monkeypatch.setattr(series, "MAX_VOXELS_IN_MEMORY", 10)
    np.testing.assert_array_equal(read(tmp_path / "ct").pixels, expected)
    monkeypatch.setattr(series, "MAX_VOXELS", 600)
    with pytest.raises(UnreadableImage, match="11 x 9 x 7 voxels; expected at most 600"):
        read(tmp_path / "ct")


def test_a_folder_or_one_of_its_files_names_the_series(tmp_path: Path, write_series: Write) -> None:
    """Other files of the folder are not slices."""
    folder = tmp_path / "study"
    first = write_series(folder, VOXELS, AFFINES["axial"])
    (folder / "DICOMDIR").write_bytes(b"")
    (folder / "notes.txt").write_text("text")
    assert find_files(folder) == find_files(first[3]) == first
    assert inspect(folder, SETTINGS).indices == (0,) and inspect(folder, SETTINGS).patient == "QZ-7391155"
    expected = read(folder).pixels
    moved_paths = [path.rename(path.with_name(f"A{path.name}")) for path in first]
    others = write_series(folder, 2 * VOXELS, AFFINES["axial"], series="1.2.826.0.1.8")
    for paths, pixels in ((moved_paths, expected), (others, read(others[0]).pixels)):
        assert find_files(paths[2]) == paths
        np.testing.assert_array_equal(read_image(paths[2], SETTINGS).pixels, pixels)
    assert (read(others[0]).pixels != expected).any()
    with pytest.raises(UnreadableImage, match=r"a folder of 2 DICOM series, with the first files AIM0000, IM0000; "):
        read_image(folder, SETTINGS)
    with pytest.raises(UnreadableImage, match="a folder without DICOM files"):
        read_image(tmp_path, SETTINGS)
    with pytest.raises(UnreadableImage, match=r"^not a regular file$"):
        read_image(folder, Preprocess())  # of a model of images


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 6), st.integers(128, 900), st.binary(min_size=1, max_size=6))
def test_any_damage_gives_a_volume_or_one_message(place: int, start: int, damage: bytes) -> None:
    """Bytes of one slice are overwritten, most of them in the header."""
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(SLICES):
            if number == place:
                content = content[:start] + damage + content[start + len(damage) :]
            Path(folder, f"{number}.dcm").write_bytes(content)
        message = ""
        try:
            read(Path(folder, "0.dcm" if place else "1.dcm"))
        except UnreadableImage as error:
            message = str(error)
        assert not re.search("|".join(SECRETS), message)


def test_a_real_volume_is_the_same_as_nifti_and_as_a_series(
    tmp_path: Path, write_series: Write, shared_data: Callable[[str], Path]
) -> None:
    """The MNI template, 197 x 233 x 189 voxels, turned to an oblique plane; slices without their neighbours."""
    path = shared_data("formats") / "nifti" / "nilearn" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    image: Any = nibabel.load(path)
    voxels = np.asarray(image.dataobj)[:, :, 60:120].astype(np.int16)
    affine = turned((12, -8, 5), (1.0, 1.0, 1.0), "--+")
    write_series(tmp_path / "mr", voxels, affine, intercept=0)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "mr.nii.gz")
    preprocess = SETTINGS.model_copy(update={"window": None})
    expected, found = read_image(tmp_path / "mr.nii.gz", preprocess), read_image(tmp_path / "mr", preprocess)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.affine is not None and expected.affine is not None
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-3)
