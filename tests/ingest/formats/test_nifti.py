"""NIfTI, MGZ and Analyze volumes: slices equal those of nibabel's full float array in RAS orientation."""

import contextlib
import gzip
import math
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from medgen.config import Preprocess, Volume
from medgen.ingest.formats import nifti, windowing
from medgen.ingest.formats.nifti import VolumeFile, inspect
from medgen.ingest.formats.raw import LeftOutImage, RawImage, UnreadableImage

AXES = ("sagittal", "coronal", "axial")
RANDOM = np.random.default_rng(0)
EVERY = Preprocess(volume=Volume(min_foreground=0.0))


def settings_of(**volume: Any) -> Preprocess:
    return Preprocess(volume=Volume(**({"min_foreground": 0.0} | volume)))


def read_all(path: Path, preprocess: Preprocess = EVERY, mask: bool = False) -> list[RawImage]:
    with VolumeFile(path, preprocess, mask) as file:
        return [file.read(index) for index in inspect(path, preprocess).indices]


def ras(path: Path, frame: int = 0) -> np.ndarray:
    """(X, Y, Z) float64, by nibabel alone."""
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    return volume[..., frame] if volume.ndim == 4 else volume


def upright(volume: np.ndarray, axis: str, index: int) -> np.ndarray:
    """Slice with front or head at the top and the patient's right (or front) at the left, pixel by pixel."""
    plane = np.take(volume, index, AXES.index(axis))
    width, height = plane.shape
    return np.array([[plane[width - 1 - x, height - 1 - y] for x in range(width)] for y in range(height)])


def windowed(plane: np.ndarray, volume: np.ndarray, window: tuple[float, float] = (0.5, 99.5)) -> np.ndarray:
    black, white = np.percentile(volume[np.isfinite(volume)], window)
    return np.rint(np.clip(np.where(np.isfinite(plane), (plane - black) / (white - black), 0), 0, 1) * 65535)


def head(shape: tuple[int, ...] = (9, 10, 11), dtype: Any = np.int16) -> np.ndarray:
    """A volume in which every voxel has another value."""
    return RANDOM.permutation(math.prod(shape)).reshape(shape).astype(dtype)


def oriented(codes: str, sizes: tuple[float, float, float] = (1, 1, 1), shape: tuple[int, ...] = (9, 10, 11)) -> Any:
    """Affine of a volume with these axis codes."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    affine = np.eye(4) @ inv_ornt_aff(turn, shape)
    affine[:3, :3] *= sizes
    return affine


def save(path: Path, image: Any) -> Path:
    nibabel.save(image, path)
    return path


ORIENTATIONS = ["RAS", "LAS", "LPS", "RSA", "PIR", "SLA", "AIL", "IPL", "ASR"]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_slices_are_upright_in_every_orientation(tmp_path: Path, codes: str, axis: str) -> None:
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(head(), oriented(codes)))
    volume = ras(path)
    found = read_all(path, settings_of(axis=axis, window=(0, 100)))
    assert len(found) == volume.shape[AXES.index(axis)]
    for index, raw in enumerate(found):
        expected = upright(volume, axis, index)
        assert raw.pixels.dtype == np.uint16
        assert raw.size == expected.shape[::-1] and raw.mode == "int16"
        assert np.abs(raw.pixels - windowed(expected, volume, (0, 100))).max() <= 1


def test_the_patients_right_is_on_the_left_and_the_front_at_the_top(tmp_path: Path) -> None:
    """Test without a formula: one bright voxel near the patient's right, front and head."""
    for codes in ORIENTATIONS:
        volume = np.zeros((9, 10, 11), np.uint8)
        volume[7, 8, 9] = 200  # in RAS axes
        turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
        stored = nibabel.orientations.apply_orientation(volume, turn)
        path = save(tmp_path / "v.nii", nibabel.Nifti1Image(stored, inv_ornt_aff(turn, volume.shape)))
        for axis, index, expected in (("axial", 9, (1, 1)), ("coronal", 8, (1, 1)), ("sagittal", 7, (1, 1))):
            with VolumeFile(path, settings_of(axis=axis)) as file:
                assert np.argwhere(file.read(index).pixels).tolist() == [list(expected)], (codes, axis)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR", "PIL"])
