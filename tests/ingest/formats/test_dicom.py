"""DICOM files: transfer syntaxes, grey values and colours as the standard defines them, and no tag in any message."""

import contextlib
import logging
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medgen.config import Preprocess
from medgen.ingest.formats import dicom
from medgen.ingest.formats.dicom import DicomFile, inspect
from medgen.ingest.formats.raw import LeftOutImage, RawImage, UnreadableImage

GREY, COLOUR = Preprocess(), Preprocess(channels=3)

PLANTED = {
    "PatientName": "Quokka^Zebedee",
    "PatientID": "QZ-7391155",
    "PatientBirthDate": "19010203",
    "PatientComments": "lives at Wombat Lane",
    "InstitutionName": "Numbat Infirmary",
    "StudyDescription": "second look at Bandicoot",
    "AccessionNumber": "ACC8842661",
}
SECRETS = ("Quokka", "Zebedee", "7391155", "19010203", "Wombat", "Numbat", "Bandicoot", "8842661")
CT = "1.2.840.10008.5.1.4.1.1.2"


def encode_rle(frame: Any) -> bytes:
    """Encode with pydicom, which shares no code with the reader."""
    samples = 3 if frame.ndim == 3 else 1
    return get_encoder(RLELossless).encode(
        frame.tobytes(),
        rows=frame.shape[0],
        columns=frame.shape[1],
        samples_per_pixel=samples,
        bits_allocated=8 * frame.itemsize,
        bits_stored=8 * frame.itemsize,
        pixel_representation=0,
        number_of_frames=1,
        photometric_interpretation="RGB" if samples == 3 else "MONOCHROME2",
        planar_configuration=0,
    )