def test_a_whole_volume_is_the_stack_of_its_slices_in_every_orientation(tmp_path: Path, codes: str, axis: str) -> None:
    """It starts at the head (the front, the right), so that all planes are upright; spacing is along D, H and W."""
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(head(), oriented(codes, (1.0, 2.0, 3.0))))
    selected = Volume(axis=axis, first=0.2, last=0.8, step=2, window=(0, 100))
    (whole,) = read_all(path, Preprocess(image_size=(16, 16, 16), clahe_clip=0.0, volume=selected))
    volume, across = ras(path), AXES.index(axis)
    sizes = nibabel.as_closest_canonical(nibabel.load(path)).header.get_zooms()
    rows, columns = {"sagittal": (2, 1), "coronal": (2, 0), "axial": (1, 0)}[axis]
    assert whole.spacing == pytest.approx((2 * sizes[across], sizes[rows], sizes[columns]))
    length = volume.shape[across]
    planes = [upright(volume, axis, index) for index in range(round(0.2 * length), round(0.8 * length), 2)][::-1]
    assert whole.pixels.dtype == np.uint16 and whole.size == planes[0].shape[::-1]
    assert np.abs(whole.pixels - windowed(np.stack(planes), volume, (0, 100))).max() <= 1
    settings = Preprocess(image_size=(16, 16, 16), clahe_clip=0.0, volume=selected)
    (mask,) = read_all(path, settings, mask=True)
    assert np.array_equal(mask.pixels, np.where(np.stack(planes) != 0, 255, 0))


def scaled(image: Any, slope: float, intercept: float) -> Any:
    image.header.set_slope_inter(slope, intercept)
    return image


def with_qform(image: Any, affine: np.ndarray) -> Any:
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    return image


def with_holes(volume: np.ndarray) -> np.ndarray:
    volume[2, 3, 4], volume[5, 6, 7], volume[0, 0, 0] = np.nan, np.inf, -np.inf
    return volume


VOLUMES: dict[str, tuple[str, Any]] = {
    "nifti1 float": ("v.nii", nibabel.Nifti1Image(head(dtype=np.float32) - 40, np.eye(4))),
    "nifti1 scaled": ("v.nii", scaled(nibabel.Nifti1Image(head(), np.eye(4)), -0.25, 3.0)),
    "nifti1 big": ("v.nii", nibabel.Nifti1Image(head(), np.eye(4), nibabel.Nifti1Header(endianness=">"))),
    "nifti1 gz": ("v.nii.gz", nibabel.Nifti1Image(head(dtype=np.uint16), np.eye(4))),
    "nifti1 pair": ("v.hdr", nibabel.Nifti1Pair(head(), oriented("PIR"))),
    "nifti1 uint64": ("v.nii", nibabel.Nifti1Image(head(dtype=np.uint64) << 50, np.eye(4), dtype=np.uint64)),
    "nifti2": ("v.nii", nibabel.Nifti2Image(head(dtype=np.float64), oriented("SLA"))),
    "nifti2 big gz": ("v.nii.gz", nibabel.Nifti2Image(head(), np.eye(4), nibabel.Nifti2Header(endianness=">"))),
    "mgz": ("v.mgz", nibabel.MGHImage(head(dtype=np.int32), oriented("LAS"))),
    "mgh": ("v.mgh", nibabel.MGHImage(head(dtype=np.float32), oriented("PIR"))),
    "analyze": ("v.hdr", nibabel.AnalyzeImage(head(), None)),
    "analyze big": ("v.hdr", nibabel.AnalyzeImage(head(), None, nibabel.AnalyzeHeader(endianness=">"))),
    "spm2": ("v.hdr", nibabel.Spm2AnalyzeImage(head(dtype=np.float32), None)),
    "few slices": ("v.nii", nibabel.Nifti1Image(head((9, 10, 4)), np.eye(4))),
    "one frame": ("v.nii", nibabel.Nifti1Image(head((9, 10, 11, 1)), np.eye(4))),
    "qform": ("v.nii", with_qform(nibabel.Nifti1Image(head(), None), oriented("LPS"))),
    "not finite": ("v.nii", nibabel.Nifti1Image(with_holes(head(dtype=np.float32)), np.eye(4))),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", VOLUMES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # arithmetic on infinities in nibabel and the test
def test_every_format_and_data_type(tmp_path: Path, name: str, axis: str) -> None:
    file_name, image = VOLUMES[name]
    path = save(tmp_path / file_name, image)
    volume = ras(path)
    found = read_all(path, settings_of(axis=axis))
    expected = np.stack([windowed(upright(volume, axis, index), volume) for index in range(len(found))])
    assert len(found) == volume.shape[AXES.index(axis)]
    assert np.abs(np.stack([raw.pixels for raw in found]) - expected).max() <= 1


def test_a_2d_nifti_is_one_slice(tmp_path: Path) -> None:
    plane = head((9, 10))
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(plane, np.eye(4)))
    (raw,) = read_all(path)
    assert np.abs(raw.pixels - windowed(plane[::-1, ::-1].T.astype(float), plane)).max() <= 1


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        ({}, range(11)),
        ({"first": 0.3, "last": 0.7}, range(3, 8)),
        ({"first": 0.99}, [10]),
        ({"first": 0.5, "last": 0.51}, [6]),
        ({"last": 0.01}, [0]),
        ({"step": 4}, [0, 4, 8]),
        ({"first": 0.3, "step": 100}, [3]),
        ({"axis": "coronal"}, range(10)),
        ({"axis": "sagittal", "last": 0.5}, range(4)),
    ],
)
def test_selected_slices(tmp_path: Path, volume: dict[str, Any], expected: Any) -> None:
    """A volume has 11 axial slices in any orientation, by its header."""
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(np.zeros((11, 9, 10), np.uint8), oriented("SLA")))
    contents = inspect(path, settings_of(**volume))
    assert list(contents.indices) == list(expected)
    assert not contents.independent  # all slices are of one patient
    assert contents.patient is None and contents.labels is None and contents.splits is None


@pytest.mark.parametrize(("name", "voxels"), [("v.hdr", "v.img"), ("v.hdr.gz", "v.img.gz"), ("V.HDR", "V.IMG")])
def test_a_header_is_read_with_its_voxels(tmp_path: Path, name: str, voxels: str) -> None:
    save(tmp_path / name, nibabel.Nifti1Pair(head(), np.eye(4)))
    assert inspect(tmp_path / name, EVERY).companions == (tmp_path / voxels,)
    with pytest.raises(UnreadableImage, match=r"voxels of the \.hdr file, which is read instead"):
        inspect(tmp_path / voxels, EVERY)
    (tmp_path / name).unlink()
    with pytest.raises(UnreadableImage, match=r"voxels whose \.hdr is not in this folder"):
        inspect(tmp_path / voxels, EVERY)


def test_a_header_without_voxels_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "v.hdr", nibabel.AnalyzeImage(head(), None))
    (tmp_path / "v.img").unlink()
    with pytest.raises(UnreadableImage, match=r"without its voxels: v\.img is not in this folder"):
        inspect(tmp_path / "v.hdr", EVERY)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz"])