def encode_jpeg_2000(frame: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k"))


LOSSLESS: dict[str, tuple[UID, Callable[[Any], bytes] | None]] = {
    "implicit": (ImplicitVRLittleEndian, None),
    "explicit": (ExplicitVRLittleEndian, None),
    "big-endian": (ExplicitVRBigEndian, None),
    "deflated": (DeflatedExplicitVRLittleEndian, None),
    "rle": (RLELossless, encode_rle),
    "jpeg-lossless": (JPEGLosslessSV1, lambda frame: bytes(imagecodecs.ljpeg_encode(frame))),
    "jpeg-ls": (JPEGLSLossless, lambda frame: bytes(imagecodecs.jpegls_encode(frame))),
    "jpeg-2000": (JPEG2000Lossless, encode_jpeg_2000),
    "htj2k": (HTJ2KLossless, lambda frame: bytes(imagecodecs.htj2k_encode(frame))),
}
SYNTAXES = {
    **LOSSLESS,
    "jpeg": (JPEGBaseline8Bit, lambda frame: bytes(imagecodecs.jpeg8_encode(frame, level=95))),
    "jpeg-12": (JPEGExtended12Bit, lambda frame: bytes(imagecodecs.jpeg8_encode(frame, level=95, bitspersample=12))),
}


def write_dicom(
    path: Path,
    frames: list[Any],
    syntax: str = "explicit",
    fragments: int = 1,
    has_table: bool = True,
    encoded: list[bytes] | None = None,
    **elements: Any,
) -> Path:
    """Write frames (H, W) or (H, W, 3) of one type; an element of None is not written."""
    uid, encode = SYNTAXES[syntax]
    shape, dtype = frames[0].shape, frames[0].dtype
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid
    dataset.file_meta.MediaStorageSOPClassUID = UID(CT)
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    fields: dict[str, Any] = {
        **PLANTED,
        "SOPClassUID": CT,
        "SOPInstanceUID": "1.2.3.4",
        "Rows": shape[0],
        "Columns": shape[1],
        "SamplesPerPixel": 1 if len(shape) == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if len(shape) == 2 else "RGB",
        "PlanarConfiguration": None if len(shape) == 2 else 0,
        "BitsAllocated": 8 * dtype.itemsize,
        "BitsStored": 8 * dtype.itemsize,
        "PixelRepresentation": 1 if dtype.kind == "i" else 0,
        "NumberOfFrames": len(frames) if len(frames) > 1 else None,
        **elements,
    }
    fields.setdefault("HighBit", fields["BitsStored"] - 1 if fields["BitsStored"] else None)
    for keyword, value in fields.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if encode is None:
        order = ">" if syntax == "big-endian" else "<"
        content = b"".join(frame.astype(frame.dtype.newbyteorder(order)).tobytes() for frame in frames)
        if dtype.kind == "f":
            dataset.FloatPixelData = content
        else:
            dataset.PixelData = content + b"\0" * (len(content) % 2)
            dataset["PixelData"].VR = "OW" if dtype.itemsize > 1 else "OB"
    else:
        unsigned = [frame.view(f"u{dtype.itemsize}") for frame in frames]  # JPEG has no sign
        parts = encoded if encoded is not None else [encode(frame) for frame in unsigned]
        dataset.PixelData = encapsulate(parts, fragments_per_frame=fragments, has_bot=has_table)
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def seeds(folder: Path) -> dict[str, bytes]:
    """A small file of every syntax, grey and, if it supports colour, RGB: the seeds of the fuzz tests."""
    random = np.random.default_rng(0)
    grey = (np.add.outer(np.arange(24), np.arange(20)) * 80 + random.integers(0, 99, (24, 20))).astype(np.uint16) & 4095
    colour = random.integers(0, 256, (24, 20, 3)).astype(np.uint8)
    found = {}
    for name in SYNTAXES:
        frame = (grey >> 4).astype(np.uint8) if name == "jpeg" else grey
        stored = 8 if name == "jpeg" else 12
        window = {"WindowCenter": [900, 40], "WindowWidth": [1200, 80], "RescaleSlope": 2, "RescaleIntercept": -8}
        path = write_dicom(folder / f"{name}.dcm", [frame, frame[::-1].copy()], name, BitsStored=stored, **window)
        found[name] = path.read_bytes()
        if name not in ("jpeg-lossless", "jpeg-12"):
            found[f"{name}-rgb"] = write_dicom(folder / f"{name}-rgb.dcm", [colour], name).read_bytes()
    return found


def read(path: Path, index: int = 0, preprocess: Preprocess = GREY, mask: bool = False) -> RawImage:
    with DicomFile(path, preprocess, mask) as file:
        return file.read(index)


def windowed(value: float, centre: float, width: float, function: str = "LINEAR") -> int:
    """Apply the pseudo-code of PS3.3 C.11.2.1.2 and C.11.2.1.3 to one value, with outputs 0 to 65535."""
    low, high = 0.0, 65535.0
    if function == "SIGMOID":
        return round((high - low) / (1 + np.exp(min(-4 * (value - centre) / width, 700))) + low)
    shift, narrower = (0.5, 1.0) if function == "LINEAR" else (0.0, 0.0)
    if value <= centre - shift - (width - narrower) / 2:
        return int(low)
    if value > centre - shift + (width - narrower) / 2:
        return int(high)
    return round(((value - (centre - shift)) / (width - narrower) + 0.5) * (high - low) + low)


def stretched(values: Any) -> Any:
    """Map the smallest value to 0 and the largest to 65535."""
    values = values.astype(np.float64)
    return np.rint((values - values.min()) / (values.max() - values.min()) * 65535)


def ramp(dtype: str = "uint16", low: int = 0, high: int = 4095, shape: tuple[int, int] = (24, 20)) -> Any:
    return np.linspace(low, high, shape[0] * shape[1]).round().astype(dtype).reshape(shape)


# ---- every syntax


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_lossless_syntaxes_keep_every_pixel(tmp_path: Path, syntax: str, dtype: str) -> None:
    pixels = ramp(dtype, 0, 255) if dtype == "uint8" else ramp(dtype, -900 if dtype == "int16" else 0, 3000)
    path = write_dicom(tmp_path / "a", [pixels], syntax, WindowCenter=100, WindowWidth=300)
    raw = read(path)
    assert (raw.size, raw.mode) == ((20, 24), f"MONOCHROME2;{8 * pixels.itemsize}")
    assert raw.pixels.dtype == np.uint16
    np.testing.assert_array_equal(raw.pixels, [[windowed(int(value), 100, 300) for value in row] for row in pixels])


@pytest.mark.parametrize("syntax", ["jpeg", "jpeg-12"])
def test_lossy_syntaxes_are_close(tmp_path: Path, syntax: str) -> None:
    top = 255 if syntax == "jpeg" else 4095
    pixels = ramp("uint8" if top == 255 else "uint16", 0, top, (64, 48))
    path = write_dicom(tmp_path / "a", [pixels], syntax, BitsStored=8 if top == 255 else 12)
    assert np.abs(read(path).pixels.astype(int) - stretched(pixels)).max() < 65535 * 0.02


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("syntax", ["explicit", "big-endian", "rle", "jpeg-ls", "jpeg-2000"])
def test_colour_images_are_rgb_or_luma(tmp_path: Path, syntax: str, dtype: str) -> None:
    pixels = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (24, 20, 3), endpoint=True).astype(dtype)
    path = write_dicom(tmp_path / "a", [pixels], syntax)
    np.testing.assert_array_equal(read(path, preprocess=COLOUR).pixels, pixels)
    grey = read(path).pixels
    assert grey.dtype == dtype
    luma = pixels.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(grey - luma).max() <= 1.01 * np.iinfo(dtype).max / 255 / (1 if dtype == "uint8" else 50)


@pytest.mark.parametrize("syntax", ["explicit", "deflated", "rle", "jpeg-ls", "jpeg-2000"])
@pytest.mark.parametrize(("fragments", "has_table"), [(1, True), (1, False), (2, True)])
def test_frames_are_read_in_any_order(tmp_path: Path, syntax: str, fragments: int, has_table: bool) -> None:
    frames = [ramp(high=100 * number) for number in (5, 3, 9)]
    path = write_dicom(tmp_path / "a", frames, syntax, fragments, has_table, WindowCenter=450.5, WindowWidth=901)
    assert inspect(path, GREY).indices == range(3)
    with DicomFile(path, GREY) as file:
        assert file.num_images == 3
        for index in (2, 0, 1):
            np.testing.assert_allclose(file.read(index).pixels, frames[index] / 900 * 65535, atol=0.51)
        with pytest.raises(UnreadableImage, match="no frame 3"):
            file.read(3)


def test_other_frames_of_a_damaged_frame_are_readable(tmp_path: Path) -> None:
    frames = [ramp(high=100 * number) for number in (5, 3, 9)]
    parts = [SYNTAXES["jpeg-ls"][1](frame) for frame in frames]
    parts[1] = parts[1][:20] + bytes(len(parts[1]) - 20)
    path = write_dicom(tmp_path / "a", frames, "jpeg-ls", encoded=parts)
    with DicomFile(path, GREY) as file:
        assert file.read(0).pixels.max() == file.read(2).pixels.max() == 65535
        with pytest.raises(UnreadableImage, match="damaged"):
            file.read(1)