def test_one_frame_of_a_series_is_read(tmp_path: Path, suffix: str) -> None:
    kind = nibabel.MGHImage if suffix == ".mgz" else nibabel.Nifti1Image
    path = save(tmp_path / f"v{suffix}", kind(head((5, 6, 7, 4), np.int32), oriented("LPS", shape=(5, 6, 7))))
    for frame in range(4):
        volume = ras(path, frame)
        found = read_all(path, settings_of(frame=frame))
        expected = [windowed(upright(volume, "axial", index), volume) for index in range(7)]
        assert np.abs(np.stack([raw.pixels for raw in found]) - expected).max() <= 1
    with pytest.raises(UnreadableImage, match=r"a series of 4; preprocess\.volume\.frame is 4, counted from 0"):
        inspect(path, settings_of(frame=4))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_long_series_takes_the_memory_of_one_frame(tmp_path: Path, zipped: bool) -> None:
    side, num_frames = 64, 200 if zipped else 5000  # 105 MB and 2.6 GB
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((side, side, side, num_frames))
    header["magic"], header["vox_offset"] = b"n+1", 352
    frame = head((side, side, side)).ravel("F").tobytes()
    start, place = header.binaryblock + bytes(4), (num_frames - 2) * len(frame)
    path = tmp_path / ("v.nii.gz" if zipped else "v.nii")
    with gzip.open(path, "wb", 1) if zipped else path.open("wb") as file:
        file.write(start)
        for _ in range(num_frames - 2 if zipped else 0):
            file.write(bytes(len(frame)))
        file.seek(352 + place)
        file.write(frame)
        if zipped:
            file.write(bytes(len(frame)))
        else:
            file.truncate(352 + num_frames * len(frame))
    preprocess = settings_of(frame=num_frames - 2, window=(0, 100))
    inspect(path, preprocess)  # imports nibabel
    tracemalloc.start()
    with VolumeFile(path, preprocess) as file:
        pixels = file.read(5).pixels
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(frame)  # the frame, and its voxels as sorted floats for the window
    volume = np.frombuffer(frame, np.int16).reshape((side,) * 3, order="F").astype(float)
    expected = windowed(upright(volume[::-1], "axial", 5), volume, (0, 100))  # NIfTI without an affine is LAS
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("zipped", [False, True])
def test_a_large_volume_is_mapped_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    volume = np.zeros((96, 96, 120), np.float64)  # 9 MB
    volume[20:80, 30:90, 20:100] = RANDOM.normal(100, 20, (60, 60, 80))
    series = np.stack([volume, volume[::-1]], axis=-1)
    path = save(tmp_path / ("v.nii.gz" if zipped else "v.nii"), nibabel.Nifti1Image(series, oriented("PIR")))
    monkeypatch.setattr(windowing, "_NUM_SAMPLES", 1 << 14)
    for frame in (0, 1):
        with VolumeFile(path, settings_of(frame=frame)) as file:
            expected = [file.read(index).pixels for index in (3, 50, 70)]
        with monkeypatch.context() as patch:
            patch.setattr(nifti, "MAX_VOXELS_IN_MEMORY", 1 << 19)
            tracemalloc.start()
            opened = [VolumeFile(path, settings_of(frame=frame)) for _ in range(4)]
            for file in opened:
                file.read(3)
            assert tracemalloc.get_traced_memory()[1] < 0.5 * volume.nbytes
            tracemalloc.stop()
            np.testing.assert_array_equal([opened[3].read(index).pixels for index in (3, 50, 70)], expected)
            path_cut = tmp_path / ("cut.nii.gz" if zipped else "cut.nii")
            path_cut.write_bytes(path.read_bytes()[:-20])
            with VolumeFile(path_cut, settings_of(frame=0)) as file:
                file.read(3)  # the missing bytes belong to the other frame
            if zipped:
                with VolumeFile(path_cut, settings_of(frame=1)) as file, pytest.raises(UnreadableImage, match="cut"):
                    file.read(3)


def test_a_damaged_volume_is_loaded_once_and_each_slice_raises_a_new_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "v.nii.gz", nibabel.Nifti1Image(head(), np.eye(4)))
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    loads: list[Any] = []
    whole = nifti._read_voxels
    monkeypatch.setattr(nifti, "_read_voxels", lambda header: loads.append(header) or whole(header))
    errors = []
    with VolumeFile(path, EVERY) as file:
        for index in range(5):
            with pytest.raises(UnreadableImage, match=r"^damaged or cut short$") as caught:
                file.read(index)
            errors.append(caught.value)
    assert len(loads) == 1 and len(set(map(id, errors))) == 5


@pytest.mark.parametrize("shape", [(9, 10, 11), (9, 10, 11, 1)])
def test_one_mask_serves_every_frame_of_a_series(tmp_path: Path, shape: tuple[int, ...]) -> None:
    series = save(tmp_path / "v.nii", nibabel.Nifti1Image(head((9, 10, 11, 3)), oriented("LPS")))
    stored = (head(shape) % 3 == 0).astype(np.uint8)
    path = save(tmp_path / "mask.nii", nibabel.Nifti1Image(stored, oriented("LPS")))
    for frame in range(3):
        preprocess = settings_of(frame=frame, first=0.2, last=0.7, step=2)
        indices = inspect(series, preprocess).indices
        with VolumeFile(path, preprocess, mask=True) as mask, VolumeFile(series, preprocess) as image:
            assert mask.num_images == image.num_images == 11
            volume = ras(path).reshape(9, 10, 11)
            for index in indices:
                assert np.array_equal(mask.read(index).pixels, 255 * (upright(volume, "axial", index) != 0))
    for opening in (inspect, VolumeFile):
        with pytest.raises(UnreadableImage, match="a series of 1; preprocess"):
            opening(path, settings_of(frame=2))  # only a mask may lack the frame
    both = save(tmp_path / "both.nii", nibabel.Nifti1Image(np.stack([head(), head()], -1), np.eye(4)))
    with pytest.raises(UnreadableImage, match="a series of 2; preprocess"):
        VolumeFile(both, settings_of(frame=2), mask=True)


def test_a_mask_in_another_orientation_has_the_same_slices(tmp_path: Path) -> None:
    preprocess = settings_of(first=0.1, last=0.8, step=3)
    volume = head()
    image = nibabel.Nifti1Image(volume, np.eye(4))
    turned = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("SLA")))
    paths = [save(tmp_path / f"{number}.nii", each) for number, each in enumerate((image, turned))]
    assert [inspect(path, preprocess).indices for path in paths] == [range(1, 9, 3)] * 2
    assert [VolumeFile(path, preprocess, mask=True).num_images for path in paths] == [11, 11]


def test_the_window_of_a_large_volume_is_computed_from_a_sample(tmp_path: Path) -> None:
    volume = RANDOM.gamma(2.0, 100.0, (160, 160, 160)).astype(np.float32)
    volume[::2] *= 3  # a sample aligned with the sides would contain only one half
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(volume, np.eye(4)))
    with VolumeFile(path, EVERY) as file:
        found = file.read(80).pixels
    expected = windowed(volume[::-1, ::-1, 80].T, volume)
    assert np.abs(found - expected).mean() < 65535 * 0.002


def test_anisotropic_voxels_become_square_pixels(tmp_path: Path) -> None:
    volume = head((40, 8, 30), np.uint8)
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(volume, oriented("RSA", (1, 5, 1), (40, 8, 30))))
    for axis, stored, shown in (("axial", (40, 30), (40, 30)), ("sagittal", (30, 8), (30, 40)),
                                ("coronal", (40, 8), (40, 40))):  # fmt: skip
        with VolumeFile(path, settings_of(axis=axis)) as file:
            raw = file.read(3)
            assert raw.size == stored
            assert raw.pixels.shape == shown[::-1]
    with VolumeFile(path, settings_of(axis="sagittal"), mask=True) as file:
        assert set(np.unique(file.read(3).pixels)) <= {0, 255}
    nearly = save(tmp_path / "n.nii", nibabel.Nifti1Image(volume, np.diag([1.0, 1.005, 1, 1])))
    with VolumeFile(nearly, EVERY) as file:
        assert file.read(3).pixels.shape == (8, 40)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_mask_is_white_where_it_is_not_zero(tmp_path: Path, dtype: Any) -> None:
    volume = np.zeros((9, 10, 11), dtype)
    volume[2:4, 3:6, 5] = [[1, 2, 3], [200, 5, 1]]
    volume[8, 9, 5] = 1
    path = save(tmp_path / "m.nii", nibabel.Nifti1Image(volume, np.eye(4)))
    found = read_all(path, Preprocess(), mask=True)  # empty slices of a mask are kept
    assert len(found) == 11
    for index, raw in enumerate(found):
        assert raw.pixels.dtype == np.uint8
        assert np.array_equal(raw.pixels, np.where(upright(volume, "axial", index) != 0, 255, 0))