def test_threads_share_a_file(tmp_path: Path) -> None:
    frames = [ramp(high=1000 + number) for number in range(8)]
    groups = [functional_group(WindowCenter=400 + number, WindowWidth=100) for number in range(8)]
    for syntax in ("explicit", "rle", "jpeg-ls", "jpeg-2000", "jpeg-lossless"):
        path = write_dicom(tmp_path / syntax, frames, syntax, PerFrameFunctionalGroupsSequence=Sequence(groups))
        with DicomFile(path, GREY) as file, ThreadPoolExecutor(8) as pool:
            for number, raw in zip([*range(8)] * 4, pool.map(file.read, [*range(8)] * 4), strict=True):
                expected = [[windowed(int(v), 400 + number, 100) for v in row] for row in frames[number][::6, ::6]]
                np.testing.assert_array_equal(raw.pixels[::6, ::6], expected)


# ---- grey values


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(40, 400), (-600.5, 1500), (3, 1), (0, 2)])
def test_windows_follow_the_standard(tmp_path: Path, function: str | None, centre: float, width: float) -> None:
    pixels = ramp("int16", -1000, 1000)
    path = write_dicom(tmp_path / "a", [pixels], WindowCenter=centre, WindowWidth=width, VOILUTFunction=function)
    expected = [[windowed(int(value), centre, width, function or "LINEAR") for value in row] for row in pixels]
    assert np.abs(read(path).pixels - np.array(expected)).max() <= 1  # round() rounds half to even


def test_the_first_window_applies_to_rescaled_values(tmp_path: Path) -> None:
    pixels = ramp()
    rescaled = {"RescaleSlope": 0.5, "RescaleIntercept": -1024}
    path = write_dicom(tmp_path / "a", [pixels], WindowCenter=[40, 300], WindowWidth=[80, 700], **rescaled)
    expected = [[windowed(value * 0.5 - 1024, 40, 80) for value in row] for row in pixels.tolist()]
    assert np.abs(read(path).pixels - np.array(expected)).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "low", "high", "stored"),
    [
        *(("uint8", 3, 200, 8), ("uint16", 0, 1023, 10), ("uint16", 7, 4000, 12), ("uint16", 9, 65535, 16)),
        *(("int16", -2000, 1500, 12), ("int16", -32768, 32767, 16), ("int8", -100, 27, 8)),
        *(("uint32", 5, 4_000_000_000, 32), ("int32", -70_000, 2_000_000_000, 32), ("uint32", 0, 90_000, 20)),
    ],
)
@pytest.mark.parametrize("syntax", ["implicit", "big-endian"])
def test_without_a_window_the_range_of_the_frame_is_used(
    tmp_path: Path, syntax: str, dtype: str, low: int, high: int, stored: int
) -> None:
    pixels = ramp(dtype, low, high)
    path = write_dicom(tmp_path / "a", [pixels], syntax, BitsStored=stored)
    np.testing.assert_array_equal(read(path).pixels, stretched(pixels))