def test_empty_slices_are_left_out(tmp_path: Path) -> None:
    """A head in noisy air: slices are kept if it covers at least a twentieth of them."""
    volume = RANDOM.rayleigh(5.0, (50, 50, 40)).astype(np.float32)
    x, y, z = np.mgrid[:50, :50, :40]
    inside = (x - 25) ** 2 + (y - 25) ** 2 + (z - 20) ** 2 < 15**2
    volume[inside] = RANDOM.uniform(100, 400, inside.sum())
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(volume, np.eye(4)))
    kept, reasons = [], {}
    with VolumeFile(path, Preprocess()) as file:
        for index in inspect(path, Preprocess()).indices:
            try:
                file.read(index)
                kept.append(index)
            except LeftOutImage as reason:
                reasons[index] = str(reason)
    assert kept == [index for index in range(40) if inside[:, :, index].mean() >= 0.05]
    assert reasons[0] == "empty slice: 0 % foreground, less than preprocess.volume.min_foreground"
    share = 100 * inside[:, :, kept[0] - 1].mean()
    assert 0 < share < 5 and f"{share:.3g} %" in reasons[kept[0] - 1]


def test_a_volume_of_mostly_background_keeps_its_foreground(tmp_path: Path) -> None:
    volume = np.zeros((30, 30, 30), np.float32)
    volume[10:13, 10:13, 15] = 2.5
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(volume, np.eye(4)))
    with VolumeFile(path, Preprocess(volume=Volume(min_foreground=0.009))) as file:
        assert np.array_equal(file.read(15).pixels, upright(volume, "axial", 15) / 2.5 * 65535)
        with pytest.raises(LeftOutImage):
            file.read(14)