@pytest.mark.parametrize("bad", [{"WindowWidth": 0}, {"WindowWidth": -5}, {"WindowWidth": 0.5}, {"WindowWidth": ""}])
def test_an_invalid_window_is_ignored(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write_dicom(tmp_path / "a", [ramp()], **{"WindowCenter": 40, **bad})
    np.testing.assert_array_equal(read(path).pixels, stretched(ramp()))


@pytest.mark.parametrize("value", [0, 1, 4095])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_constant_image_is_black(tmp_path: Path, value: int, photometric: str) -> None:
    pixels = np.full((24, 20), value, np.uint16)
    assert not read(write_dicom(tmp_path / "a", [pixels], PhotometricInterpretation=photometric)).pixels.any()


@pytest.mark.parametrize(
    ("elements", "inverted"),
    [
        ({"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "IDENTITY"}, False),
        ({"PhotometricInterpretation": "MONOCHROME1"}, True),
        ({"PresentationLUTShape": "INVERSE"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, True),  # both: inverted once
    ],
)
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}])
def test_monochrome1_and_inverse_are_inverted_once(
    tmp_path: Path, elements: dict[str, Any], inverted: bool, window: dict[str, Any]
) -> None:
    pixels = read(write_dicom(tmp_path / "a", [ramp()], **elements, **window)).pixels
    assert (pixels[0, 0], pixels[-1, -1]) == ((65535, 0) if inverted else (0, 65535))
    assert (np.diff(pixels.reshape(-1).astype(int)) * (-1 if inverted else 1) > 0).all()


@pytest.mark.parametrize(
    ("dtype", "padding", "limit"),
    [("int16", -2000, None), ("int16", -2000, -1900), ("uint16", 65535, None), ("uint16", 60000, 65535)],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_not_part_of_the_range(
    tmp_path: Path, dtype: str, padding: int, limit: int | None, photometric: str
) -> None:
    pixels = ramp(dtype, 10, 900)
    pixels[:, :5] = padding
    pixels[:, 5] = padding if limit is None else limit
    path = write_dicom(
        tmp_path / "a",
        [pixels],
        PhotometricInterpretation=photometric,
        PixelPaddingValue=padding,
        PixelPaddingRangeLimit=limit,
    )
    found, expected = read(path).pixels, stretched(pixels[:, 6:])
    assert not found[:, :6].any()
    np.testing.assert_array_equal(found[:, 6:], expected if photometric == "MONOCHROME2" else 65535 - expected)


def table(first: int, entries: list[int], bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = entries
    item["LUTData"].VR = "US"
    return Sequence([item])


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big-endian"])
def test_modality_lut_comes_before_voi_lut(tmp_path: Path, syntax: str) -> None:
    """PS3.3 C.11; values outside a table map to its first or last entry."""
    pixels = ramp(low=0, high=20)
    modality, voi = [5 * value for value in range(10)], [4000 - 100 * value for value in range(40)]
    path = write_dicom(
        tmp_path / "a",
        [pixels],
        syntax,
        ModalityLUTSequence=table(3, modality, 16),
        VOILUTSequence=table(2, voi, 12),
        WindowCenter=1,
        WindowWidth=2,  # the VOI LUT comes before the window
    )
    shown = []
    for value in pixels.reshape(-1).tolist():
        measured = modality[min(max(value - 3, 0), 9)]
        shown.append(voi[min(max(measured - 2, 0), 39)])
    expected = (np.array(shown) - min(voi)) / (max(voi) - min(voi)) * 65535
    np.testing.assert_array_equal(read(path).pixels.reshape(-1), np.rint(expected))


def functional_group(**elements: Any) -> Dataset:
    group, window, rescale = Dataset(), Dataset(), Dataset()
    for keyword, value in elements.items():
        setattr(window if "Window" in keyword else rescale, keyword, value)
    group.FrameVOILUTSequence = Sequence([window])
    group.PixelValueTransformationSequence = Sequence([rescale])
    return group


def test_enhanced_objects_have_a_window_per_frame(tmp_path: Path) -> None:
    frames = [ramp(), ramp()]
    shared = functional_group(RescaleSlope=2, RescaleIntercept=-100)
    own = [functional_group(WindowCenter=50, WindowWidth=100), functional_group(WindowCenter=900, WindowWidth=500)]
    path = write_dicom(
        tmp_path / "a",
        frames,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(own),
    )
    for index, (centre, width) in enumerate([(50, 100), (900, 500)]):
        expected = [[windowed(2 * value - 100, centre, width) for value in row] for row in frames[0].tolist()]
        np.testing.assert_array_equal(read(path, index).pixels, expected)


@pytest.mark.parametrize("syntax", ["explicit", "rle"])
def test_unused_bits_are_ignored(tmp_path: Path, syntax: str) -> None:
    """Old files keep overlays in the bits above the value, or the value in the upper bits."""
    pixels = ramp()
    over = write_dicom(tmp_path / "a", [pixels | 0xA000], syntax, BitsStored=12)
    np.testing.assert_array_equal(read(over).pixels, stretched(pixels))
    upper = write_dicom(tmp_path / "b", [(pixels << 4) | 5], syntax, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(read(upper).pixels, stretched(pixels))


def test_one_bit_and_float_pixels(tmp_path: Path) -> None:
    bits = np.random.default_rng(2).integers(0, 2, (2, 5, 7)).astype(np.uint8)  # frames that share a byte
    packed = [np.packbits(bits.reshape(-1), bitorder="little").reshape(1, -1)]
    one = {"Rows": 5, "Columns": 7, "BitsAllocated": 1, "BitsStored": 1, "NumberOfFrames": 2}
    path = write_dicom(tmp_path / "bits", packed, **one)
    for index in (0, 1):
        np.testing.assert_array_equal(read(path, index).pixels, bits[index] * 65535.0)
    values = np.linspace(-1.5, 4.25, 480, dtype=np.float32).reshape(24, 20)
    values[0, 0] = np.nan
    path = write_dicom(tmp_path / "floats", [values], BitsStored=None, PixelRepresentation=None)
    expected = stretched(np.where(np.isnan(values), 4.25, values).astype(np.float64) - values[0, 1])
    found = read(path).pixels
    assert found[0, 0] == 0 == found[0, 1] and np.abs(found.reshape(-1)[1:] - expected.reshape(-1)[1:]).max() <= 1


def test_a_mask_is_white_where_it_is_not_zero(tmp_path: Path) -> None:
    pixels = ramp(high=3)
    path = write_dicom(tmp_path / "a", [pixels], WindowCenter=2, WindowWidth=1, PhotometricInterpretation="MONOCHROME1")
    raw = read(path, mask=True)
    assert raw.pixels.dtype == np.uint8
    np.testing.assert_array_equal(raw.pixels, np.where(pixels > 0, 255, 0))
    colour = np.zeros((24, 20, 3), np.uint8)
    colour[4:9, 3:7] = 200
    assert (
        read(write_dicom(tmp_path / "b", [colour]), preprocess=COLOUR, mask=True).pixels == colour[..., 0] // 200 * 255
    ).all()


# ---- colour


def test_planar_and_ycc_colours_become_rgb(tmp_path: Path) -> None:
    rgb = cv2.resize(np.random.default_rng(3).integers(0, 256, (4, 4, 3)).astype(np.uint8), (20, 24))
    ycc = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).reshape(24, 20, 3)
    half = ycc[:, ::2].copy()  # PS3.3 C.7.6.3.1.2: Y1 Y2 Cb Cr
    packed = np.stack([ycc[:, ::2, 0], ycc[:, 1::2, 0], half[..., 1], half[..., 2]], -1).reshape(24, 40)
    half_size = {"SamplesPerPixel": 3, "Columns": 20, "PhotometricInterpretation": "YBR_FULL_422"}
    rows: list[tuple[Path, Any, int]] = [
        (write_dicom(tmp_path / "planes", [planes], PlanarConfiguration=1), rgb, 0),
        (write_dicom(tmp_path / "full", [ycc], PhotometricInterpretation="YBR_FULL"), rgb, 2),
        (write_dicom(tmp_path / "rle", [ycc], "rle", PhotometricInterpretation="YBR_FULL"), rgb, 2),
        (write_dicom(tmp_path / "ls", [ycc], "jpeg-ls", PhotometricInterpretation="YBR_FULL"), rgb, 2),
        (
            write_dicom(tmp_path / "422", [packed], PlanarConfiguration=0, **half_size),
            None,
            0,
        ),
    ]
    for path, expected, tolerance in rows:
        found = read(path, preprocess=COLOUR).pixels
        assert found.shape == (24, 20, 3)
        if expected is not None:
            assert np.abs(found.astype(int) - expected).max() <= tolerance, path.name
    luma = cv2.cvtColor(read(rows[-1][0], preprocess=COLOUR).pixels, cv2.COLOR_RGB2GRAY).astype(int)
    assert np.median(np.abs(luma - ycc[..., 0])) <= 2


@pytest.mark.parametrize("space", ["YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("stream", ["JFIF", "Adobe RGB", "Adobe YCC", "plain"])
def test_the_colour_space_in_jpeg_markers_counts(tmp_path: Path, space: str, stream: str) -> None:
    """Markers in the JPEG data override the DICOM header; without markers the header counts."""
    rgb = np.zeros((64, 48, 3), np.uint8)
    rgb[:] = (200, 40, 90)
    ycc = stream in ("JFIF", "Adobe YCC") or (stream == "plain" and space == "YBR_FULL_422")
    data = bytes(imagecodecs.jpeg8_encode(rgb, level=95, colorspace="RGB", outcolorspace="YCBCR" if ycc else "RGB"))
    kept = bytearray(data[:2])
    if stream.startswith("Adobe"):
        kept += b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + bytes([ycc])
    elif stream == "JFIF":
        kept += b"\xff\xe0\x00\x10JFIF\x00\x01\x01" + bytes(7)
    at = 2
    while data[at + 1] != 0xDA:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = bytearray(data[at : at + length])
        if data[at + 1] in (0xC0, 0xC1):
            segment[10:19:3] = b"\1\2\3"  # no R G B
        if data[at + 1] not in (0xE0, 0xEE):
            kept += segment
        at += length
    scan = bytearray(data[at:])
    scan[5:11:2] = b"\1\2\3"
    path = write_dicom(tmp_path / "a", [rgb], "jpeg", encoded=[bytes(kept + scan)], PhotometricInterpretation=space)
    assert np.abs(read(path, preprocess=COLOUR).pixels.astype(int) - rgb).max() <= 4


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("segmented", [False, True])
def test_palette_colours(tmp_path: Path, bits: int, segmented: bool) -> None:
    pixels = ramp("uint8", 0, 40)
    full = 255 if bits == 8 else 65535
    red, green = np.linspace(0, full, 21).round().astype(int), np.linspace(full, 7, 21).round().astype(int)
    blue = np.full(21, full // 3)
    elements: dict[str, Any] = {}
    for name, ends in (("Red", red), ("Green", green), ("Blue", blue)):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [21, 10, bits]
        entries = [0, 1, int(ends[0]), 1, 20, int(ends[-1])] if segmented else ends
        data = np.asarray(entries, f"<u{bits // 8}").tobytes()
        elements[f"{'Segmented' if segmented else ''}{name}PaletteColorLookupTableData"] = data + b"\0" * (
            len(data) % 2
        )
    path = write_dicom(tmp_path / "a", [pixels], PhotometricInterpretation="PALETTE COLOR", **elements)
    palette = np.stack([red, green, blue], 1)
    raw = read(path, preprocess=COLOUR)
    assert raw.pixels.dtype == f"uint{bits}"
    np.testing.assert_array_equal(raw.pixels, palette[np.clip(pixels.astype(int) - 10, 0, 20)])


# ---- files without readable images


def test_the_patient_is_the_patient_id(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a", [ramp()])
    assert inspect(path, GREY).patient == "QZ-7391155"
    assert not inspect(path, GREY).independent


@pytest.mark.parametrize("patient", ["", "  ", None])
def test_without_a_patient_id_the_study_uid_is_the_patient(tmp_path: Path, patient: str | None) -> None:
    for study, expected in (("1.2.3.77", "1.2.3.77"), (None, None)):
        path = write_dicom(tmp_path / "a", [ramp()], PatientID=patient, StudyInstanceUID=study)
        assert inspect(path, GREY).patient == expected
    assert inspect(write_dicom(path, [ramp()], StudyInstanceUID="1.2.3.77"), GREY).patient == "QZ-7391155"


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big-endian"])
def test_files_without_a_preamble_are_read(tmp_path: Path, syntax: str) -> None:
    path = write_dicom(tmp_path / "a", [ramp()], syntax)
    content = path.read_bytes()
    length = int.from_bytes(content[140:144], "little")
    (tmp_path / "b").write_bytes(content[144 + length :])
    np.testing.assert_array_equal(read(tmp_path / "b").pixels, read(path).pixels)


def replaced(content: bytes, old: str, new: str) -> bytes:
    assert content.count(old.encode()) == 1 and len(old) == len(new)
    return content.replace(old.encode(), new.encode())


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing frames": (lambda path: write_dicom(path, [ramp()], NumberOfFrames=5), "ends early"),
    "too many frames": (lambda path: write_dicom(path, [ramp()], NumberOfFrames=2**31 - 1), "from 1 to 1,000,000$"),
    "two frames in one fragment": (lambda path: write_dicom(path, [ramp()], "rle", NumberOfFrames=2), "ends early"),
    "too large": (
        lambda path: write_dicom(path, [ramp()], Rows=65535, Columns=65535),
        "^images of 65535 x 65535, more than 100 megapixels$",
    ),
    "too small": (lambda path: write_dicom(path, [ramp(shape=(3, 9))]), "^images of 9 x 3; expected at least 4 x 4$"),
    "no size": (lambda path: write_dicom(path, [ramp()], Rows=None), "Rows is missing"),
    "depth": (lambda path: write_dicom(path, [ramp()], BitsAllocated=12), "16 bits stored in 12 bits; expected"),
    "two samples": (lambda path: write_dicom(path, [ramp()], SamplesPerPixel=2), "2 samples per pixel"),
    "retired colours": (
        lambda path: write_dicom(path, [ramp()], SamplesPerPixel=3, PhotometricInterpretation="HSV"),
        "HSV",
    ),
    "no palette": (
        lambda path: write_dicom(path, [ramp()], PhotometricInterpretation="PALETTE COLOR"),
        "without its palette",
    ),
    "text": (lambda path: path.write_text("Quokka was here\n" * 30), "not a DICOM file: a text file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a DICOM file|damaged"),
    "retired syntax": (
        lambda path: path.write_bytes(
            replaced(write_dicom(path, [ramp()], "jpeg-ls").read_bytes(), JPEGLSLossless, "1.2.840.10008.1.2.4.65")
        ),
        "no decoder for JPEG Lossless, Hierarchical",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_files_are_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    make(tmp_path / "a")
    with pytest.raises(UnreadableImage, match=reason):
        read(tmp_path / "a")


def without_pixels(path: Path, **elements: Any) -> bytes:
    content = write_dicom(path, [ramp()], **elements).read_bytes()
    content = content[: content.rindex(b"\xe0\x7f\x10\x00")]
    path.write_bytes(content)
    return content


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.840.10008.5.1.4.1.1.481.5", "RT Plan Storage"),
        ("1.2.840.10008.5.1.4.1.1.88.11", "Basic Text SR Storage"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "Encapsulated PDF Storage"),
        ("1.2.840.10008.5.1.4.1.1.66.5", "Surface Segmentation Storage"),
        ("1.2.840.10008.1.3.10", "Media Storage Directory Storage"),  # a DICOMDIR
    ],
)
def test_objects_without_pixels_are_left_out(tmp_path: Path, uid: str, name: str) -> None:
    without_pixels(tmp_path / "a", SOPClassUID=uid, Rows=None, Columns=None)
    for use in (lambda: inspect(tmp_path / "a", GREY), lambda: DicomFile(tmp_path / "a", GREY)):
        with pytest.raises(LeftOutImage, match=f"^no pixel data: {name}$"):
            use()


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({}, "no pixel data: CT Image Storage"),
        ({"Rows": None}, "no pixel data: CT Image Storage"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", "Rows": None}, "no pixel data: Segmentation Storage"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.2", "Rows": None}, "no pixel data: Enhanced US Volume Storage"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "no pixel data: RT Dose Storage"),  # it has a size
    ],
)
def test_image_objects_without_pixels_are_damaged(tmp_path: Path, elements: dict[str, Any], reason: str) -> None:
    without_pixels(tmp_path / "a", **elements)
    with pytest.raises(UnreadableImage, match=f"^{reason}$") as caught:
        inspect(tmp_path / "a", GREY)
    assert not isinstance(caught.value, LeftOutImage)


def test_an_unknown_class_is_not_quoted(tmp_path: Path) -> None:
    content = without_pixels(tmp_path / "a", SOPClassUID="Quokka^Zebedee").replace(CT.encode(), b"Q" * len(CT))
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"^no pixel data$"):
        inspect(tmp_path / "a", GREY)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_truncated_file_is_refused(tmp_path: Path, syntax: str) -> None:
    frame = ramp("uint8", 0, 255) if syntax == "jpeg" else ramp()
    path = write_dicom(tmp_path / "a", [frame], syntax, BitsStored=8 if syntax == "jpeg" else 12)
    content = path.read_bytes()
    for length in (len(content) - 40, len(content) - 200):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableImage):
            inspect(path, GREY)


BOMBS = """
import resource, sys
from pathlib import Path
from medgen.config import Preprocess
from medgen.ingest.formats import dicom
from medgen.ingest.formats.dicom import DicomFile, inspect
from medgen.ingest.formats.raw import UnreadableImage
DicomFile(Path(sys.argv[1]), Preprocess()).read(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    try:
        inspect(Path(name), Preprocess())
        DicomFile(Path(name), Preprocess()).read(0)
        print("read")
    except UnreadableImage as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_false_sizes_take_no_memory(tmp_path: Path) -> None:
    """Compressed data that claims 65535 x 65535 pixels under a header of 24 x 20, and 300 MB of deflated zeros."""
    fine = write_dicom(tmp_path / "fine", [ramp()], "jpeg-ls")
    huge = struct.pack(">HH", 65535, 65535)
    small = struct.pack(">HH", 24, 20)
    paths, reasons = [], []
    for syntax in ("jpeg", "jpeg-12", "jpeg-lossless", "jpeg-ls"):
        frame = ramp("uint8", 0, 255) if syntax == "jpeg" else ramp()
        data = SYNTAXES[syntax][1](frame)
        assert small in data
        stored = 8 if syntax == "jpeg" else 12
        paths.append(
            write_dicom(tmp_path / syntax, [frame], syntax, encoded=[data.replace(small, huge, 1)], BitsStored=stored)
        )
        reasons.append("the header has 20 x 24 pixels, the compressed data 65535 x 65535")
    for syntax in ("jpeg-2000", "htj2k"):
        data = SYNTAXES[syntax][1](ramp())
        size = data[:8] + struct.pack(">II", 65535, 65535) + data[16:]
        tiles = data[:24] + struct.pack(">II", 1, 1) + data[32:]
        paths.append(write_dicom(tmp_path / syntax, [ramp()], syntax, encoded=[size]))
        reasons.append("damaged: the compressed data has too many tiles for its size")
        paths.append(write_dicom(tmp_path / f"{syntax}-tiles", [ramp()], syntax, encoded=[tiles]))
        reasons.append("damaged: the compressed data has too many tiles for its size")
    meta = write_dicom(tmp_path / "deflated", [ramp()], "deflated").read_bytes()
    meta = meta[: 144 + int.from_bytes(meta[140:144], "little")]
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = squeeze.compress(bytes(1 << 20))
    (tmp_path / "bomb").write_bytes(meta + zeros + b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(300)))
    paths.append(tmp_path / "bomb")
    reasons.append("deflated data of more than 206 MB")
    ran = subprocess.run(
        [sys.executable, "-c", BOMBS, str(fine), *map(str, paths)], capture_output=True, text=True, check=True
    )
    *found, megabytes = ran.stdout.splitlines()
    assert found == reasons
    assert not ran.stderr
    assert int(megabytes) < 600


def test_an_endless_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of empty items, each of which takes 8 bytes in the file and a hundred times that in memory."""
    monkeypatch.setattr(dicom, "_MAX_HEADER_BYTES", 1 << 16)
    content = struct.pack("<HHL", 0x0008, 0x1140, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 10_000
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UnreadableImage, match="a header of more than"):
        inspect(tmp_path / "a", GREY)


# ---- privacy


def everything_shown(
    work: Callable[[], Any], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> str:
    """All text that a user may see: the error and its causes, warnings, logs, stdout and stderr."""
    shown = []
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        try:
            shown.append(str(work()))
        except UnreadableImage as error:
            cause: BaseException | None = error
            while cause is not None:
                shown.append(f"{cause} {cause!r} {getattr(cause, '__notes__', '')}")
                cause = cause.__cause__ or cause.__context__
    streams = capfd.readouterr()
    return "\n".join([*shown, *(str(one.message) for one in caught), caplog.text, streams.out, streams.err])


def summarise(path: Path, preprocess: Preprocess = COLOUR) -> Any:
    """Read a file; size, mode and shape of its first frames, which may be shown."""
    contents = inspect(path, preprocess)
    with DicomFile(path, preprocess) as file:
        return [(raw.size, raw.mode, raw.pixels.shape) for raw in map(file.read, list(contents.indices)[:3])]


@pytest.mark.parametrize("module", [dicom.__name__, "pydicom", "pydicom.valuerep"])
def test_warnings_of_the_reader_are_hidden(tmp_path: Path, module: str) -> None:
    path = write_dicom(tmp_path / "a", [ramp()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inspect(path, GREY)
        warnings.warn_explicit("Quokka", UserWarning, "a.py", 1, module)
        warnings.warn_explicit("other module", UserWarning, "a.py", 1, "medgen.data.format")
    assert [str(one.message) for one in caught] == ["other module"]


def test_no_identifier_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not in intact files, in damaged ones, or in files with identifiers in place of numbers."""
    random = np.random.default_rng(4)
    path = tmp_path / "a"
    for name, content in seeds(tmp_path).items():
        for number in range(12):
            mutated = bytearray(content)
            for at in random.integers(132, len(content), number):
                mutated[at] ^= int(random.integers(1, 256))
            path.write_bytes(mutated)
            shown = everything_shown(lambda: summarise(path), capfd, caplog)
            assert shown.strip() and not any(secret in shown for secret in SECRETS), name
    content = seeds(tmp_path)["explicit"]
    secret = b"QuokkaZebedeeWombatNumbat"
    for keyword in (
        b"1200.0\\80.0",
        b"900.0\\40.0",
        b"MONOCHROME2",
        b"IS\2\0002 ",
        b"1.2.840.10008.1.2.1",
        CT.encode(),
    ):
        mutated = bytearray(content)
        at = content.rindex(keyword)
        mutated[at : at + len(keyword)] = secret[: len(keyword)].ljust(len(keyword), b"Q")
        path.write_bytes(mutated)
        shown = everything_shown(lambda: summarise(path), capfd, caplog)
        assert not any(word in shown for word in (*SECRETS, secret.decode()[:3])), keyword
    item = Dataset()
    item.add_new("LUTDescriptor", "LO", ["Quokka", "Zebedee", "Wombat"])
    item.add_new("LUTData", "LO", "Numbat")
    path = write_dicom(path, [ramp()], ModalityLUTSequence=Sequence([item]))
    shown = everything_shown(lambda: summarise(path), capfd, caplog)
    assert "damaged DICOM file (ValueError)" in shown and not any(secret in shown for secret in SECRETS)


# ---- real files

PYDICOM: dict[str, tuple[int, int] | str] = {
    "CT_small.dcm": (128, 128),
    "ExplVR_BigEnd.dcm": (80, 60),
    "ExplVR_LitEndNoMeta.dcm": "no pixel data: RT Ion Plan Storage",
    "J2K_pixelrep_mismatch.dcm": (512, 512),
    "JPEG-lossy.dcm": (256, 1024),
    "JPEG2000.dcm": (256, 1024),
    "JPGExtended.dcm": (256, 1024),
    "LICENSE": "not a DICOM file: a text file",
    "MR_small.dcm": (64, 64),
    "MR_small_RLE.dcm": (64, 64),
    "MR_small_bigendian.dcm": (64, 64),
    "MR_small_expb.dcm": (64, 64),
    "MR_small_implicit.dcm": (64, 64),
    "MR_small_jp2klossless.dcm": (64, 64),
    "MR_small_jpeg_ls_lossless.dcm": (64, 64),
    "MR_small_padded.dcm": (64, 64),
    "MR_truncated.dcm": "damaged: the pixel data ends early",
    "README.txt": "not a DICOM file: a text file",
    "SC_rgb_jpeg.dcm": (256, 256),
    "SC_rgb_rle_16bit.dcm": (100, 100),
    "SC_rgb_rle_2frame.dcm": (100, 100),
    "SC_rgb_small_odd.dcm": "images of 3 x 3; expected at least 4 x 4",
    "SC_ybr_full_422_uncompressed.dcm": (100, 100),
    "badVR.dcm": "damaged: NumberOfFrames is not an integer",  # it is "1A"
    "examples_jpeg2k.dcm": (640, 480),
    "examples_overlay.dcm": (484, 300),
    "examples_palette.dcm": (800, 350),
    "image_dfl.dcm": (512, 512),
    "liver_1frame.dcm": (512, 512),
    "no_meta.dcm": "not a DICOM file",  # a stray byte precedes its first element
    "rtdose_1frame.dcm": (10, 10),
    "rtplan.dcm": "no pixel data: RT Plan Storage",
    "zipMR.gz": "not a DICOM file: a gzip archive: unpack it",
}
NIBABEL: dict[str, tuple[int, int] | str] = {
    "0.dcm": (256, 256),
    "1.dcm": (256, 256),
    "csa_slice_norm.dcm": "no pixel data: MR Image Storage",
    "decimal_rescale.dcm": (128, 96),
    "slicethickness_empty_string.dcm": (384, 384),
}


@pytest.mark.parametrize("preprocess", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_real_file_is_read_or_refused(shared_data, preprocess: Preprocess) -> None:
    folder = shared_data("formats") / "dicom"
    for group, table in (("pydicom", PYDICOM), ("nibabel", NIBABEL)):
        assert {path.name for path in (folder / group).iterdir()} == set(table)
        for name, expected in table.items():
            if isinstance(expected, str):
                with pytest.raises(UnreadableImage) as caught:
                    inspect(folder / group / name, preprocess)
                assert str(caught.value) == expected, name
                continue
            raw = read(folder / group / name, preprocess=preprocess)
            assert raw.size == expected == raw.pixels.shape[1::-1], name
            full = np.iinfo(raw.pixels.dtype).max
            grey = raw.pixels / full
            if name == "decimal_rescale.dcm":  # its pixels are all 0
                assert not raw.pixels.any()
            else:
                assert grey.max() > 0.6 and grey.std() > 0.003, name


def test_one_slice_is_the_same_in_eight_syntaxes(shared_data) -> None:
    folder = shared_data("formats") / "dicom" / "pydicom"
    first, *others = [read(folder / name).pixels for name in PYDICOM if name.startswith("MR_small")]
    assert len(others) == 7
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_bones_are_bright_in_a_chest_xray(shared_data) -> None:
    folder = shared_data("formats") / "torchxrayvision"
    chest = read(next(folder.glob("1.2.276*.dcm"))).pixels / 65535
    lungs = (chest[300:500, 200:350].mean() + chest[300:500, 650:800].mean()) / 2
    assert chest[200:600, 480:540].mean() > lungs + 0.1  # the spine between the lungs
    inverted = read(folder / "Fake_MONOHR1.dcm").pixels / 65535
    assert np.corrcoef(chest.reshape(-1), inverted.reshape(-1))[0, 1] < -0.99


# ---- damage


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(data=st.data())
def test_random_damage_raises_only_unreadable_image(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damage"
    if not folder.exists():
        folder.mkdir()
        seeds(folder)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.dcm"))))
    content = bytearray(path.read_bytes())
    pixels = max(content.rfind(b"\xe0\x7f\x10\x00"), 132)
    place = st.integers(132, len(content) - 1) | st.integers(pixels, min(pixels + 200, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=6)):
        content[at] = value
    del content[data.draw(st.integers(0, len(content)) | st.just(len(content))) :]
    damaged = folder / "damaged"
    damaged.write_bytes(content)
    with contextlib.suppress(UnreadableImage):
        summarise(damaged, data.draw(st.sampled_from([GREY, COLOUR])))