def test_a_volume_of_one_value_is_black(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii", nibabel.Nifti1Image(np.full((5, 6, 7), 9, np.uint8), np.eye(4)))
    assert not any(raw.pixels.any() for raw in read_all(path))


def test_threads_share_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "v.nii.gz", nibabel.Nifti1Image(head((30, 30, 30)), np.eye(4)))
    expected = [raw.pixels for raw in read_all(path)]
    found: list[list[np.ndarray]] = []
    with VolumeFile(path, EVERY) as file:
        threads = [
            threading.Thread(target=lambda: found.append([file.read(index).pixels for index in range(30)]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 and all(np.array_equal(each, expected) for each in found)


# damaged files

PLAIN = nibabel.Nifti1Image(np.arange(990, dtype=np.int16).reshape(9, 10, 11), np.eye(4))
PLAIN_BYTES = PLAIN.to_bytes()
NIFTI2_BYTES = nibabel.Nifti2Image(np.asarray(PLAIN.dataobj), np.eye(4)).to_bytes()
MGH_BYTES = nibabel.MGHImage(np.asarray(PLAIN.dataobj), np.eye(4)).to_bytes()


def patched(place: int, format: str, *values: Any, data: bytes = PLAIN_BYTES) -> bytes:
    changed = bytearray(data)
    struct.pack_into(format, changed, place, *values)
    return bytes(changed)


def of_type(dtype: Any) -> bytes:
    return nibabel.Nifti1Image(np.zeros((4, 4, 4), dtype), np.eye(4)).to_bytes()


DIM, OFFSET, SFORM, CODES = 40, 108, 280, 252
ZEROS = gzip.compress(bytes(1 << 22))  # gzip files may follow one another
LONG_VOXELS = patched(DIM, "<4h", 3, 100, 100, 1000, data=patched(SFORM, "<12f", *np.diag([1, 9999, 1, 1])[:3].flat))


def volume_of_zeros(*sides: int) -> bytes:
    """A NIfTI-2 volume in gzip, a thousandth of its size."""
    header = patched(16, "<4q", 3, *sides, data=NIFTI2_BYTES)[:544]
    return gzip.compress(header) + ZEROS * -(-math.prod(sides) * 2 // (1 << 22))


BAD = {
    "empty": (b"", "empty file"),
    "text": (b"#?RADIANCE and so on" * 100, "not a header"),
    "short header": (PLAIN_BYTES[:200], "not a header"),
    "no voxels": (PLAIN_BYTES[:352], "cut short"),
    "cut": (PLAIN_BYTES[:-1], "cut short: the voxels should reach byte 2332"),
    "negative side": (patched(DIM + 2, "<h", -9), "an array of -9 x 10 x 11"),
    "no side": (patched(DIM + 2, "<h", 0), "an array of 0 x 10"),
    "no dimensions": (patched(DIM, "<h", 0), "an array of 0"),
    "a line": (patched(DIM, "<h", 1), "an array of 9;"),
    "a field": (patched(DIM, "<6h", 5, 9, 5, 11, 1, 2), "an array of 9 x 5 x 11 x 1 x 2"),
    "huge": (patched(DIM, "<4h", 3, 32767, 32767, 32767), "voxels; expected at most 268435456"),
    "larger than the file": (patched(DIM, "<4h", 3, 512, 512, 512), "cut short"),
    "a long series": (patched(DIM, "<5h", 4, 9, 10, 11, 32767), None),  # frame 0 is there
    "voxels beyond": (patched(OFFSET, "<f", 1e9), "cut short"),
    "voxels at infinity": (patched(OFFSET, "<f", math.inf), "damaged header"),
    "voxels nowhere": (patched(OFFSET, "<f", math.nan), "damaged header"),
    "voxels before": (patched(OFFSET, "<f", -1000), "begin at byte -1000"),
    "voxels in the header": (patched(OFFSET, "<f", 0), "begin at byte 0, before the end"),
    "unknown type": (patched(70, "<h", 77), "damaged header"),
    "infinite intercept": (patched(112, "<2f", 2.0, math.inf), "damaged header"),
    "flat affine": (patched(SFORM, "<12f", *[0.0] * 12), "gives no orientation"),
    "infinite affine": (patched(SFORM, "<f", math.inf), "not finite"),
    "a slice stretched without end": (patched(SFORM, "<f", 1e-9), "megapixels"),
    "slices of a pixel": (volume_of_zeros(1, 1, 1 << 28), "images of 1 x 1; expected at least 4 x 4"),
    "slices without end": (volume_of_zeros(4, 4, 1 << 24), "16777216 slices; expected at most 32767"),
    "voxels a thousand times as long as wide": (
        gzip.compress(LONG_VOXELS[:352]) + ZEROS * 5,
        "1000 slices of 100 x 999900 square pixels; expected at most 2048 megapixels",
    ),
    "bad quaternion": (patched(CODES, "<2h3f", 1, 0, 9.0, 9.0, 9.0), "damaged header"),
    "complex": (of_type(np.complex64), "voxels are complex64; expected"),
    "colours": (of_type(np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxels are colours; expected"),
    "nothing finite": (nibabel.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)).to_bytes(), "finite"),
    "nifti2 huge": (patched(16, "<4q", 3, 1 << 62, 1 << 62, 1 << 62, data=NIFTI2_BYTES), "expected at most"),
    "nifti2 negative": (patched(24, "<q", -(1 << 63), data=NIFTI2_BYTES), "an array of -9223372036854775808"),
    "nifti2 beyond": (patched(168, "<q", 1 << 62, data=NIFTI2_BYTES), "cut short"),
    "mgh huge": (patched(4, ">4i", 1 << 30, 1 << 30, 1 << 30, 1, data=MGH_BYTES), "expected at most"),
    "mgh unknown type": (patched(20, ">i", 99, data=MGH_BYTES), "damaged header"),
    "gz bomb": (gzip.compress(patched(DIM, "<4h", 3, 600, 600, 600) + bytes(1000)), "cut short"),
    "gz of too much": (gzip.compress(PLAIN_BYTES + bytes(50_000_000)), None),  # the rest is not read
    "gz of too little": (gzip.compress(patched(DIM, "<4h", 3, 64, 64, 64)), "cut short: 1980 of 524288"),
    "gz cut": (gzip.compress(PLAIN_BYTES)[:-100], "damaged or cut"),
    "gz changed": (gzip.compress(PLAIN_BYTES)[:-8] + bytes(8), "damaged or cut"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, when the test casts NaN
def test_damaged_files_are_refused_without_using_memory(tmp_path: Path, name: str) -> None:
    content, reason = BAD[name]
    path = tmp_path / "v.nii.gz"
    path.write_bytes(content)
    tracemalloc.start()
    if reason is None:
        assert len(read_all(path)) == 11
    else:
        with pytest.raises(UnreadableImage, match=reason):
            read_all(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_missing_file_or_slice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        inspect(tmp_path / "absent.nii", EVERY)
    path = save(tmp_path / "v.nii", PLAIN)
    for index in (-1, 11):
        with VolumeFile(path, EVERY) as file, pytest.raises(UnreadableImage, match=f"slice {index} of 11"):
            file.read(index)


SAMPLES = {"v.nii": PLAIN_BYTES, "w.nii": NIFTI2_BYTES, "v.mgh": MGH_BYTES, "v.nii.gz": gzip.compress(PLAIN_BYTES)}


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(1, 4000),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_damage_raises_only_unreadable_image(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(SAMPLES[name])
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data[:length])
    with contextlib.suppress(UnreadableImage):
        preprocess = settings_of(axis=AXES[length % 3])
        contents = inspect(path, preprocess)
        with VolumeFile(path, preprocess) as file:
            for index in contents.indices[:3]:
                file.read(index)


# real files


def test_real_volumes(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("formats") / "nifti"
    num_volumes = 0
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith((".nii", ".nii.gz", ".mgz")):
            continue
        volume = ras(path)
        for axis in AXES if volume.size < 1 << 21 else ["coronal"]:
            preprocess = settings_of(axis=axis)
            if min(np.delete(volume.shape[:3], AXES.index(axis))) < 4:
                continue
            indices = inspect(path, preprocess).indices
            assert len(indices) == volume.shape[AXES.index(axis)]
            with VolumeFile(path, preprocess) as file:
                raw = file.read(indices[len(indices) // 2])
            expected = upright(volume, axis, indices[len(indices) // 2])
            assert raw.size == expected.shape[::-1]
            if raw.pixels.shape == expected.shape:
                # some 0.1 % of the window: percentiles of a sample for the largest, of all voxels for the others
                limit = 1 if volume.size < 1 << 21 else 400
                assert np.abs(raw.pixels - windowed(expected, volume)).max() <= limit, path
        num_volumes += 1
    assert num_volumes == 13
    for name in ("analyze.hdr", "nifti1.hdr"):
        with pytest.raises(UnreadableImage, match="without its voxels"):
            inspect(folder / "nibabel" / name, EVERY)


def test_slices_of_air_around_a_real_brain_are_left_out(shared_data: Callable[[str], Path]) -> None:
    """MNI 152: 189 axial slices of 1 mm; the brain covers about 140."""
    path = shared_data("formats") / "nifti/nilearn/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    kept = []
    with VolumeFile(path, Preprocess()) as file:
        for index in inspect(path, Preprocess()).indices:
            with contextlib.suppress(LeftOutImage):
                file.read(index)
                kept.append(index)
    assert kept == list(range(kept[0], kept[-1] + 1))
    assert 125 < len(kept) < 150


def test_a_real_head_is_upright_as_a_whole_volume(shared_data: Callable[[str], Path]) -> None:
    """By nibabel alone: the axes point to the right, to the front and up, and all three are turned around."""
    path = shared_data("formats") / "nifti" / "nibabel" / "someones_anatomy.nii.gz"
    settings = Preprocess(image_size=(64, 64, 64), clahe_clip=0.0, volume=Volume(window=(0, 100)))
    (whole,) = read_all(path, settings)
    volume = ras(path)
    assert whole.pixels.shape == volume.shape[::-1] and whole.spacing == pytest.approx((2.75, 2.75, 2.75))
    assert np.abs(whole.pixels - windowed(volume[::-1, ::-1, ::-1].T, volume, (0, 100))).max() <= 1
